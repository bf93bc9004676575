//! How much work an operation is: what its formula needs, not what an implementation does.
//!
//! ```text
//! linear      2 rows in out  (+ 2 rows rank (in + out) per adapter)
//! attention   queries x keys x heads x 4 head_dim, and 2 head_dim (side + side) per query for the relative positions
//! backward    twice the forward where weights are frozen halves: dx alone for a frozen linear, 4 products for attention
//! ```
//! Padded queries and recomputation are not counted; padded keys, which take part in SAM's softmax, are. Bytes are
//! those of reading every input and writing every output once.

use super::models::{Vit, WINDOW};
use std::ops::{Add, Mul};

/// Floating-point operations and bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    pub flops: f64,
    pub bytes: f64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Mul<f64> for Work {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { flops: self.flops * factor, bytes: self.bytes * factor }
    }
}

/// Tokens, element size and direction: what all counts share.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    pub batch: usize,
    pub grid: usize,
    /// Bytes of an element.
    pub element: usize,
    pub backward: bool,
}

impl Pass {
    pub fn forward(batch: usize, grid: usize, element: usize) -> Self {
        Self { batch, grid, element, backward: false }
    }

    pub fn with_backward(self) -> Self {
        Self { backward: true, ..self }
    }

    pub fn rows(&self) -> f64 {
        (self.batch * self.grid * self.grid) as f64
    }

    /// `adapters` of `rank` on a frozen linear; backward: dx, and the four small products of each adapter.
    pub fn linear(&self, in_dim: usize, out_dim: usize, rank: usize, adapters: usize) -> Work {
        let (rows, input, output) = (self.rows(), in_dim as f64, out_dim as f64);
        let base = 2.0 * rows * input * output;
        let adapter_out = if adapters == 0 { 0.0 } else { output / adapters.max(3) as f64 };
        let low_rank = 2.0 * rows * rank as f64 * (input + adapter_out) * adapters as f64;
        let passes = if self.backward { (2.0, 3.0) } else { (1.0, 1.0) };
        let traffic = rows * (input + output) + input * output;
        Work {
            flops: passes.0 * base + passes.1 * low_rank,
            bytes: passes.0 * traffic * self.element as f64,
        }
    }

    /// Global attention, or in windows of [`WINDOW`].
    pub fn attention(&self, vit: &Vit, windowed: bool) -> Work {
        let side = if windowed { WINDOW } else { self.grid } as f64;
        let (rows, dim) = (self.rows(), vit.dim as f64);
        let passes = if self.backward { 3.0 } else { 1.0 };
        Work {
            flops: passes * rows * dim * (4.0 * side * side + 4.0 * side),
            bytes: passes * rows * 4.0 * dim * self.element as f64,
        }
    }

    pub fn layer_norm(&self, dim: usize) -> Work {
        let (rows, dim) = (self.rows(), dim as f64);
        let passes = if self.backward { 2.5 } else { 1.0 };
        Work { flops: 0.0, bytes: passes * 2.0 * rows * dim * self.element as f64 }
    }

    /// qkv, attention, proj; adapters of `rank` on q and v.
    pub fn attention_layer(&self, vit: &Vit, windowed: bool, rank: usize) -> Work {
        self.linear(vit.dim, 3 * vit.dim, rank, if rank > 0 { 2 } else { 0 })
            + self.attention(vit, windowed)
            + self.linear(vit.dim, vit.dim, 0, 0)
    }

    pub fn block(&self, vit: &Vit, windowed: bool, rank: usize) -> Work {
        self.attention_layer(vit, windowed, rank)
            + self.linear(vit.dim, 4 * vit.dim, 0, 0) * 2.0
            + self.layer_norm(vit.dim) * 2.0
    }

    /// Backward reaches every layer: the first adapters are in the first layer.
    pub fn encoder(&self, vit: &Vit, rank: usize) -> Work {
        let global = vit.global.len() as f64;
        self.block(vit, false, rank) * global
            + self.block(vit, true, rank) * (vit.depth as f64 - global)
            + Self { backward: false, ..*self }.linear(3 * 16 * 16, vit.dim, 0, 0)
            + self.linear(vit.dim, 256, 0, 0)
            + self.linear(9 * 256, 256, 0, 0)
    }
}
