//! The row-wise part of attention: what happens to a tile of scores between the two products.
//!
//! A tile holds whole key rows of a window, each padded to `pitch` lanes. Its bias is then one vector of `rel_w` for
//! all key rows, minus infinity in the padding lanes, plus one number `rel_h` per key row.
//!
//! Logarithms are to base two: scores, biases and maxima are those of the softmax times log2 e. This costs nothing
//! where it is part of a factor, and spares the exponential a product.

use super::simd::{exp2_nonpositive, run, vectors, vectors_mut};
use pulp::{Simd, WithSimd};

/// One query's scores against one key tile, `[key rows, pitch]`, and its biases.
pub struct Row<'a> {
    /// `q . k`, unscaled; becomes the weights.
    pub scores: &'a mut [f32],
    /// Bias of each key row.
    pub rel_h: &'a [f32],
    /// Bias of each column, `pitch` long; minus infinity where there is no key.
    pub rel_w: &'a [f32],
    /// Factor of `q . k`: `softmax_scale log2 e`.
    pub scale: f32,
}

/// Normalizes a query's weights: `P = 2^(score - max) / sum`.
///
/// The two are kept apart, not as one `lse = max + log2(sum)`. At a score of 1e3 that sum loses parts below 1e-4, and
/// so would every weight. The backward's scores have the forward's bits, so the largest gives exactly `1 / sum`.
#[derive(Clone, Copy, Debug)]
pub struct Normalizer {
    /// The largest score.
    pub max: f32,
    /// The sum of all `2^(score - max)`.
    pub sum: f32,
}

/// Turns scores into `2^(score - max)` of the running maximum.
pub struct Online<'a> {
    /// The scores and biases.
    pub row: Row<'a>,
    /// The maximum so far.
    pub max: f32,
}

/// Result of a step of [`Online`].
pub struct OnlineStep {
    /// The new maximum.
    pub max: f32,
    /// Factor of all sums so far, which were relative to the old maximum.
    pub rescale: f32,
    /// The sum of the tile's weights.
    pub sum: f32,
}

impl WithSimd for Online<'_> {
    type Output = OnlineStep;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> OnlineStep {
        let scale = simd.splat_f32s(self.row.scale);
        let rel_w = vectors::<S>(self.row.rel_w);
        let mut maxima = simd.splat_f32s(f32::NEG_INFINITY);
        let scores = vectors_mut::<S>(self.row.scores);
        for (scores, &rel_h) in scores.chunks_exact_mut(rel_w.len()).zip(self.row.rel_h) {
            let rel_h = simd.splat_f32s(rel_h);
            for (score, &rel_w) in scores.iter_mut().zip(rel_w) {
                *score = simd.mul_add_f32s(*score, scale, simd.add_f32s(rel_w, rel_h));
                maxima = simd.max_f32s(maxima, *score);
            }
        }
        let max = self.max.max(simd.reduce_max_f32s(maxima));
        // While every score is minus infinity, the weights are zero relative to any finite number, NaN to the maximum.
        let reference = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let splat = simd.splat_f32s(reference);
        let mut sums = simd.splat_f32s(0.0);
        for score in scores.iter_mut() {
            *score = exp2_nonpositive(simd, simd.sub_f32s(*score, splat));
            sums = simd.add_f32s(sums, *score);
        }
        let rescale = (self.max - reference).exp2();
        OnlineStep { max, rescale, sum: simd.reduce_sum_f32s(sums) }
    }
}

/// Turns scores into the final weights P, and dP into `dS = P (dP - delta)` with its sums over each key row and over
/// each column.
pub struct Gradient<'a> {
    /// The scores and biases.
    pub row: Row<'a>,
    /// The forward's, of the same scores.
    pub normalizer: Normalizer,
    /// dP, `[key rows, pitch]`; becomes dS.
    pub grads: &'a mut [f32],
    /// `dO . O` of the query.
    pub delta: f32,
    /// Gradient of `rel_h`, one per key row; replaced.
    pub rel_h: &'a mut [f32],
    /// Gradient of `rel_w`, `pitch` long; added to.
    pub rel_w: &'a mut [f32],
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let scale = simd.splat_f32s(self.row.scale);
        let Normalizer { max, sum } = self.normalizer;
        let (max, inverse_sum) = (simd.splat_f32s(max), simd.splat_f32s(1.0 / sum));
        let delta = simd.splat_f32s(self.delta);
        let (rel_w, drel_w) = (vectors::<S>(self.row.rel_w), vectors_mut::<S>(self.rel_w));
        let (scores, grads) = (vectors_mut::<S>(self.row.scores), vectors_mut::<S>(self.grads));
        let rows = scores.chunks_exact_mut(rel_w.len()).zip(grads.chunks_exact_mut(rel_w.len()));
        for ((scores, grads), (&rel_h, drel_h)) in rows.zip(self.row.rel_h.iter().zip(self.rel_h)) {
            let rel_h = simd.splat_f32s(rel_h);
            let mut sum = simd.splat_f32s(0.0);
            let columns = rel_w.iter().zip(drel_w.iter_mut());
            for ((score, grad), (&rel_w, drel_w)) in scores.iter_mut().zip(grads).zip(columns) {
                let log = simd.mul_add_f32s(*score, scale, simd.add_f32s(rel_w, rel_h));
                let power = exp2_nonpositive(simd, simd.sub_f32s(log, max));
                *score = simd.mul_f32s(power, inverse_sum);
                *grad = simd.mul_f32s(*score, simd.sub_f32s(*grad, delta));
                sum = simd.add_f32s(sum, *grad);
                *drel_w = simd.add_f32s(*drel_w, *grad);
            }
            *drel_h = simd.reduce_sum_f32s(sum);
        }
    }
}

/// Which weight of whole vectors is above 1/2, if any.
pub struct AboveHalf<'a>(pub &'a [f32]);

impl WithSimd for AboveHalf<'_> {
    type Output = Option<usize>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Option<usize> {
        let mut maxima = simd.splat_f32s(0.0);
        for &weights in vectors::<S>(self.0) {
            maxima = simd.max_f32s(maxima, weights);
        }
        let found = simd.reduce_max_f32s(maxima) > 0.5;
        found.then(|| self.0.iter().position(|&weight| weight > 0.5)).flatten()
    }
}

/// Runs one of the above.
pub fn apply<K: WithSimd>(kernel: K) -> K::Output {
    run(kernel)
}
