//! Vector arithmetic shared by the kernels: which instruction set this machine has, and an exponential.
//!
//! Kernels are written once over [`pulp::Simd`] and compiled for AVX-512, AVX2 + FMA, NEON and plain scalars; the
//! best is chosen at run time. Everything below a [`run`] must be `#[inline(always)]` to be compiled for it.

use pulp::{Arch, Simd, WithSimd};
use std::sync::atomic::{AtomicU8, Ordering};

/// The widest vector of any instruction set, in f32 lanes: buffers are padded to multiples of it.
pub const MAX_LANES: usize = 16;

/// Instructions that the CPU path may use, the most first.
///
/// [Example](crate::testing::allow_instructions)
#[cfg_attr(not(feature = "testing"), allow(dead_code))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    /// All that this machine has.
    All,
    /// AVX2 and FMA: no AVX-512, neither its products of bf16 nor those of int8.
    Avx2,
    /// No vectors.
    Scalar,
}

/// The number of the [`Instructions`] that are allowed.
static ALLOWED: AtomicU8 = AtomicU8::new(0);

/// Makes the CPU path run as on a machine that has fewer instructions, for all threads of the process.
///
/// Tests and benchmarks run other machines' code by this. Call it before the first operation. Candle's own operations
/// keep all instructions.
///
/// ```
/// use candle_sam_lora::testing::{allow_instructions, Instructions};
///
/// allow_instructions(Instructions::Avx2);
/// ```
#[cfg(feature = "testing")]
pub fn allow_instructions(allowed: Instructions) {
    ALLOWED.store(allowed as u8, Ordering::Relaxed);
}

/// Whether the CPU path may use these instructions, if the machine has them.
pub fn allowed(instructions: Instructions) -> bool {
    ALLOWED.load(Ordering::Relaxed) <= instructions as u8
}

/// Runs a kernel with the best instruction set of this machine that is allowed.
pub fn run<K: WithSimd>(kernel: K) -> K::Output {
    best().dispatch(kernel)
}

fn best() -> Arch {
    if allowed(Instructions::All) {
        return Arch::new();
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = pulp::x86::V3::try_new().filter(|_| allowed(Instructions::Avx2)) {
        return Arch::V3(avx2);
    }
    Arch::Scalar
}

/// `n` rounded up to whole vectors of any instruction set.
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(MAX_LANES)
}

/// The whole vectors of a slice whose length is a multiple of [`MAX_LANES`].
#[inline(always)]
pub fn vectors<S: Simd>(slice: &[f32]) -> &[S::f32s] {
    S::as_simd_f32s(slice).0
}

/// As [`vectors`].
#[inline(always)]
pub fn vectors_mut<S: Simd>(slice: &mut [f32]) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(slice).0
}

/// `2^x` for `x <= 0`, relative error below 2e-7; zero below -126.5.
///
/// `2^n p(r)` with `n = round(x)`, `r = x - n` without rounding, `|r| <= 1/2`, and a minimax polynomial of degree 5.
#[inline(always)]
pub fn exp2_nonpositive<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 * 2^23 rounds to the nearest integer. Adding the exponent's bias, too, leaves the exponent's bits of
    // 2^n in the low bits of the pattern.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    const COEFFICIENTS: [f32; 5] =
        [0.009_669_691, 0.055_505_585, 0.240_222_83, std::f32::consts::LN_2, 1.0];
    // At -127 the exponent's bits are zero, and so is the result.
    let lowest = simd.splat_f32s(-127.0);
    // A comparison, not a maximum: NaN must stay NaN.
    let x = simd.select_f32s(simd.less_than_f32s(x, lowest), lowest, x);
    let shifted = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let r = simd.sub_f32s(x, simd.sub_f32s(shifted, simd.splat_f32s(ROUND)));
    let mut p = simd.splat_f32s(0.001_330_060_5);
    for c in COEFFICIENTS {
        p = simd.mul_add_f32s(p, r, simd.splat_f32s(c));
    }
    let bits = simd.transmute_u32s_f32s(shifted);
    let scale = simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23));
    simd.mul_f32s(p, simd.transmute_f32s_u32s(scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);

    impl WithSimd for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for x in vectors_mut::<S>(self.0) {
                *x = exp2_nonpositive(simd, *x);
            }
        }
    }

    #[test]
    fn exp2_is_accurate_on_every_instruction_set() {
        let inputs: Vec<f32> = (0..126_000).map(|i| -(i as f32) * 1e-3).collect();
        let mut best = inputs.clone();
        run(Exp(&mut best));
        let mut scalar = inputs.clone();
        Exp(&mut scalar).with_simd(pulp::Scalar);
        for results in [&best, &scalar] {
            for (x, y) in inputs.iter().zip(results) {
                let exact = f64::from(*x).exp2();
                assert!((f64::from(*y) / exact - 1.0).abs() < 2e-7, "2^{x} = {y}");
            }
        }
    }

    #[test]
    fn exp2_of_infinity_and_nan() {
        let mut values = [f32::NEG_INFINITY; MAX_LANES];
        (values[3], values[4], values[5]) = (f32::NAN, -127.0, -1e30);
        run(Exp(&mut values));
        assert!(values[3].is_nan(), "{values:?}");
        assert!([0, 4, 5].iter().all(|&i| values[i].to_bits() == 0), "{values:?}");
    }
}
