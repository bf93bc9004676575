//! Multi-head attention between two sets of tokens, heads last, forward and backward.
//!
//! ```text
//! S[m, n] = scale k_m . q_n      P = exp(S - max) / sum, over the keys m      O_n = sum_m P[m, n] v_m
//! dP[m, n] = v_m . dO_n          dS = P (dP - D)                              D_n = dO_n . O_n
//! dq_n = scale sum_m dS[m, n] k_m        dk_m = scale sum_n dS[m, n] q_n      dv_m = sum_n P[m, n] dO_n
//! ```
//! A unit of work is one head of one batch entry. Scores lie with the keys down and a block of queries across. So k and
//! v are read where they lie, few queries fill vectors as many do, and the softmax needs no sum within a vector. A
//! block's largest buffer is `KEYS` x `QUERIES`.

use super::buffer::Buffer;
use super::columns::{Gradient, Online};
use super::math::add;
use super::panel::{panel, row_dots, Into, Left, Right};
use super::simd::{padded, run, MAX_LANES};
use super::softmax::Normalizer;
use crate::problem::MultiHeadProblem;
use rayon::prelude::*;
use std::borrow::Cow;
use std::f32::consts::LOG2_E;

/// Queries of a block, at most.
const QUERIES: usize = 96;
/// Keys of a tile, at most.
const KEYS: usize = 256;

/// q `[q_batch, queries, heads, d]`, k and v `[kv_batch, keys, heads, d]`.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries.
    pub q: &'a [f32],
    /// Keys.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
}

/// Gradients of [`Inputs`].
pub struct Gradients {
    /// Shaped as q.
    pub q: Buffer,
    /// Shaped as k.
    pub k: Buffer,
    /// Shaped as v.
    pub v: Buffer,
}

/// One head of one batch entry: rows of whole vectors, `stride` apart.
struct Head<'a> {
    rows: Cow<'a, [f32]>,
    stride: usize,
}

impl<'a> Head<'a> {
    /// In place where a head fills whole vectors, else gathered with zeros behind each row.
    fn new(p: &MultiHeadProblem, x: &'a [f32], tokens: usize, unit: usize) -> Self {
        let (d, channels) = (p.head_dim, p.channels());
        let entries = x.len() / (tokens * channels).max(1);
        let (entry, head) = (unit / p.num_heads % entries.max(1), unit % p.num_heads);
        let rows = &x[entry * tokens * channels..][..tokens * channels];
        if d.is_multiple_of(MAX_LANES) {
            return Self { rows: Cow::Borrowed(&rows[head * d..]), stride: channels };
        }
        let mut gathered = vec![0f32; tokens * padded(d)];
        for (to, row) in gathered.chunks_exact_mut(padded(d)).zip(rows.chunks_exact(channels)) {
            to[..d].copy_from_slice(&row[head * d..][..d]);
        }
        Self { rows: Cow::Owned(gathered), stride: padded(d) }
    }

    fn from(&self, row: usize) -> &[f32] {
        &self.rows[row * self.stride..]
    }

    fn left(&self, row: usize) -> Left<'_> {
        Left::Rows(self.from(row), self.stride)
    }

    fn right(&self, row: usize) -> Right<'_> {
        Right(self.from(row), self.stride)
    }

    /// Rows from `first` on as columns, `[d, padded count]`.
    fn transposed(&self, first: usize, count: usize, d: usize) -> Vec<f32> {
        let pitch = padded(count);
        let mut columns = vec![0f32; d * pitch];
        for (n, row) in self.from(first).chunks(self.stride).take(count).enumerate() {
            for (column, &value) in columns.chunks_exact_mut(pitch).zip(row) {
                column[n] = value;
            }
        }
        columns
    }

    /// Rows from `first` on, `[count, width]`.
    fn copied(&self, first: usize, count: usize, width: usize) -> Vec<f32> {
        let rows = self.from(first).chunks(self.stride).take(count);
        rows.flat_map(|row| &row[..width]).copied().collect()
    }
}

fn block_queries(p: &MultiHeadProblem) -> usize {
    let blocks = p.queries.div_ceil(QUERIES).max(1);
    p.queries.div_ceil(blocks).next_multiple_of(MAX_LANES)
}

/// Output `[batch, queries, heads, d]` and the normalizers `[batch, heads, queries]`.
pub fn forward(p: &MultiHeadProblem, inputs: &Inputs<'_>) -> (Buffer, Vec<Normalizer>) {
    let (units, d, rows) = (p.batch * p.num_heads, p.head_dim, block_queries(p));
    let mut out = Buffer::any(units * p.queries * d);
    let mut normalizers = vec![Normalizer { max: 0.0, sum: 0.0 }; units * p.queries];
    let parts = out.par_chunks_mut(p.queries * d).zip(normalizers.par_chunks_mut(p.queries));
    parts.enumerate().for_each(|(unit, (out, normalizers))| {
        let q = Head::new(p, inputs.q, p.queries, unit);
        let k = Head::new(p, inputs.k, p.keys, unit);
        let v = Head::new(p, inputs.v, p.keys, unit);
        let blocks = out.par_chunks_mut(rows * d).zip(normalizers.par_chunks_mut(rows));
        blocks.enumerate().for_each(|(block, (out, normalizers))| {
            forward_block(p, [&q, &k, &v], block * rows, (out, normalizers));
        });
    });
    (heads_last(p, &out, p.queries, p.batch), normalizers)
}

/// The queries from `first` on against all keys.
fn forward_block(
    p: &MultiHeadProblem,
    [q, k, v]: [&Head<'_>; 3],
    first: usize,
    (out, normalizers): (&mut [f32], &mut [Normalizer]),
) {
    let (count, d, width) = (normalizers.len(), p.head_dim, padded(p.head_dim));
    let pitch = padded(count);
    let q = q.transposed(first, count, d);
    let mut scores = vec![0f32; p.keys.min(KEYS) * pitch];
    let mut max = vec![f32::NEG_INFINITY; pitch];
    let (mut sum, mut rescale) = (vec![0f32; pitch], vec![0f32; pitch]);
    let mut acc = vec![0f32; count * width];
    for key in (0..p.keys).step_by(KEYS) {
        let keys = KEYS.min(p.keys - key);
        let scores = &mut scores[..keys * pitch];
        let shape = (keys, pitch, d);
        let scale = p.softmax_scale * LOG2_E;
        panel((scores, pitch), (Into::Store, scale), shape, k.left(key), Right(&q, pitch));
        run(Online { scores, max: &mut max, sum: &mut sum, rescale: &mut rescale });
        for (acc, &rescale) in acc.chunks_exact_mut(width).zip(&rescale).filter(|_| key > 0) {
            acc.iter_mut().for_each(|x| *x *= rescale);
        }
        let weights = Left::Columns(scores, pitch);
        panel((&mut acc, width), (Into::Add, 1.0), (count, width, keys), weights, v.right(key));
    }
    for (n, out) in out.chunks_exact_mut(d).enumerate() {
        for (o, acc) in out.iter_mut().zip(&acc[n * width..]) {
            *o = acc / sum[n];
        }
        normalizers[n] = Normalizer { max: max[n], sum: sum[n] };
    }
}

/// The gradients for the gradient `grad` of the output `out`.
pub fn backward(
    p: &MultiHeadProblem,
    inputs: &Inputs<'_>,
    (out, normalizers): (&[f32], &[Normalizer]),
    grad: &[f32],
) -> Gradients {
    let (units, d) = (p.batch * p.num_heads, p.head_dim);
    let mut dq = Buffer::any(units * p.queries * d);
    let mut dk = Buffer::any(units * p.keys * d);
    let mut dv = Buffer::any(units * p.keys * d);
    let slabs = dk.par_chunks_mut(p.keys * d).zip(dv.par_chunks_mut(p.keys * d));
    let slabs = dq.par_chunks_mut(p.queries * d).zip(slabs);
    slabs.zip(normalizers.par_chunks(p.queries)).enumerate().for_each(
        |(unit, ((dq, (dk, dv)), normalizers))| {
            let unit = Unit {
                p,
                q: Head::new(p, inputs.q, p.queries, unit),
                k: Head::new(p, inputs.k, p.keys, unit),
                v: Head::new(p, inputs.v, p.keys, unit),
                out: Head::new(p, out, p.queries, unit),
                grad: Head::new(p, grad, p.queries, unit),
                normalizers,
            };
            unit.backward([dq, dk, dv]);
        },
    );
    Gradients {
        q: heads_last(p, &dq, p.queries, p.q_batch),
        k: heads_last(p, &dk, p.keys, p.kv_batch),
        v: heads_last(p, &dv, p.keys, p.kv_batch),
    }
}

/// Inputs of the backward of one head.
struct Unit<'a> {
    p: &'a MultiHeadProblem,
    q: Head<'a>,
    k: Head<'a>,
    v: Head<'a>,
    out: Head<'a>,
    grad: Head<'a>,
    normalizers: &'a [Normalizer],
}

impl Unit<'_> {
    /// The gradients of q `[queries, d]`, k and v `[keys, d]`.
    fn backward(&self, [dq, dk, dv]: [&mut [f32]; 3]) {
        let (p, d, width) = (self.p, self.p.head_dim, padded(self.p.head_dim));
        let rows = block_queries(p);
        let mut dk_rows = vec![0f32; p.keys * width];
        let mut dv_rows = vec![0f32; p.keys * width];
        let mut weights = vec![0f32; p.keys.min(KEYS) * rows];
        let mut grads = weights.clone();
        let blocks = self.normalizers.chunks(rows).zip(dq.chunks_mut(rows * d));
        for (block, (normalizers, dq)) in blocks.enumerate() {
            let (first, count) = (block * rows, normalizers.len());
            let pitch = padded(count);
            let q_columns = self.q.transposed(first, count, d);
            let grad_columns = self.grad.transposed(first, count, d);
            let grad = self.grad.copied(first, count, width);
            let mut delta = row_dots(&grad, &self.out.copied(first, count, width), width);
            delta.resize(pitch, 0.0);
            // Columns without a query have weights that nobody reads.
            let mut max: Vec<f32> = normalizers.iter().map(|n| n.max).collect();
            let mut inverse_sum: Vec<f32> = normalizers.iter().map(|n| 1.0 / n.sum).collect();
            max.resize(pitch, 0.0);
            inverse_sum.resize(pitch, 0.0);
            let mut dq_rows = vec![0f32; count * width];
            for key in (0..p.keys).step_by(KEYS) {
                let keys = KEYS.min(p.keys - key);
                let weights = &mut weights[..keys * pitch];
                let grads = &mut grads[..keys * pitch];
                let (shape, scale) = ((keys, pitch, d), p.softmax_scale);
                let q = Right(&q_columns, pitch);
                let left = self.k.left(key);
                panel((weights, pitch), (Into::Store, scale * LOG2_E), shape, left, q);
                let right = Right(&grad_columns, pitch);
                panel((grads, pitch), (Into::Store, 1.0), shape, self.v.left(key), right);
                let (max, inverse_sum, delta) = (&max, &inverse_sum, &delta);
                run(Gradient { scores: weights, grads, max, inverse_sum, delta });
                let (ds, dp) = (Left::Rows(grads, pitch), Left::Rows(weights, pitch));
                let shape = (keys, width, count);
                let dk = (&mut dk_rows[key * width..], width);
                panel(dk, (Into::Add, scale), shape, ds, self.q.right(first));
                let dv = (&mut dv_rows[key * width..], width);
                panel(dv, (Into::Add, 1.0), shape, dp, Right(&grad, width));
                let (dq, ds) = ((&mut dq_rows[..], width), Left::Columns(grads, pitch));
                panel(dq, (Into::Add, scale), (count, width, keys), ds, self.k.right(key));
            }
            unpad(&dq_rows, dq, d);
        }
        unpad(&dk_rows, dk, d);
        unpad(&dv_rows, dv, d);
    }
}

/// Rows of whole vectors to rows of `d`.
fn unpad(padded_rows: &[f32], rows: &mut [f32], d: usize) {
    for (row, padded) in rows.chunks_exact_mut(d).zip(padded_rows.chunks_exact(padded(d))) {
        row.copy_from_slice(&padded[..d]);
    }
}

/// `[batch, heads, tokens, d] -> [entries, tokens, heads, d]`, summed over the batch where one entry serves all of it.
fn heads_last(p: &MultiHeadProblem, slabs: &[f32], tokens: usize, entries: usize) -> Buffer {
    let (d, heads, channels) = (p.head_dim, p.num_heads, p.channels());
    let mut out = Buffer::any(entries * tokens * channels);
    out.par_chunks_mut(channels).enumerate().with_min_len(64).for_each(|(row, out)| {
        let (entry, token) = (row / tokens, row % tokens);
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            let part = |batch: usize| &slabs[((batch * heads + head) * tokens + token) * d..][..d];
            out.copy_from_slice(part(entry));
            for batch in (entry + entries..p.batch).step_by(entries) {
                add(out, part(batch));
            }
        }
    });
    out
}
