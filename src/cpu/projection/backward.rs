//! The backward of the projections.
//!
//! ```text
//! g = grad * act'(sum)                dS_p = scaling_p g_p B_p
//! dx = sum_p g_p W_p + drop_p(dS_p A_p)      dA_p = dS_p^T drop_p(x)      dB_p = scaling_p g_p^T S_p
//! ```
//! Gradients of the parameters are summed within a group of consecutive rows, then over the groups, in order.

use super::{copy_columns, dropped, Projections, Ready, Saved};
use crate::cpu::activation::gradient;
use crate::cpu::bf16;
use crate::cpu::blocked::{accumulate, add_transposed_product, Packed, Term, ROWS};
use crate::cpu::buffer::Elements;
use crate::cpu::element::Element;
use crate::cpu::math::add;
use crate::cpu::panel::PANEL;
use crate::cpu::simd::padded;
use crate::problem::small_layout;
use rayon::prelude::*;
use std::borrow::Cow;

/// Groups of rows, at most, whose gradients of parameters are summed separately.
const GROUPS: usize = 32;

/// Gradients; each is empty where it was not asked for.
pub struct Gradients<T: Element> {
    /// Gradient of x, `[rows, in]`.
    pub x: Elements<T>,
    /// Gradient of the parameters, in their layout.
    pub parameters: Vec<f32>,
}

/// The gradients of x and of the parameters, where wanted, for the gradient `grad` of the output. Only the parameters
/// read x, which may be empty without them.
pub fn backward<T: Element>(
    layer: &Projections<'_>,
    x: &[T],
    saved: &Saved<T>,
    grad: &[T],
    (want_x, want_parameters): (bool, bool),
) -> Gradients<T> {
    let (in_dim, total) = (layer.in_dim, layer.total());
    let rows = grad.len() / total;
    let parts = layer.ready(|weight, n, k| match want_x {
        true => weight.by_rows::<T>(n, k),
        false => Packed::empty(),
    });
    let in_pairs = parts.iter().any(|part| part.weight.in_pairs());
    let in_f32 = want_parameters || parts.iter().any(|p| p.lora.is_some() || !p.weight.in_pairs());
    // B and A where there is LoRA, for dS = scaling g B and dx += dS A.
    let low_rank: Vec<_> = parts
        .iter()
        .map(|part| {
            let rank = part.lora?.rank;
            let b = Packed::from_rows(part.b(), part.out_dim(), rank);
            Some((b, Packed::from_rows(part.a(), rank, in_dim)))
        })
        .collect();
    let mut dx = Elements::any(rows * in_dim);
    let group_rows = rows.div_ceil(GROUPS).next_multiple_of(ROWS);
    let partial: Vec<Vec<PartGradients>> = dx
        .par_chunks_mut(group_rows * in_dim)
        .enumerate()
        .map(|(group, dx)| {
            let mut sums: Vec<_> =
                parts.iter().map(|part| PartGradients::new(part, in_dim)).collect();
            let (mut wide_g, mut wide_x) = (Vec::new(), Vec::new());
            for (block, dx) in dx.chunks_mut(ROWS * in_dim).enumerate() {
                let first = group * group_rows + block * ROWS;
                let count = dx.len() / in_dim;
                let at = first * total..(first + count) * total;
                let grad = &grad[at.clone()];
                let (g, g_pairs) = match (layer.activation, saved.sum.get(at)) {
                    (Some(activation), Some(sum)) => {
                        let g = gradient(activation, sum, grad);
                        let pairs = if in_pairs { bf16::pairs(&g) } else { Vec::new() };
                        (Cow::Owned(g), Cow::Owned(pairs))
                    }
                    _ => {
                        let g = if in_f32 { T::read(grad, &mut wide_g) } else { &[] };
                        let pairs = if in_pairs { T::pairs(grad) } else { Cow::Borrowed(&[][..]) };
                        (Cow::Borrowed(g), pairs)
                    }
                };
                let x = match want_parameters {
                    true => T::read(&x[first * in_dim..][..count * in_dim], &mut wide_x),
                    false => &[],
                };
                let rows = BlockRows { first, count, x, g: &g, g_pairs: &g_pairs, total };
                let ds: Vec<_> = parts
                    .iter()
                    .zip(&low_rank)
                    .map(|(part, lr)| rows.ds(part, lr.as_ref()))
                    .collect();
                if want_parameters {
                    for (index, (part, sums)) in parts.iter().zip(&mut sums).enumerate() {
                        let s = saved.s.get(index).map_or(&[][..], Vec::as_slice);
                        sums.add(part, &rows, &ds[index], s, in_dim);
                    }
                }
                if want_x {
                    rows.dx(dx, in_dim, &parts, &low_rank, &ds);
                }
            }
            sums
        })
        .collect();
    let mut dparameters =
        vec![0f32; if want_parameters { small_layout(in_dim, layer.projections).1 } else { 0 }];
    if want_parameters {
        for group in &partial {
            for (part, sums) in parts.iter().zip(group) {
                sums.write(part, in_dim, &mut dparameters);
            }
        }
    }
    Gradients { x: if want_x { dx } else { Elements::default() }, parameters: dparameters }
}

/// A block of rows in the backward.
struct BlockRows<'a> {
    first: usize,
    count: usize,
    /// `[count, in]`, or empty where the parameters' gradients are not wanted.
    x: &'a [f32],
    /// Gradient of the sum before the activation, `[count, total]`.
    g: &'a [f32],
    /// The same in pairs, where a weight is.
    g_pairs: &'a [f32],
    total: usize,
}

impl BlockRows<'_> {
    /// `dS = scaling g B`, `[count, padded rank]`; empty without LoRA.
    fn ds(&self, part: &Ready<'_>, low_rank: Option<&(Packed, Packed)>) -> Vec<f32> {
        let (Some((b, _)), Some(lora)) = (low_rank, part.lora) else { return Vec::new() };
        let width = padded(lora.rank);
        let mut ds = vec![0f32; self.count * width];
        let mut acc = vec![0f32; self.count * PANEL];
        let left = &self.g[part.columns.start..];
        for column in b.panels() {
            let term = Term { left, stride: self.total, right: b, scale: lora.scaling };
            accumulate(&mut acc, self.count, column, &[term]);
            copy_columns(&acc, &mut ds, width, column);
        }
        ds
    }

    /// `dx = sum_p g_p W_p + drop_p(dS_p A_p)`
    fn dx<T: Element>(
        &self,
        dx: &mut [T],
        in_dim: usize,
        parts: &[Ready<'_>],
        low_rank: &[Option<(Packed, Packed)>],
        ds: &[Vec<f32>],
    ) {
        let base = parts.iter().map(|part| {
            let (left, stride) = match part.weight.in_pairs() {
                true => (&self.g_pairs[part.columns.start / 2..], self.total / 2),
                false => (&self.g[part.columns.start..], self.total),
            };
            Term { left, stride, right: &part.weight, scale: 1.0 }
        });
        let ups = parts.iter().zip(low_rank).zip(ds).filter_map(|((part, low_rank), ds)| {
            let ((_, a), lora) = (low_rank.as_ref()?, part.lora?);
            let term = Term { left: ds, stride: padded(lora.rank), right: a, scale: 1.0 };
            Some((term, lora.dropout))
        });
        let (masked, plain): (Vec<_>, Vec<_>) = ups.partition(|(_, dropout)| dropout.is_some());
        let terms: Vec<_> = base.chain(plain.into_iter().map(|(term, _)| term)).collect();
        let mut acc = vec![0f32; self.count * PANEL];
        let mut part_acc = acc.clone();
        for column in (0..in_dim).step_by(PANEL) {
            let width = PANEL.min(in_dim - column);
            accumulate(&mut acc, self.count, column, &terms);
            for (term, dropout) in &masked {
                accumulate(&mut part_acc, self.count, column, &[*term]);
                for (index, row) in part_acc.chunks_exact_mut(PANEL).enumerate() {
                    if let Some(dropout) = dropout {
                        dropout.apply_row((self.first + index) as u64, column, &mut row[..width]);
                    }
                }
                add(&mut acc, &part_acc);
            }
            copy_columns(&acc, dx, in_dim, column);
        }
    }
}

/// Sums of one projection's gradients over a group of rows, in padded rows.
struct PartGradients {
    /// `[rank, padded in]`
    a: Vec<f32>,
    /// `[out, padded rank]`
    b: Vec<f32>,
    /// Column sums of g; empty where there is no bias of either kind.
    bias: Vec<f32>,
}

impl PartGradients {
    fn new(part: &Ready<'_>, in_dim: usize) -> Self {
        let rank = part.lora.map_or(0, |lora| lora.rank);
        let biased = part.layout.bias.is_some() || part.layout.lora_bias.is_some();
        Self {
            a: vec![0f32; rank * padded(in_dim)],
            b: vec![0f32; if rank > 0 { part.out_dim() * padded(rank) } else { 0 }],
            bias: vec![0f32; if biased { part.out_dim() } else { 0 }],
        }
    }

    fn add(
        &mut self,
        part: &Ready<'_>,
        rows: &BlockRows<'_>,
        ds: &[f32],
        s: &[f32],
        in_dim: usize,
    ) {
        if !self.bias.is_empty() {
            for row in rows.g.chunks_exact(rows.total) {
                add(&mut self.bias, &row[part.columns.clone()]);
            }
        }
        let Some(lora) = part.lora else { return };
        let (rank, width) = (lora.rank, padded(lora.rank));
        let x = dropped(rows.x, in_dim, padded(in_dim), rows.first, lora);
        let shape = (rows.count, rank, in_dim);
        add_transposed_product(&mut self.a, 1.0, shape, (ds, width), &x);
        let s = &s[rows.first * width..][..rows.count * width];
        let shape = (rows.count, part.out_dim(), rank);
        let g = (&rows.g[part.columns.start..], rows.total);
        add_transposed_product(&mut self.b, lora.scaling, shape, g, s);
    }

    fn write(&self, part: &Ready<'_>, in_dim: usize, dparameters: &mut [f32]) {
        let scaling = part.lora.map_or(1.0, |lora| lora.scaling);
        for (range, scale) in [(&part.layout.bias, 1.0), (&part.layout.lora_bias, scaling)] {
            let Some(range) = range else { continue };
            for (sum, part) in dparameters[range.clone()].iter_mut().zip(&self.bias) {
                *sum += scale * part;
            }
        }
        let Some(lora) = part.lora else { return };
        for (range, rows, width) in
            [(&part.layout.a, &self.a, in_dim), (&part.layout.b, &self.b, lora.rank)]
        {
            let sums = dparameters[range.clone()].chunks_exact_mut(width);
            for (sum, row) in sums.zip(rows.chunks_exact(padded(width))) {
                add(sum, row);
            }
        }
    }
}
