#![warn(missing_docs)]
//! Runs CUDA kernels on the CPU, for tests on machines without a GPU.
//!
//! The host compiler compiles the kernels' own sources (`kernels/*.cu`) as C++20 against stand-ins for CUDA's headers
//! (`include/`). A scheduler runs them, in which every CUDA thread is a fiber (`runtime/`). [`Emulator::launch`] takes
//! the driver's arguments: a name, grid, block, shared memory and the params struct's bytes.
//!
//! Adversity tells a wrong kernel apart from a right one:
//!
//! - Shared memory is exactly as large as asked for, and NaN at first.
//! - Asynchronous copies land as late or as early as the rules allow.
//! - Threads run in seeded orders.
//! - A collective that not all threads reach ends in a report of who waits where.
//!
//! It is no proof of the GPU. It does not show races between a GPU's real threads that no order of whole steps shows,
//! nor a GPU's rounding in tensor cores.
//!
//! A test that first asks for the kernels compiles them, not a build script, so building the crate or its examples
//! needs no C++ compiler. Objects are cached by content. In the environment, `CXX` names the compiler, and
//! `EMULATOR_SANITIZE` (`address,undefined` or `thread`) instruments everything: see `scripts/sanitize-kernels.sh`.

mod compile;
#[path = "../../build/files.rs"]
mod files;
mod tensor_map;

pub use compile::Sources;
pub use tensor_map::TensorMap;

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::path::Path;

/// The text of `src/launch/tile_table.rs`: the tiles of a folder of kernels, with the shared memory that their blocks
/// take.
///
/// # Errors
/// The compiler's output.
pub fn tile_table(kernels: &Path, cache: &Path) -> Result<String, String> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tiles.cpp");
    compile::output_of(&program, kernels, cache)
}

/// When asynchronous copies land, products are formed and dependent launches begin, of the moments the rules allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// When they are waited for: shows a missing wait. A launch: after those before it.
    Late,
    /// When they are issued: shows a buffer that is refilled while it is still read. A launch: before those before it,
    /// as far as it gets.
    Early,
}

/// How the freedoms that a kernel leaves are used. A right kernel gives the same bits in every mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// When asynchronous copies land.
    pub timing: Timing,
    /// When asynchronous products (wgmma) are formed.
    pub products: Timing,
    /// When launches begin that may begin before those before them have ended.
    pub dependents: Timing,
    /// 0: the threads of a block take turns. Else: any one that can run, by this seed.
    pub seed: u64,
}

impl Mode {
    /// Late and early, each with three seeds.
    pub fn all() -> impl Iterator<Item = Mode> {
        Self::timings([(Timing::Late, Timing::Late), (Timing::Early, Timing::Early)])
    }

    /// Copies and products late and early, each by itself, with three seeds. With early copies and late
    /// products, a stage given back before the products have read it shows.
    pub fn all_with_products() -> impl Iterator<Item = Mode> {
        let both = [Timing::Late, Timing::Early];
        Self::timings(
            both.into_iter().flat_map(move |copies| both.map(|products| (copies, products))),
        )
    }

    fn timings(pairs: impl IntoIterator<Item = (Timing, Timing)>) -> impl Iterator<Item = Mode> {
        // Dependents begin early but for one seed.
        let mode = |timing, products| {
            move |seed| {
                let dependents = if seed == 1 { Timing::Late } else { Timing::Early };
                Mode { timing, products, dependents, seed }
            }
        };
        pairs.into_iter().flat_map(move |(timing, products)| (0..3).map(mode(timing, products)))
    }
}

/// A launch as the driver takes it.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel's name.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster, along x.
    pub cluster: u32,
    /// The bytes of its params struct.
    pub params: &'a [u8],
    /// Whether it may begin before the launch before it has ended, for which every block of it then has to wait.
    pub begins_early: bool,
}

/// A launch and its mode, as runtime/launch.cpp declares them.
#[repr(C)]
struct Arguments {
    kernel: *const c_char,
    params: *const c_void,
    params_bytes: u64,
    seed: u64,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    cluster: u32,
    begins_early: u32,
    early: u32,
    early_products: u32,
    workers: u32,
}

type BeginFn = unsafe extern "C" fn(*const Arguments, c_int, *mut c_char, usize) -> *mut c_void;
type EndFn = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;
type KernelsFn = unsafe extern "C" fn(*mut c_char, usize) -> usize;
type ParamsBytesFn = unsafe extern "C" fn(*const c_char) -> usize;

/// Compiled kernels, ready to be launched.
pub struct Emulator {
    loaded: libloading::Library,
    workers: u32,
}

impl Emulator {
    /// Compiles `sources`, or takes the library out of `cache` if they have not changed, and loads it.
    ///
    /// # Errors
    /// - compiling or loading fails: the message is that of the compiler or the loader.
    pub fn new(sources: &Sources, cache: &Path) -> Result<Self, String> {
        let path = sources.compile(cache)?;
        // SAFETY: the library's initialisers only fill the table of kernels.
        let loaded = unsafe { libloading::Library::new(&path) }
            .map_err(|e| format!("cannot load {}: {e}", path.display()))?;
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        Ok(Self { loaded, workers })
    }

    /// The names of all kernels, sorted.
    ///
    /// # Errors
    /// If the library is not one of this crate's.
    pub fn kernels(&self) -> Result<Vec<String>, String> {
        // SAFETY: the signature is that of runtime/launch.cpp.
        let kernels = unsafe { self.loaded.get::<KernelsFn>(b"emulator_kernels\0") }
            .map_err(|e| e.to_string())?;
        // SAFETY: with 0 bytes nothing is written; then it gets the bytes that it asked for.
        let names = unsafe {
            let mut names = vec![0u8; kernels(std::ptr::null_mut(), 0)];
            kernels(names.as_mut_ptr().cast(), names.len());
            names
        };
        let text = CStr::from_bytes_until_nul(&names).map_err(|e| e.to_string())?;
        Ok(text.to_string_lossy().lines().map(str::to_string).collect())
    }

    /// The size of a kernel's params struct; none if there is no such kernel.
    ///
    /// # Errors
    /// If the library is not one of this crate's.
    pub fn params_bytes(&self, kernel: &CStr) -> Result<Option<usize>, String> {
        // SAFETY: the signature is that of runtime/launch.cpp.
        let params_bytes = unsafe { self.loaded.get::<ParamsBytesFn>(b"emulator_params_bytes\0") }
            .map_err(|e| e.to_string())?;
        // SAFETY: reads the name.
        let bytes = unsafe { params_bytes(kernel.as_ptr()) };
        Ok((bytes > 0).then_some(bytes))
    }

    /// Launches a kernel and waits for its end.
    ///
    /// # Errors
    /// If there is no such kernel, the launch is one that no device takes, or the kernel went wrong: divergence,
    /// deadlock, shared memory overrun. The message names kernel, block, threads, file and line.
    ///
    /// # Safety
    /// The addresses in `params` must be those of live memory of the sizes that the kernel expects.
    pub unsafe fn launch(&self, launch: &Launch<'_>, mode: Mode) -> Result<(), String> {
        // SAFETY: the caller's promise.
        unsafe { self.start(launch, mode, false)?.end() }
    }

    /// Begins a launch before the previous ones have run, if it may and the mode has it so. The first
    /// of its blocks get as far as the wait for them. [`Begun::end`] runs the rest.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    ///
    /// # Safety
    /// As [`launch`](Self::launch), until it has ended.
    pub unsafe fn begin(&self, launch: &Launch<'_>, mode: Mode) -> Result<Begun<'_>, String> {
        // SAFETY: the caller's promise.
        unsafe { self.start(launch, mode, launch.begins_early && mode.dependents == Timing::Early) }
    }

    unsafe fn start(
        &self,
        launch: &Launch<'_>,
        mode: Mode,
        early: bool,
    ) -> Result<Begun<'_>, String> {
        let name = CString::new(launch.kernel).map_err(|e| e.to_string())?;
        let arguments = Arguments {
            kernel: name.as_ptr(),
            params: launch.params.as_ptr().cast(),
            params_bytes: launch.params.len() as u64,
            seed: mode.seed,
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            cluster: launch.cluster,
            begins_early: launch.begins_early.into(),
            early: u32::from(mode.timing == Timing::Early),
            early_products: u32::from(mode.products == Timing::Early),
            workers: self.workers,
        };
        // SAFETY: the signatures are those of runtime/launch.cpp.
        let (begin, end) = unsafe {
            let begin = self.loaded.get::<BeginFn>(b"emulator_begin\0");
            let end = self.loaded.get::<EndFn>(b"emulator_end\0");
            (begin.map_err(|e| e.to_string())?, end.map_err(|e| e.to_string())?)
        };
        let mut error = vec![0u8; ERROR_BYTES];
        let (text, length) = (error.as_mut_ptr().cast(), error.len());
        // SAFETY: all that the arguments point to outlives the call; the addresses are the caller's promise.
        let started = unsafe { begin(&arguments, early.into(), text, length) };
        match started.is_null() {
            true => Err(message(&error)),
            false => Ok(Begun { started, end }),
        }
    }
}

/// A launch that has begun.
pub struct Begun<'a> {
    started: *mut c_void,
    end: libloading::Symbol<'a, EndFn>,
}

impl Begun<'_> {
    /// Runs the rest of it, and waits for its end.
    ///
    /// # Errors
    /// As [`Emulator::launch`].
    pub fn end(mut self) -> Result<(), String> {
        let mut error = vec![0u8; ERROR_BYTES];
        let started = std::mem::replace(&mut self.started, std::ptr::null_mut());
        // SAFETY: begun and not ended, on this thread: the pointer makes this type neither Send nor Sync.
        match unsafe { (self.end)(started, error.as_mut_ptr().cast(), error.len()) } {
            0 => Ok(()),
            _ => Err(message(&error)),
        }
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if !self.started.is_null() {
            // SAFETY: as in `end`; without an array for an error it is given up.
            unsafe { (self.end)(self.started, std::ptr::null_mut(), 0) };
        }
    }
}

const ERROR_BYTES: usize = 4096;

fn message(error: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(error).unwrap_or_default();
    text.to_string_lossy().into_owned()
}
