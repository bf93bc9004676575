//! The device's memory: the host's, exactly as long as asked for, NaN when it is new and when it is given back.

use crate::{dry_run, Outcome, Status, INVALID_VALUE};
use std::alloc::Layout;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// A stream's handle.
pub type Stream = usize;
/// As a pool of the driver's aligns it.
const ALIGNMENT: usize = 256;
const NAN: u8 = 0xFF;

/// Where live memory lies, and how long it is.
static LIVE: Mutex<BTreeMap<u64, usize>> = Mutex::new(BTreeMap::new());

/// Bytes of live memory, and the most there were since somebody asked.
static NOW: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

/// Bytes of live memory; `peak` becomes the most there were since the last call.
///
/// # Safety
/// `peak` is an address to write to.
#[no_mangle]
pub unsafe extern "C" fn emulated_driver_bytes(peak: *mut u64) -> u64 {
    let now = NOW.load(Ordering::SeqCst);
    // SAFETY: the caller's promise.
    unsafe { *peak = PEAK.swap(now, Ordering::SeqCst) };
    now
}

/// That of graphs, which stays when it is freed: another launch writes it again.
static OWNED: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

fn owned<T>(change: impl FnOnce(&mut BTreeSet<u64>) -> T) -> T {
    change(&mut OWNED.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Memory becomes a graph's.
pub fn own(address: u64) {
    owned(|owned| owned.insert(address));
}

/// A graph's memory, after its end.
pub fn disown(address: u64) -> Outcome {
    match owned(|owned| owned.remove(&address)) {
        true => Ok(()),
        false => Err((INVALID_VALUE, format!("{address:#x} is not a graph's"))),
    }
}

fn live<T>(change: impl FnOnce(&mut BTreeMap<u64, usize>) -> T) -> T {
    change(&mut LIVE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// New memory, NaN.
pub fn alloc(bytes: usize) -> Result<u64, (Status, String)> {
    let refused = || (INVALID_VALUE, format!("an allocation of {bytes} bytes"));
    let layout = Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| refused())?;
    if bytes == 0 {
        return Err(refused());
    }
    // SAFETY: the layout is not empty; the bytes are written before anybody reads them.
    let address = unsafe {
        let start = std::alloc::alloc(layout);
        if start.is_null() {
            std::alloc::handle_alloc_error(layout)
        }
        if !dry_run::is_on() {
            start.write_bytes(NAN, bytes);
        }
        start as u64
    };
    let now = NOW.fetch_add(bytes as u64, Ordering::SeqCst) + bytes as u64;
    PEAK.fetch_max(now, Ordering::SeqCst);
    live(|live| live.insert(address, bytes));
    Ok(address)
}

/// Gives memory back, NaN.
pub fn free(address: u64) -> Outcome {
    if owned(|owned| owned.contains(&address)) {
        return Ok(());
    }
    let Some(bytes) = live(|live| live.remove(&address)) else {
        return Err((INVALID_VALUE, format!("{address:#x} is freed, but was not allocated")));
    };
    NOW.fetch_sub(bytes as u64, Ordering::SeqCst);
    // SAFETY: allocated with this layout, and no longer listed, so nobody else frees it.
    unsafe {
        if !dry_run::is_on() {
            (address as *mut u8).write_bytes(NAN, bytes);
        }
        std::alloc::dealloc(
            address as *mut u8,
            Layout::from_size_align_unchecked(bytes, ALIGNMENT),
        );
    }
    Ok(())
}

/// The start and length of the live memory that this address lies in.
pub fn holding(address: u64) -> Option<(u64, usize)> {
    live(|live| {
        let (start, length) = live.range(..=address).next_back()?;
        (address < start + *length as u64).then_some((*start, *length))
    })
}

/// Whether all of it is live memory.
pub fn check(address: u64, bytes: usize) -> Outcome {
    let end = live(|live| {
        let (start, length) = live.range(..=address).next_back()?;
        Some(start + *length as u64)
    });
    match end {
        Some(end) if address + bytes as u64 <= end => Ok(()),
        _ => Err((INVALID_VALUE, format!("{bytes} bytes at {address:#x} are not the device's"))),
    }
}
