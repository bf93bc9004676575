//! The forward of the projections.
//!
//! A task takes a block of rows: S while the rows are in cache, then panel after panel of the output. The low-rank term
//! is one more product into the same accumulator. Bias, activation and residual follow on the accumulator, and one
//! write. The dropped input exists for one block at a time; the backward regenerates it from the seed.
//!
//! Kept for the backward: S, and with an activation the sum before it.

use super::{copy_columns, dropped, few_rows, Projections, Ready, Saved};
use crate::cpu::blocked::{accumulate, Packed, Term, ROWS};
use crate::cpu::buffer::Elements;
use crate::cpu::element::Element;
use crate::cpu::int8;
use crate::cpu::panel::PANEL;
use crate::cpu::simd::{padded, run};
use crate::problem::LoraProblem;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::borrow::Cow;

/// Rows whose sums stay in the first-level cache through the epilogue.
const EPILOGUE: usize = 48;

/// `out [rows, sum of out_dim]` for `x [rows, in]`; what the backward needs is kept only if `keep`.
pub fn forward<T: Element>(
    layer: &Projections<'_>,
    x: &[T],
    residual: Option<&[T]>,
    keep: bool,
) -> (Elements<T>, Saved<T>) {
    let (in_dim, total) = (layer.in_dim, layer.total());
    let rows = x.len() / in_dim;
    if !keep && few_rows::applies(rows, in_dim) {
        let (mut wide_x, mut wide_residual) = (Vec::new(), Vec::new());
        let x = T::read(x, &mut wide_x);
        let residual = residual.map(|residual| T::read(residual, &mut wide_residual));
        if let Some(sums) = few_rows::forward(layer, x, residual) {
            let mut out = Elements::any(sums.len());
            T::write(&mut out, &mut Vec::new(), |out| out.copy_from_slice(&sums));
            return (out, Saved::default());
        }
    }
    let parts = layer.ready(|weight, n, k| weight.transposed(n, k));
    let any = |test: fn(&Ready<'_>) -> bool| parts.iter().any(test);
    let (in_pairs, in_quads) = (any(|p| p.weight.in_pairs()), any(|p| p.weight.in_quads()));
    let in_f32 = any(|p| p.lora.is_some() || !(p.weight.in_pairs() || p.weight.in_quads()));
    let constants: Vec<_> = parts.iter().map(Ready::constant).collect();
    // A^T and B^T where there is LoRA.
    let low_rank: Vec<_> = parts
        .iter()
        .map(|part| {
            let rank = part.lora?.rank;
            let a = Packed::from_transposed(part.a(), rank, in_dim);
            Some((a, Packed::from_transposed(part.b(), part.out_dim(), rank)))
        })
        .collect();
    let keep_sum = keep && layer.activation.is_some();
    let mut out = Elements::any(rows * total);
    let mut sum = Elements::any(if keep_sum { out.len() } else { 0 });
    let sums: Vec<Option<&mut [T]>> = match keep_sum {
        true => sum.chunks_mut(ROWS * total).map(Some).collect(),
        false => (0..rows.div_ceil(ROWS)).map(|_| None).collect(),
    };
    let block_s: Vec<Vec<Vec<f32>>> = out
        .par_chunks_mut(ROWS * total)
        .zip(sums)
        .enumerate()
        .map(|(block, (out, mut sum))| {
            let first = block * ROWS;
            let count = out.len() / total;
            let x_rows = &x[first * in_dim..][..count * in_dim];
            let x_pairs = if in_pairs { T::pairs(x_rows) } else { Cow::Borrowed(&[][..]) };
            let x_quads = if in_quads { int8::rows(x_rows, in_dim) } else { Vec::new() };
            let mut wide = Vec::new();
            let x_rows = if in_f32 { T::read(x_rows, &mut wide) } else { &[] };
            let mut acc = vec![0f32; count.min(EPILOGUE) * PANEL];
            let mut s_of_parts = Vec::new();
            for ((part, constant), low_rank) in parts.iter().zip(&constants).zip(&low_rank) {
                let s = match (low_rank, part.lora) {
                    (Some((a, _)), Some(lora)) => low_rank_input(x_rows, in_dim, first, a, lora),
                    _ => Vec::new(),
                };
                let (left, stride) = match &part.weight {
                    weight if weight.in_pairs() => (&*x_pairs, in_dim / 2),
                    weight if weight.in_quads() => (&x_quads[..], in_dim / 4 + int8::TAIL),
                    _ => (x_rows, in_dim),
                };
                let rows = (0..count).step_by(EPILOGUE);
                for (column, row) in
                    part.weight.panels().flat_map(|column| rows.clone().map(move |r| (column, r)))
                {
                    let count = EPILOGUE.min(count - row);
                    let acc = &mut acc[..count * PANEL];
                    let left = &left[row * stride..];
                    let base = Term { left, stride, right: &part.weight, scale: 1.0 };
                    match (low_rank, part.lora) {
                        (Some((_, b)), Some(lora)) => {
                            let stride = padded(lora.rank);
                            let left = &s[row * stride..];
                            let up = Term { left, stride, right: b, scale: lora.scaling };
                            accumulate(acc, count, column, &[base, up]);
                        }
                        _ => accumulate(acc, count, column, &[base]),
                    }
                    let constant = &constant[column..part.out_dim().min(column + PANEL)];
                    let place = row * total + part.columns.start + column;
                    let sum = sum.as_mut().map(|sum| &mut sum[place..]);
                    run(AddConstant { acc: &mut *acc, constant, sum, total });
                    if let Some(activation) = layer.activation {
                        activation(acc, false);
                    }
                    let residual = residual.map(|residual| &residual[first * total + place..]);
                    let (acc, out) = (&*acc, &mut out[place..]);
                    run(Store { acc, residual, out, total, width: constant.len() });
                }
                s_of_parts.push(s);
            }
            if keep {
                s_of_parts
            } else {
                Vec::new()
            }
        })
        .collect();
    let s = if keep {
        (0..parts.len())
            .map(|p| block_s.iter().flat_map(|s| s[p].iter().copied()).collect())
            .collect()
    } else {
        Vec::new()
    };
    (out, Saved { s, sum })
}

/// `drop(x) A^T` for rows of x, `[count, padded rank]`.
fn low_rank_input(
    x: &[f32],
    in_dim: usize,
    first: usize,
    a: &Packed,
    lora: LoraProblem,
) -> Vec<f32> {
    let (count, width) = (x.len() / in_dim, padded(lora.rank));
    let x = dropped(x, in_dim, in_dim, first, lora);
    let mut s = vec![0f32; count * width];
    let mut acc = vec![0f32; count * PANEL];
    for column in a.panels() {
        accumulate(
            &mut acc,
            count,
            column,
            &[Term { left: &x, stride: in_dim, right: a, scale: 1.0 }],
        );
        copy_columns(&acc, &mut s, width, column);
    }
    s
}

/// `acc += constant`, and a copy of it.
struct AddConstant<'a, T> {
    /// `[rows, PANEL]`
    acc: &'a mut [f32],
    constant: &'a [f32],
    /// Rows `total` apart.
    sum: Option<&'a mut [T]>,
    total: usize,
}

impl<T: Element> WithSimd for AddConstant<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for acc in self.acc.chunks_exact_mut(PANEL) {
            for (acc, constant) in acc.iter_mut().zip(self.constant) {
                *acc += constant;
            }
        }
        let Some(sum) = self.sum else { return };
        for (sum, acc) in sum.chunks_mut(self.total).zip(self.acc.chunks_exact(PANEL)) {
            for (sum, &acc) in sum.iter_mut().zip(&acc[..self.constant.len()]) {
                *sum = T::nearest(acc);
            }
        }
    }
}

/// `out = acc + residual`
struct Store<'a, T> {
    /// `[rows, PANEL]`, of which `width` columns count.
    acc: &'a [f32],
    /// Rows `total` apart.
    residual: Option<&'a [T]>,
    /// As `residual`.
    out: &'a mut [T],
    total: usize,
    width: usize,
}

impl<T: Element> WithSimd for Store<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let rows = self.out.chunks_mut(self.total).zip(self.acc.chunks_exact(PANEL));
        for (index, (out, acc)) in rows.enumerate() {
            let out = out.iter_mut().zip(&acc[..self.width]);
            match self.residual {
                Some(residual) => {
                    let residual = &residual[index * self.total..];
                    for ((out, acc), residual) in out.zip(residual) {
                        *out = T::nearest(acc + residual.widened());
                    }
                }
                None => out.for_each(|(out, &acc)| *out = T::nearest(acc)),
            }
        }
    }
}
