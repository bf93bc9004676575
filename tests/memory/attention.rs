//! The attention allocates nothing of size N x N: an allocator that keeps count watches it, forward and backward.

use crate::common;
use crate::counting::peak;
use anyhow::Result;
use candle_core::Var;
use candle_sam_lora::ops::{self, RelPosAttention};

pub fn global_attention_is_linear_in_tokens() -> Result<()> {
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
    // A handful of copies of inputs and outputs and the blocks of two threads, far from one N x N matrix.
    assert!(forward < 6 * io && forward < n_by_n / 8, "forward took {forward} bytes");
    assert!(backward < 12 * io && backward < n_by_n / 6, "backward took {backward} bytes");
    Ok(())
}
