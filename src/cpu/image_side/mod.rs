//! An image and a few tokens that look at each other, with the image's projections absorbed into the tokens.
//!
//! ```text
//! column c = (token t, head h)       S[m, c] = scale (x_m + p_m) . A_c         A_c = sum_i t_h[i] W[h d + i, :]
//! tokens to image    P = softmax over m of each column      out_c = (sum_m P[m, c] x_m) Wv_h^T + bias
//! image to tokens    P = softmax over t within each head    y_m = norm(x_m + bias + sum_c P[m, c] V_c)
//! ```
//! k, v and q of an image of n rows cost `n C inner` products each, and so does its output projection. With them
//! absorbed a product costs `n C columns`. The rows go in blocks that stay in cache, and nothing else of the image's
//! size exists but the output.
//!
//! The functions for training take columns and values that are absorbed already, so the gradients of projections and
//! tokens are those of small products. A backward computes scores and weights again and keeps nothing of the image's
//! size but the gradient of the rows.

mod over_tokens;
mod to_image;
mod to_tokens;

pub use to_image::{means, means_backward, tokens_to_image};
pub use to_tokens::{image_to_tokens, mixed, mixed_backward, Output, TokenSide};

use super::bf16;
use super::panel::{panel, Into, Left, Right};
use super::simd::{padded, run, MAX_LANES};
use pulp::{Simd, WithSimd};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Rows of a block: whole register tiles.
const BLOCK: usize = 96;
/// Rows whose weighted sum is taken at one time when tokens look at the image; the parts are added in order.
const PART: usize = 512;

/// The shapes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the image.
    pub rows: usize,
    /// Channels of the image.
    pub channels: usize,
    /// Tokens of a group.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of all heads.
    pub inner: usize,
    /// Factor of `q . k`.
    pub softmax_scale: f32,
    /// Whether rows and tokens may be rounded to bf16 for their products.
    pub bf16: bool,
}

impl Shape {
    /// Pairs of a token and a head.
    pub fn columns(&self) -> usize {
        self.tokens * self.heads
    }

    /// Distance of two rows of scores: whole vectors.
    fn pitch(&self) -> usize {
        padded(self.columns()).max(MAX_LANES)
    }
}

/// The rows that tokens are multiplied with: `x + shift`, `[rows, depth]` for each entry of x.
#[derive(Clone, Copy)]
pub struct Scored<'a> {
    /// `[groups or 1, rows, depth]`
    pub x: &'a [f32],
    /// `[rows, depth]`, or empty.
    pub shift: &'a [f32],
    /// Length of a row.
    pub depth: usize,
}

/// A projection `x W^T + bias` whose weight is absorbed.
#[derive(Clone, Copy)]
pub struct Absorbed<'a> {
    /// `[inner, channels]`; empty where the rows are projected already.
    pub weight: &'a [f32],
    /// `[inner]`, or empty.
    pub bias: &'a [f32],
}

/// The entry of `[entries, size]` that a group of tokens meets; each serves equally many groups.
fn entry(x: &[f32], size: usize, (group, groups): (usize, usize)) -> &[f32] {
    &x[group * (x.len() / size) / groups * size..][..size]
}

/// A stretch of the rows of one entry, for gradients. The groups meet it, `first` is its first row, and `grads` are the
/// places of `N` tensors' gradients.
struct Stretch<'a, const N: usize> {
    groups: Range<usize>,
    first: usize,
    grads: [&'a mut [f32]; N],
}

/// The stretches of `rows` rows of tensors `[entries, rows, width]`, each given with its width.
fn stretches<const N: usize>(
    tensors: [(&mut [f32], usize); N],
    rows: usize,
    groups: usize,
) -> Vec<Stretch<'_, N>> {
    let entries = tensors[0].0.len() / (rows * tensors[0].1);
    let parts = rows.div_ceil(PART);
    let mut rest = tensors;
    let stretch = |index: usize| {
        let (entry, first) = (index / parts, index % parts * PART);
        let count = PART.min(rows - first);
        let grads = rest.each_mut().map(|(rest, width)| {
            let (part, behind) = std::mem::take(rest).split_at_mut(count * *width);
            *rest = behind;
            part
        });
        Stretch { groups: entry * groups / entries..(entry + 1) * groups / entries, first, grads }
    };
    (0..entries * parts).map(stretch).collect()
}

/// `sum_i tokens[t, h d + i] weight[h d + i, :]` for each column, `[pitch, depth]`; rows without a token are zero.
fn absorb(s: &Shape, tokens: &[f32], weight: &[f32], depth: usize) -> Vec<f32> {
    let d = s.inner / s.heads;
    let mut out = vec![0f32; s.pitch() * depth];
    for head in 0..s.heads.min(s.columns()) {
        let tokens = &tokens[head * d..];
        if weight.is_empty() {
            let columns = out.chunks_exact_mut(s.heads * depth).zip(tokens.chunks(s.inner));
            for (out, token) in columns {
                out[head * (depth + d)..][..d].copy_from_slice(&token[..d]);
            }
            continue;
        }
        let (left, right) =
            (Left::Rows(tokens, s.inner), Right(&weight[head * d * depth..], depth));
        let shape = (s.tokens, depth, d);
        panel((&mut out[head * depth..], s.heads * depth), (Into::Store, 1.0), shape, left, right);
    }
    out
}

/// `[rows, columns] -> [columns, rows]`
fn transposed(x: &[f32], columns: usize) -> Vec<f32> {
    let rows = x.len() / columns;
    let mut out = vec![0f32; x.len()];
    for (r, row) in x.chunks_exact(columns).enumerate() {
        for (out, &value) in out.chunks_exact_mut(rows).zip(row) {
            out[r] = value;
        }
    }
    out
}

/// The tokens' side of the scores, packed for one kind of product.
enum Tokens {
    /// `[depth, pitch]`
    F32(Vec<f32>),
    /// Pairs `[depth / 2, pitch]`, see [`super::bf16`].
    Pairs(Vec<f32>),
}

impl Tokens {
    /// From [`absorb`]ed columns `[pitch, depth]`.
    fn new(s: &Shape, columns: &[f32], depth: usize) -> Self {
        if s.bf16 && depth.is_multiple_of(2) && bf16::available() {
            return Self::Pairs(transposed(&bf16::pairs(columns), depth / 2));
        }
        Self::F32(transposed(columns, depth))
    }
}

/// `out = a + b`, b as often as it fits.
struct Sum<'a> {
    out: &'a mut [f32],
    a: &'a [f32],
    b: &'a [f32],
}

impl WithSimd for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let parts = self.out.chunks_mut(self.b.len()).zip(self.a.chunks(self.b.len()));
        for (out, a) in parts {
            for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(self.b)) {
                *out = a + b;
            }
        }
    }
}

/// Columns `[columns, depth]` with zeros behind, `[pitch, depth]`, as columns: `[depth, pitch]`.
fn turned(s: &Shape, columns: &[f32], depth: usize) -> Vec<f32> {
    let mut out = columns.to_vec();
    out.resize(s.pitch() * depth, 0.0);
    transposed(&out, depth)
}

/// Scores of the rows from `first` on, `[count, pitch]`, to base two.
fn score(
    s: &Shape,
    (x, shift, depth): (&[f32], &[f32], usize),
    first: usize,
    tokens: &Tokens,
    scores: &mut [f32],
) {
    let pitch = s.pitch();
    let scale = s.softmax_scale * LOG2_E;
    let mut scratch = Vec::new();
    for (block, scores) in scores.chunks_mut(BLOCK * pitch).enumerate() {
        let (count, start) = (scores.len() / pitch, (first + block * BLOCK) * depth);
        let rows = &x[start..start + count * depth];
        let shift = (!shift.is_empty()).then(|| &shift[start..start + count * depth]);
        match tokens {
            Tokens::F32(tokens) => {
                let rows = match shift {
                    Some(shift) => {
                        scratch.resize(rows.len(), 0.0);
                        run(Sum { out: &mut scratch, a: rows, b: shift });
                        &scratch
                    }
                    None => rows,
                };
                let (left, right) = (Left::Rows(rows, depth), Right(tokens, pitch));
                panel((scores, pitch), (Into::Store, scale), (count, pitch, depth), left, right);
            }
            Tokens::Pairs(tokens) => {
                let pairs = match shift {
                    Some(shift) => bf16::pairs_of_sums(rows, shift, &mut scratch),
                    None => bf16::pairs_in(rows, &mut scratch),
                };
                let (left, right) = (Left::Rows(pairs, depth / 2), Right(tokens, pitch));
                let shape = (count, pitch, depth / 2);
                bf16::product((scores, pitch), (Into::Store, scale), shape, left, right);
            }
        }
    }
}
