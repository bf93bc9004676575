//! The forward of the projections.
//!
//! A task takes a block of rows: S while the rows are in cache, then panel after panel of the output. The low-rank term
//! is one more product into the same accumulator. Bias, activation and residual follow on the accumulator, and one
//! write. The dropped input exists for one block at a time; the backward regenerates it from the seed.
//!
//! Kept for the backward: S, and with an activation the sum before it.

use super::{copy_columns, dropped, few_rows, Projections, Ready, Saved, Weight};
use crate::cpu::bf16;
use crate::cpu::blocked::{accumulate, Packed, Term, ROWS};
use crate::cpu::buffer::Buffer;
use crate::cpu::math::add;
use crate::cpu::panel::PANEL;
use crate::cpu::simd::padded;
use crate::problem::LoraProblem;
use rayon::prelude::*;

/// `out [rows, sum of out_dim]` for `x [rows, in]`; what the backward needs is kept only if `keep`.
pub fn forward(
    layer: &Projections<'_>,
    x: &[f32],
    residual: Option<&[f32]>,
    keep: bool,
) -> (Buffer, Saved) {
    let (in_dim, total) = (layer.in_dim, layer.total());
    let rows = x.len() / in_dim;
    if !keep && few_rows::applies(rows, in_dim) {
        return (few_rows::forward(layer, x, residual), Saved::default());
    }
    let parts = layer.ready(|weight, n, k| match weight {
        Weight::F32(weight) => Packed::from_transposed(weight, n, k),
        Weight::Pairs(pairs) => Packed::from_transposed_pairs(pairs, n, k),
    });
    let in_pairs = parts.iter().any(|part| part.weight.in_pairs());
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
    let mut out = Buffer::any(rows * total);
    let mut sum = Buffer::any(if keep_sum { out.len() } else { 0 });
    let sums: Vec<Option<&mut [f32]>> = match keep_sum {
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
            let x_pairs = if in_pairs { bf16::pairs(x_rows) } else { Vec::new() };
            let mut acc = vec![0f32; count * PANEL];
            let mut s_of_parts = Vec::new();
            for ((part, constant), low_rank) in parts.iter().zip(&constants).zip(&low_rank) {
                let s = match (low_rank, part.lora) {
                    (Some((a, _)), Some(lora)) => low_rank_input(x_rows, in_dim, first, a, lora),
                    _ => Vec::new(),
                };
                let (left, stride) = match part.weight.in_pairs() {
                    true => (x_pairs.as_slice(), in_dim / 2),
                    false => (x_rows, in_dim),
                };
                for column in part.weight.panels() {
                    let base = Term { left, stride, right: &part.weight, scale: 1.0 };
                    match (low_rank, part.lora) {
                        (Some((_, b)), Some(lora)) => {
                            let stride = padded(lora.rank);
                            let up = Term { left: &s, stride, right: b, scale: lora.scaling };
                            accumulate(&mut acc, count, column, &[base, up]);
                        }
                        _ => accumulate(&mut acc, count, column, &[base]),
                    }
                    let constant = &constant[column..part.out_dim().min(column + PANEL)];
                    for acc in acc.chunks_exact_mut(PANEL) {
                        add(acc, constant);
                    }
                    let start = part.columns.start + column;
                    let place =
                        |row: usize| row * total + start..row * total + start + constant.len();
                    if let Some(sum) = &mut sum {
                        for (row, acc) in acc.chunks_exact(PANEL).enumerate() {
                            sum[place(row)].copy_from_slice(&acc[..constant.len()]);
                        }
                    }
                    if let Some(activation) = layer.activation {
                        activation(&mut acc, false);
                    }
                    for (row, acc) in acc.chunks_exact(PANEL).enumerate() {
                        out[place(row)].copy_from_slice(&acc[..constant.len()]);
                    }
                }
                s_of_parts.push(s);
            }
            if let Some(residual) = residual {
                add(out, &residual[first * total..]);
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
