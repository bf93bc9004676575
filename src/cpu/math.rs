//! Elementary functions that the compiler can vectorise: branch-free, a few ulp.

/// `exp(x)` for `x <= 0`, as a softmax needs it; anything below -87 gives 0.
///
/// `2^n * p(r)` with `n = round(x log2 e)` and `|r| <= ln 2 / 2`; p is the Taylor polynomial of degree 7.
#[inline(always)]
pub fn exp_nonpositive(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // A comparison, not `max`: NaN must stay NaN.
    let clamped = if x < -87.3 { -87.3 } else { x };
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let scale = f32::from_bits((((n as i32) + 127) << 23) as u32);
    if x < -87.3 {
        0.0
    } else {
        p * scale
    }
}

/// The error function, absolute error below 1.5e-7.
///
/// Odd polynomial in [-1, 1]; outside, `1 - exp(-x^2) q(1 / (1 + |x| / 2))`. The coefficients are minimax fits.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    const NEAR: [f32; 7] = [
        std::f32::consts::FRAC_2_SQRT_PI,
        -0.376_126_38,
        0.112_837_896,
        -0.026_865_272,
        0.005_213_967,
        -0.000_825_615_6,
        0.000_087_041_895,
    ];
    const FAR: [f32; 7] = [
        0.282_600_4,
        0.274_368_76,
        0.296_646,
        0.002_029_604_5,
        0.433_980_46,
        -0.384_361_8,
        0.094_649_63,
    ];
    let magnitude = x.abs();
    let square = x * x;
    let near = NEAR.iter().rev().fold(0.0, |p, c| p * square + c) * x;
    let t = 1.0 / (1.0 + 0.5 * magnitude);
    let q = FAR.iter().rev().fold(0.0, |p, c| p * t + c) * t;
    let far = (1.0 - exp_nonpositive(-square) * q).copysign(x);
    if magnitude < 1.0 {
        near
    } else {
        far
    }
}

/// The exact GELU, `x/2 (1 + erf(x / sqrt 2))`.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Derivative of [`gelu`]: `(1 + erf(x / sqrt 2)) / 2 + x exp(-x^2 / 2) / sqrt(2 pi)`.
#[inline(always)]
pub fn gelu_derivative(x: f32) -> f32 {
    const INV_SQRT_2_PI: f32 = 0.398_942_3;
    let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    cdf + x * INV_SQRT_2_PI * exp_nonpositive(-0.5 * x * x)
}

/// The dot product, summed in eight lanes.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_two_ulp() {
        let mut worst = 0f64;
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_nonpositive(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive(0.0), 1.0);
    }

    #[test]
    fn erf_and_gelu_are_accurate() {
        let mut worst = [0f64; 3];
        for i in -60_000..60_000 {
            let x = i as f32 * 1e-4;
            let exact = candle_core::cpu::erf::erf_f64(f64::from(x));
            worst[0] = worst[0].max((f64::from(erf(x)) - exact).abs());
            let cdf = 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(f64::from(x) / 2f64.sqrt()));
            // GELU grows as x does, and its rounding with it.
            let error = (f64::from(gelu(x)) - f64::from(x) * cdf).abs();
            worst[1] = worst[1].max(error / f64::from(x).abs().max(1.0));
            let pdf = (-0.5 * f64::from(x).powi(2)).exp() / (2.0 * std::f64::consts::PI).sqrt();
            let derivative = cdf + f64::from(x) * pdf;
            worst[2] = worst[2].max((f64::from(gelu_derivative(x)) - derivative).abs());
        }
        assert!(worst.iter().all(|&e| e < 2e-7), "errors {worst:?}");
    }
}
