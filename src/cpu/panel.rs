//! Products of small matrices that are already in cache: `C (+)= scale * A B`.
//!
//! B and C are row-major with rows of whole vectors. A is read one element at a time and broadcast, so it may lie
//! either way round, and nothing has to be packed. `MR` rows times `NV` vectors of C stay in registers over the
//! whole of k.

use super::simd::{run, vectors, vectors_mut, MAX_LANES};
use pulp::{Simd, WithSimd};

/// A, `[m, k]`.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// Element (i, p) at `i * stride + p`.
    Rows(&'a [f32], usize),
    /// Element (i, p) at `p * stride + i`: the transpose of a row-major matrix.
    Columns(&'a [f32], usize),
}

/// B, `[k, n]`: row p at `p * stride`; n and stride are multiples of [`MAX_LANES`](super::simd::MAX_LANES).
#[derive(Clone, Copy)]
pub struct Right<'a>(pub &'a [f32], pub usize);

/// Columns of one panel of a packed matrix: four AVX-512 vectors.
pub const PANEL: usize = 64;

/// Whether the old values of C are replaced or added to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// `C = ..`
    Store,
    /// `C += ..`
    Add,
}

/// `C [m, n] (+)= scale * A [m, k] B [k, n]`, rows of C `c_stride` apart; n and c_stride are multiples of
/// [`MAX_LANES`](super::simd::MAX_LANES).
pub fn panel(
    (c, c_stride): (&mut [f32], usize),
    (into, scale): (Into, f32),
    (m, n, k): (usize, usize, usize),
    a: Left<'_>,
    b: Right<'_>,
) {
    run(Panel { c, c_stride, into, scale, m, n, k, a, b })
}

/// The dot product of each row of `a` with the same row of `b`, rows of whole vectors `width` apart. Order and bits are
/// those that [`panel`] gives the diagonal of `A B^T`.
pub fn row_dots(a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
    run(RowDots { a, b, width })
}

struct RowDots<'a> {
    a: &'a [f32],
    b: &'a [f32],
    width: usize,
}

impl WithSimd for RowDots<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let rows = self.a.chunks_exact(self.width).zip(self.b.chunks_exact(self.width));
        rows.map(|(a, b)| {
            let mut sum = simd.splat_f32s(0.0);
            for (&a, &b) in a.iter().zip(b) {
                sum = simd.mul_add_f32s(simd.splat_f32s(a), simd.splat_f32s(b), sum);
            }
            first_lane::<S>(sum)
        })
        .collect()
    }
}

/// The first lane of a vector.
#[inline(always)]
fn first_lane<S: Simd>(vector: S::f32s) -> f32 {
    let mut lanes = [0f32; MAX_LANES];
    vectors_mut::<S>(&mut lanes)[0] = vector;
    lanes[0]
}

struct Panel<'a> {
    c: &'a mut [f32],
    c_stride: usize,
    into: Into,
    scale: f32,
    m: usize,
    n: usize,
    k: usize,
    a: Left<'a>,
    b: Right<'a>,
}

impl WithSimd for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // AVX-512 and NEON have registers for 6 x 4 sums and their operands, AVX2 for 6 x 2.
        let mut column = 0;
        let lanes = S::F32_LANES;
        while column < self.n {
            let left = (self.n - column) / lanes;
            column += lanes
                * match left {
                    4.. if S::REGISTER_COUNT >= 32 => self.rows::<S, 4>(simd, column),
                    3 if S::REGISTER_COUNT >= 32 => self.rows::<S, 3>(simd, column),
                    2.. => self.rows::<S, 2>(simd, column),
                    _ => self.rows::<S, 1>(simd, column),
                };
        }
    }
}

impl Panel<'_> {
    /// All rows of `NV` vectors of columns; returns `NV`.
    #[inline(always)]
    fn rows<S: Simd, const NV: usize>(&mut self, simd: S, column: usize) -> usize {
        let mut row = 0;
        while row < self.m {
            row += match self.m - row {
                6.. => self.tile::<S, 6, NV>(simd, row, column),
                4.. => self.tile::<S, 4, NV>(simd, row, column),
                2.. => self.tile::<S, 2, NV>(simd, row, column),
                _ => self.tile::<S, 1, NV>(simd, row, column),
            };
        }
        NV
    }

    /// `MR x NV` vectors of C; returns `MR`.
    #[inline(always)]
    fn tile<S: Simd, const MR: usize, const NV: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) -> usize {
        let k = self.k;
        let mut sums = [[simd.splat_f32s(0.0); NV]; MR];
        let lanes = S::F32_LANES;
        let (b_stride, b_column) = (self.b.1 / lanes, column / lanes);
        let b = vectors::<S>(self.b.0).get(b_column..).unwrap_or_default();
        match self.a {
            Left::Rows(a, stride) => {
                let mut rows: [&[f32]; MR] = [&[]; MR];
                for (i, rows) in rows.iter_mut().enumerate() {
                    *rows = &a[(row + i) * stride..][..k];
                }
                for p in 0..k {
                    let mut column = [0f32; MR];
                    for i in 0..MR {
                        column[i] = rows[i][p];
                    }
                    step(simd, &mut sums, column, &b[p * b_stride..]);
                }
            }
            Left::Columns(a, stride) => {
                for p in 0..k {
                    let mut column = [0f32; MR];
                    column.copy_from_slice(&a[p * stride + row..][..MR]);
                    step(simd, &mut sums, column, &b[p * b_stride..]);
                }
            }
        }
        let scale = simd.splat_f32s(self.scale);
        for (i, sums) in sums.iter().enumerate() {
            let c = &mut self.c[(row + i) * self.c_stride + column..][..NV * lanes];
            for (c, &sum) in vectors_mut::<S>(c).iter_mut().zip(sums) {
                *c = match self.into {
                    Into::Store => simd.mul_f32s(scale, sum),
                    Into::Add => simd.mul_add_f32s(scale, sum, *c),
                };
            }
        }
        MR
    }
}

/// One step of k: the outer product of a column of A and a row of B. A function, since a closure would not be
/// compiled for the instruction set.
#[inline(always)]
fn step<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    sums: &mut [[S::f32s; NV]; MR],
    a: [f32; MR],
    b: &[S::f32s],
) {
    let b = &b[..NV];
    for i in 0..MR {
        let a = simd.splat_f32s(a[i]);
        for j in 0..NV {
            sums[i][j] = simd.mul_add_f32s(a, b[j], sums[i][j]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_dots_have_the_bits_of_the_diagonal() {
        let (m, k) = (19, 48);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.3) / 7.7;
        let a: Vec<f32> = (0..m * k).map(value).collect();
        let b: Vec<f32> = (0..m * k).map(|i| value(i * 3 + 5)).collect();
        let pitch = m.next_multiple_of(MAX_LANES);
        let mut b_t = vec![0f32; k * pitch];
        b.iter().enumerate().for_each(|(i, &x)| b_t[i % k * pitch + i / k] = x);
        let mut c = vec![0f32; m * pitch];
        let (left, right) = (Left::Rows(&a, k), Right(&b_t, pitch));
        panel((&mut c, pitch), (Into::Store, 1.0), (m, pitch, k), left, right);
        for (i, dot) in row_dots(&a, &b, k).into_iter().enumerate() {
            assert_eq!(dot.to_bits(), c[i * pitch + i].to_bits(), "row {i}");
        }
    }

    #[test]
    fn every_tile_size_both_ways_round() {
        for (m, n, k) in [(1, 16, 1), (5, 48, 3), (13, 80, 17), (6, 64, 0), (7, 112, 9)] {
            let value = |i: usize| ((i * 37 % 23) as f32 - 11.0) / 8.0;
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let a_t: Vec<f32> = (0..k * m).map(|i| a[(i % m) * k + i / m]).collect();
            let b: Vec<f32> = (0..k * (n + 16)).map(|i| value(i + 5)).collect();
            for a_side in [Left::Rows(&a, k), Left::Columns(&a_t, m)] {
                let mut c = vec![1f32; m * n];
                panel((&mut c, n), (Into::Add, 0.5), (m, n, k), a_side, Right(&b, n + 16));
                for i in 0..m {
                    for j in 0..n {
                        let dot: f32 = (0..k).map(|p| a[i * k + p] * b[p * (n + 16) + j]).sum();
                        assert!(
                            (c[i * n + j] - 1.0 - 0.5 * dot).abs() < 1e-4,
                            "{m} {n} {k}: {i} {j}"
                        );
                    }
                }
            }
        }
    }
}
