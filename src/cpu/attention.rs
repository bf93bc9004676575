//! Attention with decomposed relative positions over grids, global or windowed, forward and backward.
//!
//! ```text
//! S[n, m] = scale q_n . k_m + rel_h[n, h_m] + rel_w[n, w_m]      P = exp(S - lse)      O = drop(P) V
//! dP = drop(dO V^T)    dS = P (dP - D)    D_n = dO_n . O_n
//! dq = scale dS K + drel_h Rh + drel_w Rw     dk = scale dS^T q     dv = drop(P)^T dO
//! drel_h[n, kh] = sum_kw dS[n, (kh, kw)]      drel_w[n, kw] = sum_kh dS[n, (kh, kw)]
//! ```
//! A unit of work is one head of one window. Its q, k, v are gathered from the packed grid into `[tokens, d]`, the
//! `pad` vector standing in for tokens outside the grid; queries outside do not exist. Queries go in blocks of
//! `BLOCK_M`, keys in tiles of whole window rows, so in a tile `rel_w` is the same for every key row and `rel_h`
//! one number per key row. The softmax is online; a block's largest buffer is `BLOCK_M` x one key tile.
//!
//! The projected tables are `q R^T` for every table row (`[BLOCK_M, 2 side - 1]`), read with the offset of the
//! query's place; the backward scatters into the same shape and multiplies by R once.

use super::gemm::{gemm, Into, Mat, MatMut};
use super::math::{dot, exp_nonpositive};
use crate::problem::AttentionProblem;
use rayon::prelude::*;

/// Queries of one block.
const BLOCK_M: usize = 64;
/// Keys of one tile, rounded to whole rows of the window.
const BLOCK_N: usize = 256;

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

/// Gradients of [`Inputs`]; `tables` and `pad` are empty where the input is.
pub struct Gradients {
    /// Of qkv.
    pub qkv: Vec<f32>,
    /// Of the tables.
    pub tables: Vec<f32>,
    /// Of the pad.
    pub pad: Vec<f32>,
}

/// q, k, v of one head in one window, `[tokens, d]` each, and which tokens are real.
struct Unit {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Tokens inside the grid: (token of the window, token of the grid).
    real: Vec<(usize, usize)>,
}

impl Unit {
    fn gather(p: &AttentionProblem, inputs: &Inputs<'_>, window: usize, head: usize) -> Self {
        let (d, channels) = (p.head_dim, p.channels());
        let mut parts = [(); 3].map(|_| vec![0f32; p.tokens() * d]);
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
            for (index, part) in parts.iter_mut().enumerate() {
                part[token * d..][..d].copy_from_slice(&source[index * channels + head * d..][..d]);
            }
        }
        let [q, k, v] = parts;
        Self { q, k, v, real }
    }
}

/// Reads `[grid, channels]`-shaped rows of one head for a block of real tokens.
fn gather_head(
    p: &AttentionProblem,
    grid: &[f32],
    block: &[(usize, usize)],
    head: usize,
) -> Vec<f32> {
    let d = p.head_dim;
    let mut rows = Vec::with_capacity(block.len() * d);
    for &(_, index) in block {
        rows.extend_from_slice(&grid[index * p.channels() + head * d..][..d]);
    }
    rows
}

/// The scores of a block of queries against one key tile, biases included.
struct Scores<'a> {
    p: &'a AttentionProblem,
    /// `q R^T`: `[queries, 2 side_h - 1]` and `[queries, 2 side_w - 1]`; empty without relative positions.
    qr_h: Vec<f32>,
    qr_w: Vec<f32>,
    block: &'a [(usize, usize)],
    q: &'a [f32],
}

impl<'a> Scores<'a> {
    fn new(
        p: &'a AttentionProblem,
        tables: &[f32],
        block: &'a [(usize, usize)],
        q: &'a [f32],
    ) -> Self {
        let (d, (rows_h, rows_w)) = (p.head_dim, p.table_rows());
        let project = |table: &[f32], rows: usize| {
            let mut out = vec![0f32; block.len() * rows];
            let queries = Mat::packed(q, block.len(), d);
            let table = Mat::packed(table, rows, d).t();
            gemm(MatMut::packed(&mut out, block.len(), rows), Into::Store, 1.0, queries, table);
            out
        };
        let (qr_h, qr_w) = if p.rel_pos {
            let (table_h, table_w) = tables.split_at(rows_h * d);
            (project(table_h, rows_h), project(table_w, rows_w))
        } else {
            (Vec::new(), Vec::new())
        };
        Self { p, qr_h, qr_w, block, q }
    }

    /// Where query `n`'s projected tables start: entry `kh` is `qr_h[start_h - kh]`, likewise for w.
    fn starts(&self, n: usize) -> (usize, usize) {
        table_starts(self.p, n, self.block[n].0)
    }

    /// Fills `scores [queries, keys]` for the whole key rows `rows`.
    fn tile(&self, k: &[f32], rows: std::ops::Range<usize>, scores: &mut [f32]) {
        let (d, side_w) = (self.p.head_dim, self.p.side_w);
        let keys = rows.len() * side_w;
        gemm(
            MatMut::packed(scores, self.block.len(), keys),
            Into::Store,
            self.p.softmax_scale,
            Mat::packed(self.q, self.block.len(), d),
            Mat::packed(&k[rows.start * side_w * d..], keys, d).t(),
        );
        if !self.p.rel_pos {
            return;
        }
        let mut rel_w = vec![0f32; side_w];
        for (n, scores) in scores.chunks_mut(keys).take(self.block.len()).enumerate() {
            let (start_h, start_w) = self.starts(n);
            for (kw, rel) in rel_w.iter_mut().enumerate() {
                *rel = self.qr_w[start_w - kw];
            }
            for (kh, scores) in rows.clone().zip(scores.chunks_mut(side_w)) {
                let rel_h = self.qr_h[start_h - kh];
                for (score, rel_w) in scores.iter_mut().zip(&rel_w) {
                    *score += rel_h + rel_w;
                }
            }
        }
    }
}

/// Index of `kh = 0` and `kw = 0` in row `n` of the projected tables, for the query at `token`.
fn table_starts(p: &AttentionProblem, n: usize, token: usize) -> (usize, usize) {
    let ((rows_h, rows_w), (y, x)) = (p.table_rows(), (token / p.side_w, token % p.side_w));
    (n * rows_h + y + p.side_h - 1, n * rows_w + x + p.side_w - 1)
}

/// The key tiles of a window, as ranges of its rows.
fn tiles(p: &AttentionProblem) -> impl Iterator<Item = std::ops::Range<usize>> {
    let step = (BLOCK_N / p.side_w).max(1);
    let side_h = p.side_h;
    (0..side_h).step_by(step).map(move |row| row..(row + step).min(side_h))
}

/// Row of the attention-weight matrix that dropout is addressed by.
fn dropout_row(p: &AttentionProblem, window: usize, head: usize, token: usize) -> u64 {
    ((window * p.num_heads + head) * p.tokens() + token) as u64
}

/// Output `[batch, h, w, heads, d]` and `lse [windows, heads, tokens]`, real tokens first, in order.
pub fn forward(p: &AttentionProblem, inputs: &Inputs<'_>) -> (Vec<f32>, Vec<f32>) {
    let (tokens, d) = (p.tokens(), p.head_dim);
    let units = p.windows() * p.num_heads;
    // Head-major, so that every block writes a contiguous part; permuted to the grid afterwards.
    let mut out = vec![0f32; units * tokens * d];
    let mut lse = vec![0f32; units * tokens];
    out.par_chunks_mut(tokens * d).zip(lse.par_chunks_mut(tokens)).enumerate().for_each(
        |(unit, (out, lse))| {
            let (window, head) = (unit / p.num_heads, unit % p.num_heads);
            let data = Unit::gather(p, inputs, window, head);
            out.par_chunks_mut(BLOCK_M * d)
                .zip(lse.par_chunks_mut(BLOCK_M))
                .zip(data.real.par_chunks(BLOCK_M))
                .for_each(|((out, lse), block)| {
                    forward_block(p, inputs.tables, &data, (window, head), block, out, lse)
                });
        },
    );
    (to_grid(p, &out, d, 1), lse)
}

/// One block of queries against all keys. `out` and `lse` hold the block's real queries in order.
fn forward_block(
    p: &AttentionProblem,
    tables: &[f32],
    unit: &Unit,
    (window, head): (usize, usize),
    block: &[(usize, usize)],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let d = p.head_dim;
    let q = gather_tokens(&unit.q, block, d);
    let scores_of = Scores::new(p, tables, block, &q);
    let mut max = vec![f32::NEG_INFINITY; block.len()];
    let mut sum = vec![0f32; block.len()];
    let mut scores = vec![0f32; block.len() * tile_keys(p)];
    for rows in tiles(p) {
        let first = rows.start * p.side_w;
        let keys = rows.len() * p.side_w;
        scores_of.tile(&unit.k, rows, &mut scores);
        for (n, scores) in scores.chunks_mut(keys).take(block.len()).enumerate() {
            let tile_max = scores.iter().fold(max[n], |m, &s| m.max(s));
            let rescale = exp_nonpositive(max[n] - tile_max);
            let mut tile_sum = 0f32;
            for score in scores.iter_mut() {
                *score = exp_nonpositive(*score - tile_max);
                tile_sum += *score;
            }
            sum[n] = sum[n] * rescale + tile_sum;
            max[n] = tile_max;
            if rescale != 1.0 {
                out[n * d..][..d].iter_mut().for_each(|o| *o *= rescale);
            }
            if let Some(dropout) = p.dropout {
                dropout.apply_row(dropout_row(p, window, head, block[n].0), first, scores);
            }
        }
        gemm(
            MatMut::packed(&mut out[..block.len() * d], block.len(), d),
            Into::Add,
            1.0,
            Mat::packed(&scores, block.len(), keys),
            Mat::packed(&unit.v[first * d..], keys, d),
        );
    }
    for (n, out) in out.chunks_mut(d).take(block.len()).enumerate() {
        out.iter_mut().for_each(|o| *o /= sum[n]);
        lse[n] = max[n] + sum[n].ln();
    }
}

/// Keys of the largest tile.
fn tile_keys(p: &AttentionProblem) -> usize {
    (BLOCK_N / p.side_w).clamp(1, p.side_h) * p.side_w
}

fn gather_tokens(rows: &[f32], block: &[(usize, usize)], d: usize) -> Vec<f32> {
    block.iter().flat_map(|&(token, _)| &rows[token * d..][..d]).copied().collect()
}

/// `[windows, heads, part.., real tokens, d]` -> `[grid tokens, part, heads, d]`: each unit's slab of
/// `parts * tokens` rows holds, part by part, its real tokens in order.
fn to_grid(p: &AttentionProblem, slabs: &[f32], d: usize, parts: usize) -> Vec<f32> {
    let (tokens, heads) = (p.tokens(), p.num_heads);
    let mut place = vec![(0usize, 0usize); p.batch * p.h * p.w];
    for window in 0..p.windows() {
        let real = (0..tokens).filter_map(|token| p.grid_index(window, token));
        for (index, grid) in real.enumerate() {
            place[grid] = (window, index);
        }
    }
    let mut grid = vec![0f32; place.len() * parts * heads * d];
    grid.par_chunks_mut(parts * heads * d).zip(&place).for_each(|(row, &(window, index))| {
        for (slot, out) in row.chunks_mut(d).enumerate() {
            let (part, head) = (slot / heads, slot % heads);
            let slab = (window * heads + head) * parts + part;
            out.copy_from_slice(&slabs[(slab * tokens + index) * d..][..d]);
        }
    });
    grid
}

/// The gradients for the gradient `grad_out` of the output `out`, both `[batch, h, w, heads, d]`.
pub fn backward(
    p: &AttentionProblem,
    inputs: &Inputs<'_>,
    out: &[f32],
    lse: &[f32],
    grad_out: &[f32],
) -> Gradients {
    let (tokens, d, heads) = (p.tokens(), p.head_dim, p.num_heads);
    let units = p.windows() * heads;
    let table_len = inputs.tables.len();
    // Per unit: dq, dk, dv of the real tokens; the tables' part and the pad's k and v, summed in order below.
    let mut slabs = vec![0f32; units * 3 * tokens * d];
    let extra = table_len + 2 * d;
    let mut extras = vec![0f32; units * extra];
    slabs
        .par_chunks_mut(3 * tokens * d)
        .zip(extras.par_chunks_mut(extra).zip(lse.par_chunks(tokens)))
        .enumerate()
        .for_each(|(index, (slab, (extra, lse)))| {
            let at = (index / heads, index % heads);
            let unit = Unit::gather(p, inputs, at.0, at.1);
            backward_unit(p, inputs.tables, &unit, at, (out, grad_out, lse), slab, extra);
        });
    let mut tables = vec![0f32; table_len];
    let mut pad = vec![0f32; inputs.pad.len()];
    for (index, extra) in extras.chunks(extra).enumerate() {
        let (table_part, pad_part) = extra.split_at(table_len);
        add(&mut tables, table_part);
        if !pad.is_empty() {
            let head = index % heads;
            for (part, values) in pad_part.chunks(d).enumerate() {
                add(&mut pad[(part + 1) * p.channels() + head * d..][..d], values);
            }
        }
    }
    Gradients { qkv: to_grid(p, &slabs, d, 3), tables, pad }
}

/// One head of one window. `extra` is `[tables | pad k | pad v]`.
fn backward_unit(
    p: &AttentionProblem,
    tables: &[f32],
    unit: &Unit,
    (window, head): (usize, usize),
    (out, grad_out, lse): (&[f32], &[f32], &[f32]),
    slab: &mut [f32],
    extra: &mut [f32],
) {
    let (tokens, d, scale) = (p.tokens(), p.head_dim, p.softmax_scale);
    let (rows_h, rows_w) = p.table_rows();
    let (dtables, dpad) = extra.split_at_mut(tables.len());
    let (dq, _) = slab.split_at_mut(tokens * d);
    let (mut dk, mut dv) = (vec![0f32; tokens * d], vec![0f32; tokens * d]);
    let mut probs = vec![0f32; BLOCK_M * tile_keys(p)];
    let mut dscores = probs.clone();
    for ((block, lse), dq) in
        unit.real.chunks(BLOCK_M).zip(lse.chunks(BLOCK_M)).zip(dq.chunks_mut(BLOCK_M * d))
    {
        let count = block.len();
        let q = gather_tokens(&unit.q, block, d);
        let grad = gather_head(p, grad_out, block, head);
        let o = gather_head(p, out, block, head);
        let delta: Vec<f32> = grad.chunks(d).zip(o.chunks(d)).map(|(g, o)| dot(g, o)).collect();
        let scores_of = Scores::new(p, tables, block, &q);
        let (mut dqr_h, mut dqr_w) = (vec![0f32; count * rows_h], vec![0f32; count * rows_w]);
        for rows in tiles(p) {
            let (first, keys) = (rows.start * p.side_w, rows.len() * p.side_w);
            let key_rows = first * d..(first + keys) * d;
            scores_of.tile(&unit.k, rows.clone(), &mut probs);
            gemm(
                MatMut::packed(&mut dscores, count, keys),
                Into::Store,
                1.0,
                Mat::packed(&grad, count, d),
                Mat::packed(&unit.v[key_rows.clone()], keys, d).t(),
            );
            for n in 0..count {
                let (probs, ds) =
                    (&mut probs[n * keys..][..keys], &mut dscores[n * keys..][..keys]);
                let prob = |s: f32| exp_nonpositive(if s > lse[n] { 0.0 } else { s - lse[n] });
                probs.iter_mut().for_each(|s| *s = prob(*s));
                let row = dropout_row(p, window, head, block[n].0);
                if let Some(dropout) = p.dropout {
                    dropout.apply_row(row, first, ds);
                }
                for (ds, prob) in ds.iter_mut().zip(probs.iter()) {
                    *ds = prob * (*ds - delta[n]);
                }
                if let Some(dropout) = p.dropout {
                    dropout.apply_row(row, first, probs);
                }
                if p.rel_pos {
                    let (start_h, start_w) = scores_of.starts(n);
                    for (kh, ds) in rows.clone().zip(ds.chunks(p.side_w)) {
                        dqr_h[start_h - kh] += ds.iter().sum::<f32>();
                        for (kw, ds) in ds.iter().enumerate() {
                            dqr_w[start_w - kw] += ds;
                        }
                    }
                }
            }
            let (ds, probs) =
                (Mat::packed(&dscores, count, keys), Mat::packed(&probs, count, keys));
            let k = Mat::packed(&unit.k[key_rows.clone()], keys, d);
            gemm(MatMut::packed(dq, count, d), Into::Add, scale, ds, k);
            let dk = MatMut::packed(&mut dk[key_rows.clone()], keys, d);
            gemm(dk, Into::Add, scale, ds.t(), Mat::packed(&q, count, d));
            let dv = MatMut::packed(&mut dv[key_rows], keys, d);
            gemm(dv, Into::Add, 1.0, probs.t(), Mat::packed(&grad, count, d));
        }
        if p.rel_pos {
            let (table_h, table_w) = tables.split_at(rows_h * d);
            let (dtable_h, dtable_w) = dtables.split_at_mut(rows_h * d);
            for (dqr, rows, table, dtable) in
                [(&dqr_h, rows_h, table_h, dtable_h), (&dqr_w, rows_w, table_w, dtable_w)]
            {
                let dqr = Mat::packed(dqr, count, rows);
                let dq = MatMut::packed(dq, count, d);
                gemm(dq, Into::Add, 1.0, dqr, Mat::packed(table, rows, d));
                let dtable = MatMut::packed(dtable, rows, d);
                gemm(dtable, Into::Add, 1.0, dqr.t(), Mat::packed(&q, count, d));
            }
        }
    }
    scatter_keys(unit, &dk, &dv, d, &mut slab[tokens * d..], dpad);
}

/// Moves dk and dv of the real tokens into the slab's second and third part, and sums those of padding.
fn scatter_keys(unit: &Unit, dk: &[f32], dv: &[f32], d: usize, slab: &mut [f32], dpad: &mut [f32]) {
    let half = slab.len() / 2;
    for (part, grad) in [dk, dv].into_iter().enumerate() {
        let slab = &mut slab[part * half..][..half];
        let dpad = &mut dpad[part * d..][..d];
        let mut real = unit.real.iter().map(|&(token, _)| token).enumerate().peekable();
        for (token, grad) in grad.chunks(d).enumerate() {
            match real.next_if(|&(_, next)| next == token) {
                Some((index, _)) => slab[index * d..][..d].copy_from_slice(grad),
                None => add(dpad, grad),
            }
        }
    }
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum += part;
    }
}
