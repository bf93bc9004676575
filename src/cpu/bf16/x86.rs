//! The code for AVX512-BF16. Its features are those that [`available`](super::available) detects.

use super::super::panel::{Into, Left};
use super::super::softmax::{Gradient, Normalizer, OnlineStep, Row};
use super::operands::Operands;
use super::portable;
use std::arch::x86_64::*;
use std::mem::transmute;

/// Bits of the same vector, as the products take them.
#[target_feature(enable = "avx512f")]
fn pairs_of(vector: __m512) -> __m512bh {
    // SAFETY: vectors of the same size, of which every bit pattern is one.
    unsafe { transmute(vector) }
}

/// Two vectors, rounded: those of `low` come first.
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(high: __m512, low: __m512) -> __m512 {
    // SAFETY: vectors of the same size, of which every bit pattern is one.
    unsafe { transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

#[target_feature(enable = "avx512f")]
fn load(values: &[f32]) -> __m512 {
    assert!(values.len() >= 16);
    // SAFETY: there are 16 numbers.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
fn store(values: &mut [f32], vector: __m512) {
    assert!(values.len() >= 16);
    // SAFETY: there is place for 16 numbers.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), vector) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
pub fn pairs(values: &[f32], out: &mut [f32]) {
    let whole = values.len() / 32;
    for (out, values) in out.chunks_exact_mut(16).zip(values.chunks_exact(32)) {
        store(out, rounded(load(&values[16..]), load(values)));
    }
    portable::pairs(&values[whole * 32..], &mut out[whole * 16..]);
}

#[target_feature(enable = "avx512f,avx512bf16")]
pub fn pairs_of_sums(a: &[f32], b: &[f32], out: &mut [f32]) {
    let whole = a.len() / 32;
    let terms = a.chunks_exact(32).zip(b.chunks_exact(32));
    for (out, (a, b)) in out.chunks_exact_mut(16).zip(terms) {
        let low = _mm512_add_ps(load(a), load(b));
        store(out, rounded(_mm512_add_ps(load(&a[16..]), load(&b[16..])), low));
    }
    portable::pairs_of_sums(&a[whole * 32..], &b[whole * 32..], &mut out[whole * 16..]);
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn pairs_of_rows(first: &[f32], second: &[f32], out: &mut [f32]) {
    // Numbers 0 and 16, 1 and 17, ..
    let mut order = [0u16; 32];
    for (index, order) in (0..).zip(&mut order) {
        *order = index / 2 + index % 2 * 16;
    }
    // SAFETY: the numbers are 512 bits.
    let order = unsafe { _mm512_loadu_epi16(order.as_ptr().cast()) };
    let rows = first.chunks_exact(16).zip(second.chunks_exact(16));
    for (out, (first, second)) in out.chunks_exact_mut(16).zip(rows) {
        let both = _mm512_castps_si512(rounded(load(second), load(first)));
        store(out, _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both)));
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
pub fn product(c: &mut [f32], operands: &Operands<'_>) {
    let mut column = 0;
    while column < operands.n {
        column += match (operands.n - column) / 16 {
            4.. => all_rows::<4>(c, operands, column),
            3 => all_rows::<3>(c, operands, column),
            2 => all_rows::<2>(c, operands, column),
            _ => all_rows::<1>(c, operands, column),
        };
    }
}

/// All rows of `NV` vectors of columns; returns their columns.
#[target_feature(enable = "avx512f,avx512bf16")]
fn all_rows<const NV: usize>(c: &mut [f32], operands: &Operands<'_>, column: usize) -> usize {
    let mut row = 0;
    while row < operands.m {
        row += match operands.m - row {
            6.. => tile::<6, NV>(c, operands, (row, column)),
            4.. => tile::<4, NV>(c, operands, (row, column)),
            2.. => tile::<2, NV>(c, operands, (row, column)),
            _ => tile::<1, NV>(c, operands, (row, column)),
        };
    }
    16 * NV
}

/// `MR x NV` vectors of C; returns `MR`.
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile<const MR: usize, const NV: usize>(
    c: &mut [f32],
    operands: &Operands<'_>,
    (row, column): (usize, usize),
) -> usize {
    let &Operands { into, scale, k, b, .. } = operands;
    let mut sums = [[_mm512_setzero_ps(); NV]; MR];
    if k > 0 {
        let (a, (row_step, step)) = match operands.a {
            Left::Rows(a, stride) => (a, (stride, 1)),
            Left::Columns(a, stride) => (a, (1, stride)),
        };
        let a = &a[row * row_step..][..(MR - 1) * row_step + (k - 1) * step + 1];
        let b_tile = &b.0[column..][..(k - 1) * b.1 + 16 * NV];
        for p in 0..k {
            let mut line = [_mm512_setzero_ps(); NV];
            for (j, line) in line.iter_mut().enumerate() {
                // SAFETY: `p < k` and `j < NV`, so this ends where `b_tile` does, or before.
                *line = unsafe { _mm512_loadu_ps(b_tile.as_ptr().add(p * b.1 + 16 * j)) };
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `i < MR` and `p < k`, so this is the last element of `a`, or one before.
                let pair = unsafe { *a.as_ptr().add(i * row_step + p * step) };
                let pair = pairs_of(_mm512_set1_ps(pair));
                for (sum, &line) in sums.iter_mut().zip(&line) {
                    *sum = _mm512_dpbf16_ps(*sum, pair, pairs_of(line));
                }
            }
        }
    }
    let scale = _mm512_set1_ps(scale);
    for (i, sums) in sums.into_iter().enumerate() {
        let c = &mut c[(row + i) * operands.c_stride + column..][..16 * NV];
        for (c, sum) in c.chunks_exact_mut(16).zip(sums) {
            let result = match into {
                Into::Store => _mm512_mul_ps(scale, sum),
                Into::Add => _mm512_fmadd_ps(scale, sum, load(c)),
            };
            store(c, result);
        }
    }
    MR
}

/// The dot product of the first lanes of [`product`].
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for (&a, &b) in a.iter().zip(b) {
        sum = _mm512_dpbf16_ps(sum, pairs_of(_mm512_set1_ps(a)), pairs_of(_mm512_set1_ps(b)));
    }
    _mm512_cvtss_f32(sum)
}

/// `2^x` for `x <= 0`, relative error below 9e-5, exact at 0: a cubic, in the interval above the next lower integer.
#[target_feature(enable = "avx512f,avx512dq")]
fn exp2_nonpositive(x: __m512) -> __m512 {
    // The rest above the integer below; 0 for minus infinity.
    const FRACTION: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    let r = _mm512_reduce_ps::<FRACTION>(x);
    let mut p = _mm512_set1_ps(0.077_067_17);
    for c in [0.227_644_85, 0.695_116_8, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    // Times 2 to the integer below.
    _mm512_scalef_ps(p, x)
}

#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
pub fn weights(row: Row<'_>, before: f32, out: &mut [f32]) -> OnlineStep {
    let scale = _mm512_set1_ps(row.scale);
    let mut maxima = _mm512_set1_ps(f32::NEG_INFINITY);
    for (scores, &rel_h) in row.scores.chunks_exact_mut(row.rel_w.len()).zip(row.rel_h) {
        let rel_h = _mm512_set1_ps(rel_h);
        for (score, rel_w) in scores.chunks_exact_mut(16).zip(row.rel_w.chunks_exact(16)) {
            let bias = _mm512_add_ps(load(rel_w), rel_h);
            let sum = _mm512_fmadd_ps(load(score), scale, bias);
            store(score, sum);
            maxima = _mm512_max_ps(maxima, sum);
        }
    }
    // A whole number: sums change their reference by a power of two, without rounding.
    let max = before.max(_mm512_reduce_max_ps(maxima).ceil());
    // While every score is minus infinity, the weights are zero relative to any finite number, NaN to the maximum.
    let reference = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let splat = _mm512_set1_ps(reference);
    let ones = pairs_of(_mm512_castsi512_ps(_mm512_set1_epi32(0x3f80_3f80)));
    let mut sums = _mm512_setzero_ps();
    let scores = row.scores.chunks_exact(32);
    let last = scores.remainder();
    for (out, scores) in out.chunks_exact_mut(16).zip(scores) {
        let low = exp2_nonpositive(_mm512_sub_ps(load(scores), splat));
        let high = exp2_nonpositive(_mm512_sub_ps(load(&scores[16..]), splat));
        let both = rounded(high, low);
        sums = _mm512_dpbf16_ps(sums, pairs_of(both), ones);
        store(out, both);
    }
    if !last.is_empty() {
        let low = exp2_nonpositive(_mm512_sub_ps(load(last), splat));
        let both = rounded(_mm512_setzero_ps(), low);
        sums = _mm512_dpbf16_ps(sums, pairs_of(both), ones);
        let out = &mut out[row.scores.len() / 32 * 16..][..8];
        // SAFETY: `out` has place for the eight pairs that the mask lets through.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), 0xff, both) };
    }
    let rescale = (before - reference).exp2();
    OnlineStep { max, rescale, sum: _mm512_reduce_add_ps(sums) }
}

/// Each number's nearest in bf16.
#[target_feature(enable = "avx512f,avx512bf16")]
fn nearest(numbers: __m512) -> __m512 {
    // SAFETY: vectors of the same size, of which every bit pattern is one.
    let halves: __m256i = unsafe { transmute(_mm512_cvtneps_pbh(numbers)) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
pub fn gradient(gradient: Gradient<'_>) {
    let Gradient { row, normalizer: Normalizer { max, sum }, grads, delta, rel_h, rel_w } =
        gradient;
    let (scale, delta) = (_mm512_set1_ps(row.scale), _mm512_set1_ps(delta));
    let (max, inverse_sum) = (_mm512_set1_ps(max), _mm512_set1_ps(1.0 / sum));
    let pitch = row.rel_w.len();
    let rows = row.scores.chunks_exact_mut(pitch).zip(grads.chunks_exact_mut(pitch));
    for ((scores, grads), (&bias_h, drel_h)) in rows.zip(row.rel_h.iter().zip(rel_h)) {
        let bias_h = _mm512_set1_ps(bias_h);
        let mut sum = _mm512_setzero_ps();
        let columns = row.rel_w.chunks_exact(16).zip(rel_w.chunks_exact_mut(16));
        let vectors = scores.chunks_exact_mut(16).zip(grads.chunks_exact_mut(16));
        for ((score, grad), (bias_w, drel_w)) in vectors.zip(columns) {
            let bias = _mm512_add_ps(load(bias_w), bias_h);
            let log = _mm512_fmadd_ps(load(score), scale, bias);
            let power = exp2_nonpositive(_mm512_sub_ps(log, max));
            let weight = _mm512_mul_ps(nearest(power), inverse_sum);
            let ds = _mm512_mul_ps(weight, _mm512_sub_ps(load(grad), delta));
            store(score, weight);
            store(grad, ds);
            sum = _mm512_add_ps(sum, ds);
            store(drel_w, _mm512_add_ps(load(drel_w), ds));
        }
        *drel_h = _mm512_reduce_add_ps(sum);
    }
}
