//! Elements that the CPU path stores: f32, or bf16 that is read and written once and computed with in f32.

use super::bf16::pairs;
use super::buffer::Pooled;
use super::simd::run;
use half::bf16;
use pulp::{Simd, WithSimd};
use std::borrow::Cow;

/// An element of a tensor on the CPU.
pub trait Element: Pooled {
    /// Whether products may round their operands to bf16.
    const IS_BF16: bool;

    /// In f32.
    fn widened(self) -> f32;

    /// The nearest to a number.
    fn nearest(number: f32) -> Self;

    /// The values in f32: themselves, or converted into `scratch`.
    fn read<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];

    /// Lets `fill` write all values in f32: in place, or in `scratch` and rounded from there.
    fn write(values: &mut [Self], scratch: &mut Vec<f32>, fill: impl FnOnce(&mut [f32]));

    /// As [`write`](Self::write), for a `change` of the values that are there.
    fn update(values: &mut [Self], scratch: &mut Vec<f32>, change: impl FnOnce(&mut [f32]));

    /// Neighbours rounded to bf16, in pairs, see [`super::bf16`]; the values' count is even.
    fn pairs(values: &[Self]) -> Cow<'_, [f32]>;

    /// The values, rounded.
    fn rounded(values: &[f32]) -> Vec<Self> {
        let mut rounded = vec![Self::default(); values.len()];
        Self::write(&mut rounded, &mut Vec::new(), |out| out.copy_from_slice(values));
        rounded
    }
}

impl Element for f32 {
    const IS_BF16: bool = false;

    #[inline(always)]
    fn widened(self) -> f32 {
        self
    }

    #[inline(always)]
    fn nearest(number: f32) -> f32 {
        number
    }

    fn read<'a>(values: &'a [f32], _: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }

    fn write(values: &mut [f32], _: &mut Vec<f32>, fill: impl FnOnce(&mut [f32])) {
        fill(values);
    }

    fn update(values: &mut [f32], _: &mut Vec<f32>, change: impl FnOnce(&mut [f32])) {
        change(values);
    }

    fn pairs(values: &[f32]) -> Cow<'_, [f32]> {
        Cow::Owned(pairs(values))
    }
}

impl Element for bf16 {
    const IS_BF16: bool = true;

    #[inline(always)]
    fn widened(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn nearest(number: f32) -> bf16 {
        bf16::from_bits(rounded_bits(number.to_bits()))
    }

    fn read<'a>(values: &'a [bf16], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(values.len(), 0.0);
        widen(values, scratch);
        scratch
    }

    fn write(values: &mut [bf16], scratch: &mut Vec<f32>, fill: impl FnOnce(&mut [f32])) {
        scratch.resize(values.len(), 0.0);
        fill(scratch);
        round(scratch, values);
    }

    fn update(values: &mut [bf16], scratch: &mut Vec<f32>, change: impl FnOnce(&mut [f32])) {
        Self::read(values, scratch);
        change(scratch);
        round(scratch, values);
    }

    fn pairs(values: &[bf16]) -> Cow<'_, [f32]> {
        match bytemuck::try_cast_slice(values) {
            Ok(pairs) => Cow::Borrowed(pairs),
            // Tensors may begin anywhere.
            Err(_) => {
                let mut pairs = vec![0f32; values.len() / 2];
                bytemuck::cast_slice_mut(&mut pairs).copy_from_slice(values);
                Cow::Owned(pairs)
            }
        }
    }
}

/// f32 from bf16.
pub fn widen(from: &[bf16], to: &mut [f32]) {
    run(Widen { from, to });
}

/// The nearest bf16 of each number.
pub fn round(from: &[f32], to: &mut [bf16]) {
    run(Round { from, to });
}

// Plain loops, which the compiler turns into vectors of the instruction set that `run` chose.

struct Widen<'a> {
    from: &'a [bf16],
    to: &'a mut [f32],
}

impl WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (to, &from) in self.to.iter_mut().zip(self.from) {
            *to = from.widened();
        }
    }
}

struct Round<'a> {
    from: &'a [f32],
    to: &'a mut [bf16],
}

impl WithSimd for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to = bf16::nearest(*from);
        }
    }
}

/// The bits of a bf16 nearest to an f32, ties to even.
#[inline(always)]
fn rounded_bits(bits: u32) -> u16 {
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // A NaN stays one: its low bits may be all that it has.
    let chosen = if nan { bits | 0x40_0000 } else { nearest };
    (chosen >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_agrees_with_half() {
        let special = [f32::NAN, f32::INFINITY, -0.0, f32::MAX, f32::MIN_POSITIVE, 1e-40];
        let bits = (0..1 << 16).map(|i: u32| f32::from_bits(i.wrapping_mul(0x0003_5a7b)));
        let values: Vec<f32> = special.into_iter().chain(bits).collect();
        for (value, rounded) in values.iter().zip(<bf16 as Element>::rounded(&values)) {
            let expected = bf16::from_f32(*value);
            assert!(rounded.to_bits() == expected.to_bits(), "{value}: {rounded} {expected}");
            let mut scratch = Vec::new();
            let rounded = [rounded];
            let wide = bf16::read(&rounded, &mut scratch)[0];
            assert_eq!(wide.to_bits(), expected.to_f32().to_bits());
        }
    }

    #[test]
    fn pairs_begin_anywhere() {
        let values: Vec<bf16> = (0..9).map(|i| bf16::from_f32(i as f32)).collect();
        for first in 0..2 {
            let pairs = bf16::pairs(&values[first..][..8]);
            assert_eq!(bytemuck::cast_slice::<f32, bf16>(&pairs), &values[first..][..8]);
        }
    }
}
