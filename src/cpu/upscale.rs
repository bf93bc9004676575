//! The mask decoder's upscaling and masks, pixel by pixel, in blocks that stay in cache.
//!
//! ```text
//! u = gelu(norm(x W1 + b1))     [4 taps, Q] of each position      w = gelu(u W2 + b2)     [4 taps, E] of each tap of u
//! mask_i = hyper_i . w          [4 h, 4 w]
//! ```
//! The maps u and w are never whole; the masks lie as images.

use super::activation::gelu;
use super::bf16;
use super::blocked::{accumulate, Packed, Term};
use super::buffer::Buffer;
use super::layer_norm;
use super::panel::{panel, Into, Left, Right, PANEL};
use super::simd::padded;
use rayon::prelude::*;
use std::borrow::Cow;

/// Taps of a 2x2 convolution.
const TAPS: usize = 4;

/// The weights; a convolution's is `[taps x out, in]`, its bias `[taps x out]`.
#[derive(Clone, Copy)]
pub struct Upscale<'a> {
    /// Rows and columns of the image.
    pub grid: (usize, usize),
    /// The first convolution.
    pub conv1: (&'a [f32], &'a [f32]),
    /// The norm's weight and bias, and epsilon.
    pub norm: (&'a [f32], &'a [f32], f64),
    /// The second convolution.
    pub conv2: (&'a [f32], &'a [f32]),
    /// Whether operands of the convolutions may be rounded to bf16.
    pub bf16: bool,
}

/// A linear layer, ready for blocks.
struct Layer<'a> {
    weight: Packed,
    bias: &'a [f32],
    in_dim: usize,
}

impl<'a> Layer<'a> {
    fn new((weight, bias): (&'a [f32], &'a [f32]), in_bf16: bool) -> Self {
        let (out_dim, in_dim) = (bias.len(), weight.len() / bias.len());
        let weight = match in_bf16 && bf16::available() && in_dim.is_multiple_of(2) {
            true => Packed::from_transposed_pairs(&bf16::pairs(weight), out_dim, in_dim),
            false => Packed::from_transposed(weight, out_dim, in_dim),
        };
        Self { weight, bias, in_dim }
    }

    /// `x W^T + bias`, `[rows, in] -> [rows, out]`; `acc` is scratch.
    fn apply(&self, x: &[f32], out: &mut Vec<f32>, acc: &mut Vec<f32>) {
        let (rows, width) = (x.len() / self.in_dim, self.bias.len());
        acc.resize(rows * PANEL, 0.0);
        out.resize(rows * width, 0.0);
        let (left, stride) = match self.weight.in_pairs() {
            true => (Cow::Owned(bf16::pairs(x)), self.in_dim / 2),
            false => (Cow::Borrowed(x), self.in_dim),
        };
        let term = Term { left: &left, stride, right: &self.weight, scale: 1.0 };
        for column in self.weight.panels() {
            accumulate(acc, rows, column, &[term]);
            let end = width.min(column + PANEL);
            for (out, acc) in out.chunks_exact_mut(width).zip(acc.chunks_exact(PANEL)) {
                let sums = acc.iter().zip(&self.bias[column..end]);
                out[column..end].iter_mut().zip(sums).for_each(|(o, (acc, bias))| *o = acc + bias);
            }
        }
    }
}

/// Buffers of a task, used again for the next.
#[derive(Default)]
struct Scratch {
    acc: Vec<f32>,
    u: Vec<f32>,
    fine: Vec<f32>,
    values: Vec<f32>,
}

/// Masks `[groups, masks, 4 h, 4 w]` of `x [groups, h, w, C]` by `hyper [groups, masks, E]`.
pub fn masks(up: &Upscale<'_>, x: &[f32], hyper: &[f32], masks: usize) -> Buffer {
    let (h, w) = up.grid;
    let (conv1, conv2) = (Layer::new(up.conv1, up.bf16), Layer::new(up.conv2, up.bf16));
    let (c, eighth) = (conv1.in_dim, up.conv2.1.len() / TAPS);
    let groups = x.len() / (h * w * c);
    let (row_pixels, pitch) = (TAPS * TAPS * w, padded(masks));
    // The columns are the masks.
    let mut hyper_t = vec![0f32; groups * eighth * pitch];
    for (i, &value) in hyper.iter().enumerate() {
        let (group, mask) = (i / (masks * eighth), i / eighth % masks);
        hyper_t[(group * eighth + i % eighth) * pitch + mask] = value;
    }
    // A row of positions gives four rows of pixels, mask after mask.
    let mut rows = Buffer::any(groups * h * masks * row_pixels);
    let tasks = rows.par_chunks_mut(masks * row_pixels).enumerate();
    tasks.for_each_init(Scratch::default, |scratch, (index, out)| {
        let Scratch { acc, u, fine, values } = scratch;
        conv1.apply(&x[index * w * c..][..w * c], u, acc);
        let (weight, bias, eps) = up.norm;
        layer_norm::in_place(u, weight, bias, eps);
        gelu(u, false);
        conv2.apply(u, fine, acc);
        gelu(fine, false);
        values.resize(row_pixels * pitch, 0.0);
        let hyper = &hyper_t[index / h * eighth * pitch..][..eighth * pitch];
        let shape = (row_pixels, pitch, eighth);
        let (left, right) = (Left::Rows(fine, eighth), Right(hyper, pitch));
        panel((values, pitch), (Into::Store, 1.0), shape, left, right);
        for (mask, out) in out.chunks_exact_mut(row_pixels).enumerate() {
            for (y, out) in out.chunks_exact_mut(TAPS * w).enumerate() {
                // Pixel (y, x) of a position: tap (y / 2, x / 2) of the first convolution, (y % 2, x % 2) of the second.
                let first = (y / 2 * 2 * TAPS + y % 2 * 2) * pitch + mask;
                let positions = values.chunks_exact(TAPS * TAPS * pitch);
                for (out, values) in out.chunks_exact_mut(TAPS).zip(positions) {
                    for (x, out) in out.iter_mut().enumerate() {
                        *out = values[first + (x / 2 * TAPS + x % 2) * pitch];
                    }
                }
            }
        }
    });
    if masks == 1 {
        return rows;
    }
    let mut out = Buffer::any(rows.len());
    out.par_chunks_mut(row_pixels).enumerate().for_each(|(index, out)| {
        let (group, mask, y) = (index / (masks * h), index / h % masks, index % h);
        out.copy_from_slice(&rows[((group * h + y) * masks + mask) * row_pixels..][..row_pixels]);
    });
    out
}
