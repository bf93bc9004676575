//! Projections that share an input, with LoRA, activation and residual.
//!
//! ```text
//! y_p = x W_p^T + b_p + scaling_p (S_p B_p^T + lora_bias_p),    S_p = drop_p(x) A_p^T     [rows, rank]
//! out = act(cat_p y_p) + residual
//! ```
//! The base products write straight into their columns of the packed output and S B^T is added to them there; one
//! last pass over blocks of rows adds biases, applies the activation and adds the residual. The dropped input
//! exists only for a block of rows at a time. The backward regenerates it from the seed.
//!
//! Kept for the backward: S, and with GELU or ReLU the sum before the activation.

use super::gemm::{gemm, gemm_parallel, Into, Mat, MatMut};
use super::math::{gelu, gelu_derivative};
use crate::philox::Dropout;
use crate::problem::{small_layout, ProjectionProblem, SmallLayout};
use rayon::prelude::*;
use std::borrow::Cow;

/// Rows that one task handles; sums over rows are taken block by block, in order.
const ROWS: usize = 256;

/// The activation as this module computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// The sum as it is.
    Identity,
    /// The exact GELU.
    Gelu,
    /// `max(x, 0)`
    Relu,
}

/// The shapes, and the weights `[out, in]` of each projection.
pub struct Weights<'a> {
    /// Width of the input.
    pub in_dim: usize,
    /// One per projection.
    pub projections: &'a [ProjectionProblem],
    /// One per projection.
    pub weights: Vec<Cow<'a, [f32]>>,
}

/// What the backward needs besides its inputs.
#[derive(Debug, Default)]
pub struct Saved {
    /// S of each projection, `[rows, rank]`; empty without LoRA.
    s: Vec<Vec<f32>>,
    /// The sum before the activation; empty where it is not needed.
    sum: Vec<f32>,
}

/// Gradients; each is empty where it was not asked for.
pub struct Gradients {
    /// Of x, `[rows, in]`.
    pub x: Vec<f32>,
    /// Of the small tensors, laid out as they are.
    pub small: Vec<f32>,
}

/// `out [rows, sum of out_dim]` for `x [rows, in]`; what the backward needs is kept only if `keep`.
pub fn forward(
    weights: &Weights<'_>,
    x: &[f32],
    small: &[f32],
    residual: Option<&[f32]>,
    epilogue: Epilogue,
    keep: bool,
) -> (Vec<f32>, Saved) {
    let in_dim = weights.in_dim;
    let rows = x.len() / in_dim;
    let total: usize = weights.projections.iter().map(|p| p.out_dim).sum();
    let (layouts, _) = small_layout(in_dim, weights.projections);
    let mut out = vec![0f32; rows * total];
    let mut saved = Saved::default();
    // The constant part of each column: bias + scaling * lora_bias.
    let mut constant = vec![0f32; total];
    let mut column = 0;
    for ((p, layout), weight) in weights.projections.iter().zip(&layouts).zip(&weights.weights) {
        let columns = column..column + p.out_dim;
        column = columns.end;
        gemm_parallel(
            MatMut::new(&mut out[columns.start..], rows, p.out_dim, total),
            Into::Store,
            1.0,
            Mat::packed(x, rows, in_dim),
            Mat::packed(weight, p.out_dim, in_dim).t(),
        );
        if let Some(bias) = &layout.bias {
            add_scaled(&mut constant[columns.clone()], &small[bias.clone()], 1.0);
        }
        let Some(lora) = p.lora else {
            saved.s.push(Vec::new());
            continue;
        };
        if let Some(bias) = &layout.lora_bias {
            add_scaled(&mut constant[columns.clone()], &small[bias.clone()], lora.scaling);
        }
        let a = Mat::packed(&small[layout.a.clone()], lora.rank, in_dim);
        let mut s = vec![0f32; rows * lora.rank];
        s.par_chunks_mut(ROWS * lora.rank).enumerate().for_each(|(block, s)| {
            let count = s.len() / lora.rank;
            let x = dropped(x, in_dim, block * ROWS, count, lora.dropout);
            let s = MatMut::packed(s, count, lora.rank);
            gemm(s, Into::Store, 1.0, Mat::packed(&x, count, in_dim), a.t());
        });
        gemm_parallel(
            MatMut::new(&mut out[columns.start..], rows, p.out_dim, total),
            Into::Add,
            lora.scaling,
            Mat::packed(&s, rows, lora.rank),
            Mat::packed(&small[layout.b.clone()], p.out_dim, lora.rank).t(),
        );
        saved.s.push(if keep { s } else { Vec::new() });
    }
    if constant.iter().any(|&c| c != 0.0) {
        out.par_chunks_mut(total).for_each(|row| add_scaled(row, &constant, 1.0));
    }
    if epilogue != Epilogue::Identity {
        if keep {
            saved.sum = out.clone();
        }
        out.par_chunks_mut(total).for_each(|row| match epilogue {
            Epilogue::Identity => {}
            Epilogue::Gelu => row.iter_mut().for_each(|y| *y = gelu(*y)),
            // A comparison, not `max`: NaN must stay NaN.
            Epilogue::Relu => row.iter_mut().for_each(|y| *y = if *y < 0.0 { 0.0 } else { *y }),
        });
    }
    if let Some(residual) = residual {
        out.par_chunks_mut(total)
            .zip(residual.par_chunks(total))
            .for_each(|(row, residual)| add_scaled(row, residual, 1.0));
    }
    (out, saved)
}

/// The gradients of x and of the small tensors, where wanted, for the gradient `grad` of the output.
pub fn backward(
    weights: &Weights<'_>,
    x: &[f32],
    small: &[f32],
    saved: &Saved,
    grad: &[f32],
    epilogue: Epilogue,
    (want_x, want_small): (bool, bool),
) -> Gradients {
    let in_dim = weights.in_dim;
    let rows = x.len() / in_dim;
    let total: usize = weights.projections.iter().map(|p| p.out_dim).sum();
    let (layouts, small_len) = small_layout(in_dim, weights.projections);
    let grad = through_activation(grad, &saved.sum, epilogue);
    let mut dx = vec![0f32; if want_x { x.len() } else { 0 }];
    let mut dsmall = vec![0f32; if want_small { small_len } else { 0 }];
    let mut column = 0;
    for (index, (p, layout)) in weights.projections.iter().zip(&layouts).enumerate() {
        let g = Mat::new(&grad[column..], rows, p.out_dim, total);
        if want_x {
            let weight = Mat::packed(&weights.weights[index], p.out_dim, in_dim);
            gemm_parallel(MatMut::packed(&mut dx, rows, in_dim), Into::Add, 1.0, g, weight);
        }
        if want_small {
            bias_gradients(&mut dsmall, layout, p, &grad, column, total);
        }
        if let Some(lora) = p.lora {
            // dS = scaling g B
            let mut ds = vec![0f32; rows * lora.rank];
            gemm_parallel(
                MatMut::packed(&mut ds, rows, lora.rank),
                Into::Store,
                lora.scaling,
                g,
                Mat::packed(&small[layout.b.clone()], p.out_dim, lora.rank),
            );
            if want_x {
                let a = Mat::packed(&small[layout.a.clone()], lora.rank, in_dim);
                add_low_rank_dx(&mut dx, &ds, a, in_dim, lora.rank, lora.dropout);
            }
            if want_small {
                let da = &mut dsmall[layout.a.clone()];
                a_gradient(da, &ds, x, in_dim, lora.rank, lora.dropout);
                // dB = scaling g^T S
                gemm_parallel(
                    MatMut::packed(&mut dsmall[layout.b.clone()], p.out_dim, lora.rank),
                    Into::Store,
                    lora.scaling,
                    g.t(),
                    Mat::packed(&saved.s[index], rows, lora.rank),
                );
            }
        }
        column += p.out_dim;
    }
    Gradients { x: dx, small: dsmall }
}

/// Rows `first..first + count` of x, dropped; x itself without dropout.
fn dropped(
    x: &[f32],
    in_dim: usize,
    first: usize,
    count: usize,
    dropout: Option<Dropout>,
) -> Cow<'_, [f32]> {
    let rows = &x[first * in_dim..(first + count) * in_dim];
    let Some(dropout) = dropout else { return Cow::Borrowed(rows) };
    let mut rows = rows.to_vec();
    for (index, row) in rows.chunks_mut(in_dim).enumerate() {
        dropout.apply_row((first + index) as u64, 0, row);
    }
    Cow::Owned(rows)
}

fn through_activation<'a>(grad: &'a [f32], sum: &[f32], epilogue: Epilogue) -> Cow<'a, [f32]> {
    let derivative = match epilogue {
        Epilogue::Identity => return Cow::Borrowed(grad),
        Epilogue::Gelu => gelu_derivative,
        Epilogue::Relu => |sum: f32| f32::from(sum > 0.0),
    };
    Cow::Owned(grad.par_iter().zip(sum).map(|(g, &sum)| g * derivative(sum)).collect())
}

/// The gradients of bias and LoRA bias: column sums, block by block.
fn bias_gradients(
    dsmall: &mut [f32],
    layout: &SmallLayout,
    p: &ProjectionProblem,
    grad: &[f32],
    column: usize,
    total: usize,
) {
    if layout.bias.is_none() && layout.lora_bias.is_none() {
        return;
    }
    let partial: Vec<Vec<f32>> = grad
        .par_chunks(ROWS * total)
        .map(|block| {
            let mut sum = vec![0f32; p.out_dim];
            for row in block.chunks(total) {
                add_scaled(&mut sum, &row[column..column + p.out_dim], 1.0);
            }
            sum
        })
        .collect();
    let scaling = p.lora.map_or(1.0, |lora| lora.scaling);
    for (range, scale) in [(&layout.bias, 1.0), (&layout.lora_bias, scaling)] {
        let Some(range) = range else { continue };
        for sum in &partial {
            add_scaled(&mut dsmall[range.clone()], sum, scale);
        }
    }
}

/// `dx += mask * (dS A)`
fn add_low_rank_dx(
    dx: &mut [f32],
    ds: &[f32],
    a: Mat<'_>,
    in_dim: usize,
    rank: usize,
    dropout: Option<Dropout>,
) {
    dx.par_chunks_mut(ROWS * in_dim).zip(ds.par_chunks(ROWS * rank)).enumerate().for_each(
        |(block, (dx, ds))| {
            let count = ds.len() / rank;
            let ds = Mat::packed(ds, count, rank);
            let Some(dropout) = dropout else {
                gemm(MatMut::packed(dx, count, in_dim), Into::Add, 1.0, ds, a);
                return;
            };
            let mut part = vec![0f32; dx.len()];
            gemm(MatMut::packed(&mut part, count, in_dim), Into::Store, 1.0, ds, a);
            for (row, part) in part.chunks_mut(in_dim).enumerate() {
                dropout.apply_row((block * ROWS + row) as u64, 0, part);
            }
            add_scaled(dx, &part, 1.0);
        },
    );
}

/// `dA = dS^T drop(x)`, block by block.
fn a_gradient(
    da: &mut [f32],
    ds: &[f32],
    x: &[f32],
    in_dim: usize,
    rank: usize,
    dropout: Option<Dropout>,
) {
    let partial: Vec<Vec<f32>> = ds
        .par_chunks(ROWS * rank)
        .enumerate()
        .map(|(block, ds)| {
            let count = ds.len() / rank;
            let x = dropped(x, in_dim, block * ROWS, count, dropout);
            let mut part = vec![0f32; rank * in_dim];
            gemm(
                MatMut::packed(&mut part, rank, in_dim),
                Into::Store,
                1.0,
                Mat::packed(ds, count, rank).t(),
                Mat::packed(&x, count, in_dim),
            );
            part
        })
        .collect();
    for part in &partial {
        add_scaled(da, part, 1.0);
    }
}

fn add_scaled(sum: &mut [f32], part: &[f32], scale: f32) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum += scale * part;
    }
}
