//! The same without the instruction, for tests and other machines.

use super::super::panel::{Into, Left};
use super::super::softmax::{Gradient, Normalizer, OnlineStep, Row};
use super::operands::Operands;
use half::bf16;

fn pair(first: f32, second: f32) -> f32 {
    let bits = |x: f32| u32::from(bf16::from_f32(x).to_bits());
    f32::from_bits(bits(first) | bits(second) << 16)
}

/// Both numbers of a pair.
pub fn split(pair: f32) -> [f32; 2] {
    [f32::from_bits(pair.to_bits() << 16), f32::from_bits(pair.to_bits() & 0xffff_0000)]
}

/// Two pairs, one below the other, as the pair of the first numbers and the pair of the second ones.
pub fn transpose(upper: f32, lower: f32) -> [f32; 2] {
    let (upper, lower) = (upper.to_bits(), lower.to_bits());
    [upper & 0xffff | lower << 16, upper >> 16 | lower & 0xffff_0000].map(f32::from_bits)
}

pub fn pairs(values: &[f32], out: &mut [f32]) {
    for (out, values) in out.iter_mut().zip(values.chunks_exact(2)) {
        *out = pair(values[0], values[1]);
    }
}

pub fn pairs_of_sums(a: &[f32], b: &[f32], out: &mut [f32]) {
    let terms = a.chunks_exact(2).zip(b.chunks_exact(2));
    for (out, (a, b)) in out.iter_mut().zip(terms) {
        *out = pair(a[0] + b[0], a[1] + b[1]);
    }
}

pub fn pairs_of_rows(first: &[f32], second: &[f32], out: &mut [f32]) {
    for (out, (&first, &second)) in out.iter_mut().zip(first.iter().zip(second)) {
        *out = pair(first, second);
    }
}

fn times(a: f32, b: f32) -> f32 {
    let (a, b) = (split(a), split(b));
    a[0] * b[0] + a[1] * b[1]
}

pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (&a, &b)| sum + times(a, b))
}

pub fn product(c: &mut [f32], operands: &Operands<'_>) {
    let &Operands { c_stride, into, scale, m, n, k, a, b } = operands;
    for i in 0..m {
        let mut sums = vec![0f32; n];
        for p in 0..k {
            let pair = match a {
                Left::Rows(a, stride) => a[i * stride + p],
                Left::Columns(a, stride) => a[p * stride + i],
            };
            for (sum, &b) in sums.iter_mut().zip(&b.0[p * b.1..]) {
                *sum += times(pair, b);
            }
        }
        for (c, sum) in c[i * c_stride..].iter_mut().zip(sums) {
            let old = if into == Into::Add { *c } else { 0.0 };
            *c = old + scale * sum;
        }
    }
}

/// The logarithm of each weight, row by row.
fn logs<'a>(row: &'a Row<'_>) -> impl Iterator<Item = f32> + 'a {
    let pitch = row.rel_w.len();
    let bias = move |i: usize| row.rel_w[i % pitch] + row.rel_h[i / pitch];
    (0..row.scores.len()).map(move |i| row.scores[i].mul_add(row.scale, bias(i)))
}

pub fn weights(row: Row<'_>, before: f32, out: &mut [f32]) -> OnlineStep {
    let max = logs(&row).fold(f32::NEG_INFINITY, f32::max).ceil().max(before);
    let reference = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let powers: Vec<f32> = logs(&row).map(|log| (log - reference).exp2()).collect();
    pairs(&powers, out);
    let sum = out.iter().flat_map(|&pair| split(pair)).sum();
    OnlineStep { max, rescale: (before - reference).exp2(), sum }
}

pub fn gradient(gradient: Gradient<'_>) {
    let Gradient { row, normalizer: Normalizer { max, sum }, grads, delta, rel_h, rel_w } =
        gradient;
    let pitch = rel_w.len();
    let nearest = |log: f32| bf16::from_f32((log - max).exp2()).to_f32();
    let weights: Vec<f32> = logs(&row).map(|log| nearest(log) * (1.0 / sum)).collect();
    rel_h.fill(0.0);
    for (i, (grad, weight)) in grads.iter_mut().zip(&weights).enumerate() {
        *grad = weight * (*grad - delta);
        rel_h[i / pitch] += *grad;
        rel_w[i % pitch] += *grad;
    }
    row.scores.copy_from_slice(&weights);
}
