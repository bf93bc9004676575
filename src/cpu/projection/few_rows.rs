//! The forward for so few rows that packing a weight costs more than the product.
//!
//! Weights are read once, where they lie. A vector holds neighbours in depth. Some rows of x meet some rows of the
//! weight in registers, and each sum ends with one sum over a vector.

use super::{dropped, Projections, Weight};
use crate::cpu::blocked::Packed;
use crate::cpu::buffer::Buffer;
use crate::cpu::element::Element;
use crate::cpu::math::add;
use crate::cpu::simd::{run, vectors};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Rows up to which packing does not pay.
const MOST: usize = 64;
/// Width of the input from which on packing costs anything worth mention.
const WIDE: usize = 128;
/// Rows of x in registers, at most.
const ROWS: usize = 7;
/// Rows of the weight of one task.
const TASK: usize = 96;

/// Whether [`forward`] is for so many rows of such a width.
pub fn applies(rows: usize, in_dim: usize) -> bool {
    (1..=MOST).contains(&rows) && in_dim >= WIDE
}

/// `out [rows, sum of out_dim]` for `x [rows, in]` where [`applies`] and no backward follows. None where a weight is in
/// int8: its products are of packed weights alone.
pub fn forward(layer: &Projections<'_>, x: &[f32], residual: Option<&[f32]>) -> Option<Buffer> {
    let (in_dim, total) = (layer.in_dim, layer.total());
    let mut out = Buffer::any(x.len() / in_dim * total);
    for (part, weight) in layer.ready(|_, _, _| Packed::empty()).iter().zip(&layer.weights) {
        let constant = part.constant();
        for row in out.chunks_exact_mut(total) {
            row[part.columns.clone()].copy_from_slice(&constant);
        }
        let sums = &mut out[part.columns.start..];
        match weight {
            Weight::F32(weight) => add_product(sums, total, (x, in_dim), weight, 1.0),
            Weight::Bf16(weight) => add_product(sums, total, (x, in_dim), weight, 1.0),
            Weight::Pairs(pairs) => {
                let weight: &[half::bf16] = bytemuck::cast_slice(pairs);
                add_product(sums, total, (x, in_dim), weight, 1.0);
            }
            Weight::Quads(..) => return None,
        }
        if let Some(lora) = part.lora {
            let x = dropped(x, in_dim, in_dim, 0, lora);
            let mut s = vec![0f32; x.len() / in_dim * lora.rank];
            add_product(&mut s, lora.rank, (&x, in_dim), part.a(), 1.0);
            add_product(sums, total, (&s, lora.rank), part.b(), lora.scaling);
        }
    }
    if let Some(activation) = layer.activation {
        activation(&mut out, false);
    }
    if let Some(residual) = residual {
        add(&mut out, residual);
    }
    Some(out)
}

/// `sums [rows, n] += scale * x weight^T`, rows of the sums `stride` apart, `x [rows, depth]`, `weight [n, depth]`.
fn add_product<T: Element>(
    sums: &mut [f32],
    stride: usize,
    (x, depth): (&[f32], usize),
    weight: &[T],
    scale: f32,
) {
    let rows = x.len() / depth;
    let mut columns = vec![0f32; weight.len() / depth * rows];
    let tasks = columns.par_chunks_mut(TASK * rows).zip(weight.par_chunks(TASK * depth));
    tasks.for_each(|(columns, weight)| {
        let mut wide = Vec::new();
        let weight = T::read(weight, &mut wide);
        run(Product { columns, rows, x, depth, weight });
    });
    add_columns(sums, stride, (&columns, rows), scale);
}

/// `sums [rows, n] += scale * columns [n, rows]^T`
fn add_columns(sums: &mut [f32], stride: usize, (columns, rows): (&[f32], usize), scale: f32) {
    // Few columns at a time stay in the first-level cache.
    for (block, columns) in columns.chunks(16 * rows).enumerate() {
        for (row, sums) in sums.chunks_mut(stride).enumerate() {
            let values = columns.chunks_exact(rows).map(|column| column[row]);
            sums[block * 16..].iter_mut().zip(values).for_each(|(sum, x)| *sum += scale * x);
        }
    }
}

/// `columns [n, rows] += weight [n, depth] x [rows, depth]^T`
struct Product<'a> {
    columns: &'a mut [f32],
    rows: usize,
    x: &'a [f32],
    depth: usize,
    weight: &'a [f32],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // The weight's rows outside: each comes from memory once.
        let count = self.weight.len() / self.depth;
        let mut column = 0;
        while column < count {
            // AVX-512 and NEON have registers for 7 x 3 sums and their operands.
            column += match count - column {
                3.. if S::REGISTER_COUNT >= 32 => self.tiles::<S, 3>(simd, column),
                _ => self.tiles::<S, 1>(simd, column),
            };
        }
    }
}

impl Product<'_> {
    /// All rows of x and `NW` of the weight; returns `NW`.
    #[inline(always)]
    fn tiles<S: Simd, const NW: usize>(&mut self, simd: S, column: usize) -> usize {
        // Equal parts of the rows: 8 are 4 and 4, no 7 and 1.
        let step = self.rows.div_ceil(self.rows.div_ceil(ROWS).max(1));
        let mut row = 0;
        while row < self.rows {
            row += match step.min(self.rows - row) {
                7 => self.tile::<S, 7, NW>(simd, row, column),
                6 => self.tile::<S, 6, NW>(simd, row, column),
                5 => self.tile::<S, 5, NW>(simd, row, column),
                4 => self.tile::<S, 4, NW>(simd, row, column),
                3 => self.tile::<S, 3, NW>(simd, row, column),
                2 => self.tile::<S, 2, NW>(simd, row, column),
                _ => self.tile::<S, 1, NW>(simd, row, column),
            };
        }
        NW
    }

    /// `MR` rows of x and `NW` of the weight; returns `MR`.
    #[inline(always)]
    fn tile<S: Simd, const MR: usize, const NW: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) -> usize {
        let depth = self.depth;
        let mut x: [&[f32]; MR] = [&[]; MR];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + i) * depth..][..depth];
        }
        let mut w: [&[f32]; NW] = [&[]; NW];
        for (j, w) in w.iter_mut().enumerate() {
            *w = &self.weight[(column + j) * depth..][..depth];
        }
        let whole = depth / S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.0); NW]; MR];
        let mut xs: [&[S::f32s]; MR] = [&[]; MR];
        let mut ws: [&[S::f32s]; NW] = [&[]; NW];
        for i in 0..MR {
            xs[i] = &vectors::<S>(x[i])[..whole];
        }
        for j in 0..NW {
            ws[j] = &vectors::<S>(w[j])[..whole];
        }
        for p in 0..whole {
            for i in 0..MR {
                for j in 0..NW {
                    sums[i][j] = simd.mul_add_f32s(xs[i][p], ws[j][p], sums[i][j]);
                }
            }
        }
        for j in 0..NW {
            for i in 0..MR {
                let mut sum = simd.reduce_sum_f32s(sums[i][j]);
                for p in whole * S::F32_LANES..depth {
                    sum += x[i][p] * w[j][p];
                }
                self.columns[(column + j) * self.rows + row + i] += sum;
            }
        }
        MR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_shapes_and_both_kinds_of_weight() {
        for (rows, n, depth) in [(1, 5, 4), (7, 100, 32), (8, 3, 18), (28, 97, 50)] {
            let value = |i: usize| ((i * 29 % 31) as f32 - 15.0) / 16.0;
            let x: Vec<f32> = (0..rows * depth).map(value).collect();
            let weight: Vec<f32> = (0..n * depth).map(|i| value(i + 7)).collect();
            let stride = n + 2;
            let (mut sums, mut of_bf16) = (vec![1f32; rows * stride], vec![1f32; rows * stride]);
            add_product(&mut sums, stride, (&x, depth), &weight, 0.5);
            // The weight's values are exact in bf16.
            let weight_bf16 = half::bf16::rounded(&weight);
            add_product(&mut of_bf16, stride, (&x, depth), &weight_bf16, 0.5);
            for i in 0..rows {
                for j in 0..stride {
                    let product =
                        |p| f64::from(x[i * depth + p]) * f64::from(weight[j * depth + p]);
                    let dot: f64 = if j < n { (0..depth).map(product).sum() } else { 0.0 };
                    let error = (f64::from(sums[i * stride + j]) - 1.0 - 0.5 * dot).abs();
                    assert!(error < 1e-5, "{rows} {n} {depth}: {i} {j}");
                    assert_eq!(of_bf16[i * stride + j], sums[i * stride + j]);
                }
            }
        }
    }
}
