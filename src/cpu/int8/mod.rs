//! Products of int8 activations and int8 weights with exact sums in 32 bits, by AVX512-VNNI where the CPU has it.
//!
//! ```text
//! x[i, p] = x_scale[i] xq[i, p]          xq is an i8, x_scale = max |x[i]| / 127, of each row as it comes
//! w[j, p] = w_scale[j] wq[j, p]          wq + 128 is a byte, w_scale = max |w[j]| / 127, fixed
//! y[i, j] = x_scale[i] w_scale[j] (sum over p of xq[i, p] (wq[j, p] + 128)  - 128 sum over p of xq[i, p])
//! ```
//! The instruction multiplies unsigned bytes by signed ones, hence the 128. Four neighbours in p make a quad of 32
//! bits. A quad travels as the f32 of the same bits, which is never computed with. So packing is that of f32 with a
//! quarter of the depth. Behind the quads of a row of activations lie its scale and its correction.
//!
//! The sums are integers, and what follows is rounded in one order. So every instruction set gives the same bits.

use super::element::Element;
use super::simd::run;
use pulp::{Simd, WithSimd};

mod operands;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use operands::{Operands, TAIL};

/// Added to an integer of -127 to 127, it makes the stored byte.
pub const OFFSET: u8 = 128;
/// Depth up to which no sum overflows 32 bits.
pub const MAX_DEPTH: usize = i32::MAX as usize / (255 * 127);

/// Multiplies by the best instruction set of this machine.
pub fn product(c: (&mut [f32], usize), operands: &Operands<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_vnni() {
            // SAFETY: the features that the function is compiled for have just been detected.
            return unsafe { x86::by_vnni(c, operands) };
        }
        if x86::has_avx2() {
            // SAFETY: the features that the function is compiled for have just been detected.
            return unsafe { x86::by_avx2(c, operands) };
        }
    }
    portable::product(c, operands);
}

/// Rows of `k` activations as A, `k / 4 + TAIL` elements each. A row with a number that is not finite has a scale of
/// NaN.
pub fn rows<T: Element>(x: &[T], k: usize) -> Vec<f32> {
    let stride = k / 4 + TAIL;
    let mut out = vec![0f32; x.len() / k * stride];
    let mut wide = Vec::new();
    for (out, x) in out.chunks_exact_mut(stride).zip(x.chunks_exact(k)) {
        let (quads, tail) = out.split_at_mut(k / 4);
        let (scale, sum) = quantize(T::read(x, &mut wide), bytemuck::cast_slice_mut(quads));
        tail[0] = scale;
        tail[1] = f32::from_bits((sum * -i32::from(OFFSET)).cast_unsigned());
    }
    out
}

/// A row of weights as bytes that are [`OFFSET`] too large; returns its scale.
pub fn quantize_weight(row: &[f32], out: &mut [u8]) -> f32 {
    let (scale, _) = quantize(row, out);
    out.iter_mut().for_each(|byte| *byte ^= OFFSET);
    scale
}

/// A weight's value from its byte and its row's scale.
#[inline(always)]
pub fn dequantized(byte: u8, scale: f32) -> f32 {
    (f32::from(byte) - f32::from(OFFSET)) * scale
}

/// Numbers as the bytes of `x / scale`, rounded to even; returns `scale = max |x| / 127` and the sum of the bytes.
pub fn quantize(row: &[f32], out: &mut [u8]) -> (f32, i32) {
    run(Quantize { row, out })
}

struct Quantize<'a> {
    row: &'a [f32],
    out: &'a mut [u8],
}

impl WithSimd for Quantize<'_> {
    type Output = (f32, i32);

    /// Plain loops, which the compiler turns into vectors of the instruction set that `run` chose.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> (f32, i32) {
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the pattern.
        const ROUND: f32 = 12_582_912.0;
        // The patterns of magnitudes are ordered as the magnitudes, with infinity and NaN above them all.
        let mut largest = 0u32;
        for x in self.row {
            largest = largest.max(x.to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(largest);
        let inverse = 127.0 / largest;
        let (scale, inverse) = match largest.is_finite() {
            false => (f32::NAN, 0.0),
            // Zeros, or next to nothing.
            true if !inverse.is_finite() => (0.0, 0.0),
            true => (largest / 127.0, inverse),
        };
        let mut sum = 0i32;
        for (out, x) in self.out.iter_mut().zip(self.row) {
            let bits = (x * inverse + ROUND).to_bits();
            *out = bits as u8;
            sum = sum.wrapping_add(bits.wrapping_sub(ROUND.to_bits()).cast_signed());
        }
        (scale, if scale.is_nan() { 0 } else { sum })
    }
}

#[cfg(test)]
mod tests {
    use super::super::panel::Into;
    use super::*;

    /// Row-major A and B^T as integers.
    struct Case {
        shape: (usize, usize, usize),
        x: Vec<i8>,
        w: Vec<i8>,
    }

    impl Case {
        /// Extremes of both types among random integers.
        fn new(shape: (usize, usize, usize)) -> Self {
            let (m, n, k) = shape;
            let value = |i: usize, salt: usize| match (i * 7 + salt) % 11 {
                0 => 127,
                1 => -127,
                _ => ((i * 2_654_435_761 + salt * 40_503) >> 7) as u8 as i8,
            };
            let x = (0..m * k).map(|i| value(i, 1).max(-127)).collect();
            Self { shape, x, w: (0..n * k).map(|i| value(i, 5).max(-127)).collect() }
        }

        /// A in rows of quads and B in lines of quads, `b_stride` apart.
        fn operands(&self, b_stride: usize) -> (Vec<f32>, Vec<f32>) {
            let (m, n, k) = self.shape;
            let quad = |bytes: &[u8]| {
                f32::from_bits(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            };
            let mut a = Vec::new();
            for (i, row) in self.x.chunks_exact(k).enumerate() {
                let bytes: Vec<u8> = row.iter().map(|x| x.cast_unsigned()).collect();
                a.extend(bytes.chunks_exact(4).map(quad));
                let sum: i32 = row.iter().map(|&x| i32::from(x)).sum();
                a.extend([0.5 + i as f32, f32::from_bits((-128 * sum).cast_unsigned())]);
            }
            let mut b = vec![0f32; k / 4 * b_stride];
            for (j, row) in self.w.chunks_exact(k).enumerate() {
                let bytes: Vec<u8> = row.iter().map(|w| w.cast_unsigned() ^ OFFSET).collect();
                for (p, bytes) in bytes.chunks_exact(4).enumerate() {
                    b[p * b_stride + j] = quad(bytes);
                }
            }
            assert_eq!((a.len(), b.len()), (m * (k / 4 + TAIL), k / 4 * b_stride.max(n)));
            (a, b)
        }

        /// The sum of products of an element of C.
        fn exact(&self, i: usize, j: usize) -> i64 {
            let k = self.shape.2;
            let (x, w) = (&self.x[i * k..][..k], &self.w[j * k..][..k]);
            x.iter().zip(w).map(|(&x, &w)| i64::from(x) * i64::from(w)).sum()
        }
    }

    type Multiply = fn((&mut [f32], usize), &Operands<'_>);

    fn engines() -> Vec<(&'static str, Multiply)> {
        let mut engines: Vec<(&str, Multiply)> =
            vec![("portable", portable::product), ("best", product)];
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: the features that the functions are compiled for have just been detected.
            if x86::has_avx2() {
                engines.push(("AVX2", |c, operands| unsafe { x86::by_avx2(c, operands) }));
            }
            if x86::has_vnni() {
                engines.push(("VNNI", |c, operands| unsafe { x86::by_vnni(c, operands) }));
            }
        }
        engines
    }

    #[test]
    fn sums_are_exact_and_bits_equal_everywhere() {
        for shape in [(1, 16, 4), (7, 64, 12), (13, 112, 768), (6, 80, 3072)] {
            let case = Case::new(shape);
            let (m, n, k) = shape;
            let (a, b) = case.operands(n + 16);
            // Powers of two, for which the integers are seen as they are while f32 holds them.
            let scales: Vec<f32> = (0..n).map(|j| (j as f32 % 3.0 - 1.0).exp2()).collect();
            for (into, start) in [(Into::Store, f32::NAN), (Into::Add, 3.0)] {
                let shape = (m, n, k / 4);
                let operands = Operands {
                    into: (into, 2.0),
                    shape,
                    a: &a,
                    b: &b,
                    b_stride: n + 16,
                    scales: &scales,
                };
                let mut first: Option<Vec<u32>> = None;
                for (name, multiply) in engines() {
                    let mut c = vec![start; m * (n + 5)];
                    multiply((&mut c, n + 5), &operands);
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let row = (0.5 + i as f64) * 2.0;
                        let value = case.exact(i, j) as f64 * row * f64::from(scales[j]);
                        let expected = if into == Into::Add { 3.0 + value } else { value };
                        let error = (f64::from(c[i * (n + 5) + j]) - expected).abs();
                        assert!(
                            error <= 2e-7 * expected.abs(),
                            "{name} {shape:?} {i} {j}: {error}"
                        );
                    }
                    let bits: Vec<u32> = c.iter().map(|x| x.to_bits()).collect();
                    assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{name} {shape:?}");
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_even_integer() {
        let row: Vec<f32> = (-508..=508).map(|i| i as f32 * 0.25).collect();
        let mut bytes = vec![0u8; row.len()];
        let (scale, sum) = quantize(&row, &mut bytes);
        assert!(scale == 1.0 && sum == 0);
        for (x, byte) in row.iter().zip(bytes) {
            assert_eq!(f32::from(byte.cast_signed()), x.round_ties_even(), "{x}");
        }
    }

    #[test]
    fn zeros_tiny_numbers_and_what_is_not_finite() {
        let run = |row: [f32; 4]| quantize(&row, &mut [9; 4]);
        assert_eq!(run([0.0; 4]), (0.0, 0));
        assert_eq!(run([1e-40, -1e-41, 0.0, 0.0]), (0.0, 0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(run([1.0, bad, 2.0, 0.0]).0.is_nan(), "{bad}");
        }
        let mut bytes = [0; 4];
        let scale = quantize_weight(&[1.0, -1.0, 0.5, 0.0], &mut bytes);
        assert_eq!(bytes, [255, 1, 192, 128]);
        assert_eq!(bytes.map(|byte| dequantized(byte, scale)), [1.0, -1.0, 64.0 / 127.0, 0.0]);
    }
}
