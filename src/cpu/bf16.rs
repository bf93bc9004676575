//! Products in bf16 with f32 sums, where the CPU has an instruction for them (AVX512-BF16): twice the f32 arithmetic.
//!
//! ```text
//! C [m, 64] (+)= scale * sum over pairs p of  A[i, 2p] B[2p, j] + A[i, 2p + 1] B[2p + 1, j]
//! ```
//! Two neighbours in k make a pair of 32 bits. A pair travels as the f32 of the same bits, which is never computed
//! with. So packing and blocking are those of f32 with half the depth.

use super::panel::{Into, PANEL};

/// Whether this machine has the instruction; without it f32 is faster.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Numbers rounded to bf16, in pairs; their count is even.
pub fn pairs(values: &[f32]) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        return unsafe { x86::pairs(values) };
    }
    portable::pairs(values)
}

/// Both numbers of every pair.
pub fn unpair(pairs: &[f32]) -> Vec<f32> {
    pairs.iter().flat_map(|&pair| portable::split(pair)).collect()
}

/// `acc [rows, PANEL] (+)= scale * left right`: rows of left pairs `stride` apart, `right [depth, PANEL]` pairs.
pub fn panel(
    acc: &mut [f32],
    (into, scale): (Into, f32),
    (rows, depth): (usize, usize),
    (left, stride): (&[f32], usize),
    right: &[f32],
) {
    let operands = Operands { scale, into, rows, depth, left, stride, right };
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the features that the function is compiled for have just been detected.
        return unsafe { x86::panel(acc, &operands) };
    }
    portable::panel(acc, &operands);
}

struct Operands<'a> {
    scale: f32,
    into: Into,
    rows: usize,
    depth: usize,
    left: &'a [f32],
    stride: usize,
    right: &'a [f32],
}

impl Operands<'_> {
    fn row(&self, index: usize) -> &[f32] {
        &self.left[index * self.stride..][..self.depth]
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{portable, Into, Operands, PANEL};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// Vectors of one panel's row.
    const NV: usize = PANEL / 16;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn pairs(values: &[f32]) -> Vec<f32> {
        let mut out = vec![0f32; values.len() / 2];
        let whole = values.len() / 32;
        for (out, values) in out.chunks_exact_mut(16).zip(values.chunks_exact(32)) {
            // SAFETY: both halves of `values` and all of `out` are 16 numbers long.
            unsafe {
                let low = _mm512_loadu_ps(values.as_ptr());
                let high = _mm512_loadu_ps(values[16..].as_ptr());
                let both = transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_ps(out.as_mut_ptr(), both);
            }
        }
        out[whole * 16..].copy_from_slice(&portable::pairs(&values[whole * 32..]));
        out
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn panel(acc: &mut [f32], operands: &Operands<'_>) {
        let mut row = 0;
        while row < operands.rows {
            row += match operands.rows - row {
                6.. => tile::<6>(acc, operands, row),
                4.. => tile::<4>(acc, operands, row),
                2.. => tile::<2>(acc, operands, row),
                _ => tile::<1>(acc, operands, row),
            };
        }
    }

    /// `MR` rows of the accumulator, from `row` on; returns `MR`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn tile<const MR: usize>(acc: &mut [f32], operands: &Operands<'_>, row: usize) -> usize {
        let mut sums = [[_mm512_setzero_ps(); NV]; MR];
        let mut rows: [&[f32]; MR] = [&[]; MR];
        for (index, rows) in rows.iter_mut().enumerate() {
            *rows = operands.row(row + index);
        }
        let lines = operands.right.chunks_exact(PANEL).take(operands.depth);
        for (p, line) in lines.enumerate() {
            let mut b = [_mm512_setzero_ps(); NV];
            for (b, line) in b.iter_mut().zip(line.chunks_exact(16)) {
                // SAFETY: `line` is 16 numbers long.
                *b = unsafe { _mm512_loadu_ps(line.as_ptr()) };
            }
            for i in 0..MR {
                let a = _mm512_set1_epi32(rows[i][p].to_bits().cast_signed());
                for j in 0..NV {
                    // SAFETY: vectors of the same size, of which every bit pattern is one.
                    let (a, b) = unsafe {
                        (transmute::<__m512i, __m512bh>(a), transmute::<__m512, __m512bh>(b[j]))
                    };
                    sums[i][j] = _mm512_dpbf16_ps(sums[i][j], a, b);
                }
            }
        }
        let scale = _mm512_set1_ps(operands.scale);
        let acc = acc[row * PANEL..][..MR * PANEL].chunks_exact_mut(16);
        for (acc, sum) in acc.zip(sums.into_iter().flatten()) {
            // SAFETY: `acc` is 16 numbers long.
            unsafe {
                let result = match operands.into {
                    Into::Store => _mm512_mul_ps(scale, sum),
                    Into::Add => _mm512_fmadd_ps(scale, sum, _mm512_loadu_ps(acc.as_ptr())),
                };
                _mm512_storeu_ps(acc.as_mut_ptr(), result);
            }
        }
        MR
    }
}

/// The same without the instruction.
mod portable {
    use super::{Into, Operands, PANEL};
    use half::bf16;

    pub fn pairs(values: &[f32]) -> Vec<f32> {
        let bits = |x: f32| u32::from(bf16::from_f32(x).to_bits());
        values.chunks_exact(2).map(|v| f32::from_bits(bits(v[0]) | bits(v[1]) << 16)).collect()
    }

    pub fn split(pair: f32) -> [f32; 2] {
        [f32::from_bits(pair.to_bits() << 16), f32::from_bits(pair.to_bits() & 0xffff_0000)]
    }

    pub fn panel(acc: &mut [f32], operands: &Operands<'_>) {
        for (i, acc) in acc.chunks_exact_mut(PANEL).take(operands.rows).enumerate() {
            let mut sums = [0f32; PANEL];
            for (&a, line) in operands.row(i).iter().zip(operands.right.chunks_exact(PANEL)) {
                let a = split(a);
                for (sum, &b) in sums.iter_mut().zip(line) {
                    let b = split(b);
                    *sum += a[0] * b[0] + a[1] * b[1];
                }
            }
            for (acc, sum) in acc.iter_mut().zip(sums) {
                let old = if operands.into == Into::Add { *acc } else { 0.0 };
                *acc = old + operands.scale * sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_agrees_with_the_portable_sums() {
        for (rows, depth) in [(1, 1), (5, 7), (6, 33), (13, 100)] {
            let value = |i: usize| ((i * 37 % 23) as f32 - 11.0) / 7.0;
            let left: Vec<f32> = (0..rows * (depth + 3) * 2).map(value).collect();
            let right: Vec<f32> = (0..depth * PANEL * 2).map(|i| value(i + 5)).collect();
            let (left, right) = (pairs(&left), pairs(&right));
            assert_eq!(left[0].to_bits(), portable::pairs(&unpair(&left[..1]))[0].to_bits());
            let stride = depth + 3;
            let mut acc = vec![1f32; rows * PANEL];
            let mut expected = acc.clone();
            panel(&mut acc, (Into::Add, 0.5), (rows, depth), (&left, stride), &right);
            let (scale, into, left, right) = (0.5, Into::Add, &left[..], &right[..]);
            let operands = Operands { scale, into, rows, depth, left, stride, right };
            portable::panel(&mut expected, &operands);
            for (x, y) in acc.iter().zip(&expected) {
                assert!((x - y).abs() < 1e-4 * (1.0 + depth as f32), "{rows} {depth}: {x} {y}");
            }
        }
    }
}
