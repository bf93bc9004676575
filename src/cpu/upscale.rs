//! The mask decoder's upscaling and masks, pixel by pixel, in blocks that stay in cache.
//!
//! ```text
//! u = gelu(norm(x W1 + b1))     [4 taps, Q] of each position      w = gelu(u W2 + b2)     [4 taps, E] of each tap of u
//! mask_i = hyper_i . w          [4 h, 4 w]
//! ```
//! The maps u and w are never whole; the masks lie as images.

use super::activation::{gelu_of_bf16, gelu_of_inference};
use super::bf16;
use super::blocked::{add_term, Packed, Term};
use super::buffer::Buffer;
use super::layer_norm;
use super::simd::run;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Taps of a 2x2 convolution.
pub(super) const TAPS: usize = 4;

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
pub(super) struct Layer<'a> {
    weight: Packed,
    bias: &'a [f32],
    pub in_dim: usize,
}

impl<'a> Layer<'a> {
    pub fn new((weight, bias): (&'a [f32], &'a [f32]), in_bf16: bool) -> Self {
        let (out_dim, in_dim) = (bias.len(), weight.len() / bias.len());
        let weight = match in_bf16 && bf16::available() && in_dim.is_multiple_of(2) {
            true => Packed::from_transposed_pairs(&bf16::pairs(weight), out_dim, in_dim),
            false => Packed::from_transposed(weight, out_dim, in_dim),
        };
        Self { weight, bias, in_dim }
    }

    /// `x W^T + bias`, `[rows, in] -> [rows, out]`; the buffers are scratch.
    pub fn apply(&self, x: &[f32], out: &mut Vec<f32>, [acc, pairs]: &mut [Vec<f32>; 2]) {
        let (rows, width) = (x.len() / self.in_dim, self.bias.len());
        out.resize(rows * width, 0.0);
        for out in out.chunks_exact_mut(width) {
            out.copy_from_slice(self.bias);
        }
        let right = &self.weight;
        if right.in_pairs() {
            let (left, stride) = (bf16::pairs_in(x, pairs), self.in_dim / 2);
            add_term(out, rows, &Term { left, stride, right, scale: 1.0 }, acc);
        } else {
            add_term(out, rows, &Term { left: x, stride: self.in_dim, right, scale: 1.0 }, acc);
        }
    }
}

/// Buffers of a task, used again for the next.
#[derive(Default)]
struct Scratch {
    of_layers: [Vec<f32>; 2],
    u: Vec<f32>,
    fine: Vec<f32>,
}

/// Masks `[groups, masks, 4 h, 4 w]` of `x [groups, h, w, C]` by `hyper [groups, masks, E]`.
pub fn masks(up: &Upscale<'_>, x: &[f32], hyper: &[f32], masks: usize) -> Buffer {
    let (h, w) = up.grid;
    let (conv1, conv2) = (Layer::new(up.conv1, up.bf16), Layer::new(up.conv2, up.bf16));
    let (c, eighth) = (conv1.in_dim, up.conv2.1.len() / TAPS);
    let groups = x.len() / (h * w * c);
    let row_pixels = TAPS * TAPS * w;
    let gelu = if up.bf16 { gelu_of_bf16 } else { gelu_of_inference };
    let mut out = Buffer::any(groups * masks * h * row_pixels);
    // A row of positions gives four rows of pixels of each mask.
    let mut tasks: Vec<Vec<&mut [f32]>> = (0..groups * h).map(|_| vec![]).collect();
    for (index, rows) in out.chunks_exact_mut(row_pixels).enumerate() {
        tasks[index / (masks * h) * h + index % h].push(rows);
    }
    let tasks = tasks.into_par_iter().enumerate();
    tasks.for_each_init(Scratch::default, |scratch, (index, out)| {
        let Scratch { of_layers, u, fine } = scratch;
        conv1.apply(&x[index * w * c..][..w * c], u, of_layers);
        let (weight, bias, eps) = up.norm;
        layer_norm::in_place(u, weight, bias, eps);
        gelu(u);
        conv2.apply(u, fine, of_layers);
        gelu(fine);
        let hyper = &hyper[index / h * masks * eighth..][..masks * eighth];
        for (rows, hyper) in out.into_iter().zip(hyper.chunks_exact(eighth)) {
            run(Mask { rows, fine, hyper });
        }
    });
    out
}

/// One mask's four rows of pixels, of which each is the product of `hyper` and its features.
struct Mask<'a> {
    /// `[4, 4 w]`
    rows: &'a mut [f32],
    /// `[w, taps of the first convolution, taps of the second, E]`
    fine: &'a [f32],
    /// `[E]`
    hyper: &'a [f32],
}

impl WithSimd for Mask<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let eighth = self.hyper.len();
        let (hyper, tail) = S::as_simd_f32s(self.hyper);
        let width = self.rows.len() / TAPS;
        let positions = self.fine.chunks_exact(TAPS * TAPS * eighth);
        for (position, fine) in positions.enumerate() {
            for (pixel, fine) in fine.chunks_exact(eighth).enumerate() {
                let mut sums = simd.splat_f32s(0.0);
                let (whole, rest) = S::as_simd_f32s(fine);
                for (&x, &weight) in whole.iter().zip(hyper) {
                    sums = simd.mul_add_f32s(x, weight, sums);
                }
                let mut sum = simd.reduce_sum_f32s(sums);
                for (x, weight) in rest.iter().zip(tail) {
                    sum += x * weight;
                }
                self.rows[place(width, position, pixel)] = sum;
            }
        }
    }
}

/// Where a pixel of a position lies in the four rows of pixels of its row of positions.
#[inline(always)]
pub(super) fn place(width: usize, position: usize, pixel: usize) -> usize {
    // Tap (y / 2, x / 2) of the first convolution, (y % 2, x % 2) of the second.
    let (first, second) = (pixel / TAPS, pixel % TAPS);
    let (y, x) = (first / 2 * 2 + second / 2, first % 2 * 2 + second % 2);
    y * width + position * TAPS + x
}
