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

use super::bf16;
use super::buffer::Buffer;
use super::columns::Online;
use super::layer_norm;
use super::math::{add, add_scaled, dot};
use super::panel::{panel, Into, Left, Right, PANEL};
use super::simd::{exp2_nonpositive, padded, run, vectors_mut};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

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
    fn columns(&self) -> usize {
        self.tokens * self.heads
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

/// The rows of entry `group`, of which there may be one for all.
fn entry(x: &[f32], size: usize, group: usize) -> &[f32] {
    if x.len() > size {
        &x[group * size..][..size]
    } else {
        x
    }
}

/// `sum_i tokens[t, h d + i] weight[h d + i, :]` for each column, `[padded columns, depth]`; rows without a token are zero.
fn absorb(s: &Shape, tokens: &[f32], weight: &[f32], depth: usize) -> Vec<f32> {
    let d = s.inner / s.heads;
    let mut out = vec![0f32; padded(s.columns()) * depth];
    for (column, (out, token)) in
        out.chunks_exact_mut(depth).zip(tokens.chunks_exact(d)).enumerate()
    {
        let first = column % s.heads * d;
        if weight.is_empty() {
            out[first..first + d].copy_from_slice(token);
            continue;
        }
        for (&factor, row) in token.iter().zip(weight[first * depth..].chunks_exact(depth)) {
            add_scaled(out, factor, row);
        }
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
    /// Pairs `[depth / 2, PANEL]`, see [`super::bf16`].
    Pairs(Vec<f32>),
}

impl Tokens {
    /// From [`absorb`]ed columns `[pitch, depth]`.
    fn new(s: &Shape, columns: &[f32], depth: usize) -> Self {
        let pairs = s.bf16 && padded(s.columns()) == PANEL && depth.is_multiple_of(2);
        if pairs && bf16::available() {
            return Self::Pairs(transposed(&bf16::pairs(columns), depth / 2));
        }
        Self::F32(transposed(columns, depth))
    }
}

/// Scores of the rows from `first` on, `[count, pitch]`, to base two.
fn score(
    s: &Shape,
    (x, shift, depth): (&[f32], &[f32], usize),
    first: usize,
    tokens: &Tokens,
    scores: &mut [f32],
) {
    let pitch = padded(s.columns());
    let scale = s.softmax_scale * LOG2_E;
    let mut shifted = Vec::new();
    for (block, scores) in scores.chunks_mut(BLOCK * pitch).enumerate() {
        let (count, start) = (scores.len() / pitch, (first + block * BLOCK) * depth);
        let mut rows = &x[start..start + count * depth];
        if !shift.is_empty() {
            shifted.clear();
            shifted.extend(rows.iter().zip(&shift[start..]).map(|(x, p)| x + p));
            rows = &shifted;
        }
        match tokens {
            Tokens::F32(tokens) => {
                let (left, right) = (Left::Rows(rows, depth), Right(tokens, pitch));
                panel((scores, pitch), (Into::Store, scale), (count, pitch, depth), left, right);
            }
            Tokens::Pairs(tokens) => {
                let (shape, rows) = ((count, depth / 2), bf16::pairs(rows));
                bf16::panel(scores, (Into::Store, scale), shape, (&rows, depth / 2), tokens);
            }
        }
    }
}

/// Queries `[groups, tokens, inner]` look at `x`: `[groups, tokens, inner]`. k's bias is the same for all rows, and so
/// leaves the softmax as it is.
pub fn tokens_to_image(
    s: &Shape,
    queries: &[f32],
    (x, positions): (&[f32], &[f32]),
    k: &Absorbed<'_>,
    v: &Absorbed<'_>,
) -> Vec<f32> {
    let (c, d, size) = (s.channels, s.inner / s.heads, s.tokens * s.inner);
    let (used, pitch) = (s.columns(), padded(s.columns()));
    let groups = queries.len() / size;
    let absorbed: Vec<_> = queries
        .par_chunks_exact(size)
        .map(|queries| Tokens::new(s, &absorb(s, queries, k.weight, c), c))
        .collect();
    let parts = s.rows.div_ceil(PART);
    let sums: Vec<(Vec<f32>, Vec<f32>, Vec<f32>)> = (0..groups * parts)
        .into_par_iter()
        .map(|index| {
            let (group, first) = (index / parts, index % parts * PART);
            let count = PART.min(s.rows - first);
            let x = entry(x, s.rows * c, group);
            let mut scores = vec![0f32; count * pitch];
            score(s, (x, positions, c), first, &absorbed[group], &mut scores);
            let mut max = vec![f32::NEG_INFINITY; pitch];
            let (mut sum, mut rescale) = (vec![0f32; pitch], vec![0f32; pitch]);
            run(Online {
                scores: &mut scores,
                max: &mut max,
                sum: &mut sum,
                rescale: &mut rescale,
            });
            let mut mean = vec![0f32; used * c];
            let (weights, rows) = (Left::Columns(&scores, pitch), Right(&x[first * c..], c));
            panel((&mut mean, c), (Into::Store, 1.0), (used, c, count), weights, rows);
            (max, sum, mean)
        })
        .collect();
    let mut out = vec![0f32; queries.len()];
    let tokens = out.par_chunks_exact_mut(size).zip(sums.par_chunks_exact(parts));
    tokens.for_each(|(out, parts)| {
        let mut mean = vec![0f32; c];
        for (column, out) in out.chunks_exact_mut(d).enumerate() {
            let max = parts.iter().map(|part| part.0[column]).fold(f32::MIN, f32::max);
            let mut sum = 0.0;
            mean.fill(0.0);
            for (part_max, part_sum, part_mean) in parts {
                let factor = (part_max[column] - max).exp2();
                sum += factor * part_sum[column];
                add_scaled(&mut mean, factor, &part_mean[column * c..][..c]);
            }
            let first = column % s.heads * d;
            for (out, row) in out.iter_mut().zip(v.weight[first * c..].chunks_exact(c)) {
                *out = dot(row, &mean) / sum;
            }
            if !v.bias.is_empty() {
                add(out, &v.bias[first..first + d]);
            }
        }
    });
    out
}

/// The end of [`image_to_tokens`].
#[derive(Clone, Copy)]
pub struct Output<'a> {
    /// The output projection's weight, transposed: `[inner, channels]`.
    pub weight: &'a [f32],
    /// Its bias, `[channels]`, or empty.
    pub bias: &'a [f32],
    /// The norm's weight and bias, and epsilon.
    pub norm: (&'a [f32], &'a [f32], f64),
}

/// The image `x [groups or 1, rows, channels]` looks at k and v, `[groups, tokens, inner]` each:
/// `norm(x + out_proj(attention))`, `[groups, rows, channels]`.
pub fn image_to_tokens(
    s: &Shape,
    x: &[f32],
    (scored, q): (&Scored<'_>, &Absorbed<'_>),
    [k, v]: [&[f32]; 2],
    output: &Output<'_>,
) -> Buffer {
    let (c, d, size, depth) = (s.channels, s.inner / s.heads, s.tokens * s.inner, scored.depth);
    let (used, pitch) = (s.columns(), padded(s.columns()));
    let mut out = Buffer::any(k.len() / size * s.rows * c);
    let groups = out.par_chunks_mut(s.rows * c).zip(k.par_chunks(size).zip(v.par_chunks(size)));
    groups.enumerate().for_each(|(group, (out, (k, v)))| {
        let keys = Tokens::new(s, &absorb(s, k, q.weight, depth), depth);
        let mut values = absorb(s, v, output.weight, c);
        // The weights of the first head add up to one, and so carry the bias.
        if !output.bias.is_empty() {
            let of_first_head = values.chunks_exact_mut(c).step_by(s.heads).take(s.tokens);
            of_first_head.for_each(|value| add(value, output.bias));
        }
        // q's bias adds a constant to each column's scores.
        let mut constants = vec![0f32; pitch];
        if !q.bias.is_empty() {
            for (column, k) in k.chunks_exact(d).enumerate() {
                let bias = &q.bias[column % s.heads * d..][..d];
                constants[column] = dot(k, bias) * s.softmax_scale * LOG2_E;
            }
        }
        let x = entry(x, s.rows * c, group);
        let scored_x = entry(scored.x, s.rows * depth, group);
        let blocks = out.par_chunks_mut(BLOCK * c).enumerate();
        blocks.for_each_init(Vec::new, |weights, (block, out)| {
            let (first, count) = (block * BLOCK, out.len() / c);
            weights.resize(count * pitch, 0.0);
            score(s, (scored_x, scored.shift, depth), first, &keys, weights);
            run(OverTokens { scores: weights, constants: &constants, used, heads: s.heads });
            out.copy_from_slice(&x[first * c..][..count * c]);
            let (left, right) = (Left::Rows(weights, pitch), Right(&values, c));
            panel((out, c), (Into::Add, 1.0), (count, c, used), left, right);
            let (weight, bias, eps) = output.norm;
            layer_norm::in_place(out, weight, bias, eps);
        });
    });
    out
}

/// The softmax of each row of scores, over the tokens of each head: columns `[tokens, heads]`.
struct OverTokens<'a> {
    scores: &'a mut [f32],
    /// Added to every row; as long as one.
    constants: &'a [f32],
    used: usize,
    heads: usize,
}

impl WithSimd for OverTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.heads {
            8 => self.rows::<S>(simd, 8),
            heads => self.rows::<S>(simd, heads),
        }
    }
}

impl OverTokens<'_> {
    /// A literal `heads` lets the compiler unroll the loops over heads.
    #[inline(always)]
    fn rows<S: Simd>(self, simd: S, heads: usize) {
        let mut heads_max = vec![0f32; heads];
        let mut heads_sum = vec![0f32; heads];
        let (max, sum) = (&mut heads_max[..heads], &mut heads_sum[..heads]);
        for scores in self.scores.chunks_exact_mut(self.constants.len()) {
            for (score, constant) in scores.iter_mut().zip(self.constants) {
                *score += constant;
            }
            max.fill(f32::MIN);
            for token in scores[..self.used].chunks_exact(heads) {
                for h in 0..heads {
                    max[h] = if token[h] > max[h] { token[h] } else { max[h] };
                }
            }
            for token in scores[..self.used].chunks_exact_mut(heads) {
                for h in 0..heads {
                    token[h] -= max[h];
                }
            }
            for score in vectors_mut::<S>(scores) {
                *score = exp2_nonpositive(simd, *score);
            }
            sum.fill(0.0);
            for token in scores[..self.used].chunks_exact(heads) {
                for h in 0..heads {
                    sum[h] += token[h];
                }
            }
            for sum in sum.iter_mut() {
                *sum = 1.0 / *sum;
            }
            for token in scores[..self.used].chunks_exact_mut(heads) {
                for h in 0..heads {
                    token[h] *= sum[h];
                }
            }
        }
    }
}
