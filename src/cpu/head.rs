//! One head of one window, gathered from the packed grid into the shapes the products want.
//!
//! ```text
//! q, dO      [block, width]               width = head_dim padded to whole vectors, the rest zero
//! k, v       [keys, width]                keys = side_h x pitch, pitch = side_w padded to whole vectors
//! k^T, v^T   [tile][head_dim, stride]     tiles of whole window rows; an odd number of vectors apart, so that the
//!                                         lines of a column do not compete for the same places of a cache
//! tables     [width of the reversed table, width] and transposed; row j holds R[2 side - 2 - j]
//! ```
//! A query at row y needs the rows `R[y - kh + side - 1]` for kh = 0, 1, .. In a reversed table these are consecutive
//! from `side - 1 - y`. So its biases are one stretch of `q R^T`, ready to be read as vectors.

use super::buffer::Buffer;
use super::math::{add, add_scaled, all_finite};
use super::panel::{panel, Into, Left, Right};
use super::simd::{padded, MAX_LANES};
use crate::problem::AttentionProblem;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Keys of one tile, at most, unless a single window row is longer.
const BLOCK_N: usize = 512;

/// The inputs: `qkv [batch, h, w, 3, heads, d]`, tables `[2 side - 1, d]` or empty, `pad [3, heads, d]` or empty
/// (zero).
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Packed q, k, v of the grid's tokens.
    pub qkv: &'a [f32],
    /// `rel_pos_h`, then `rel_pos_w`.
    pub tables: &'a [f32],
    /// The qkv of a padded token.
    pub pad: &'a [f32],
}

/// Which keys and values are wanted, and how.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// k^T and v.
    Forward,
    /// k, k^T and v^T.
    Backward,
}

/// Keys and values of one head of one window; what its pass does not want is empty.
pub struct Head<'a> {
    pub p: &'a AttentionProblem,
    /// `window * heads + head`
    pub unit: usize,
    /// Tokens inside the grid: (token of the window, token of the grid).
    pub real: Vec<(usize, usize)>,
    qkv: &'a [f32],
    k: Buffer,
    v: Buffer,
    k_t: Buffer,
    v_t: Buffer,
}

/// Some whole key rows of a window.
pub struct Tile<'a> {
    /// Which rows of the window.
    pub rows: Range<usize>,
    /// Keys in the tile, padding lanes included.
    pub keys: usize,
    /// The first of them.
    pub first: usize,
    /// Distance of the rows of what has a column per key.
    pub stride: usize,
    /// `[keys, width]`
    pub k: &'a [f32],
    /// `[keys, width]`
    pub v: &'a [f32],
    /// `[head_dim, stride]`
    pub k_t: &'a [f32],
    /// `[head_dim, stride]`
    pub v_t: &'a [f32],
}

impl<'a> Head<'a> {
    pub fn gather(p: &'a AttentionProblem, inputs: &Inputs<'a>, unit: usize, pass: Pass) -> Self {
        let (window, head) = (unit / p.num_heads, unit % p.num_heads);
        let (d, channels, width, pitch) =
            (p.head_dim, p.channels(), padded(p.head_dim), padded(p.side_w));
        let places = || (0..p.side_h).flat_map(|y| (0..p.side_w).map(move |x| (y, x)));
        let mut real = Vec::with_capacity(p.tokens());
        // The tokens' q, k and v; nothing where they are zero.
        let mut sources = Vec::with_capacity(p.tokens());
        for token in 0..p.tokens() {
            let grid = p.grid_index(window, token);
            real.extend(grid.map(|grid| (token, grid)));
            sources.push(grid.map_or(inputs.pad, |grid| &inputs.qkv[grid * 3 * channels..]));
        }
        // k (1) or v (2) of every token that has any.
        let part = |index: usize| {
            let values =
                move |source: &&'a [f32]| source.get(index * channels + head * d..)?.get(..d);
            places().zip(&sources).filter_map(move |(place, source)| Some((place, values(source)?)))
        };
        let rows = |index: usize| {
            let mut rows = Buffer::zeros(p.side_h * pitch * width);
            for ((y, x), values) in part(index) {
                rows[(y * pitch + x) * width..][..d].copy_from_slice(values);
            }
            rows
        };
        let columns = |index: usize| {
            let (tile_rows, stride) = (tile_rows(p), tile_stride(p));
            let mut columns = Buffer::zeros(p.side_h.div_ceil(tile_rows) * d * stride);
            for ((y, x), values) in part(index) {
                let tile = &mut columns[y / tile_rows * d * stride..][..d * stride];
                let at = y % tile_rows * pitch + x;
                for (line, &value) in tile.chunks_exact_mut(stride).zip(values) {
                    line[at] = value;
                }
            }
            columns
        };
        let (k, v, v_t) = match pass {
            Pass::Forward => (Buffer::default(), rows(2), Buffer::default()),
            Pass::Backward => (rows(1), Buffer::default(), columns(2)),
        };
        let k_t = columns(1);
        Self { p, unit, real, qkv: inputs.qkv, k, v, k_t, v_t }
    }

    /// Every key, `[keys, width]`, of the backward.
    pub fn k(&self) -> &[f32] {
        &self.k
    }

    /// Keys, padding lanes included.
    pub fn keys(&self) -> usize {
        self.p.side_h * padded(self.p.side_w)
    }

    /// See [`Tile::stride`].
    pub fn stride(&self) -> usize {
        tile_stride(self.p)
    }

    pub fn tiles(&self) -> impl Iterator<Item = Tile<'_>> {
        let (p, pitch, width) = (self.p, padded(self.p.side_w), padded(self.p.head_dim));
        let (step, stride) = (tile_rows(p), tile_stride(p));
        (0..p.side_h).step_by(step).enumerate().map(move |(index, row)| {
            let rows = row..(row + step).min(p.side_h);
            let (first, keys) = (rows.start * pitch, rows.len() * pitch);
            let natural = first * width..(first + keys) * width;
            let transposed = index * p.head_dim * stride..(index + 1) * p.head_dim * stride;
            Tile {
                rows,
                keys,
                first,
                stride,
                k: part_of(&self.k, natural.clone()),
                v: part_of(&self.v, natural),
                k_t: part_of(&self.k_t, transposed.clone()),
                v_t: part_of(&self.v_t, transposed),
            }
        })
    }

    /// This head of some tokens of a `[grid, heads, d]` array, as `[tokens, width]`.
    pub fn gather_grid(&self, grid: &[f32], real: &[(usize, usize)]) -> Vec<f32> {
        self.gather_rows(grid, self.p.channels(), real)
    }

    fn gather_rows(&self, rows: &[f32], stride: usize, real: &[(usize, usize)]) -> Vec<f32> {
        let (d, width) = (self.p.head_dim, padded(self.p.head_dim));
        let column = self.unit % self.p.num_heads * d;
        let mut gathered = vec![0f32; real.len() * width];
        for (out, &(_, index)) in gathered.chunks_exact_mut(width).zip(real) {
            out[..d].copy_from_slice(&rows[index * stride + column..][..d]);
        }
        gathered
    }

    /// Moves dk and dv `[keys, width]` of the real tokens into `slab [2, tokens, d]`, and sums those of padding
    /// tokens into `dpad [2, d]`.
    pub fn scatter_keys(&self, dk: &[f32], dv: &[f32], slab: &mut [f32], dpad: &mut [f32]) {
        let (p, d, width, pitch) =
            (self.p, self.p.head_dim, padded(self.p.head_dim), padded(self.p.side_w));
        for (part, grads) in [dk, dv].into_iter().enumerate() {
            let slab = &mut slab[part * p.tokens() * d..][..p.tokens() * d];
            let dpad = &mut dpad[part * d..][..d];
            let mut real = self.real.iter().map(|&(token, _)| token).enumerate().peekable();
            for token in 0..p.tokens() {
                let at = (token / p.side_w * pitch + token % p.side_w) * width;
                let grad = &grads[at..][..d];
                match real.next_if(|&(_, next)| next == token) {
                    Some((index, _)) => slab[index * d..][..d].copy_from_slice(grad),
                    None => add(dpad, grad),
                }
            }
        }
    }
}

/// Window rows of one tile.
fn tile_rows(p: &AttentionProblem) -> usize {
    (BLOCK_N / padded(p.side_w)).clamp(1, p.side_h)
}

/// See [`Tile::stride`].
fn tile_stride(p: &AttentionProblem) -> usize {
    let vectors = tile_rows(p) * padded(p.side_w) / MAX_LANES;
    (vectors | 1) * MAX_LANES
}

/// A range of what may not have been gathered.
fn part_of(values: &[f32], range: Range<usize>) -> &[f32] {
    values.get(range).unwrap_or_default()
}

/// One of the two tables, reversed and padded.
struct Table {
    /// Rows of the table, and padded.
    rows: usize,
    /// `[padded rows, width]`
    natural: Vec<f32>,
    /// `[head_dim, padded rows]`
    transposed: Vec<f32>,
}

/// Both tables, reversed and padded; without rows where there are no relative positions.
pub struct Tables {
    d: usize,
    h: Table,
    w: Table,
    finite: bool,
}

/// Gradients of both [`Tables`], `[padded rows, width]`.
pub struct TableGradients {
    h: Vec<f32>,
    w: Vec<f32>,
}

impl Table {
    fn new(values: &[f32], rows: usize, d: usize) -> Self {
        let (width, pitch) = (padded(d), padded(rows));
        let mut natural = vec![0f32; pitch * width];
        let mut transposed = vec![0f32; pitch * d];
        for (index, row) in values.chunks_exact(d).enumerate() {
            let reversed = rows - 1 - index;
            natural[reversed * width..][..d].copy_from_slice(row);
            for (c, &value) in row.iter().enumerate() {
                transposed[c * pitch + reversed] = value;
            }
        }
        Self { rows, natural, transposed }
    }

    fn pitch(&self) -> usize {
        padded(self.rows)
    }
}

impl Tables {
    /// From `rel_pos_h` and `rel_pos_w` one after the other, each `[2 side - 1, d]`.
    pub fn new(p: &AttentionProblem, tables: &[f32]) -> Self {
        let (d, (rows_h, rows_w)) = (p.head_dim, p.table_rows());
        let (h, w) = tables.split_at(rows_h * d);
        let finite = all_finite(tables);
        Self { d, h: Table::new(h, rows_h, d), w: Table::new(w, rows_w, d), finite }
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
        let width = padded(self.d);
        let (dqr_h, dqr_w) = block.to_projected(self, dbiases);
        for (table, dqr, grads) in
            [(&self.h, &dqr_h, &mut grads.h), (&self.w, &dqr_w, &mut grads.w)]
        {
            let (count, pitch) = (block.places.len(), table.pitch());
            let right = Right(&table.natural, width);
            let rows = Left::Rows(dqr, pitch);
            panel((dq, width), (Into::Add, 1.0), (count, width, pitch), rows, right);
            let columns = Left::Columns(dqr, pitch);
            let q = Right(&block.q, width);
            panel((grads, width), (Into::Add, 1.0), (pitch, width, count), columns, q);
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
    pub fn new(head: &Head<'_>, tables: &Tables, real: &[(usize, usize)]) -> Self {
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
        let project = |table: &Table| {
            let mut out = vec![0f32; real.len() * table.pitch()];
            let shape = (real.len(), table.pitch(), p.head_dim);
            let right = Right(&table.transposed, table.pitch());
            let rows = Left::Rows(&q, padded(p.head_dim));
            panel((&mut out, table.pitch()), (Into::Store, LOG2_E), shape, rows, right);
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
