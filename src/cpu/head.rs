//! One head of one window, gathered from the packed grid into the shapes the products want.
//!
//! ```text
//! q, dO      [block, width]               width = head_dim padded to whole vectors, the rest zero
//! k, v       [keys, width]                keys = side_h x pitch, pitch = side_w padded to whole vectors
//! k^T, v^T   [tile][head_dim, stride]     tiles of whole window rows; an odd number of vectors apart, so that the
//!                                         lines of a column do not compete for the same places of a cache
//! ```
//! Where products are of pairs, two neighbours of k, of q's width or of the keys make one element.

use super::bf16;
use super::buffer::Buffer;
use super::element::Element;
use super::math::add;
use super::products::Products;
use super::simd::{padded, MAX_LANES};
use crate::problem::AttentionProblem;
use std::ops::Range;

/// Keys of one tile, at most, unless a single window row is longer.
const BLOCK_N: usize = 512;

/// The inputs: `qkv [batch, h, w, 3, heads, d]`, tables `[2 side - 1, d]` or empty, `pad [3, heads, d]` or empty
/// (zero).
pub struct Inputs<'a, T> {
    /// Packed q, k, v of the grid's tokens.
    pub qkv: &'a [T],
    /// `rel_pos_h`, then `rel_pos_w`.
    pub tables: &'a [f32],
    /// The qkv of a padded token.
    pub pad: Vec<T>,
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
pub struct Head<'a, T> {
    pub p: &'a AttentionProblem,
    /// `window * heads + head`
    pub unit: usize,
    /// Tokens inside the grid: (token of the window, token of the grid).
    pub real: Vec<(usize, usize)>,
    pub products: Products,
    pub qkv: &'a [T],
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
    /// `[keys, width]`, [down rows](Products::down_rows).
    pub k: &'a [f32],
    /// As `k`.
    pub v: &'a [f32],
    /// `[head_dim, stride]`, the transpose of what is [along rows](Products::along_rows).
    pub k_t: &'a [f32],
    /// As `k_t`.
    pub v_t: &'a [f32],
}

impl<'a, T: Element> Head<'a, T> {
    pub fn gather(
        p: &'a AttentionProblem,
        inputs: &'a Inputs<'a, T>,
        unit: usize,
        pass: Pass,
    ) -> Self {
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
            sources.push(grid.map_or(&inputs.pad[..], |grid| &inputs.qkv[grid * 3 * channels..]));
        }
        // k (1) or v (2) of every token that has any.
        let part = |index: usize| {
            let values =
                move |source: &&'a [T]| source.get(index * channels + head * d..)?.get(..d);
            places().zip(&sources).filter_map(move |(place, source)| Some((place, values(source)?)))
        };
        let products = Products::of::<T>(d);
        let rows = |index: usize| {
            let mut rows = Buffer::zeros(products.depth(p.side_h * pitch) * width);
            let mut wide = Vec::new();
            for ((y, x), values) in part(index) {
                let key = y * pitch + x;
                match products {
                    Products::F32 => {
                        let values = T::read(values, &mut wide);
                        rows[key * width..][..d].copy_from_slice(values);
                    }
                    Products::Pairs => {
                        let values = T::pairs(values);
                        let values: &[half::bf16] = bytemuck::cast_slice(&values);
                        let pairs = &mut rows[key / 2 * width..][..d];
                        let halves: &mut [half::bf16] = bytemuck::cast_slice_mut(pairs);
                        for (pair, &value) in halves.chunks_exact_mut(2).zip(values) {
                            pair[key % 2] = value;
                        }
                    }
                }
            }
            rows
        };
        let columns = |index: usize| {
            let (tile_rows, stride) = (tile_rows(p), tile_stride(p));
            let tile_size = products.depth(d) * stride;
            let mut columns = Buffer::zeros(p.side_h.div_ceil(tile_rows) * tile_size);
            let mut wide = Vec::new();
            for ((y, x), values) in part(index) {
                let pairs;
                let elements = match products {
                    Products::F32 => T::read(values, &mut wide),
                    Products::Pairs => {
                        pairs = T::pairs(values);
                        &pairs
                    }
                };
                let tile = &mut columns[y / tile_rows * tile_size..][..tile_size];
                let at = y % tile_rows * pitch + x;
                for (line, &element) in tile.chunks_exact_mut(stride).zip(elements) {
                    line[at] = element;
                }
            }
            columns
        };
        let (k, v, v_t) = match pass {
            Pass::Forward => (Buffer::default(), rows(2), Buffer::default()),
            Pass::Backward => (rows(1), Buffer::default(), columns(2)),
        };
        let k_t = columns(1);
        Self { p, unit, real, products, qkv: inputs.qkv, k, v, k_t, v_t }
    }

    /// Key `key` of the backward, `[width]`.
    pub fn key(&self, key: usize) -> Vec<f32> {
        let width = padded(self.p.head_dim);
        let row = &self.k[self.products.depth(key + 1) * width - width..][..width];
        match self.products {
            Products::F32 => row.to_vec(),
            Products::Pairs => row.iter().map(|&pair| bf16::split(pair)[key % 2]).collect(),
        }
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
            let depth = |numbers| self.products.depth(numbers);
            let natural = depth(first) * width..depth(first + keys) * width;
            let transposed =
                index * depth(p.head_dim) * stride..(index + 1) * depth(p.head_dim) * stride;
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
    pub fn gather_grid(&self, grid: &[T], real: &[(usize, usize)]) -> Vec<f32> {
        self.gather_rows(grid, self.p.channels(), real)
    }

    pub fn gather_rows(&self, rows: &[T], stride: usize, real: &[(usize, usize)]) -> Vec<f32> {
        let (d, width) = (self.p.head_dim, padded(self.p.head_dim));
        let column = self.unit % self.p.num_heads * d;
        let mut gathered = vec![0f32; real.len() * width];
        let mut wide = Vec::new();
        for (out, &(_, index)) in gathered.chunks_exact_mut(width).zip(real) {
            out[..d].copy_from_slice(T::read(&rows[index * stride + column..][..d], &mut wide));
        }
        gathered
    }

    /// Moves dk and dv `[keys, width]` of the real tokens into `slab [2, tokens, d]`, and sums those of padding
    /// tokens into `dpad [2, d]`.
    pub fn scatter_keys(&self, dk: &[f32], dv: &[f32], slab: &mut [T], dpad: &mut [f32]) {
        let (p, d, width, pitch) =
            (self.p, self.p.head_dim, padded(self.p.head_dim), padded(self.p.side_w));
        let mut scratch = Vec::new();
        for (part, grads) in [dk, dv].into_iter().enumerate() {
            let slab = &mut slab[part * p.tokens() * d..][..p.tokens() * d];
            let dpad = &mut dpad[part * d..][..d];
            let mut real = self.real.iter().map(|&(token, _)| token).enumerate().peekable();
            for token in 0..p.tokens() {
                let at = (token / p.side_w * pitch + token % p.side_w) * width;
                let grad = &grads[at..][..d];
                match real.next_if(|&(_, next)| next == token) {
                    Some((index, _)) => {
                        let slab = &mut slab[index * d..][..d];
                        T::write(slab, &mut scratch, |slab| slab.copy_from_slice(grad));
                    }
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
