//! The mask decoder's upscaling and masks, pixel by pixel, in blocks that stay in cache.
//!
//! ```text
//! u = gelu(norm(x W1 + b1))     [4 taps, Q] of each position      w = gelu(u W2 + b2)     [4 taps, E] of each tap of u
//! mask_i = hyper_i . w          [4 h, 4 w]
//! ```
//! The maps u and w are never whole; the masks lie as images.

use super::activation::gelu;
use super::blocked::{accumulate, Packed, Term};
use super::buffer::Buffer;
use super::layer_norm;
use super::math::add;
use super::panel::{panel, Into, Left, Right, PANEL};
use super::simd::padded;
use rayon::prelude::*;

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
}

/// A linear layer, ready for blocks.
struct Layer<'a> {
    weight: Packed,
    bias: &'a [f32],
    in_dim: usize,
}

impl<'a> Layer<'a> {
    fn new((weight, bias): (&'a [f32], &'a [f32])) -> Self {
        let in_dim = weight.len() / bias.len();
        Self { weight: Packed::from_transposed(weight, bias.len(), in_dim), bias, in_dim }
    }

    /// `x W^T + bias`, `[rows, in] -> [rows, out]`; `acc` is scratch.
    fn apply(&self, x: &[f32], out: &mut [f32], acc: &mut Vec<f32>) {
        let (rows, width) = (x.len() / self.in_dim, self.bias.len());
        acc.resize(rows * PANEL, 0.0);
        let term = Term { left: x, stride: self.in_dim, right: &self.weight, scale: 1.0 };
        for column in self.weight.panels() {
            accumulate(acc, rows, column, &[term]);
            let end = width.min(column + PANEL);
            for (out, acc) in out.chunks_exact_mut(width).zip(acc.chunks_exact(PANEL)) {
                out[column..end].copy_from_slice(&acc[..end - column]);
                add(&mut out[column..end], &self.bias[column..end]);
            }
        }
    }
}

/// Masks `[groups, masks, 4 h, 4 w]` of `x [groups, h, w, C]` by `hyper [groups, masks, E]`.
pub fn masks(up: &Upscale<'_>, x: &[f32], hyper: &[f32], masks: usize) -> Buffer {
    let (h, w) = up.grid;
    let (conv1, conv2) = (Layer::new(up.conv1), Layer::new(up.conv2));
    let (c, eighth) = (conv1.in_dim, up.conv2.1.len() / TAPS);
    let groups = x.len() / (h * w * c);
    let (row_pixels, pitch) = (TAPS * TAPS * w, padded(masks));
    // Of each row of positions its four rows of pixels, mask after mask.
    let mut rows = Buffer::any(groups * h * masks * row_pixels);
    rows.par_chunks_mut(masks * row_pixels).enumerate().for_each(|(index, out)| {
        let (group, mut acc) = (index / h, Vec::new());
        let mut u = vec![0f32; w * up.conv1.1.len()];
        conv1.apply(&x[index * w * c..][..w * c], &mut u, &mut acc);
        let (weight, bias, eps) = up.norm;
        layer_norm::in_place(&mut u, weight, bias, eps);
        gelu(&mut u, false);
        let mut fine = vec![0f32; row_pixels * eighth];
        conv2.apply(&u, &mut fine, &mut acc);
        gelu(&mut fine, false);
        // The columns are the masks.
        let mut hyper_t = vec![0f32; eighth * pitch];
        let hyper = &hyper[group * masks * eighth..][..masks * eighth];
        for (i, &value) in hyper.iter().enumerate() {
            hyper_t[i % eighth * pitch + i / eighth] = value;
        }
        let mut values = vec![0f32; row_pixels * pitch];
        let shape = (row_pixels, pitch, eighth);
        let (left, right) = (Left::Rows(&fine, eighth), Right(&hyper_t, pitch));
        panel((&mut values, pitch), Into::Store, 1.0, shape, left, right);
        for (pixel, values) in values.chunks_exact(pitch).enumerate() {
            let (position, tap1, tap2) = (pixel / 16, pixel / TAPS % TAPS, pixel % TAPS);
            let y = tap1 / 2 * 2 + tap2 / 2;
            let place = y * TAPS * w + position * TAPS + tap1 % 2 * 2 + tap2 % 2;
            for (mask, &value) in values[..masks].iter().enumerate() {
                out[mask * row_pixels + place] = value;
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
