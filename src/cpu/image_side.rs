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
use super::blocked::{add_term, Packed, Term};
use super::buffer::Buffer;
use super::columns::Online;
use super::layer_norm;
use super::math::{add, add_scaled, dot};
use super::panel::{panel, Into, Left, Right, PANEL};
use super::simd::{exp2_nonpositive, padded, run, vectors_mut, MAX_LANES};
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

    /// Distance of two rows of scores: whole vectors, or a panel where that can be computed in bf16.
    fn pitch(&self) -> usize {
        let pitch = padded(self.columns()).max(MAX_LANES);
        match self.bf16 && (PANEL / 2..PANEL).contains(&pitch) {
            true => PANEL,
            false => pitch,
        }
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
    /// Pairs `[depth / 2, PANEL]`, see [`super::bf16`].
    Pairs(Vec<f32>),
}

impl Tokens {
    /// From [`absorb`]ed columns `[pitch, depth]`.
    fn new(s: &Shape, columns: &[f32], depth: usize) -> Self {
        let pairs = s.bf16 && s.pitch() == PANEL && depth.is_multiple_of(2);
        if pairs && bf16::available() {
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
    let mut shifted = Vec::new();
    for (block, scores) in scores.chunks_mut(BLOCK * pitch).enumerate() {
        let (count, start) = (scores.len() / pitch, (first + block * BLOCK) * depth);
        let mut rows = &x[start..start + count * depth];
        if !shift.is_empty() {
            shifted.resize(count * depth, 0.0);
            run(Sum { out: &mut shifted, a: rows, b: &shift[start..start + count * depth] });
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
    let (used, pitch) = (s.columns(), s.pitch());
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
///
/// Weights of a head add up to one, and a softmax knows differences alone. So scores and values are relative to those of
/// the last token, which has no columns.
pub fn image_to_tokens(
    s: &Shape,
    x: &[f32],
    (scored, q): (&Scored<'_>, &Absorbed<'_>),
    [k, v]: [&[f32]; 2],
    output: &Output<'_>,
) -> Buffer {
    let (c, d, size, depth) = (s.channels, s.inner / s.heads, s.tokens * s.inner, scored.depth);
    let relative = Shape { tokens: s.tokens - 1, ..*s };
    let (used, pitch) = (relative.columns(), relative.pitch());
    let mut out = Buffer::any(k.len() / size * s.rows * c);
    let groups = out.par_chunks_mut(s.rows * c).zip(k.par_chunks(size).zip(v.par_chunks(size)));
    groups.enumerate().for_each(|(group, (out, (k, v)))| {
        let ((k, _), (v, last)) = (from_last(k, s.inner), from_last(v, s.inner));
        let keys = Tokens::new(&relative, &absorb(&relative, &k, q.weight, depth), depth);
        let values = Values::new(&relative, absorb(&relative, &v, output.weight, c));
        let mut base = vec![0f32; c];
        for (&factor, row) in last.iter().zip(output.weight.chunks_exact(c)) {
            add_scaled(&mut base, factor, row);
        }
        add(&mut base, output.bias);
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
        blocks.for_each_init(Scratch::default, |scratch, (block, out)| {
            let Scratch { weights, last, acc } = scratch;
            let (first, count) = (block * BLOCK, out.len() / c);
            weights.resize(count * pitch, 0.0);
            last.resize(padded(count * s.heads), 0.0);
            score(&relative, (scored_x, scored.shift, depth), first, &keys, weights);
            let heads = s.heads;
            run(OverTokens { scores: weights, last, constants: &constants, used, heads });
            run(Sum { out, a: &x[first * c..][..count * c], b: &base });
            match &values {
                Values::F32(values) => {
                    let (left, right) = (Left::Rows(weights, pitch), Right(values, c));
                    panel((out, c), (Into::Add, 1.0), (count, c, used), left, right);
                }
                Values::Pairs(right) => {
                    let (left, stride) = (&bf16::pairs(weights), pitch / 2);
                    add_term(out, count, &Term { left, stride, right, scale: 1.0 }, acc);
                }
            }
            let (weight, bias, eps) = output.norm;
            layer_norm::in_place(out, weight, bias, eps);
        });
    });
    out
}

/// Buffers of a task, used again for the next.
#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    last: Vec<f32>,
    acc: Vec<f32>,
}

/// The tokens' side of the output, packed for one kind of product.
enum Values {
    /// `[columns, channels]`
    F32(Vec<f32>),
    /// Pairs of columns, see [`super::bf16`].
    Pairs(Packed),
}

impl Values {
    /// From [`absorb`]ed columns `[pitch, channels]`.
    fn new(s: &Shape, columns: Vec<f32>) -> Self {
        let used = s.columns();
        if !(s.bf16 && bf16::available() && used.is_multiple_of(2)) {
            return Self::F32(columns);
        }
        let rows = transposed(&columns[..used * s.channels], s.channels);
        Self::Pairs(Packed::from_transposed_pairs(&bf16::pairs(&rows), s.channels, used))
    }
}

/// All rows but the last relative to the last, and the last.
fn from_last(rows: &[f32], width: usize) -> (Vec<f32>, &[f32]) {
    let (others, last) = rows.split_at(rows.len().saturating_sub(width));
    let differences = others.chunks_exact(width).flat_map(|row| row.iter().zip(last));
    (differences.map(|(x, last)| x - last).collect(), last)
}

/// The softmax of each row of scores, over the tokens of each head: columns `[tokens, heads]`, and a token of score 0.
struct OverTokens<'a> {
    scores: &'a mut [f32],
    /// Scratch for the token of score 0, `[rows, heads]`.
    last: &'a mut [f32],
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
    /// A literal `heads` lets the compiler unroll the loops over heads. Three passes over rows that are in cache: a vector
    /// is never loaded right after narrower stores.
    #[inline(always)]
    fn rows<S: Simd>(self, simd: S, heads: usize) {
        let Self { scores, last, constants, used, .. } = self;
        let pitch = constants.len();
        for (scores, last) in scores.chunks_exact_mut(pitch).zip(last.chunks_exact_mut(heads)) {
            let last = &mut last[..heads];
            last.fill(0.0);
            let tokens = scores[..used].chunks_exact_mut(heads);
            for (token, constants) in tokens.zip(constants.chunks_exact(heads)) {
                for h in 0..heads {
                    token[h] += constants[h];
                    last[h] = if token[h] > last[h] { token[h] } else { last[h] };
                }
            }
            for token in scores[..used].chunks_exact_mut(heads) {
                for h in 0..heads {
                    token[h] -= last[h];
                }
            }
            for last in last.iter_mut() {
                *last = -*last;
            }
        }
        for score in vectors_mut::<S>(scores).iter_mut().chain(vectors_mut::<S>(last)) {
            *score = exp2_nonpositive(simd, *score);
        }
        for (scores, last) in scores.chunks_exact_mut(pitch).zip(last.chunks_exact_mut(heads)) {
            let last = &mut last[..heads];
            for token in scores[..used].chunks_exact(heads) {
                for h in 0..heads {
                    last[h] += token[h];
                }
            }
            for last in last.iter_mut() {
                *last = 1.0 / *last;
            }
            for token in scores[..used].chunks_exact_mut(heads) {
                for h in 0..heads {
                    token[h] *= last[h];
                }
            }
        }
    }
}
