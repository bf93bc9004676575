//! Operands of a product.

use super::super::panel::Into;

/// Elements behind the quads of a row: its scale, and `-128 sum xq` as the bits of an i32.
pub const TAIL: usize = 2;

/// `C [m, n] (+)= scale * A [m, k] B [k, n]`, rows of A and C `stride` apart; `k` counts quads.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// Whether C is replaced or added to, and the factor.
    pub into: (Into, f32),
    /// m, n, k; n is a multiple of [`MAX_LANES`](crate::cpu::simd::MAX_LANES).
    pub shape: (usize, usize, usize),
    /// Rows that [`rows`](super::rows) made.
    pub a: &'a [f32],
    /// Rows of n weights' quads, one after the other `b_stride` apart.
    pub b: &'a [f32],
    pub b_stride: usize,
    /// Scales of the n weights' rows.
    pub scales: &'a [f32],
}

impl Operands<'_> {
    /// Scale and correction of row `i` of A.
    #[inline(always)]
    pub fn row(&self, i: usize) -> (f32, i32) {
        let tail = &self.a[i * self.a_stride() + self.shape.2..][..TAIL];
        (tail[0] * self.into.1, tail[1].to_bits().cast_signed())
    }

    #[inline(always)]
    pub fn a_stride(&self) -> usize {
        self.shape.2 + TAIL
    }
}
