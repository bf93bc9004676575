//! Encoding again and again takes no more memory than encoding once: not a byte stays behind.

use crate::common::model;
use crate::counting;
use anyhow::Result;
use candle_core::DType;
use candle_sam_lora::nn::Mode;
use candle_sam_lora::sam::AttentionKind;

/// Encodes until the pools of threads and buffers have what they need, then `times` more; the bytes left by those.
fn left_behind(times: usize) -> Result<isize> {
    let pixels = model::read("tiny", "io.safetensors")?["encoder/pixel_values"].narrow(0, 0, 1)?;
    let encoder = model::model("tiny", AttentionKind::Split, DType::F32)?.vision_encoder;
    let encode = |times: usize| -> Result<()> {
        for _ in 0..times {
            counting::THREADS.install(|| encoder.forward(&pixels, Mode::Eval))?;
        }
        Ok(())
    };
    encode(20)?;
    let before = counting::live() as isize;
    encode(times)?;
    Ok(counting::live() as isize - before)
}

/// Queues between threads grow by blocks, and keep one.
const BLOCK: isize = 4096;

pub fn a_hundred_encodes_leave_nothing_behind() -> Result<()> {
    let left = left_behind(100)?;
    assert!(left <= BLOCK, "{left} bytes");
    Ok(())
}

/// A minute; `cargo test --release --test memory -- ten_thousand --ignored --nocapture`.
pub fn ten_thousand_encodes_leave_nothing_behind() -> Result<()> {
    let left = left_behind(10_000)?;
    println!("10,000 encodes: {left} bytes left behind");
    assert!(left <= BLOCK, "{left} bytes");
    Ok(())
}
