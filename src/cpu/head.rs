//! One head of one window, gathered from the packed grid into the shapes the products want.
//!
//! ```text
//! q, dO      [block, width]               width = head_dim padded to whole vectors, the rest zero
//! k, v       [keys, width]                keys = side_h x pitch, pitch = side_w padded to whole vectors
//! k^T, v^T   [tile][head_dim, tile keys]  tiles of whole window rows
//! tables     [width of the reversed table, width] and transposed; row j holds R[2 side - 2 - j]
//! ```
//! In a reversed table the rows a query at row y needs, `R[y - kh + side - 1]` for kh = 0, 1, .., are consecutive
//! from `side - 1 - y`: its biases are one stretch of `q R^T`, ready to be read as vectors.

use super::attention::{add, Inputs};
use super::panel::{panel, Into, Left, Right};
use super::simd::padded;
use crate::problem::AttentionProblem;
use std::ops::Range;

/// Keys of one tile, at most, unless a single window row is longer.
const BLOCK_N: usize = 256;

/// Keys and values of one head of one window.
pub struct Head<'a> {
    pub p: &'a AttentionProblem,
    /// `window * heads + head`
    pub unit: usize,
    /// Tokens inside the grid: (token of the window, token of the grid).
    pub real: Vec<(usize, usize)>,
    qkv: &'a [f32],
    k: Vec<f32>,
    v: Vec<f32>,
    k_t: Vec<f32>,
    v_t: Vec<f32>,
}

/// Some whole key rows of a window.
pub struct Tile<'a> {
    /// Which rows of the window.
    pub rows: Range<usize>,
    /// Keys in the tile, padding lanes included.
    pub keys: usize,
    /// The first of them.
    pub first: usize,
    pub head_dim: usize,
    pub softmax_scale: f32,
    /// `[keys, width]`
    pub k: &'a [f32],
    /// `[keys, width]`
    pub v: &'a [f32],
    /// `[head_dim, keys]`
    pub k_t: &'a [f32],
    /// `[head_dim, keys]`
    pub v_t: &'a [f32],
}

impl<'a> Head<'a> {
    pub fn gather(p: &'a AttentionProblem, inputs: &Inputs<'a>, unit: usize) -> Self {
        let (window, head) = (unit / p.num_heads, unit % p.num_heads);
        let (d, channels, width, pitch) =
            (p.head_dim, p.channels(), padded(p.head_dim), padded(p.side_w));
        let size = p.side_h * pitch;
        let (mut k, mut v) = (vec![0f32; size * width], vec![0f32; size * width]);
        let mut real = Vec::with_capacity(p.tokens());
        for token in 0..p.tokens() {
            let source = match p.grid_index(window, token) {
                Some(grid) => {
                    real.push((token, grid));
                    &inputs.qkv[grid * 3 * channels..][..3 * channels]
                }
                None if inputs.pad.is_empty() => continue,
                None => inputs.pad,
            };
            let at = (token / p.side_w * pitch + token % p.side_w) * width;
            k[at..][..d].copy_from_slice(&source[channels + head * d..][..d]);
            v[at..][..d].copy_from_slice(&source[2 * channels + head * d..][..d]);
        }
        let (k_t, v_t) = (transpose_tiles(p, &k), transpose_tiles(p, &v));
        Self { p, unit, real, qkv: inputs.qkv, k, v, k_t, v_t }
    }

    /// Keys, padding lanes included.
    pub fn keys(&self) -> usize {
        self.p.side_h * padded(self.p.side_w)
    }

    /// Keys of the largest tile.
    pub fn tile_keys(&self) -> usize {
        tile_rows(self.p) * padded(self.p.side_w)
    }

    pub fn tiles(&self) -> impl Iterator<Item = Tile<'_>> {
        let (p, pitch, width) = (self.p, padded(self.p.side_w), padded(self.p.head_dim));
        tile_ranges(p).map(move |rows| {
            let (first, keys) = (rows.start * pitch, rows.len() * pitch);
            let natural = first * width..(first + keys) * width;
            let transposed = first * p.head_dim..(first + keys) * p.head_dim;
            Tile {
                rows,
                keys,
                first,
                head_dim: p.head_dim,
                softmax_scale: p.softmax_scale,
                k: &self.k[natural.clone()],
                v: &self.v[natural],
                k_t: &self.k_t[transposed.clone()],
                v_t: &self.v_t[transposed],
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

fn tile_ranges(p: &AttentionProblem) -> impl Iterator<Item = Range<usize>> {
    let (step, side_h) = (tile_rows(p), p.side_h);
    (0..side_h).step_by(step).map(move |row| row..(row + step).min(side_h))
}

/// `[keys, width]` -> `[tile][head_dim, tile keys]`
fn transpose_tiles(p: &AttentionProblem, rows: &[f32]) -> Vec<f32> {
    let (d, width, pitch) = (p.head_dim, padded(p.head_dim), padded(p.side_w));
    let mut transposed = vec![0f32; rows.len() / width * d];
    let tiles = transposed.chunks_mut(tile_rows(p) * pitch * d);
    for (tile, rows) in tiles.zip(rows.chunks(tile_rows(p) * pitch * width)) {
        let keys = rows.len() / width;
        // Sixteen keys at a time, so that a line of the destination is filled while it is in cache.
        for (group, rows) in rows.chunks(16 * width).enumerate() {
            for c in 0..d {
                let line = &mut tile[c * keys + group * 16..];
                for (out, row) in line.iter_mut().zip(rows.chunks_exact(width)) {
                    *out = row[c];
                }
            }
        }
    }
    transposed
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
        Self { d, h: Table::new(h, rows_h, d), w: Table::new(w, rows_w, d) }
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
        let width = padded(self.d);
        let (dqr_h, dqr_w) = block.to_projected(self, dbiases);
        for (table, dqr, grads) in
            [(&self.h, &dqr_h, &mut grads.h), (&self.w, &dqr_w, &mut grads.w)]
        {
            let (count, pitch) = (block.places.len(), table.pitch());
            let right = Right(&table.natural, width);
            let rows = Left::Rows(dqr, pitch);
            panel((dq, width), Into::Add, 1.0, (count, width, pitch), rows, right);
            let columns = Left::Columns(dqr, pitch);
            let q = Right(&block.q, width);
            panel((grads, width), Into::Add, 1.0, (pitch, width, count), columns, q);
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

/// Biases of a block's queries, or their gradients: `rel_h [count, side_h]`, `rel_w [count, pitch]`.
pub struct Biases {
    side_h: usize,
    pitch: usize,
    h: Vec<f32>,
    w: Vec<f32>,
}

impl Biases {
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
            panel((&mut out, table.pitch()), Into::Store, 1.0, shape, rows, right);
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
        let Biases { side_h, pitch, h, w } = &self.biases;
        (&h[n * side_h..][..*side_h], &w[n * pitch..][..*pitch])
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
