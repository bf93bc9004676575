//! A block of queries and its relative positions.
//!
//! ```text
//! tables     [width of the reversed table, width] and transposed; row j holds R[2 side - 2 - j]
//! ```
//! A query at row y needs the rows `R[y - kh + side - 1]` for kh = 0, 1, .. In a reversed table these are consecutive
//! from `side - 1 - y`. So its biases are one stretch of `q R^T`, ready to be read as vectors.

use super::element::Element;
use super::head::Head;
use super::math::{add_scaled, all_finite};
use super::panel::{Into, Left, Right};
use super::products::Products;
use super::simd::padded;
use crate::problem::AttentionProblem;
use std::f32::consts::LOG2_E;

/// One of the two tables, reversed and padded.
struct Table {
    /// Rows of the table, and padded.
    rows: usize,
    /// `[padded rows, width]`
    natural: Vec<f32>,
    /// The same [down rows](Products::down_rows).
    right: Vec<f32>,
    /// `[head_dim, padded rows]`, the transpose of what is [along rows](Products::along_rows).
    transposed: Vec<f32>,
}

/// Both tables, reversed and padded; without rows where there are no relative positions.
pub struct Tables {
    d: usize,
    h: Table,
    w: Table,
    finite: bool,
    products: Products,
}

/// Gradients of both [`Tables`], `[padded rows, width]`.
pub struct TableGradients {
    h: Vec<f32>,
    w: Vec<f32>,
}

impl Table {
    fn new(values: &[f32], rows: usize, d: usize, products: Products) -> Self {
        let (width, pitch) = (padded(d), padded(rows));
        let mut natural = vec![0f32; pitch * width];
        let mut transposed = vec![0f32; pitch * products.depth(d)];
        for (index, row) in values.chunks_exact(d).enumerate() {
            let reversed = rows - 1 - index;
            natural[reversed * width..][..d].copy_from_slice(row);
            for (c, &element) in products.along_rows(row).iter().enumerate() {
                transposed[c * pitch + reversed] = element;
            }
        }
        let right = products.down_rows(&natural, width).into_owned();
        Self { rows, natural, right, transposed }
    }

    fn pitch(&self) -> usize {
        padded(self.rows)
    }
}

impl Tables {
    /// From `rel_pos_h` and `rel_pos_w` one after the other, each `[2 side - 1, d]`, for queries of type `T`. Tables
    /// that have more digits than bf16 keep them.
    pub fn new<T: Element>(p: &AttentionProblem, tables: &[f32]) -> Self {
        let (d, (rows_h, rows_w)) = (p.head_dim, p.table_rows());
        let (h, w) = tables.split_at(rows_h * d);
        let exact = tables.iter().all(|x| x.to_bits() & 0xffff == 0);
        let products = if exact { Products::of::<T>(d) } else { Products::F32 };
        let table = |values, rows| Table::new(values, rows, d, products);
        Self { d, h: table(h, rows_h), w: table(w, rows_w), finite: all_finite(tables), products }
    }

    pub fn zeros(&self) -> TableGradients {
        TableGradients { h: vec![0f32; self.h.natural.len()], w: vec![0f32; self.w.natural.len()] }
    }

    /// `dq += dbias R` and `dR += dbias^T q`, for a block's gradients of its biases.
    pub fn backward(
        &self,
        block: &Block,
        dbiases: &Biases,
        dq: &mut [f32],
        grads: &mut TableGradients,
    ) {
        if self.h.rows == 0 {
            return;
        }
        if !self.finite || !all_finite(&block.q) {
            return self.backward_by_pairs(block, dbiases, dq, grads);
        }
        let (width, products) = (padded(self.d), self.products);
        let (dqr_h, dqr_w) = block.to_projected(self, dbiases);
        let q = products.down_rows(&block.q, width);
        for (table, dqr, grads) in
            [(&self.h, &dqr_h, &mut grads.h), (&self.w, &dqr_w, &mut grads.w)]
        {
            let (count, pitch) = (block.places.len(), table.pitch());
            let rows = products.along_rows(dqr);
            let (rows, right) =
                (Left::Rows(&rows, products.depth(pitch)), Right(&table.right, width));
            products.multiply((dq, width), (Into::Add, 1.0), (count, width, pitch), rows, right);
            let columns = products.down_rows(dqr, pitch);
            let (columns, shape) = (Left::Columns(&columns, pitch), (pitch, width, count));
            products.multiply((grads, width), (Into::Add, 1.0), shape, columns, Right(&q, width));
        }
    }

    /// The same, for each query with the rows that it reads alone. In the products above every other row has a gradient
    /// of zero. Zero times a value that is not finite (a table's mask of minus infinity) would carry NaN between rows
    /// that never met.
    fn backward_by_pairs(
        &self,
        block: &Block,
        dbiases: &Biases,
        dq: &mut [f32],
        grads: &mut TableGradients,
    ) {
        let width = padded(self.d);
        let (side_h, side_w) = block.side;
        for (n, &(y, x)) in block.places.iter().enumerate() {
            let q = &block.q[n * width..][..width];
            let dq = &mut dq[n * width..][..width];
            let (dh, dw) = dbiases.get(n);
            for (table, grads, first, dbias) in [
                (&self.h, &mut grads.h, side_h - 1 - y, dh),
                (&self.w, &mut grads.w, side_w - 1 - x, &dw[..side_w]),
            ] {
                let rows = table.natural.chunks_exact(width).zip(grads.chunks_exact_mut(width));
                for (&dbias, (row, grad)) in dbias.iter().zip(rows.skip(first)) {
                    add_scaled(dq, dbias, row);
                    add_scaled(grad, dbias, q);
                }
            }
        }
    }

    /// Writes the gradients in the order of the tables themselves.
    pub fn unpad(&self, grads: &TableGradients, out: &mut [f32]) {
        let width = padded(self.d);
        let rows = out.chunks_exact_mut(self.d);
        let sources = [(&self.h, &grads.h), (&self.w, &grads.w)];
        let reversed = sources.into_iter().flat_map(|(table, grads)| {
            grads.chunks_exact(width).take(table.rows).rev().collect::<Vec<_>>()
        });
        for (out, row) in rows.zip(reversed) {
            out.copy_from_slice(&row[..self.d]);
        }
    }
}

/// Biases of a block's queries, or their gradients: `rel_h [count, side_h]`, `rel_w [count, pitch]`. Biases, not their
/// gradients, times log2 e as in [`super::softmax`].
pub struct Biases {
    side_h: usize,
    pitch: usize,
    h: Vec<f32>,
    w: Vec<f32>,
}

impl Biases {
    /// `rel_h` and `rel_w` of query `n`.
    pub fn get(&self, n: usize) -> (&[f32], &[f32]) {
        (&self.h[n * self.side_h..][..self.side_h], &self.w[n * self.pitch..][..self.pitch])
    }

    /// `rel_h` and `rel_w` of query `n`.
    pub fn of(&mut self, n: usize) -> (&mut [f32], &mut [f32]) {
        (&mut self.h[n * self.side_h..][..self.side_h], &mut self.w[n * self.pitch..][..self.pitch])
    }
}

/// A block of queries with the biases of all their keys.
pub struct Block {
    /// `[count, width]`
    pub q: Vec<f32>,
    /// Row and column of each query in the window.
    places: Vec<(usize, usize)>,
    side: (usize, usize),
    biases: Biases,
}

impl Block {
    pub fn new<T: Element>(head: &Head<'_, T>, tables: &Tables, real: &[(usize, usize)]) -> Self {
        let p = head.p;
        let q = head.gather_rows(head.qkv, 3 * p.channels(), real);
        let places: Vec<_> = real.iter().map(|&(t, _)| (t / p.side_w, t % p.side_w)).collect();
        let pitch = padded(p.side_w);
        let mut biases = Biases {
            side_h: p.side_h,
            pitch,
            h: vec![0f32; real.len() * p.side_h],
            w: vec![f32::NEG_INFINITY; real.len() * pitch],
        };
        let rows = tables.products.along_rows(&q);
        let project = |table: &Table| {
            let mut out = vec![0f32; real.len() * table.pitch()];
            let shape = (real.len(), table.pitch(), p.head_dim);
            let right = Right(&table.transposed, table.pitch());
            let rows = Left::Rows(&rows, tables.products.depth(padded(p.head_dim)));
            let out_rows = (&mut out[..], table.pitch());
            tables.products.multiply(out_rows, (Into::Store, LOG2_E), shape, rows, right);
            out
        };
        let (qr_h, qr_w) = (project(&tables.h), project(&tables.w));
        for (n, &(y, x)) in places.iter().enumerate() {
            let (h, w) = biases.of(n);
            if p.rel_pos {
                h.copy_from_slice(&qr_h[n * tables.h.pitch() + p.side_h - 1 - y..][..p.side_h]);
                let start = n * tables.w.pitch() + p.side_w - 1 - x;
                w[..p.side_w].copy_from_slice(&qr_w[start..][..p.side_w]);
            } else {
                w[..p.side_w].fill(0.0);
            }
        }
        Self { q, places, side: (p.side_h, p.side_w), biases }
    }

    /// `rel_h` and `rel_w` of query `n`; `rel_w` is minus infinity in the padding lanes.
    pub fn biases(&self, n: usize) -> (&[f32], &[f32]) {
        self.biases.get(n)
    }

    pub fn zero_biases(&self) -> Biases {
        let Biases { side_h, pitch, h, w } = &self.biases;
        Biases { side_h: *side_h, pitch: *pitch, h: vec![0f32; h.len()], w: vec![0f32; w.len()] }
    }

    /// Gradients of the biases, put where the queries read them in the projected tables.
    fn to_projected(&self, tables: &Tables, dbiases: &Biases) -> (Vec<f32>, Vec<f32>) {
        let (side_h, side_w) = self.side;
        let mut h = vec![0f32; self.places.len() * tables.h.pitch()];
        let mut w = vec![0f32; self.places.len() * tables.w.pitch()];
        for (n, &(y, x)) in self.places.iter().enumerate() {
            h[n * tables.h.pitch() + side_h - 1 - y..][..side_h]
                .copy_from_slice(&dbiases.h[n * side_h..][..side_h]);
            w[n * tables.w.pitch() + side_w - 1 - x..][..side_w]
                .copy_from_slice(&dbiases.w[n * dbiases.pitch..][..side_w]);
        }
        (h, w)
    }
}
