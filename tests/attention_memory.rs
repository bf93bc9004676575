//! The attention allocates nothing of size N x N: an allocator that keeps count watches it, forward and backward.

mod common;

use candle_core::{Result, Var};
use candle_sam_lora::ops::{self, RelPosAttention};
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

/// Bytes allocated at the peak of `f`, beyond what lived before.
fn peak<R>(f: impl FnOnce() -> Result<R>) -> Result<(R, usize)> {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f()?;
    Ok((result, PEAK.load(Relaxed) - before))
}

#[test]
fn global_attention_is_linear_in_tokens() -> Result<()> {
    const SIDE: usize = 64;
    const DIM: usize = 16;
    let qkv = Var::from_tensor(&common::random(1, (1, SIDE, SIDE, 3 * DIM)))?;
    let table = Var::from_tensor(&common::random(2, (2 * SIDE - 1, DIM)))?;
    let config = RelPosAttention {
        num_heads: 1,
        softmax_scale: 0.25,
        rel_pos: Some((&table, &table)),
        window: None,
        pad: None,
        dropout: None,
    };
    let (out, forward) = peak(|| ops::rel_pos_attention(&qkv, &config))?;
    let (_, backward) = peak(|| out.sum_all()?.backward())?;
    let n_by_n = SIDE.pow(4) * 4;
    let io = SIDE * SIDE * 4 * DIM * 4;
    println!(
        "forward {forward} B, backward {backward} B, N x N would be {n_by_n} B, qkv + out {io} B"
    );
    // A handful of copies of inputs and outputs and the blocks of each thread, far from one N x N matrix.
    assert!(forward < 6 * io && forward < n_by_n / 8, "forward took {forward} bytes");
    assert!(backward < 12 * io && backward < n_by_n / 6, "backward took {backward} bytes");
    Ok(())
}
