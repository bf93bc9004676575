//! The losses of mask prediction, mask by mask, and their gradient, without an intermediate of the masks' size.
//!
//! ```text
//! p = sigmoid(x)    m = p + t - 2 p t    bce = max(x, 0) - x t + ln(1 + exp(-|x|))
//! focal = (a t + (1 - a) (1 - t)) m^2 bce
//! loss = w_bce mean(bce) + w_focal mean(focal) + w_dice (1 - (2 O + 1) / (T + 1))
//! O = sum(p t)    T = sum p + sum t
//! ```
//! Sums are taken in f32 over a few vectors and in f64 over those, in a fixed order.

use super::buffer::Buffer;
use super::simd::{exp2_nonpositive, run, vectors, vectors_mut, MAX_LANES};
use crate::problem::{MaskTerms, FOCAL_ALPHA};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

/// Pixels that one task handles.
const CHUNK: usize = 1 << 13;
/// Vectors whose values are summed in f32.
const SHORT: usize = 32;

/// Sums over a mask's pixels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    bce: f64,
    focal: f64,
    /// The sum of `p t`.
    both: f64,
    /// The sum of `p + t`.
    each: f64,
}

/// Sums over the pixels of each mask, for x and t of `pixels` each.
pub fn sums(x: &[f32], t: &[f32], pixels: usize) -> Vec<Sums> {
    let masks = x.par_chunks(pixels).zip(t.par_chunks(pixels));
    let of_mask = |(x, t): (&[f32], &[f32])| {
        let chunks = x.par_chunks(CHUNK).zip(t.par_chunks(CHUNK));
        let parts: Vec<Sums> = chunks.map(|(x, t)| run(SumPixels { x, t })).collect();
        parts.iter().fold(Sums::default(), |sum, part| Sums {
            bce: sum.bce + part.bce,
            focal: sum.focal + part.focal,
            both: sum.both + part.both,
            each: sum.each + part.each,
        })
    };
    masks.map(of_mask).collect()
}

/// The loss of a mask of so many pixels.
pub fn loss(terms: MaskTerms, sums: &Sums, pixels: usize) -> f32 {
    let pixels = pixels as f64;
    let dice = 1.0 - (2.0 * sums.both + 1.0) / (sums.each + 1.0);
    (terms.bce * sums.bce / pixels + terms.focal * sums.focal / pixels + terms.dice * dice) as f32
}

/// The gradient of x for that of each mask's loss.
pub fn gradient(terms: MaskTerms, (x, t): (&[f32], &[f32]), sums: &[Sums], grad: &[f32]) -> Buffer {
    let mut dx = Buffer::any(x.len());
    let pixels = x.len() / sums.len();
    let masks = dx.par_chunks_mut(pixels).zip(x.par_chunks(pixels).zip(t.par_chunks(pixels)));
    masks.zip(sums.par_iter().zip(grad)).for_each(|((dx, (x, t)), (sums, &grad))| {
        let (grad, total) = (f64::from(grad), sums.each + 1.0);
        let factors = Factors {
            bce: (grad * terms.bce / pixels as f64) as f32,
            focal: (grad * terms.focal / pixels as f64) as f32,
            p: (grad * terms.dice * (2.0 * sums.both + 1.0) / (total * total)) as f32,
            p_inside: (-2.0 * grad * terms.dice / total) as f32,
        };
        let chunks = x.par_chunks(CHUNK).zip(t.par_chunks(CHUNK));
        dx.par_chunks_mut(CHUNK)
            .zip(chunks)
            .for_each(|(dx, (x, t))| run(Gradient { x, t, dx, factors }));
    });
    dx
}

/// Intersection over union of `x > 0` and `t > 1/2` of each mask; 1 where both are empty.
pub fn ious(x: &[f32], t: &[f32], pixels: usize) -> Vec<f32> {
    let masks = x.par_chunks(pixels).zip(t.par_chunks(pixels));
    let of_mask = |(x, t): (&[f32], &[f32])| {
        let (mut both, mut any) = (0u32, 0u32);
        for (&x, &t) in x.iter().zip(t) {
            both += u32::from(x > 0.0 && t > 0.5);
            any += u32::from(x > 0.0 || t > 0.5);
        }
        if any == 0 {
            1.0
        } else {
            both as f32 / any as f32
        }
    };
    masks.map(of_mask).collect()
}

/// Calls `f` with all whole vectors of two slices, and with the rest. The rest is filled up with pixels far outside of
/// any object: their terms are zero.
#[inline(always)]
fn in_vectors(x: &[f32], t: &[f32], mut f: impl FnMut(&[f32], &[f32])) {
    let whole = x.len() / MAX_LANES * MAX_LANES;
    f(&x[..whole], &t[..whole]);
    if whole < x.len() {
        let (mut last_x, mut last_t) = ([-200f32; MAX_LANES], [0f32; MAX_LANES]);
        last_x[..x.len() - whole].copy_from_slice(&x[whole..]);
        last_t[..x.len() - whole].copy_from_slice(&t[whole..]);
        f(&last_x, &last_t);
    }
}

/// A vector of pixels as both passes need it.
struct Pixels<V> {
    bce: V,
    /// `sigmoid(x)`
    p: V,
    /// `p (1 - p)`
    slope: V,
    /// `p + t - 2 p t`
    miss: V,
    /// `a t + (1 - a) (1 - t)`
    share: V,
}

#[inline(always)]
fn pixels<S: Simd>(simd: S, x: S::f32s, t: S::f32s) -> Pixels<S::f32s> {
    let (zero, one, two) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0), simd.splat_f32s(2.0));
    let negative = simd.less_than_f32s(x, zero);
    let magnitude = simd.abs_f32s(x);
    let e = exp2_nonpositive(simd, simd.mul_f32s(magnitude, simd.splat_f32s(-LOG2_E)));
    let inverse = simd.div_f32s(one, simd.add_f32s(one, e));
    let rest = simd.mul_f32s(e, inverse);
    let p = simd.select_f32s(negative, rest, inverse);
    // ln(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3: the first term left out is below 2^-26 of the sum.
    let s = simd.div_f32s(e, simd.add_f32s(two, e));
    let square = simd.mul_f32s(s, s);
    let mut series = simd.splat_f32s(1.0 / 13.0);
    for odd in [11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = simd.mul_add_f32s(series, square, simd.splat_f32s(1.0 / odd));
    }
    let softplus = simd.mul_f32s(simd.mul_f32s(two, s), series);
    // A comparison, not a maximum: NaN must stay NaN.
    let positive = simd.select_f32s(negative, zero, x);
    let bce = simd.add_f32s(simd.sub_f32s(positive, simd.mul_f32s(x, t)), softplus);
    let inside = simd.mul_f32s(p, t);
    let miss = simd.sub_f32s(simd.add_f32s(p, t), simd.add_f32s(inside, inside));
    let (slant, offset) = (2.0 * FOCAL_ALPHA - 1.0, 1.0 - FOCAL_ALPHA);
    let share = simd.mul_add_f32s(t, simd.splat_f32s(slant), simd.splat_f32s(offset));
    Pixels { bce, p, slope: simd.mul_f32s(rest, inverse), miss, share }
}

struct SumPixels<'a> {
    x: &'a [f32],
    t: &'a [f32],
}

impl WithSimd for SumPixels<'_> {
    type Output = Sums;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Sums {
        let mut total = Sums::default();
        in_vectors(self.x, self.t, |x, t| {
            let (x, t) = (vectors::<S>(x), vectors::<S>(t));
            for (x, t) in x.chunks(SHORT).zip(t.chunks(SHORT)) {
                let mut sums = [simd.splat_f32s(0.0); 4];
                for (&x, &t) in x.iter().zip(t) {
                    let Pixels { bce, p, miss, share, .. } = pixels(simd, x, t);
                    let weight = simd.mul_f32s(share, simd.mul_f32s(miss, miss));
                    sums[0] = simd.add_f32s(sums[0], bce);
                    sums[1] = simd.mul_add_f32s(weight, bce, sums[1]);
                    sums[2] = simd.mul_add_f32s(p, t, sums[2]);
                    sums[3] = simd.add_f32s(sums[3], simd.add_f32s(p, t));
                }
                total.bce += f64::from(simd.reduce_sum_f32s(sums[0]));
                total.focal += f64::from(simd.reduce_sum_f32s(sums[1]));
                total.both += f64::from(simd.reduce_sum_f32s(sums[2]));
                total.each += f64::from(simd.reduce_sum_f32s(sums[3]));
            }
        });
        total
    }
}

/// Factors of a mask's gradient.
#[derive(Clone, Copy)]
struct Factors {
    bce: f32,
    focal: f32,
    /// Factor of dp/dx.
    p: f32,
    /// Factor of t dp/dx.
    p_inside: f32,
}

struct Gradient<'a> {
    x: &'a [f32],
    t: &'a [f32],
    dx: &'a mut [f32],
    factors: Factors,
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, t, dx, factors } = self;
        let splat = |factor| simd.splat_f32s(factor);
        let (one, bce, focal) = (splat(1.0), splat(factors.bce), splat(factors.focal));
        let (outside, inside) = (splat(factors.p), splat(factors.p_inside));
        let mut begin = 0;
        in_vectors(x, t, |x, t| {
            let mut last = [0f32; MAX_LANES];
            let end = dx.len().min(begin + x.len());
            let is_whole = end - begin == x.len();
            let out = if is_whole { &mut dx[begin..end] } else { &mut last[..] };
            let rows = vectors::<S>(x).iter().zip(vectors::<S>(t));
            for (out, (&x, &t)) in vectors_mut::<S>(out).iter_mut().zip(rows) {
                let pixel = pixels(simd, x, t);
                let error = simd.sub_f32s(pixel.p, t);
                let slope = pixel.slope;
                // dm = (1 - 2 t) dp
                let turn = simd.mul_f32s(simd.sub_f32s(one, simd.add_f32s(t, t)), slope);
                let along = simd.mul_f32s(simd.add_f32s(turn, turn), pixel.bce);
                let across = simd.mul_add_f32s(pixel.miss, error, along);
                let of_focal = simd.mul_f32s(simd.mul_f32s(pixel.share, pixel.miss), across);
                let of_dice = simd.mul_f32s(simd.mul_add_f32s(inside, t, outside), slope);
                let sum = simd.mul_add_f32s(bce, error, of_dice);
                *out = simd.mul_add_f32s(focal, of_focal, sum);
            }
            if !is_whole {
                dx[begin..end].copy_from_slice(&last[..end - begin]);
            }
            begin = end;
        });
    }
}
