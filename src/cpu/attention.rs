//! Attention with decomposed relative positions over grids, global or windowed, forward and backward.
//!
//! ```text
//! S[n, m] = scale q_n . k_m + rel_h[n, h_m] + rel_w[n, w_m]      P = exp(S - max) / sum      O = drop(P) V
//! dP = drop(dO V^T)    dS = P (dP - D)    D_n = dO_n . O_n
//! dq = scale dS K + drel_h Rh + drel_w Rw     dk = scale dS^T q     dv = drop(P)^T dO
//! drel_h[n, kh] = sum_kw dS[n, (kh, kw)]      drel_w[n, kw] = sum_kh dS[n, (kh, kw)]
//! ```
//! A unit of work is one head of one window, see [`super::head`]. Its queries go in blocks of `BLOCK_M`, its keys in
//! tiles of whole window rows. The softmax is online. A block's largest buffer is `BLOCK_M` x one key tile. Padding is
//! addressing: keys outside the grid are the `pad` vector, queries outside do not exist.
//!
//! The projected tables are `q R^T` for every table row; a query reads, and in the backward writes, the stretch that
//! belongs to its place. Sums that cross units (tables, pad) are taken in the order of the units.
//!
//! Where one weight is 1 and the others are 0, O is that key's value. The backward's scores have the forward's bits,
//! and D those of the key's dP, so that dS is exactly 0. Keys of 1e4 would turn any rounding left in dS into a large
//! gradient. In bf16 the weights are the forward's rounded ones, and D has the output's error of rounding, too. Where
//! one weight is nearly 1, its dS is small beside the roundings of dP and D. A row's dS add up to zero, so their actual
//! sum is taken off the largest weight's dS. That makes it as exact as the others' sum.

use super::bf16;
use super::block::{Block, Tables};
use super::buffer::{Buffer, Elements};
use super::element::Element;
pub use super::head::Inputs;
use super::head::{Head, Pass, Tile};
use super::math::{add, add_scaled, all_finite};
use super::panel::{Into, Left, Right};
use super::products::Products;
use super::simd::padded;
pub use super::softmax::Normalizer;
use super::softmax::{apply, AboveHalf, Gradient, Online, OnlineStep, Row};
use super::weights::Weights;
use crate::problem::AttentionProblem;
use rayon::prelude::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Queries of one block, at most. Every block reads all keys and values, and in the backward adds to all their
/// gradients. These do not fit into a second-level cache: small blocks would wait for the third.
const BLOCK_M: usize = 96;
/// Rows of a register tile, see [`super::panel`].
const TILE_M: usize = 6;
/// As [`BLOCK_M`], for the backward of pairs: fewer blocks add to the gradients of the keys.
const PAIRS_BLOCK_M: usize = 192;
/// Queries whose scores of a tile stay in the first-level cache between the products.
const GROUP: usize = 6;

/// Queries of each block but the last: equal parts, in whole register tiles.
fn block_rows(queries: usize, most: usize) -> usize {
    let blocks = queries.div_ceil(most).max(1);
    queries.div_ceil(blocks).next_multiple_of(TILE_M).max(TILE_M)
}

/// Gradients of [`Inputs`]; `tables` and `pad` are empty where the input is.
pub struct Gradients<T: Element> {
    /// Gradient of qkv.
    pub qkv: Elements<T>,
    /// Gradient of the tables.
    pub tables: Vec<f32>,
    /// Gradient of the pad.
    pub pad: Vec<f32>,
}

/// Values of the forward that the backward needs besides its inputs and output.
pub struct Saved<T: Element> {
    /// The softmax' normalizers `[windows, heads, tokens]`, real tokens first, in order.
    pub normalizers: Vec<Normalizer>,
    /// The output's error of rounding, for D; empty where there is none.
    pub rounding: Elements<T>,
}

/// Output `[batch, h, w, heads, d]`; the error of its rounding is kept only if `keep`.
pub fn forward<T: Element>(
    p: &AttentionProblem,
    inputs: &Inputs<'_, T>,
    keep: bool,
) -> (Elements<T>, Saved<T>) {
    let (tokens, d) = (p.tokens(), p.head_dim);
    let units = p.windows() * p.num_heads;
    let tables = Tables::new::<T>(p, inputs.tables);
    // Head-major, so that every block writes a contiguous part; permuted to the grid afterwards.
    let mut out = Elements::any(units * tokens * d);
    let mut rounding = Elements::any(if keep && T::IS_BF16 { out.len() } else { 0 });
    let mut normalizers = vec![Normalizer { max: 0.0, sum: 0.0 }; units * tokens];
    let mut roundings: Vec<&mut [T]> = rounding.chunks_mut(tokens * d).collect();
    roundings.resize_with(units, Default::default);
    let outputs = out.par_chunks_mut(tokens * d).zip(roundings);
    outputs.zip(normalizers.par_chunks_mut(tokens)).enumerate().for_each(
        |(unit, ((out, rounding), normalizers))| {
            let head = Head::gather(p, inputs, unit, Pass::Forward);
            let rows = block_rows(head.real.len(), BLOCK_M);
            let mut roundings: Vec<&mut [T]> = rounding.chunks_mut(rows * d).collect();
            roundings.resize_with(tokens.div_ceil(rows), Default::default);
            let outputs = out.par_chunks_mut(rows * d).zip(roundings);
            outputs.zip(normalizers.par_chunks_mut(rows)).zip(head.real.par_chunks(rows)).for_each(
                |((out, normalizers), real)| forward_block(&head, &tables, real, out, normalizers),
            );
        },
    );
    let rounding = match rounding.is_empty() {
        true => rounding,
        false => to_grid(p, &rounding, d, 1),
    };
    (to_grid(p, &out, d, 1), Saved { normalizers, rounding })
}

/// One block of queries against all keys. `out`, its error of rounding if that is kept, and `normalizers` hold the
/// block's real queries in order.
fn forward_block<T: Element>(
    head: &Head<'_, T>,
    tables: &Tables,
    real: &[(usize, usize)],
    (out, rounding): (&mut [T], &mut [T]),
    normalizers: &mut [Normalizer],
) {
    let (p, count, width) = (head.p, real.len(), padded(head.p.head_dim));
    let products = head.products;
    let block = Block::new(head, tables, real);
    let q = products.along_rows(&block.q);
    let mut max = vec![f32::NEG_INFINITY; count];
    let mut sum = vec![0f32; count];
    let mut acc = vec![0f32; count * width];
    let mut scores = vec![0f32; GROUP * head.stride()];
    let mut pairs = vec![0f32; if products == Products::Pairs { scores.len() / 2 } else { 0 }];
    for tile in head.tiles() {
        for first in (0..count).step_by(GROUP) {
            let rows = GROUP.min(count - first);
            multiply_keys(head, (&q, first..first + rows), &tile, tile.k_t, &mut scores);
            let mut pairs_of_rows = pairs.chunks_exact_mut(tile.stride / 2);
            for (n, scores) in (first..).zip(scores.chunks_exact_mut(tile.stride)).take(rows) {
                let row = score_row(p, &block, &tile, n, &mut scores[..tile.keys]);
                let pairs = pairs_of_rows.next().map(|pairs| &mut pairs[..tile.keys / 2]);
                let step = weigh(head, &tile, (real[n].0, max[n]), row, pairs);
                if step.rescale != 1.0 {
                    sum[n] *= step.rescale;
                    acc[n * width..][..width].iter_mut().for_each(|o| *o *= step.rescale);
                }
                (max[n], sum[n]) = (step.max, sum[n] + step.sum);
            }
            let weights = match products {
                Products::F32 => Left::Rows(&scores, tile.stride),
                Products::Pairs => Left::Rows(&pairs, tile.stride / 2),
            };
            let (acc, shape) = (&mut acc[first * width..], (rows, width, tile.keys));
            products.multiply((acc, width), (Into::Add, 1.0), shape, weights, Right(tile.v, width));
        }
    }
    let mut scratch = Vec::new();
    for (n, out) in out.chunks_exact_mut(p.head_dim).take(count).enumerate() {
        let acc = &mut acc[n * width..][..p.head_dim];
        acc.iter_mut().for_each(|o| *o /= sum[n]);
        T::write(out, &mut scratch, |out| out.copy_from_slice(acc));
        if let Some(rounding) = rounding.get_mut(n * p.head_dim..(n + 1) * p.head_dim) {
            for (rounding, (acc, out)) in rounding.iter_mut().zip(acc.iter().zip(out)) {
                // Where the output is infinite or NaN, so is D without this.
                let error = acc - out.widened();
                *rounding = T::nearest(if error.is_finite() { error } else { 0.0 });
            }
        }
        normalizers[n] = Normalizer { max: max[n], sum: sum[n] };
    }
}

/// Turns a token's scores of a tile into weights, dropped, in place or as `pairs`.
fn weigh<T>(
    head: &Head<'_, T>,
    tile: &Tile<'_>,
    (token, max): (usize, f32),
    row: Row<'_>,
    pairs: Option<&mut [f32]>,
) -> OnlineStep {
    match pairs {
        Some(pairs) if head.p.dropout.is_none() => bf16::weights(row, max, pairs),
        pairs => {
            let Row { scores, rel_h, rel_w, scale } = row;
            let row = Row { scores: &mut *scores, rel_h, rel_w, scale };
            let step = apply(Online { row, max });
            drop_weights(head, token, tile, scores);
            if let Some(pairs) = pairs {
                bf16::pairs_into(scores, pairs);
            }
            step
        }
    }
}

/// Some of `rows [count, d] x columns [d, keys]` for a tile's transposed keys or values.
fn multiply_keys<T: Element>(
    head: &Head<'_, T>,
    (rows, some): (&[f32], Range<usize>),
    tile: &Tile<'_>,
    columns: &[f32],
    out: &mut [f32],
) {
    let stride = head.products.depth(padded(head.p.head_dim));
    let shape = (some.len(), tile.keys, head.p.head_dim);
    let (rows, columns) =
        (Left::Rows(&rows[some.start * stride..], stride), Right(columns, tile.stride));
    head.products.multiply((out, tile.stride), (Into::Store, 1.0), shape, rows, columns);
}

/// Query `n` of the block with its biases for the key rows of the tile.
fn score_row<'a>(
    p: &AttentionProblem,
    block: &'a Block,
    tile: &Tile<'_>,
    n: usize,
    scores: &'a mut [f32],
) -> Row<'a> {
    let (rel_h, rel_w) = block.biases(n);
    let scale = p.softmax_scale * LOG2_E;
    Row { scores, rel_h: &rel_h[tile.rows.clone()], rel_w, scale }
}

/// Attention dropout on one query's weights of a tile.
fn drop_weights<T>(head: &Head<'_, T>, token: usize, tile: &Tile<'_>, weights: &mut [f32]) {
    let (p, Some(dropout)) = (head.p, head.p.dropout) else { return };
    let row = (head.unit * p.tokens() + token) as u64;
    for (y, weights) in tile.rows.clone().zip(weights.chunks_exact_mut(padded(p.side_w))) {
        dropout.apply_row(row, y * p.side_w, &mut weights[..p.side_w]);
    }
}

/// Takes the padding lanes, whose weight is zero, out of dS and its sums over key rows. Zero times a gradient that is
/// not finite is NaN.
fn forget_padding(p: &AttentionProblem, grads: &mut [f32], drel_h: &mut [f32]) {
    for (grads, drel_h) in grads.chunks_exact_mut(padded(p.side_w)).zip(drel_h) {
        let (grads, padding) = grads.split_at_mut(p.side_w);
        padding.fill(0.0);
        *drel_h = grads.iter().sum();
    }
}

/// The gradients for the gradient `grad_out` of the output `out`, both `[batch, h, w, heads, d]`.
pub fn backward<T: Element>(
    p: &AttentionProblem,
    inputs: &Inputs<'_, T>,
    out: &[T],
    saved: &Saved<T>,
    grad_out: &[T],
) -> Gradients<T> {
    let (tokens, d, heads) = (p.tokens(), p.head_dim, p.num_heads);
    let units = p.windows() * heads;
    let tables = Tables::new::<T>(p, inputs.tables);
    // Per unit: dq, dk, dv of the real tokens; the tables' part and the pad's k and v, summed in order below.
    let mut slabs = Elements::any(units * 3 * tokens * d);
    let extra = inputs.tables.len() + 2 * d;
    let mut extras = vec![0f32; units * extra];
    slabs
        .par_chunks_mut(3 * tokens * d)
        .zip(extras.par_chunks_mut(extra).zip(saved.normalizers.par_chunks(tokens)))
        .enumerate()
        .for_each(|(unit, (slab, (extra, normalizers)))| {
            let head = Head::gather(p, inputs, unit, Pass::Backward);
            let (dtables, dpad) = extra.split_at_mut(inputs.tables.len());
            let forward = (out, &*saved.rounding, normalizers);
            backward_head(&head, &tables, forward, grad_out, (slab, dtables, dpad));
        });
    let mut dtables = vec![0f32; inputs.tables.len()];
    let mut dpad = vec![0f32; inputs.pad.len()];
    for (unit, extra) in extras.chunks_exact(extra).enumerate() {
        let (table_part, pad_part) = extra.split_at(inputs.tables.len());
        add(&mut dtables, table_part);
        if !dpad.is_empty() {
            for (part, values) in pad_part.chunks_exact(d).enumerate() {
                add(&mut dpad[(part + 1) * p.channels() + unit % heads * d..][..d], values);
            }
        }
    }
    Gradients { qkv: to_grid(p, &slabs, d, 3), tables: dtables, pad: dpad }
}

/// All of one head in one window: `slab` is `[dq | dk | dv]` of the real tokens, `dpad` the k and v of the padding.
fn backward_head<T: Element>(
    head: &Head<'_, T>,
    tables: &Tables,
    (out, rounding, normalizers): (&[T], &[T], &[Normalizer]),
    grad_out: &[T],
    (slab, dtables, dpad): (&mut [T], &mut [f32], &mut [f32]),
) {
    let (p, d, width) = (head.p, head.p.head_dim, padded(head.p.head_dim));
    let (dq, dkv) = slab.split_at_mut(p.tokens() * d);
    let mut dk = Buffer::zeros(head.keys() * width);
    let mut dv = Buffer::zeros(head.keys() * width);
    let mut dtables_padded = tables.zeros();
    let products = head.products;
    let block_rows = match products {
        Products::F32 => block_rows(head.real.len(), BLOCK_M),
        Products::Pairs => block_rows(head.real.len(), PAIRS_BLOCK_M),
    };
    let mut work = Weights::new(products, (block_rows, GROUP), head.stride());
    let mut scratch = Vec::new();
    let blocks = head.real.chunks(block_rows).zip(normalizers.chunks(block_rows));
    let blocks = blocks.zip(dq.chunks_mut(block_rows * d));
    for ((real, normalizers), dq) in blocks {
        let count = real.len();
        let block = Block::new(head, tables, real);
        let grad = head.gather_grid(grad_out, real);
        let (q_rows, grad_rows) = (products.along_rows(&block.q), products.along_rows(&grad));
        let dots = |out: &[T]| {
            let out = head.gather_grid(out, real);
            products.row_dots(&grad_rows, &products.along_rows(&out), products.depth(width))
        };
        let mut delta = dots(out);
        if !rounding.is_empty() {
            add(&mut delta, &dots(rounding));
        }
        let (q_right, grad_right) =
            (products.down_rows(&block.q, width), products.down_rows(&grad, width));
        for (delta, grad) in delta.iter_mut().zip(grad.chunks_exact(width)) {
            // The sum of P dP, which is infinite both ways, as its product is not.
            if delta.is_infinite() && !all_finite(grad) {
                *delta = f32::NAN;
            }
        }
        let mut dbiases = block.zero_biases();
        let mut dq_padded = vec![0f32; count * width];
        let mut largest = vec![None; count];
        for tile in head.tiles() {
            let (keys, stride) = (tile.keys, tile.stride);
            for first in (0..count).step_by(GROUP) {
                let some = first..count.min(first + GROUP);
                let (weights, grads) = work.rows(first);
                multiply_keys(head, (&q_rows, some.clone()), &tile, tile.k_t, weights);
                multiply_keys(head, (&grad_rows, some.clone()), &tile, tile.v_t, grads);
                let rows = weights.chunks_exact_mut(stride).zip(grads.chunks_exact_mut(stride));
                for (n, (weights, grads)) in some.clone().zip(rows) {
                    let (weights, grads) = (&mut weights[..keys], &mut grads[..keys]);
                    drop_weights(head, real[n].0, &tile, grads);
                    let (rel_h, rel_w) = dbiases.of(n);
                    let rel_h = &mut rel_h[tile.rows.clone()];
                    let row = score_row(p, &block, &tile, n, weights);
                    let (normalizer, delta) = (normalizers[n], delta[n]);
                    let gradient = Gradient {
                        row,
                        normalizer,
                        grads: &mut *grads,
                        delta,
                        rel_h: &mut *rel_h,
                        rel_w,
                    };
                    match products {
                        Products::F32 => apply(gradient),
                        Products::Pairs => bf16::gradient(gradient),
                    }
                    if !delta.is_finite() {
                        forget_padding(p, grads, rel_h);
                    }
                    if normalizer.sum < 2.0 {
                        largest[n] =
                            largest[n].or_else(|| Some(tile.first + apply(AboveHalf(weights))?));
                    }
                    drop_weights(head, real[n].0, &tile, weights);
                }
                let ds = work.finish(some.clone(), keys);
                let (dq, shape) = (&mut dq_padded[first * width..], (some.len(), width, keys));
                let into = (Into::Add, p.softmax_scale);
                products.multiply((dq, width), into, shape, ds, Right(tile.k, width));
            }
            let (weights_t, ds_t) = work.transposed();
            let shape = (keys, width, count);
            let at = tile.first * width..(tile.first + keys) * width;
            let (dk, dv) = (&mut dk[at.clone()], &mut dv[at]);
            let into = (Into::Add, p.softmax_scale);
            products.multiply((dk, width), into, shape, ds_t, Right(&q_right, width));
            let into = (Into::Add, 1.0);
            products.multiply((dv, width), into, shape, weights_t, Right(&grad_right, width));
        }
        let pitch = padded(p.side_w);
        for (n, &key) in largest.iter().enumerate() {
            let Some(key) = key else { continue };
            let (rel_h, rel_w) = dbiases.of(n);
            let excess: f32 = rel_h.iter().sum();
            if !excess.is_finite() {
                continue;
            }
            rel_h[key / pitch] -= excess;
            rel_w[key % pitch] -= excess;
            let factor = -p.softmax_scale * excess;
            let query = n * width..(n + 1) * width;
            add_scaled(&mut dq_padded[query.clone()], factor, &head.key(key));
            add_scaled(&mut dk[key * width..][..width], factor, &block.q[query]);
        }
        tables.backward(&block, &dbiases, &mut dq_padded, &mut dtables_padded);
        for (dq, padded) in dq.chunks_exact_mut(d).zip(dq_padded.chunks_exact(width)) {
            T::write(dq, &mut scratch, |dq| dq.copy_from_slice(&padded[..d]));
        }
    }
    tables.unpad(&dtables_padded, dtables);
    head.scatter_keys(&dk, &dv, dkv, dpad);
}

/// `[windows, heads, part, real tokens, d]` -> `[grid tokens, part, heads, d]`: each unit's slab of `parts * tokens`
/// rows holds, part by part, its real tokens in order.
fn to_grid<T: Element>(p: &AttentionProblem, slabs: &[T], d: usize, parts: usize) -> Elements<T> {
    let (tokens, heads) = (p.tokens(), p.num_heads);
    let mut place = vec![(0usize, 0usize); p.batch * p.h * p.w];
    for window in 0..p.windows() {
        let real = (0..tokens).filter_map(|token| p.grid_index(window, token));
        for (index, grid) in real.enumerate() {
            place[grid] = (window, index);
        }
    }
    let mut grid = Elements::any(place.len() * parts * heads * d);
    grid.par_chunks_mut(parts * heads * d).zip(&place).for_each(|(row, &(window, index))| {
        for (slot, out) in row.chunks_exact_mut(d).enumerate() {
            let (part, head) = (slot / heads, slot % heads);
            let slab = (window * heads + head) * parts + part;
            out.copy_from_slice(&slabs[(slab * tokens + index) * d..][..d]);
        }
    });
    grid
}
