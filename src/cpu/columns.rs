//! The softmax down the columns of a tile of scores, `[keys, columns]` with rows of whole vectors.
//!
//! Scores are logarithms to base two, as in [`super::softmax`].

use super::simd::{exp2_nonpositive, vectors, vectors_mut};
use pulp::{Simd, WithSimd};

/// Turns scores into `2^(score - max)` of the running maximum of their column.
pub struct Online<'a> {
    /// `[keys, columns]`
    pub scores: &'a mut [f32],
    /// The maximum so far, `[columns]`; updated.
    pub max: &'a mut [f32],
    /// The sum so far; updated.
    pub sum: &'a mut [f32],
    /// Factor of all sums so far, which were relative to the old maximum; replaced.
    pub rescale: &'a mut [f32],
}

impl WithSimd for Online<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let scores = vectors_mut::<S>(self.scores);
        let (max, sum) = (vectors_mut::<S>(self.max), vectors_mut::<S>(self.sum));
        let rescale = vectors_mut::<S>(self.rescale);
        rescale.copy_from_slice(max);
        for row in scores.chunks_exact(max.len()) {
            for (max, &score) in max.iter_mut().zip(row) {
                *max = simd.max_f32s(*max, score);
            }
        }
        for ((rescale, sum), &max) in rescale.iter_mut().zip(sum.iter_mut()).zip(&*max) {
            *rescale = exp2_nonpositive(simd, simd.sub_f32s(*rescale, finite(simd, max)));
            *sum = simd.mul_f32s(*sum, *rescale);
        }
        for row in scores.chunks_exact_mut(max.len()) {
            for ((score, sum), &max) in row.iter_mut().zip(sum.iter_mut()).zip(&*max) {
                *score = exp2_nonpositive(simd, simd.sub_f32s(*score, finite(simd, max)));
                *sum = simd.add_f32s(*sum, *score);
            }
        }
    }
}

/// While every score is minus infinity, the weights are zero relative to any finite number, NaN to the maximum.
#[inline(always)]
fn finite<S: Simd>(simd: S, max: S::f32s) -> S::f32s {
    simd.max_f32s(simd.splat_f32s(f32::MIN), max)
}

/// Turns scores into the weights P, and dP into `dS = P (dP - delta)`.
pub struct Gradient<'a> {
    /// `[keys, columns]`
    pub scores: &'a mut [f32],
    /// dP, `[keys, columns]`; becomes dS.
    pub grads: &'a mut [f32],
    /// The forward's maximum of each column.
    pub max: &'a [f32],
    /// One over the forward's sum.
    pub inverse_sum: &'a [f32],
    /// `dO . O`
    pub delta: &'a [f32],
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (max, delta) = (vectors::<S>(self.max), vectors::<S>(self.delta));
        let inverse_sum = vectors::<S>(self.inverse_sum);
        let (scores, grads) = (vectors_mut::<S>(self.scores), vectors_mut::<S>(self.grads));
        let rows = scores.chunks_exact_mut(max.len()).zip(grads.chunks_exact_mut(max.len()));
        for (scores, grads) in rows {
            let columns = max.iter().zip(inverse_sum).zip(delta);
            for ((score, grad), ((&max, &inverse), &delta)) in
                scores.iter_mut().zip(grads).zip(columns)
            {
                let power = exp2_nonpositive(simd, simd.sub_f32s(*score, max));
                *score = simd.mul_f32s(power, inverse);
                *grad = simd.mul_f32s(*score, simd.sub_f32s(*grad, delta));
            }
        }
    }
}
