//! Products in bf16 with f32 sums, where the CPU has an instruction for them (AVX512-BF16): twice the f32 arithmetic.
//!
//! ```text
//! C [m, n] (+)= scale * sum over pairs p of  A[i, 2p] B[2p, j] + A[i, 2p + 1] B[2p + 1, j]
//! ```
//! Two neighbours in k make a pair of 32 bits. A pair travels as the f32 of the same bits, which is never computed
//! with. So packing and blocking are those of f32 with half the depth.

use super::panel::{Into, Left, Right};
use super::simd::{allowed, Instructions};
use super::softmax::{Gradient, OnlineStep, Row};

mod operands;
mod portable;
use operands::Operands;
pub use portable::{split, transpose};
#[cfg(target_arch = "x86_64")]
mod x86;

/// Whether this machine has the instruction; without it f32 is faster.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return allowed(Instructions::All)
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Numbers rounded to bf16, in pairs; their count is even.
pub fn pairs(values: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; values.len() / 2];
    pairs_into(values, &mut out);
    out
}

/// As [`pairs`], into a buffer that is used again.
pub fn pairs_in<'a>(values: &[f32], buffer: &'a mut Vec<f32>) -> &'a [f32] {
    buffer.resize(values.len() / 2, 0.0);
    pairs_into(values, buffer);
    buffer
}

/// As [`pairs_in`], of the sums of two arrays.
pub fn pairs_of_sums<'a>(a: &[f32], b: &[f32], buffer: &'a mut Vec<f32>) -> &'a [f32] {
    buffer.resize(a.len() / 2, 0.0);
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        unsafe { x86::pairs_of_sums(a, b, buffer) };
        return buffer;
    }
    portable::pairs_of_sums(a, b, buffer);
    buffer
}

/// As [`pairs`], into a place.
pub fn pairs_into(values: &[f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        return unsafe { x86::pairs(values, out) };
    }
    portable::pairs(values, out);
}

/// Each number of a row and the one below it, rounded to bf16, in pairs; rows of whole vectors.
pub fn pairs_of_rows(first: &[f32], second: &[f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        return unsafe { x86::pairs_of_rows(first, second, out) };
    }
    portable::pairs_of_rows(first, second, out);
}

/// `C [m, n] (+)= scale * A [m, k] B [k, n]`, as [`super::panel::panel`] has them, for `k` pairs.
pub fn product(
    (c, c_stride): (&mut [f32], usize),
    (into, scale): (Into, f32),
    (m, n, k): (usize, usize, usize),
    a: Left<'_>,
    b: Right<'_>,
) {
    let operands = Operands { c_stride, into, scale, m, n, k, a, b };
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        return unsafe { x86::product(c, &operands) };
    }
    portable::product(c, &operands);
}

/// The dot product of each row of `a` with the same row of `b`, rows of `width` pairs. Order and bits are those that
/// [`product`] gives the diagonal of `A B^T`.
pub fn row_dots(a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    rows.map(|(a, b)| {
        #[cfg(target_arch = "x86_64")]
        if available() {
            // SAFETY: the features that the function is compiled for have just been detected.
            return unsafe { x86::dot(a, b) };
        }
        portable::dot(a, b)
    })
    .collect()
}

/// Turns scores into `2^(score - max)`, rounded to bf16, in pairs; `max` is the running maximum rounded up to a whole
/// number, first that so far. The sum is that of the rounded weights. The scores are overwritten.
pub fn weights(row: Row<'_>, max: f32, out: &mut [f32]) -> OnlineStep {
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        return unsafe { x86::weights(row, max, out) };
    }
    portable::weights(row, max, out)
}

/// [`Gradient`] with the rounded weights of the forward: dS adds up to zero as far as D is that of the forward's
/// output.
pub fn gradient(gradient: Gradient<'_>) {
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        return unsafe { x86::gradient(gradient) };
    }
    portable::gradient(gradient);
}

#[cfg(test)]
mod tests {
    use super::super::softmax::Normalizer;
    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 37 % 23) as f32 - 11.0) / 7.0
    }

    #[test]
    fn the_instruction_agrees_with_the_portable_sums() {
        for (m, n, k) in [(1, 64, 1), (5, 16, 7), (6, 48, 33), (13, 112, 100), (2, 32, 0)] {
            let left: Vec<f32> = (0..(m + 3) * (k + 3) * 2).map(value).collect();
            let right: Vec<f32> = (0..k * (n + 16) * 2).map(|i| value(i + 5)).collect();
            let (left, right) = (pairs(&left), pairs(&right));
            for a in [Left::Rows(&left, k + 3), Left::Columns(&left, m + 3)] {
                let mut c = vec![1f32; m * (n + 16)];
                let mut expected = c.clone();
                let (into, scale, b, c_stride) = (Into::Add, 0.5, Right(&right, n + 16), n + 16);
                product((&mut c, c_stride), (into, scale), (m, n, k), a, b);
                let operands = Operands { c_stride, into, scale, m, n, k, a, b };
                portable::product(&mut expected, &operands);
                for (x, y) in c.iter().zip(&expected) {
                    assert!((x - y).abs() < 1e-4 * (1.0 + k as f32), "{m} {n} {k}: {x} {y}");
                }
            }
        }
    }

    #[test]
    fn row_dots_have_the_bits_of_the_diagonal() {
        let (m, k) = (19, 48);
        let a = pairs(&(0..m * k * 2).map(value).collect::<Vec<_>>());
        let b = pairs(&(0..m * k * 2).map(|i| value(i * 3 + 5)).collect::<Vec<_>>());
        let pitch = m.next_multiple_of(16);
        let mut b_t = vec![0f32; k * pitch];
        b.iter().enumerate().for_each(|(i, &x)| b_t[i % k * pitch + i / k] = x);
        let mut c = vec![0f32; m * pitch];
        let (left, right) = (Left::Rows(&a, k), Right(&b_t, pitch));
        product((&mut c, pitch), (Into::Store, 1.0), (m, pitch, k), left, right);
        for (i, dot) in row_dots(&a, &b, k).into_iter().enumerate() {
            assert_eq!(dot.to_bits(), c[i * pitch + i].to_bits(), "row {i}");
        }
    }

    #[test]
    fn pairs_agree_with_the_portable_ones() {
        let (a, b): (Vec<_>, Vec<_>) = (0..80).map(|i| (value(i), value(i * 5 + 1))).unzip();
        let bits = |pairs: &[f32]| pairs.iter().map(|pair| pair.to_bits()).collect::<Vec<_>>();
        let (mut fast, mut slow) = (vec![0f32; 80], vec![0f32; 80]);
        pairs_of_rows(&a, &b, &mut fast);
        portable::pairs_of_rows(&a, &b, &mut slow);
        assert_eq!(bits(&fast), bits(&slow));
        portable::pairs(&a, &mut slow[..40]);
        assert_eq!(bits(&pairs(&a)), bits(&slow[..40]));
        portable::pairs_of_sums(&a, &b, &mut slow[..40]);
        assert_eq!(bits(pairs_of_sums(&a, &b, &mut fast)), bits(&slow[..40]));
    }

    #[test]
    fn weights_are_rounded_exponentials_and_their_sum() {
        for (rows, pitch) in [(3, 16), (4, 32), (8, 64)] {
            let count = rows * pitch;
            let rel_h: Vec<f32> = (0..rows).map(value).collect();
            let mut rel_w: Vec<f32> = (0..pitch).map(|i| value(i + 3)).collect();
            rel_w[pitch - 2..].fill(f32::NEG_INFINITY);
            let mut scores: Vec<f32> = (0..count).map(|i| 9.0 * value(i * 7)).collect();
            let logs: Vec<f32> = (0..count)
                .map(|i| scores[i] * 0.25 + rel_h[i / pitch] + rel_w[i % pitch])
                .collect();
            let max = logs.iter().fold(f32::MIN, |max, &log| max.max(log)).ceil();
            let row = Row { scores: &mut scores, rel_h: &rel_h, rel_w: &rel_w, scale: 0.25 };
            let mut out = vec![0f32; count / 2];
            let step = weights(row, -1.0, &mut out);
            assert_eq!(step.max, max);
            assert!((step.rescale - (-1.0 - max).exp2()).abs() < 1e-6);
            let out: Vec<f32> = out.iter().flat_map(|&pair| portable::split(pair)).collect();
            for (weight, log) in out.iter().zip(logs) {
                let exact = (log - max).exp2();
                assert!((weight - exact).abs() <= exact / 250.0, "2^({log} - {max}): {weight}");
            }
            let sum: f32 = out.iter().sum();
            assert!((step.sum - sum).abs() < sum * 1e-2, "{} {sum}", step.sum);
        }
    }

    #[test]
    fn gradients_agree_with_the_portable_ones() {
        let (rows, pitch) = (3, 32);
        let values =
            |factor: usize| (0..rows * pitch).map(|i| value(i * factor)).collect::<Vec<_>>();
        let run = |gradient: fn(Gradient<'_>)| {
            let (mut scores, mut grads) = (values(3), values(5));
            let (mut drel_h, mut drel_w) = (vec![0f32; rows], vec![1f32; pitch]);
            let (rel_h, rel_w) = (&values(2)[..rows], &values(7)[..pitch]);
            let row = Row { scores: &mut scores, rel_h, rel_w, scale: 0.5 };
            let normalizer = Normalizer { max: 4.0, sum: 7.0 };
            let (rel_h, rel_w) = (&mut drel_h[..], &mut drel_w[..]);
            gradient(Gradient { row, normalizer, grads: &mut grads, delta: 0.3, rel_h, rel_w });
            [scores, grads, drel_h, drel_w].concat()
        };
        for (x, y) in run(gradient).iter().zip(run(portable::gradient)) {
            // The exponentials are not the same; a rounding may be another.
            assert!((x - y).abs() < 1e-3 + 5e-3 * y.abs(), "{x} {y}");
        }
    }

    #[test]
    fn weights_of_infinities_and_nan() {
        let weights = |scores: &mut [f32]| {
            let row = Row { scores, rel_h: &[0.0], rel_w: &[0.0; 16], scale: 1.0 };
            let mut out = [1f32; 8];
            let step = weights(row, f32::NEG_INFINITY, &mut out);
            (step, out)
        };
        let (step, out) = weights(&mut [f32::NEG_INFINITY; 16]);
        assert!(step.sum == 0.0 && step.max == f32::NEG_INFINITY && out == [0.0; 8]);
        let mut scores = [0.0; 16];
        (scores[2], scores[3]) = (f32::NAN, -1e30);
        let (step, out) = weights(&mut scores);
        assert!(step.sum.is_nan() && portable::split(out[1])[0].is_nan());
        assert_eq!(portable::split(out[1])[1], 0.0);
    }
}
