//! How much work an operation is: what its formula needs, not what an implementation does.
//!
//! ```text
//! linear      2 rows in out, and 2 rows rank (in + out) for an adapter
//! attention   queries x keys x heads x 4 head_dim, and 2 head_dim (side + side) per query for the relative positions
//! backward    frozen linear: dx, as much as the forward; adapter and attention: twice their forward
//! ```
//! Padded queries and recomputation are not counted; padded keys, which take part in SAM's softmax, are. Bytes are
//! those of reading every input and writing every output once.

use super::vit::{Vit, WINDOW};
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

    /// A frozen linear; backward: dx.
    pub fn linear(&self, in_dim: usize, out_dim: usize) -> Work {
        let (rows, input, output) = (self.rows(), in_dim as f64, out_dim as f64);
        let passes = if self.backward { 2.0 } else { 1.0 };
        Work {
            flops: passes * 2.0 * rows * input * output,
            bytes: passes * (rows * (input + output) + input * output) * self.element as f64,
        }
    }

    /// Work that an adapter adds to a linear: two small products, and in the backward four more.
    pub fn lora(&self, in_dim: usize, out_dim: usize, rank: usize) -> Work {
        let passes = if self.backward { 3.0 } else { 1.0 };
        let flops = passes * 2.0 * self.rows() * rank as f64 * (in_dim + out_dim) as f64;
        Work { flops, bytes: passes * ((in_dim + out_dim) * rank * self.element) as f64 }
    }

    /// The q, k, v projections, with adapters of `rank` on q and v.
    pub fn qkv(&self, dim: usize, rank: usize) -> Work {
        self.linear(dim, 3 * dim) + self.lora(dim, dim, rank) * 2.0
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
        self.qkv(vit.dim, rank) + self.attention(vit, windowed) + self.linear(vit.dim, vit.dim)
    }

    pub fn block(&self, vit: &Vit, windowed: bool, rank: usize) -> Work {
        self.attention_layer(vit, windowed, rank)
            + self.linear(vit.dim, 4 * vit.dim) * 2.0
            + self.layer_norm(vit.dim) * 2.0
    }

    /// The mask decoder on a stored embedding, a prompt an entry of the batch: the products with an image's rows, each
    /// projection by itself.
    pub fn decoder(&self) -> Work {
        let upscaling = self.linear(256, 256) + self.linear(64, 128) * 4.0;
        self.linear(256, 128) * 9.0 + self.linear(128, 256) * 2.0 + upscaling
    }

    /// Backward reaches every layer: the first adapters are in the first layer.
    pub fn encoder(&self, vit: &Vit, rank: usize) -> Work {
        self.encoder_of(vit, vit.global.len(), rank)
    }

    /// An encoder with `global` global layers.
    pub fn encoder_of(&self, vit: &Vit, global: usize, rank: usize) -> Work {
        let global = global as f64;
        self.block(vit, false, rank) * global
            + self.block(vit, true, rank) * (vit.depth as f64 - global)
            + Self { backward: false, ..*self }.linear(3 * 16 * 16, vit.dim)
            + self.linear(vit.dim, 256)
            + self.linear(9 * 256, 256)
    }
}
