//! Counts, by name, calls of the driver's functions, launches of kernels, and launches permitted to begin early. For
//! tests of the host's work. Candle's kernels have `candle::` before their names. In a dry run `moved::` and a name
//! stand for bytes (`traffic`).

use std::collections::BTreeMap;
use std::ffi::{c_char, CStr};
use std::sync::{Mutex, PoisonError};

static CALLS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

/// Counts a call, or a launch.
pub fn count(name: &'static str) {
    add(name, 1);
}

/// Adds to a count.
pub fn add(name: &'static str, count: u64) {
    let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    *calls.entry(name).or_default() += count;
}

/// Tells `visit` every name, its length and its count.
#[no_mangle]
pub extern "C" fn emulated_driver_each(visit: extern "C" fn(*const u8, usize, u64)) {
    let calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for (name, count) in calls {
        visit(name.as_ptr(), name.len(), count);
    }
}

/// The calls of all functions, or launches of all kernels, whose names begin so.
///
/// # Safety
/// The prefix is a string.
#[no_mangle]
pub unsafe extern "C" fn emulated_driver_calls(prefix: *const c_char) -> u64 {
    // SAFETY: the caller's promise.
    let prefix = unsafe { CStr::from_ptr(prefix) }.to_str().unwrap_or_default();
    let calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    calls.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum()
}
