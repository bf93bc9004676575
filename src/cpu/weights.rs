//! The weights P and gradients dS of a block of queries and a tile of keys, as the products of the backward take them.

use super::bf16;
use super::panel::Left;
use super::products::Products;
use std::ops::Range;

/// P and dS: whole in f32, or a few rows in f32 and the whole in pairs.
pub struct Weights {
    products: Products,
    stride: usize,
    weights: Vec<f32>,
    grads: Vec<f32>,
    /// Rows of dS, in pairs along them.
    grad_rows: Vec<f32>,
    /// P, each row paired with the one below it.
    weights_t: Vec<f32>,
    /// dS, as `weights_t`.
    grads_t: Vec<f32>,
}

impl Weights {
    /// For blocks of so many rows, rows `stride` apart.
    pub fn new(products: Products, (rows, group): (usize, usize), stride: usize) -> Self {
        let zeros = |rows: usize| vec![0f32; rows * stride];
        let (whole, pairs) = match products {
            Products::F32 => (rows, 0),
            Products::Pairs => (group, products.depth(rows)),
        };
        Self {
            products,
            stride,
            weights: zeros(whole),
            grads: zeros(whole),
            grad_rows: zeros(if pairs > 0 { group.div_ceil(2) } else { 0 }),
            weights_t: zeros(pairs),
            grads_t: zeros(pairs),
        }
    }

    /// P and dS from row `first` on, to be computed in f32.
    pub fn rows(&mut self, first: usize) -> (&mut [f32], &mut [f32]) {
        let start = if self.products == Products::F32 { first * self.stride } else { 0 };
        (&mut self.weights[start..], &mut self.grads[start..])
    }

    /// dS of the rows computed last, `[rows, keys]`; their first is even.
    pub fn finish(&mut self, rows: Range<usize>, keys: usize) -> Left<'_> {
        let stride = self.stride;
        if self.products == Products::F32 {
            return Left::Rows(&self.grads[rows.start * stride..], stride);
        }
        // A last row alone is paired with zeros.
        if !rows.len().is_multiple_of(2) {
            self.weights[rows.len() * stride..][..keys].fill(0.0);
            self.grads[rows.len() * stride..][..keys].fill(0.0);
        }
        for (rows_f32, pairs) in
            [(&self.weights, &mut self.weights_t), (&self.grads, &mut self.grads_t)]
        {
            let pairs = pairs[rows.start / 2 * stride..].chunks_exact_mut(stride);
            let both = rows_f32.chunks_exact(2 * stride).take(rows.len().div_ceil(2));
            for (pairs, both) in pairs.zip(both) {
                let (first, second) = both.split_at(stride);
                bf16::pairs_of_rows(&first[..keys], &second[..keys], &mut pairs[..keys]);
            }
        }
        let grad_rows = self.grad_rows.chunks_exact_mut(stride / 2);
        for (pairs, row) in grad_rows.zip(self.grads.chunks_exact(stride)).take(rows.len()) {
            bf16::pairs_into(&row[..keys], &mut pairs[..keys / 2]);
        }
        Left::Rows(&self.grad_rows, stride / 2)
    }

    /// P^T and dS^T of all rows, `[keys, rows]`.
    pub fn transposed(&self) -> (Left<'_>, Left<'_>) {
        let (weights, grads) = match self.products {
            Products::F32 => (&self.weights, &self.grads),
            Products::Pairs => (&self.weights_t, &self.grads_t),
        };
        (Left::Columns(weights, self.stride), Left::Columns(grads, self.stride))
    }
}
