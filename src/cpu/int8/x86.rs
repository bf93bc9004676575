//! The products by AVX512-VNNI, and by AVX2 with pairs of 16 bits: four products of bytes overflow its own instruction.

use super::super::panel::Into;
use super::super::simd::{allowed, Instructions};
use super::operands::Operands;
use std::arch::x86_64::*;

pub fn has_vnni() -> bool {
    allowed(Instructions::All)
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vnni")
}

pub fn has_avx2() -> bool {
    allowed(Instructions::Avx2) && is_x86_feature_detected!("avx2")
}

/// All tiles of C, of up to `ROWS` x `WIDTH` vectors of `LANES` columns.
macro_rules! all_tiles {
    ($c:expr, $operands:expr, $lanes:literal, $tile:ident, [$($width:literal),+], $rows:tt) => {{
        let ((c, c_stride), operands) = ($c, $operands);
        let (m, n, _) = operands.shape;
        let mut column = 0;
        while column < n {
            let left = (n - column) / $lanes;
            $(if left >= $width {
                all_tiles!(@rows c, c_stride, operands, m, column, $tile, $width, $rows);
                column += $lanes * $width;
                continue;
            })+
        }
    }};
    (@rows $c:ident, $stride:ident, $operands:ident, $m:ident, $column:ident, $tile:ident, $width:literal,
     [$($rows:literal),+]) => {{
        let mut row = 0;
        while row < $m {
            $(if $m - row >= $rows {
                let c = &mut $c[row * $stride + $column..];
                $tile::<$rows, $width>((c, $stride), $operands, (row, $column));
                row += $rows;
                continue;
            })+
        }
    }};
}

#[target_feature(enable = "avx512f,avx512vnni")]
pub fn by_vnni(c: (&mut [f32], usize), operands: &Operands<'_>) {
    all_tiles!(c, operands, 16, tile_vnni, [4, 2, 1], [6, 4, 2, 1]);
}

/// `MR x NV` vectors of C.
#[target_feature(enable = "avx512f,avx512vnni")]
fn tile_vnni<const MR: usize, const NV: usize>(
    (c, c_stride): (&mut [f32], usize),
    operands: &Operands<'_>,
    (row, column): (usize, usize),
) {
    let &Operands { into, shape: (_, _, k), b_stride, .. } = operands;
    let a_stride = operands.a_stride();
    let mut rows = [(0f32, 0i32); MR];
    let mut sums = [[_mm512_setzero_si512(); NV]; MR];
    for (i, (row_tail, sums)) in rows.iter_mut().zip(&mut sums).enumerate() {
        *row_tail = operands.row(row + i);
        sums.fill(_mm512_set1_epi32(row_tail.1));
    }
    if k > 0 {
        let a = &operands.a[row * a_stride..][..(MR - 1) * a_stride + k];
        let b = &operands.b[column..][..(k - 1) * b_stride + 16 * NV];
        for p in 0..k {
            let mut line = [_mm512_setzero_si512(); NV];
            for (j, line) in line.iter_mut().enumerate() {
                // SAFETY: `p < k` and `j < NV`, so this ends where `b` does, or before.
                *line = unsafe { _mm512_loadu_si512(b.as_ptr().add(p * b_stride + 16 * j).cast()) };
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `i < MR` and `p < k`, so this is the last element of `a`, or one before.
                let quad = unsafe { *a.as_ptr().add(i * a_stride + p) };
                let quad = _mm512_set1_epi32(quad.to_bits().cast_signed());
                for (sum, &line) in sums.iter_mut().zip(&line) {
                    *sum = _mm512_dpbusd_epi32(*sum, line, quad);
                }
            }
        }
    }
    let scales = &operands.scales[column..][..16 * NV];
    for (i, (sums, (scale, _))) in sums.into_iter().zip(rows).enumerate() {
        let scale = _mm512_set1_ps(scale);
        let c = &mut c[i * c_stride..][..16 * NV];
        for ((c, sum), column) in c.chunks_exact_mut(16).zip(sums).zip(scales.chunks_exact(16)) {
            let value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
            // SAFETY: both chunks are 16 numbers.
            unsafe {
                let value = _mm512_mul_ps(value, _mm512_loadu_ps(column.as_ptr()));
                let value = match into.0 {
                    Into::Store => value,
                    Into::Add => _mm512_add_ps(_mm512_loadu_ps(c.as_ptr()), value),
                };
                _mm512_storeu_ps(c.as_mut_ptr(), value);
            }
        }
    }
}

#[target_feature(enable = "avx2")]
pub fn by_avx2(c: (&mut [f32], usize), operands: &Operands<'_>) {
    all_tiles!(c, operands, 8, tile_avx2, [2, 1], [4, 2, 1]);
}

/// As [`tile_vnni`]: the bytes of a quad are an even and an odd pair of 16 bits.
#[target_feature(enable = "avx2")]
fn tile_avx2<const MR: usize, const NV: usize>(
    (c, c_stride): (&mut [f32], usize),
    operands: &Operands<'_>,
    (row, column): (usize, usize),
) {
    let &Operands { into, shape: (_, _, k), b_stride, .. } = operands;
    let a_stride = operands.a_stride();
    let mut rows = [(0f32, 0i32); MR];
    let mut sums = [[_mm256_setzero_si256(); NV]; MR];
    for (i, (row_tail, sums)) in rows.iter_mut().zip(&mut sums).enumerate() {
        *row_tail = operands.row(row + i);
        sums.fill(_mm256_set1_epi32(row_tail.1));
    }
    let low = _mm256_set1_epi16(0xff);
    if k > 0 {
        let a = &operands.a[row * a_stride..][..(MR - 1) * a_stride + k];
        let b = &operands.b[column..][..(k - 1) * b_stride + 8 * NV];
        for p in 0..k {
            let mut line = [[_mm256_setzero_si256(); 2]; NV];
            for (j, line) in line.iter_mut().enumerate() {
                // SAFETY: `p < k` and `j < NV`, so this ends where `b` does, or before.
                let quads =
                    unsafe { _mm256_loadu_si256(b.as_ptr().add(p * b_stride + 8 * j).cast()) };
                *line = [_mm256_and_si256(quads, low), _mm256_srli_epi16::<8>(quads)];
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `i < MR` and `p < k`, so this is the last element of `a`, or one before.
                let quad = unsafe { *a.as_ptr().add(i * a_stride + p) };
                let quad = _mm256_set1_epi32(quad.to_bits().cast_signed());
                let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(quad));
                let odd = _mm256_srai_epi16::<8>(quad);
                for (sum, line) in sums.iter_mut().zip(&line) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(line[0], even));
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(line[1], odd));
                }
            }
        }
    }
    let scales = &operands.scales[column..][..8 * NV];
    for (i, (sums, (scale, _))) in sums.into_iter().zip(rows).enumerate() {
        let scale = _mm256_set1_ps(scale);
        let c = &mut c[i * c_stride..][..8 * NV];
        for ((c, sum), column) in c.chunks_exact_mut(8).zip(sums).zip(scales.chunks_exact(8)) {
            let value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
            // SAFETY: both chunks are 8 numbers.
            unsafe {
                let value = _mm256_mul_ps(value, _mm256_loadu_ps(column.as_ptr()));
                let value = match into.0 {
                    Into::Store => value,
                    Into::Add => _mm256_add_ps(_mm256_loadu_ps(c.as_ptr()), value),
                };
                _mm256_storeu_ps(c.as_mut_ptr(), value);
            }
        }
    }
}
