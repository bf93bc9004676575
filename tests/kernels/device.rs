//! The emulator as a back end of `launch`, its memory, and the modes that every case runs in.
#![allow(dead_code)]

use candle_core::{bail, DType, Error, Result, Tensor};
use candle_sam_lora::launch::plan::Plan;
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::launch::tensor_map::{Element, TensorMap};
use candle_sam_lora::launch::{device_ptr, Backend, Launch};
use candle_sam_lora_emulator::{Begun, Emulator, Launch as EmulatorLaunch, Mode, Sources};
use std::alloc::Layout;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Where the kernels' sources are.
pub fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Where what is compiled is kept.
pub fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator")
}

/// All kernels, compiled when first asked for.
pub fn emulator() -> &'static Emulator {
    static EMULATOR: OnceLock<Emulator> = OnceLock::new();
    EMULATOR.get_or_init(|| compile(&Sources::all(kernels())))
}

/// These files below `tests/kernels`, compiled against the kernels' headers.
pub fn compiled(files: &[&str]) -> Emulator {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels");
    let files = files.iter().map(|file| here.join(file)).collect();
    compile(&Sources::files(kernels(), files))
}

pub fn compile(sources: &Sources) -> Emulator {
    Emulator::new(sources, &cache()).unwrap_or_else(|e| panic!("{e}"))
}

/// An emulated device, running in one mode.
pub struct Device<'a> {
    pub emulator: &'a Emulator,
    pub mode: Mode,
}

impl Backend for Device<'_> {
    type Memory = Memory;

    fn alloc(&self, bytes: usize) -> Result<Memory> {
        Ok(Memory::new(bytes))
    }

    fn address(&self, memory: &Memory) -> device_ptr {
        memory.address()
    }

    unsafe fn launch(&self, launch: &Launch, operands: &Operands<'_>) -> Result<()> {
        self.with(launch, operands, |launch| unsafe { self.emulator.launch(launch, self.mode) })
    }
}

impl<'a> Device<'a> {
    /// Begins a launch that may begin before those before it have ended; what it writes by then is an error.
    fn begin(&self, launch: &Launch, operands: &Operands<'_>) -> Result<Begun<'a>> {
        let before = live_bytes();
        // SAFETY: as `launch_with`.
        let begun = self
            .with(launch, operands, |launch| unsafe { self.emulator.begin(launch, self.mode) })?;
        if live_bytes() != before {
            bail!("{} has written before griddepcontrol.wait", launch.kernel)
        }
        Ok(begun)
    }

    /// Gives the launch with its operands to the emulator.
    fn with<T>(
        &self,
        launch: &Launch,
        operands: &Operands<'_>,
        run: impl FnOnce(&EmulatorLaunch<'_>) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let params = launch.fill(operands, |map| encode(map).map_err(Error::msg))?;
        let launch = EmulatorLaunch {
            kernel: &launch.kernel,
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            cluster: launch.cluster,
            params: &params,
            begins_early: launch.begins_early,
        };
        run(&launch).map_err(Error::msg)
    }
}

/// A tensor map as the emulator reads it.
pub fn encode(map: &TensorMap) -> std::result::Result<[u8; 128], String> {
    candle_sam_lora_emulator::TensorMap {
        address: map.address,
        dims: map.dims(),
        strides: map.strides(),
        tile: map.tile(),
        element_bytes: map.element.bytes(),
        round_tf32: map.element == Element::Tf32,
        swizzle: map.swizzle.bytes(),
    }
    .encode()
}

thread_local! {
    /// Where this thread's memory lies, and how long it is.
    static LIVE: RefCell<BTreeMap<*const u8, usize>> = const { RefCell::new(BTreeMap::new()) };
}

/// All that this thread's kernels could have written.
fn live_bytes() -> Vec<u8> {
    LIVE.with_borrow(|live| {
        // SAFETY: initialised by `Memory::new`, and live until it is taken out of here; no kernel runs.
        let bytes = |(&start, &length)| unsafe { std::slice::from_raw_parts(start, length) };
        live.iter().flat_map(bytes).copied().collect()
    })
}

/// Device memory: exactly as long as asked for, aligned as CUDA aligns it, NaN until written.
pub struct Memory {
    start: *mut u8,
    layout: Layout,
}

impl Memory {
    pub fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1), 256).unwrap();
        // SAFETY: the layout is not empty; all bytes are written before anyone sees them.
        let start = unsafe {
            let start = std::alloc::alloc(layout);
            assert!(!start.is_null(), "out of memory");
            start.write_bytes(0xFF, layout.size());
            start
        };
        LIVE.with_borrow_mut(|live| live.insert(start, layout.size()));
        Self { start, layout }
    }

    /// The elements of a tensor, `offset` elements into the memory (0: aligned).
    pub fn from_tensor_at(tensor: &Tensor, offset: usize) -> Self {
        Self::from_bytes_at(&bytes(tensor), offset * tensor.dtype().size_in_bytes())
    }

    /// These bytes, behind `skip` others.
    pub fn from_bytes_at(bytes: &[u8], skip: usize) -> Self {
        let memory = Self::new(skip + bytes.len());
        // SAFETY: the memory is that long, and nobody else's.
        unsafe { memory.start.add(skip).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        memory
    }

    pub fn from_tensor(tensor: &Tensor) -> Self {
        Self::from_tensor_at(tensor, 0)
    }

    pub fn for_elements(count: usize, dtype: DType) -> Self {
        Self::new(count * dtype.size_in_bytes())
    }

    pub fn address(&self) -> device_ptr {
        self.start as device_ptr
    }

    /// Bytes that the kernels left in this memory.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: written when it was made; kernels run only inside `launch`.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }

    /// Its elements as f64.
    pub fn values(&self, dtype: DType) -> Vec<f64> {
        let bytes = self.bytes();
        match dtype {
            DType::F32 => bytes.chunks_exact(4).map(|b| f32_of(b).into()).collect(),
            DType::F16 => {
                bytes.chunks_exact(2).map(|b| half::f16::from_bits(u16_of(b)).into()).collect()
            }
            DType::BF16 => {
                bytes.chunks_exact(2).map(|b| half::bf16::from_bits(u16_of(b)).into()).collect()
            }
            other => panic!("no kernel writes {other:?}"),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        LIVE.with_borrow_mut(|live| live.remove(&self.start.cast_const()));
        // SAFETY: allocated with this layout in `new`.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

fn f32_of(bytes: &[u8]) -> f32 {
    f32::from_le_bytes(bytes.try_into().unwrap())
}

fn u16_of(bytes: &[u8]) -> u16 {
    u16::from_le_bytes(bytes.try_into().unwrap())
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => flat.to_vec1::<f32>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => {
            flat.to_vec1::<half::f16>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        DType::BF16 => {
            flat.to_vec1::<half::bf16>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        other => panic!("no kernel reads {other:?}"),
    }
}

/// Runs a case in every mode: `run` gets a device, and returns the memory of its outputs, which must have the same
/// bits every time. Returns those of one.
pub fn in_every_mode(case: &str, run: impl Fn(&Device) -> Result<Vec<Memory>>) -> Vec<Memory> {
    in_modes(case, Mode::all(), run)
}

/// The same in these modes. For addresses that a sanitizer looks at, one order of the threads stands for all.
pub fn in_modes(
    case: &str,
    modes: impl Iterator<Item = Mode>,
    run: impl Fn(&Device) -> Result<Vec<Memory>>,
) -> Vec<Memory> {
    /// The seed of [`Mode::all`] with threads in any order and dependent launches early.
    const ONE_SEED: u64 = 2;
    let addresses = std::env::var("EMULATOR_SANITIZE").is_ok_and(|kind| kind.contains("address"));
    let mut first: Option<Vec<Memory>> = None;
    for mode in modes.filter(|mode| !addresses || mode.seed == ONE_SEED) {
        let outputs = run(&Device { emulator: emulator(), mode })
            .unwrap_or_else(|e| panic!("{case}, {mode:?}: {e}"));
        match &first {
            None => first = Some(outputs),
            Some(first) => {
                for (index, (a, b)) in first.iter().zip(&outputs).enumerate() {
                    assert!(a.bytes() == b.bytes(), "{case}: output {index} differs in {mode:?}");
                }
            }
        }
    }
    first.unwrap()
}

/// Launches a plan's steps with these operands.
pub fn launch_plan(device: &Device, plan: &Plan, operands: &Operands<'_>) -> Result<()> {
    launch_with(device, &plan.steps, operands)
}

/// Launches what was planned with addresses.
pub fn launch_all(device: &Device, launches: &[Launch]) -> Result<()> {
    launch_with(device, launches, &Operands::default())
}

/// Launches one after the other; those that may begin before the one before them do, up to their wait.
fn launch_with(device: &Device, launches: &[Launch], operands: &Operands<'_>) -> Result<()> {
    for chain in launches.chunk_by(|_, next| next.begins_early) {
        let Some((first, dependents)) = chain.split_first() else { continue };
        let begun = dependents.iter().map(|launch| device.begin(launch, operands));
        let begun = begun.collect::<Result<Vec<_>>>()?;
        // SAFETY: the tests keep the memory whose addresses they pass until they have read the outputs.
        unsafe { device.launch(first, operands)? };
        begun.into_iter().try_for_each(|begun| begun.end().map_err(Error::msg))?;
    }
    Ok(())
}

/// The bound on the error of a result in `dtype`. f32 has its own. For the others it is twice the error of the eager
/// graph. One rounding is always allowed, since the eager graph may be exact by luck.
pub fn bound(dtype: DType, eager_error: f64) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => (2.0 * eager_error).max(1.0 / 2048.0),
        _ => (2.0 * eager_error).max(1.0 / 256.0),
    }
}

pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
