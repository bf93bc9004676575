//! The softmax over the tokens of each head, and its gradient. One more token has score 0 and no column.

use crate::cpu::simd::{exp2_nonpositive, vectors_mut};
use pulp::{Simd, WithSimd};

/// The softmax of each row of scores, over the tokens of each head: columns `[tokens, heads]`, and a token of score 0.
pub struct OverTokens<'a> {
    /// Scores, `[rows, pitch]`; become the weights.
    pub scores: &'a mut [f32],
    /// Scratch for the token of score 0, `[rows, heads]`.
    pub last: &'a mut [f32],
    /// Added to every row; as long as one.
    pub constants: &'a [f32],
    /// Columns that count.
    pub used: usize,
    /// Heads.
    pub heads: usize,
}

impl WithSimd for OverTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.heads {
            8 => self.rows::<S>(simd, 8),
            heads => self.rows::<S>(simd, heads),
        }
    }
}

impl OverTokens<'_> {
    /// A literal `heads` lets the compiler unroll the loops over heads. Three passes over rows that are in cache: a
    /// vector is never loaded right after narrower stores.
    #[inline(always)]
    fn rows<S: Simd>(self, simd: S, heads: usize) {
        let Self { scores, last, constants, used, .. } = self;
        let pitch = constants.len();
        for (scores, last) in scores.chunks_exact_mut(pitch).zip(last.chunks_exact_mut(heads)) {
            let last = &mut last[..heads];
            last.fill(0.0);
            let tokens = scores[..used].chunks_exact_mut(heads);
            for (token, constants) in tokens.zip(constants.chunks_exact(heads)) {
                for h in 0..heads {
                    token[h] += constants[h];
                    last[h] = if token[h] > last[h] { token[h] } else { last[h] };
                }
            }
            for token in scores[..used].chunks_exact_mut(heads) {
                for h in 0..heads {
                    token[h] -= last[h];
                }
            }
            for last in last.iter_mut() {
                *last = -*last;
            }
        }
        for score in vectors_mut::<S>(scores).iter_mut().chain(vectors_mut::<S>(last)) {
            *score = exp2_nonpositive(simd, *score);
        }
        for (scores, last) in scores.chunks_exact_mut(pitch).zip(last.chunks_exact_mut(heads)) {
            let last = &mut last[..heads];
            for token in scores[..used].chunks_exact(heads) {
                for h in 0..heads {
                    last[h] += token[h];
                }
            }
            for last in last.iter_mut() {
                *last = 1.0 / *last;
            }
            for token in scores[..used].chunks_exact_mut(heads) {
                for h in 0..heads {
                    token[h] *= last[h];
                }
            }
        }
    }
}

/// The gradient of [`OverTokens`]: `dS = P (dP - sum of P dP over a head's tokens)`; dP is 0 for the token without a
/// column.
pub struct OverTokensGradient<'a> {
    /// P, `[rows, pitch]`
    pub weights: &'a [f32],
    /// dP, which becomes dS.
    pub grads: &'a mut [f32],
    /// Columns of a row.
    pub pitch: usize,
    /// The sums of dS over the rows are added to this, `[used]`.
    pub sums: &'a mut [f32],
    /// Heads.
    pub heads: usize,
}

impl WithSimd for OverTokensGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.heads {
            8 => self.rows::<S, 8>(simd),
            _ => self.rows_of_any_heads(),
        }
    }
}

impl OverTokensGradient<'_> {
    /// A literal number of heads keeps a head's sum in a register.
    #[inline(always)]
    fn rows<S: Simd, const HEADS: usize>(self, _: S) {
        let rows =
            self.weights.chunks_exact(self.pitch).zip(self.grads.chunks_exact_mut(self.pitch));
        let used = self.sums.len();
        for (weights, grads) in rows {
            let (weights, grads) = (&weights[..used], &mut grads[..used]);
            let mut mean = [0f32; HEADS];
            for (p, dp) in weights.chunks_exact(HEADS).zip(grads.chunks_exact(HEADS)) {
                for h in 0..HEADS {
                    mean[h] += p[h] * dp[h];
                }
            }
            let tokens = weights.chunks_exact(HEADS).zip(grads.chunks_exact_mut(HEADS));
            for ((p, dp), sum) in tokens.zip(self.sums.chunks_exact_mut(HEADS)) {
                for h in 0..HEADS {
                    dp[h] = p[h] * (dp[h] - mean[h]);
                    sum[h] += dp[h];
                }
            }
        }
    }

    #[inline(always)]
    fn rows_of_any_heads(self) {
        let rows =
            self.weights.chunks_exact(self.pitch).zip(self.grads.chunks_exact_mut(self.pitch));
        let (used, heads) = (self.sums.len(), self.heads);
        for (weights, grads) in rows {
            for head in 0..heads {
                let columns = || (head..used).step_by(heads);
                let mean: f32 = columns().map(|c| weights[c] * grads[c]).sum();
                for c in columns() {
                    grads[c] = weights[c] * (grads[c] - mean);
                    self.sums[c] += grads[c];
                }
            }
        }
    }
}
