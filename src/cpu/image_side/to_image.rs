//! Tokens look at the image: the rows' mean under the weights of each column.
//!
//! ```text
//! M_j = sum_m P[m, j] x_m            dP[m, j] = x_m . dM_j           dS = P (dP - dM_j . M_j)
//! dx_m = sum_j P[m, j] dM_j + scale dS[m, j] A_j                    dA_j = scale sum_m dS[m, j] (x_m + p_m)
//! ```

use super::{absorb, entry, score, stretches, turned};
use super::{Absorbed, Shape, Stretch, Sum, Tokens, BLOCK, PART};
use crate::cpu::buffer::Buffer;
use crate::cpu::columns::{Gradient, Online};
use crate::cpu::math::{add, add_scaled, dot};
use crate::cpu::panel::{panel, row_dots, Into, Left, Right};
use crate::cpu::products::Products;
use crate::cpu::simd::run;
use crate::cpu::softmax::Normalizer;
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

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
    let absorbed: Vec<_> = queries
        .par_chunks_exact(size)
        .map(|queries| Tokens::new(s, &absorb(s, queries, k.weight, c), c))
        .collect();
    let sums = partial_sums(s, (x, positions), &absorbed);
    let mut out = vec![0f32; queries.len()];
    let tokens = out.par_chunks_exact_mut(size).zip(sums.par_chunks_exact(s.rows.div_ceil(PART)));
    tokens.for_each(|(out, parts)| {
        let mut mean = vec![0f32; c];
        for (column, out) in out.chunks_exact_mut(d).enumerate() {
            let Normalizer { sum, .. } = gathered(parts, column, &mut mean);
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

/// The weighted sums over some rows.
struct PartialSum {
    /// The largest score of each column.
    max: Vec<f32>,
    /// The sum of its weights.
    sum: Vec<f32>,
    /// The sum of the rows times its weights, `[columns, channels]`.
    rows: Vec<f32>,
}

/// The sums over each [`PART`] of the rows, group by group.
fn partial_sums(
    s: &Shape,
    (x, positions): (&[f32], &[f32]),
    columns: &[Tokens],
) -> Vec<PartialSum> {
    let (c, used, pitch, parts) = (s.channels, s.columns(), s.pitch(), s.rows.div_ceil(PART));
    let sum = |index: usize| {
        let (group, first) = (index / parts, index % parts * PART);
        let count = PART.min(s.rows - first);
        let x = entry(x, s.rows * c, (group, columns.len()));
        let mut scores = vec![0f32; count * pitch];
        score(s, (x, positions, c), first, &columns[group], &mut scores);
        let mut max = vec![f32::NEG_INFINITY; pitch];
        let (mut sum, mut rescale) = (vec![0f32; pitch], vec![0f32; pitch]);
        run(Online { scores: &mut scores, max: &mut max, sum: &mut sum, rescale: &mut rescale });
        let mut mean = vec![0f32; used * c];
        let rows = &x[first * c..][..count * c];
        match &columns[group] {
            Tokens::F32(_) => {
                let (weights, rows) = (Left::Columns(&scores, pitch), Right(rows, c));
                panel((&mut mean, c), (Into::Store, 1.0), (used, c, count), weights, rows);
            }
            // The rows of a block stay in cache between the rounding and the product.
            Tokens::Pairs(_) => {
                let blocks = scores.chunks(BLOCK * pitch).zip(rows.chunks(BLOCK * c));
                for (weights, rows) in blocks {
                    let (mean, shape) = ((&mut mean[..], c), (used, c, rows.len() / c));
                    let weights = Products::Pairs.down_rows(weights, pitch);
                    let rows = Products::Pairs.down_rows(rows, c);
                    let (left, right) = (Left::Columns(&weights, pitch), Right(&rows, c));
                    Products::Pairs.multiply(mean, (Into::Add, 1.0), shape, left, right);
                }
            }
        }
        PartialSum { max, sum, rows: mean }
    };
    (0..columns.len() * parts).into_par_iter().map(sum).collect()
}

/// The sum over all parts of a column, and its normalizer.
fn gathered(parts: &[PartialSum], column: usize, rows: &mut [f32]) -> Normalizer {
    let max = parts.iter().map(|part| part.max[column]).fold(f32::MIN, f32::max);
    let mut sum = 0.0;
    rows.fill(0.0);
    for part in parts {
        let factor = (part.max[column] - max).exp2();
        sum += factor * part.sum[column];
        add_scaled(rows, factor, &part.rows[column * rows.len()..][..rows.len()]);
    }
    Normalizer { max, sum }
}

/// The means M `[groups, columns, channels]` for absorbed columns of the same shape, and their normalizers.
pub fn means(
    s: &Shape,
    (x, positions): (&[f32], &[f32]),
    columns: &[f32],
) -> (Vec<f32>, Vec<Normalizer>) {
    let (c, used) = (s.channels, s.columns());
    let turned = columns.par_chunks_exact(used * c).map(|a| Tokens::F32(turned(s, a, c)));
    let sums = partial_sums(s, (x, positions), &turned.collect::<Vec<_>>());
    let mut out = vec![0f32; columns.len()];
    let parts = s.rows.div_ceil(PART);
    let rows = out.par_chunks_exact_mut(c).enumerate().map(|(index, out)| {
        let normalizer = gathered(&sums[index / used * parts..][..parts], index % used, out);
        out.iter_mut().for_each(|out| *out /= normalizer.sum);
        normalizer
    });
    let normalizers = rows.collect();
    (out, normalizers)
}

/// Values of a group that its backward reads for every block of rows.
struct Group<'a> {
    /// A `[columns, channels]`, and turned `[channels, pitch]`.
    columns: (&'a [f32], Vec<f32>),
    /// dM, and turned.
    grad: (&'a [f32], Vec<f32>),
    max: Vec<f32>,
    inverse_sum: Vec<f32>,
    delta: Vec<f32>,
}

impl<'a> Group<'a> {
    fn new(
        s: &Shape,
        columns: &'a [f32],
        (means, normalizers): (&[f32], &[Normalizer]),
        grad: &'a [f32],
    ) -> Self {
        let c = s.channels;
        // Columns without a token weigh nothing.
        let mut delta = row_dots(grad, means, c);
        let mut max: Vec<f32> = normalizers.iter().map(|n| n.max).collect();
        let mut inverse_sum: Vec<f32> = normalizers.iter().map(|n| 1.0 / n.sum).collect();
        for values in [&mut delta, &mut max, &mut inverse_sum] {
            values.resize(s.pitch(), 0.0);
        }
        Self {
            columns: (columns, turned(s, columns, c)),
            grad: (grad, turned(s, grad, c)),
            max,
            inverse_sum,
            delta,
        }
    }

    /// Adds to the gradients of a block of rows, and of A.
    fn add_gradients(
        &self,
        s: &Shape,
        (rows, placed): (&[f32], &[f32]),
        [weights, grads]: [&mut [f32]; 2],
        [dx, dcolumns]: [&mut [f32]; 2],
    ) {
        let (c, used, pitch, scale) = (s.channels, s.columns(), s.pitch(), s.softmax_scale);
        let count = rows.len() / c;
        let (weights, grads) = (&mut weights[..count * pitch], &mut grads[..count * pitch]);
        let shape = (count, pitch, c);
        let (left, right) = (Left::Rows(placed, c), Right(&self.columns.1, pitch));
        panel((weights, pitch), (Into::Store, scale * LOG2_E), shape, left, right);
        let (left, right) = (Left::Rows(rows, c), Right(&self.grad.1, pitch));
        panel((grads, pitch), (Into::Store, 1.0), shape, left, right);
        let Self { max, inverse_sum, delta, .. } = self;
        run(Gradient { scores: weights, grads, max, inverse_sum, delta });
        let shape = (count, c, used);
        let (ds, dp) = (Left::Rows(grads, pitch), Left::Rows(weights, pitch));
        panel((dx, c), (Into::Add, scale), shape, ds, Right(self.columns.0, c));
        panel((dx, c), (Into::Add, 1.0), shape, dp, Right(self.grad.0, c));
        let (ds, rows) = (Left::Columns(grads, pitch), Right(placed, c));
        panel((dcolumns, c), (Into::Add, scale), (used, c, count), ds, rows);
    }
}

/// The gradients of x and of the columns for the gradient `grad` of what [`means`] gave.
pub fn means_backward(
    s: &Shape,
    (x, positions): (&[f32], &[f32]),
    columns: &[f32],
    (means, normalizers): (&[f32], &[Normalizer]),
    grad: &[f32],
) -> (Buffer, Vec<f32>) {
    let (c, size) = (s.channels, s.columns() * s.channels);
    let kept = means.par_chunks_exact(size).zip(normalizers.par_chunks_exact(s.columns()));
    let groups: Vec<_> = columns
        .par_chunks_exact(size)
        .zip(kept.zip(grad.par_chunks_exact(size)))
        .map(|(columns, (kept, grad))| Group::new(s, columns, kept, grad))
        .collect();
    let mut dx = Buffer::any(x.len());
    let parts: Vec<(usize, Vec<f32>)> = stretches([(&mut dx, c)], s.rows, groups.len())
        .into_par_iter()
        .map(|Stretch { groups: own, first, grads: [dx] }| {
            let x = entry(x, s.rows * c, (own.start, groups.len()));
            let mut dcolumns = vec![0f32; own.len() * size];
            let mut scratch = [(); 2].map(|()| vec![0f32; BLOCK * s.pitch()]);
            let mut placed = Vec::new();
            for (block, dx) in dx.chunks_mut(BLOCK * c).enumerate() {
                let at = (first + block * BLOCK) * c;
                let rows = &x[at..at + dx.len()];
                placed.resize(rows.len(), 0.0);
                run(Sum { out: &mut placed, a: rows, b: &positions[at..at + rows.len()] });
                dx.fill(0.0);
                let own = groups[own.clone()].iter().zip(dcolumns.chunks_exact_mut(size));
                for (group, dcolumns) in own {
                    let [weights, grads] = &mut scratch;
                    let scratch = [&mut weights[..], &mut grads[..]];
                    group.add_gradients(s, (rows, &placed), scratch, [&mut *dx, dcolumns]);
                }
            }
            (own.start * size, dcolumns)
        })
        .collect();
    let mut dcolumns = vec![0f32; columns.len()];
    for (start, part) in parts {
        add(&mut dcolumns[start..], &part);
    }
    (dx, dcolumns)
}
