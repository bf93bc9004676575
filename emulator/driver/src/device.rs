//! The driver's one device and its one context.

use crate::{calls, dry_run, Status, BROKEN, INVALID_VALUE, SUCCESS};
use std::cell::Cell;
use std::ffi::c_char;
use std::sync::atomic::Ordering;

/// CUDA 13.0, as it counts.
const DRIVER_VERSION: i32 = 13_000;
/// Any but null.
const CONTEXT: usize = 1;

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Major and minor in one number.
fn capability() -> i32 {
    let asked = std::env::var("EMULATED_CAPABILITY").ok();
    asked.and_then(|value| value.parse().ok()).unwrap_or(90)
}

/// Whether this thread has made the context its own, as calls on memory and kernels want.
pub fn is_current() -> bool {
    CURRENT.get() == CONTEXT
}

#[no_mangle]
extern "C" fn cuInit(_flags: u32) -> Status {
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuDriverGetVersion(version: *mut i32) -> Status {
    calls::count("cuDriverGetVersion");
    // SAFETY: the caller's address is one to write to.
    unsafe { *version = DRIVER_VERSION };
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGet(device: *mut i32, ordinal: i32) -> Status {
    if ordinal != 0 {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's address is one to write to.
    unsafe { *device = ordinal };
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetCount(count: *mut i32) -> Status {
    // SAFETY: the caller's address is one to write to.
    unsafe { *count = 1 };
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, bytes: i32, _device: i32) -> Status {
    let text = c"emulated device".to_bytes_with_nul();
    if bytes < text.len() as i32 {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's buffer has that many bytes.
    unsafe { name.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len()) };
    SUCCESS
}

/// Few multiprocessors, so that persistent kernels have several tiles a block in small cases; an H200's or A100's in a
/// dry run.
#[no_mangle]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, _device: i32) -> Status {
    calls::count("cuDeviceGetAttribute");
    let hopper = capability() >= 90;
    let answer = match attribute {
        16 if !dry_run::is_on() => 4, // multiprocessors
        16 if hopper => 132,
        16 => 108,
        75 => capability() / 10,
        76 => capability() % 10,
        97 if hopper => 227 << 10, // shared memory that a block may opt into
        97 => 163 << 10,
        115 => 1,             // pools of memory
        120 => hopper.into(), // clusters
        _ => {
            eprintln!("emulated driver: attribute {attribute} of a device is not emulated");
            return INVALID_VALUE;
        }
    };
    // SAFETY: the caller's address is one to write to.
    unsafe { *value = answer };
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, _device: i32) -> Status {
    // SAFETY: the caller's address is one to write to.
    unsafe { *context = CONTEXT };
    SUCCESS
}

#[no_mangle]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: i32) -> Status {
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> Status {
    calls::count("cuCtxGetCurrent");
    // SAFETY: the caller's address is one to write to.
    unsafe { *context = CURRENT.get() };
    SUCCESS
}

#[no_mangle]
extern "C" fn cuCtxSetCurrent(context: usize) -> Status {
    calls::count("cuCtxSetCurrent");
    CURRENT.set(context);
    SUCCESS
}

#[no_mangle]
extern "C" fn cuCtxSynchronize() -> Status {
    BROKEN.load(Ordering::SeqCst)
}
