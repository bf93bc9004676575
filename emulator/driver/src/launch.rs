//! Modules, kernels, launches and tensor maps. A fat binary is taken for candle-sam-lora's, whose kernels the emulator
//! has by their names; PTX for candle's.

use crate::memory::Stream;
use crate::{
    calls, candle, device, dry_run, fault, graph, told, traffic, Outcome, Status, INVALID_CONTEXT,
    INVALID_VALUE, LAUNCH_FAILED, NOT_FOUND, NOT_SUPPORTED,
};
use candle_sam_lora_emulator::{Emulator, Launch, Mode, Sources, TensorMap, Timing};
use std::ffi::{c_char, c_void, CStr, CString};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::OnceLock;

/// First word of a fat binary.
const FAT_BINARY: u32 = 0xBA55_ED50;
/// Shared memory that needs no permission.
const FREE_SHARED: u32 = 48 << 10;
const MAX_DYNAMIC_SHARED_SIZE_BYTES: i32 = 8;
const CLUSTER_DIMENSION: u32 = 4;
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// All kernels, compiled when the first module is loaded.
fn emulator() -> Result<&'static Emulator, (Status, String)> {
    static EMULATOR: OnceLock<Result<Emulator, String>> = OnceLock::new();
    let emulator = EMULATOR.get_or_init(|| {
        let Some(root) = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2) else {
            return Err("this crate's folder lies in no other".to_string());
        };
        // Where the tests keep what they compiled.
        let cache = root.join("target/tmp/emulator");
        Emulator::new(&Sources::all(root.join("kernels")), &cache)
    });
    emulator.as_ref().map_err(|e| (NOT_SUPPORTED, e.clone()))
}

/// Owner of a module's kernels.
#[derive(Clone, Copy, PartialEq)]
enum Owner {
    Crate,
    Candle,
}

struct Function {
    name: CString,
    /// Names in the counts of launches, and of bytes.
    counted: String,
    moved: String,
    owner: Owner,
    /// Dynamic shared memory that a block may have.
    shared_bytes: AtomicU32,
}

/// Modules and functions stay until the process ends.
#[no_mangle]
unsafe extern "C" fn cuModuleLoadData(module: *mut &'static Owner, image: *const u8) -> Status {
    calls::count("cuModuleLoadData");
    // SAFETY: both kinds of image have at least four bytes.
    let magic = unsafe { image.cast::<u32>().read_unaligned() };
    let owner = if magic == FAT_BINARY { &Owner::Crate } else { &Owner::Candle };
    // SAFETY: the caller's address is one to write to.
    unsafe { *module = owner };
    told(if device::is_current() { Ok(()) } else { no_context("a module is loaded") })
}

#[no_mangle]
extern "C" fn cuModuleUnload(_module: &'static Owner) -> Status {
    told(Ok(()))
}

#[no_mangle]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut &'static Function,
    module: &'static Owner,
    name: *const c_char,
) -> Status {
    calls::count("cuModuleGetFunction");
    // SAFETY: the driver's callers give a string.
    let name = unsafe { CStr::from_ptr(name) }.to_owned();
    told(known(&name, *module).map(|()| {
        let shared_bytes = AtomicU32::new(FREE_SHARED);
        let owner = *module;
        let prefix = if owner == Owner::Candle { "candle::" } else { "" };
        let counted = format!("{prefix}{}", name.to_string_lossy());
        let moved = format!("moved::{counted}");
        let new = Function { name, counted, moved, owner, shared_bytes };
        // SAFETY: the caller's address is one to write to.
        unsafe { *function = Box::leak(Box::new(new)) };
    }))
}

fn known(name: &CStr, owner: Owner) -> Outcome {
    if owner == Owner::Crate && !dry_run::is_on() {
        let bytes = emulator()?.params_bytes(name).map_err(|e| (NOT_SUPPORTED, e))?;
        bytes.ok_or_else(|| (NOT_FOUND, format!("there is no kernel {name:?}")))?;
    }
    Ok(())
}

#[no_mangle]
extern "C" fn cuFuncSetAttribute(function: &Function, attribute: i32, value: i32) -> Status {
    calls::count("cuFuncSetAttribute");
    told(match (attribute, u32::try_from(value)) {
        (MAX_DYNAMIC_SHARED_SIZE_BYTES, Ok(bytes)) => {
            function.shared_bytes.store(bytes, Ordering::SeqCst);
            Ok(())
        }
        _ => Err((INVALID_VALUE, format!("attribute {attribute} = {value} of a function"))),
    })
}

/// `CUlaunchAttribute`.
#[repr(C)]
struct Attribute {
    id: u32,
    pad: u32,
    value: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: Stream,
    attributes: *const Attribute,
    attribute_count: u32,
}

type Arguments = *const *const c_void;

#[no_mangle]
unsafe extern "C" fn cuLaunchKernelEx(
    config: &Config,
    function: &'static Function,
    arguments: Arguments,
    _extra: *const c_void,
) -> Status {
    calls::count("cuLaunchKernelEx");
    let attributes = match config.attribute_count {
        0 => &[],
        // SAFETY: the caller's array has that many elements.
        count => unsafe { std::slice::from_raw_parts(config.attributes, count as usize) },
    };
    told(launch(config, attributes, function, arguments))
}

#[no_mangle]
unsafe extern "C" fn cuLaunchKernel(
    function: &'static Function,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared_bytes: u32,
    stream: Stream,
    arguments: Arguments,
    _extra: *const c_void,
) -> Status {
    calls::count("cuLaunchKernel");
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    let attributes = std::ptr::null();
    let config = Config { grid, block, shared_bytes, stream, attributes, attribute_count: 0 };
    told(launch(&config, &[], function, arguments))
}

fn no_context(what: &str) -> Outcome {
    Err((INVALID_CONTEXT, format!("{what}, but this thread has no context")))
}

fn launch(
    config: &Config,
    attributes: &[Attribute],
    function: &'static Function,
    arguments: Arguments,
) -> Outcome {
    let name = function.name.to_string_lossy();
    if !device::is_current() {
        return no_context(&format!("{name} is launched"));
    }
    if config.shared_bytes > function.shared_bytes.load(Ordering::SeqCst) {
        let bytes = config.shared_bytes;
        return Err((INVALID_VALUE, format!("{name} was not permitted {bytes} bytes")));
    }
    calls::count(&function.counted);
    if function.owner == Owner::Candle {
        if dry_run::is_on() {
            // SAFETY: as below.
            calls::add(&function.moved, unsafe { traffic::of_candle(&name, arguments) });
            return Ok(());
        }
        // SAFETY: the arguments are those that candle's kernel of this name takes, by the caller's promise.
        let work = unsafe { candle::kernel(&name, config.grid, config.block, arguments) };
        return match work {
            Some(work) => graph::submit(config.stream, move || {
                work();
                Ok(())
            }),
            None => Err((NOT_SUPPORTED, format!("candle's kernel {name} is not emulated"))),
        };
    }
    let (mut cluster, mut begins_early) = (1, false);
    for attribute in attributes {
        match (attribute.id, attribute.value) {
            (CLUSTER_DIMENSION, [x, 1, 1, ..]) => cluster = x,
            (PROGRAMMATIC_STREAM_SERIALIZATION, [allowed, ..]) => {
                calls::count("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION");
                begins_early = allowed != 0;
            }
            (id, _) => return Err((INVALID_VALUE, format!("{name}: attribute {id} of a launch"))),
        }
    }
    if std::env::var("EMULATED_HANG").is_ok_and(|part| name.contains(&part)) {
        eprintln!("emulated driver: {name} hangs, as EMULATED_HANG asks");
        loop {
            std::thread::park();
        }
    }
    if dry_run::is_on() {
        // SAFETY: the one argument is the kernel's params struct, by the caller's promise.
        calls::add(&function.moved, unsafe { traffic::of_crate(&name, config.grid, arguments) });
        return Ok(());
    }
    let emulator = emulator()?;
    let Ok(Some(bytes)) = emulator.params_bytes(&function.name) else {
        return Err((NOT_FOUND, format!("there is no kernel {name}")));
    };
    // SAFETY: the one argument is the params struct, as large as the kernel says.
    let params = unsafe { std::slice::from_raw_parts((*arguments).cast::<u8>(), bytes) }.to_vec();
    let (grid, block, shared_bytes) = (config.grid, config.block, config.shared_bytes);
    let baked = OnceLock::new();
    graph::submit(config.stream, move || {
        let mode = Mode {
            timing: Timing::Late,
            products: Timing::Late,
            dependents: Timing::Late,
            seed: 0,
        };
        let kernel = &function.name.to_string_lossy();
        let params = match fault::bakes_seeds(kernel) {
            true => baked.get_or_init(|| fault::with_baked_seeds(&params)),
            false => &params,
        };
        let launch = Launch { kernel, grid, block, shared_bytes, cluster, params, begins_early };
        let run = || {
            // SAFETY: that the params' addresses are live memory is the promise of who launches.
            unsafe { emulator.launch(&launch, mode) }.map_err(|reason| (LAUNCH_FAILED, reason))
        };
        match fault::is_planted(kernel) {
            true => fault::run(params, run),
            false => run(),
        }
    })
}

#[no_mangle]
unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut [u8; 128],
    element: i32,
    rank: u32,
    address: u64,
    dims: *const u64,
    strides: *const u64,
    tile: *const u32,
    steps: *const u32,
    interleave: i32,
    swizzle: i32,
    _l2_promotion: i32,
    fill: i32,
) -> Status {
    calls::count("cuTensorMapEncodeTiled");
    let rank = rank as usize;
    // SAFETY: the arrays have as many elements as the rank says, strides one less.
    let (dims, strides, tile, steps) = unsafe {
        (
            std::slice::from_raw_parts(dims, rank),
            std::slice::from_raw_parts(strides, rank.saturating_sub(1)),
            std::slice::from_raw_parts(tile, rank),
            std::slice::from_raw_parts(steps, rank),
        )
    };
    // SAFETY: the caller's map is one to write to; it may be unaligned for all that is known here.
    let write = |bytes| unsafe { map.write_unaligned(bytes) };
    let plain = steps.iter().all(|&step| step == 1) && interleave == 0 && fill == 0;
    let element_bytes = match element {
        1 => 2,      // UINT16
        2 | 11 => 4, // UINT32, TFLOAT32
        _ => 0,
    };
    let dims: Option<Vec<u32>> = dims.iter().map(|&n| u32::try_from(n).ok()).collect();
    let swizzle = [0, 32, 64, 128].get(swizzle as usize);
    let (Some(dims), Some(&swizzle), true) = (dims, swizzle, plain) else {
        return told(Err((INVALID_VALUE, "a tensor map that is not emulated".to_string())));
    };
    let dims = &dims;
    let round_tf32 = element == 11;
    let encoded =
        TensorMap { address, dims, strides, tile, element_bytes, round_tf32, swizzle }.encode();
    told(encoded.map(write).map_err(|reason| (INVALID_VALUE, reason)))
}
