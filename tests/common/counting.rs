//! An allocator that keeps count, for tests of memory: such a test is alone in its file, as others would be counted too.
#![allow(dead_code)]

use candle_core::Result;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; only the sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that live now.
pub fn live() -> usize {
    LIVE.load(Relaxed)
}

/// Bytes allocated at the peak of `f`, beyond what lived before.
pub fn peak<R>(f: impl FnOnce() -> Result<R>) -> Result<(R, usize)> {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f()?;
    Ok((result, PEAK.load(Relaxed) - before))
}
