//! An allocator that keeps count, for tests of memory.
#![allow(dead_code)]

use candle_core::Result;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::LazyLock;

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

/// Two threads that have begun, on every machine: each has memory of its own.
pub static THREADS: LazyLock<ThreadPool> = LazyLock::new(|| {
    let threads = ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
    threads.broadcast(|_| ());
    threads
});

/// Bytes allocated at the peak of `f` on [`THREADS`], beyond what lived before.
pub fn peak<R: Send>(f: impl FnOnce() -> Result<R> + Send) -> Result<(R, usize)> {
    let threads = &*THREADS;
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = threads.install(f)?;
    Ok((result, PEAK.load(Relaxed) - before))
}
