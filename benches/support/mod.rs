//! Shared by the benchmarks: shapes, random data, the same model with and without this crate's operations.
// Each benchmark is a program of its own and uses a part.
#![allow(dead_code)]

pub mod clock;
pub mod composed;
pub mod criterion;
pub mod memory;
pub mod models;
pub mod probe;
pub mod vit;
pub mod work;

use candle_core::{DType, Device, Result, Tensor};
use std::cell::Cell;

/// Twice the largest last-level cache of a GPU that we know (H200: 50 MB).
const GPU_CACHE: usize = 100 << 20;

/// The device named by CANDLE_SAM_DEVICE: `cpu` if unset, `cuda`, `cuda:1`.
pub fn device() -> candle_sam_lora::Result<Device> {
    candle_sam_lora::device(&std::env::var("CANDLE_SAM_DEVICE").unwrap_or_else(|_| "cpu".into()))
}

/// Standard normal numbers.
pub fn normal(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::randn(0f32, 1f32, shape, device)?.to_dtype(dtype)
}

/// An input in as many copies as keep a GPU's cache from holding it between repetitions. On the CPU there is one copy:
/// the other tensors of a repetition flush its caches anyway.
pub struct Rotating {
    copies: Vec<Tensor>,
    next: Cell<usize>,
}

impl Rotating {
    /// Copies of `x`; variables if it is one.
    pub fn new(x: Tensor) -> Result<Self> {
        let bytes = (x.elem_count() * x.dtype().size_in_bytes()).max(1);
        let count = if x.device().is_cpu() { 1 } else { (GPU_CACHE / bytes + 1).min(64) };
        let mut copies = vec![x];
        while copies.len() < count {
            let copy = copies[0].copy()?;
            let variable = copies[0].is_variable();
            copies.push(if variable {
                candle_core::Var::from_tensor(&copy)?.into_inner()
            } else {
                copy
            });
        }
        Ok(Self { copies, next: Cell::new(0) })
    }

    /// The copy that was used longest ago.
    pub fn next(&self) -> &Tensor {
        let index = self.next.get();
        self.next.set((index + 1) % self.copies.len());
        &self.copies[index]
    }
}
