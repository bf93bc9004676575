//! Activations and their derivatives over slices.

use super::buffer::Elements;
use super::element::Element;
use super::simd::{exp2_nonpositive, run, vectors_mut, MAX_LANES};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// An activation's values, or its derivatives, in place.
pub type Activation = fn(values: &mut [f32], derivative: bool);

/// `max(x, 0)` of every value, or its derivative, in place.
pub fn relu(values: &mut [f32], derivative: bool) {
    match derivative {
        true => values.iter_mut().for_each(|x| *x = f32::from(*x > 0.0)),
        // A comparison, not a maximum: NaN must stay NaN.
        false => values.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x }),
    }
}

/// Values that one task handles.
const CHUNK: usize = 1 << 14;

/// The activation of `x`.
pub fn applied<T: Element>(activation: Activation, x: &[T]) -> Elements<T> {
    let mut y = Elements::any(x.len());
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        y.copy_from_slice(x);
        T::update(y, &mut Vec::new(), |y| activation(y, false));
    });
    y
}

/// The gradient of the sum from that of the activation.
pub fn gradient<T: Element>(activation: Activation, sum: &[T], grad: &[T]) -> Vec<f32> {
    let mut wide = Vec::new();
    let mut derivative = T::read(sum, &mut wide).to_vec();
    times_derivative(activation, &mut derivative, T::read(grad, &mut wide));
    derivative
}

/// As [`gradient`], by all threads.
pub fn gradient_in_parallel<T: Element>(
    activation: Activation,
    sum: &[T],
    grad: &[T],
) -> Elements<T> {
    let mut dx = Elements::any(sum.len());
    let chunks = sum.par_chunks(CHUNK).zip(grad.par_chunks(CHUNK));
    dx.par_chunks_mut(CHUNK).zip(chunks).for_each(|(dx, (sum, grad))| {
        dx.copy_from_slice(sum);
        let mut wide = Vec::new();
        let grad = T::read(grad, &mut wide);
        T::update(dx, &mut Vec::new(), |dx| times_derivative(activation, dx, grad));
    });
    dx
}

fn times_derivative(activation: Activation, sum: &mut [f32], grad: &[f32]) {
    activation(sum, true);
    sum.iter_mut().zip(grad).for_each(|(d, g)| *d *= g);
}

/// GELU of every value, or its derivative `cdf(x) + x pdf(x)`, in place.
pub fn gelu(values: &mut [f32], derivative: bool) {
    in_vectors(values, |values| run(Gelu { values, derivative }));
}

/// GELU of every value, in place, and its derivatives; whole vectors of both.
pub fn gelu_with_derivatives(values: &mut [f32], derivatives: &mut [f32]) {
    run(GeluWithDerivatives { values, derivatives });
}

struct GeluWithDerivatives<'a> {
    values: &'a mut [f32],
    derivatives: &'a mut [f32],
}

impl WithSimd for GeluWithDerivatives<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let derivatives = vectors_mut::<S>(self.derivatives);
        for (x, derivative) in vectors_mut::<S>(self.values).iter_mut().zip(derivatives) {
            let (cdf, pdf) = normal_distribution(simd, *x);
            *derivative = simd.mul_add_f32s(*x, pdf, cdf);
            *x = simd.mul_f32s(*x, cdf);
        }
    }
}

/// GELU of every value at half the cost of [`gelu`] and slightly less accurate, without a derivative.
pub fn gelu_of_inference(values: &mut [f32]) {
    in_vectors(values, |values| run(RationalGelu(values)));
}

/// [`gelu`], with the values of [`gelu_of_inference`].
pub fn gelu_by_rational(values: &mut [f32], derivative: bool) {
    match derivative {
        true => gelu(values, true),
        false => gelu_of_inference(values),
    }
}

/// GELU of every value where the results are as coarse as bf16: the error is below 1e-4 of the larger of 1 and |x|.
pub fn gelu_of_bf16(values: &mut [f32]) {
    in_vectors(values, |values| run(CoarseGelu(values)));
}

/// Calls `f` with all whole vectors, and with the rest in a vector.
fn in_vectors(values: &mut [f32], f: impl Fn(&mut [f32])) {
    let whole = values.len() / MAX_LANES * MAX_LANES;
    let (head, tail) = values.split_at_mut(whole);
    f(head);
    if tail.is_empty() {
        return;
    }
    let mut last = [0f32; MAX_LANES];
    last[..tail.len()].copy_from_slice(tail);
    f(&mut last);
    tail.copy_from_slice(&last[..tail.len()]);
}

struct RationalGelu<'a>(&'a mut [f32]);

impl WithSimd for RationalGelu<'_> {
    type Output = ();

    /// The error function is `t p(t^2) / q(t^2)`, absolute error below 4e-7, and 1 beyond 4.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        const P: [f32; 7] = [
            -1.609_603_3e-2,
            -2.954_6e-3,
            -7.349_906e-4,
            -5.692_506_4e-5,
            -2.101_024e-6,
            2.770_681_4e-8,
            -2.726_142_3e-10,
        ];
        const Q: [f32; 5] =
            [-1.426_473_9e-2, -7.373_329e-3, -1.682_827e-3, -2.133_740_6e-4, -1.456_607_2e-5];
        let (half, limit) = (simd.splat_f32s(0.5), simd.splat_f32s(4.0));
        for x in vectors_mut::<S>(self.0) {
            let t = simd.mul_f32s(*x, simd.splat_f32s(std::f32::consts::FRAC_1_SQRT_2));
            let t = simd.max_f32s(simd.min_f32s(t, limit), simd.neg_f32s(limit));
            let square = simd.mul_f32s(t, t);
            let (mut p, mut q) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
            for c in P.into_iter().rev() {
                p = simd.mul_add_f32s(p, square, simd.splat_f32s(c));
            }
            for c in Q.into_iter().rev() {
                q = simd.mul_add_f32s(q, square, simd.splat_f32s(c));
            }
            let erf = simd.div_f32s(simd.mul_f32s(t, p), q);
            // NaN, which the limits may have lost, is in x.
            *x = simd.mul_f32s(*x, simd.mul_add_f32s(half, erf, half));
        }
    }
}

struct CoarseGelu<'a>(&'a mut [f32]);

impl WithSimd for CoarseGelu<'_> {
    type Output = ();

    /// The normal distribution is `1/2 + x p(x^2)`, a minimax fit, and constant beyond 3.9.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        const P: [f32; 7] = [
            0.398_608_4,
            -0.065_564_595,
            0.009_218_76,
            -0.000_905_634_84,
            5.740_21e-5,
            -2.075_311_3e-6,
            3.214_912_8e-8,
        ];
        let (half, limit) = (simd.splat_f32s(0.5), simd.splat_f32s(3.9));
        for x in vectors_mut::<S>(self.0) {
            let t = simd.max_f32s(simd.min_f32s(*x, limit), simd.neg_f32s(limit));
            let square = simd.mul_f32s(t, t);
            let mut p = simd.splat_f32s(0.0);
            for c in P.into_iter().rev() {
                p = simd.mul_add_f32s(p, square, simd.splat_f32s(c));
            }
            // NaN, which the limits may have lost, is in x.
            *x = simd.mul_f32s(*x, simd.mul_add_f32s(t, p, half));
        }
    }
}

struct Gelu<'a> {
    values: &'a mut [f32],
    derivative: bool,
}

impl WithSimd for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for x in vectors_mut::<S>(self.values) {
            let (cdf, pdf) = normal_distribution(simd, *x);
            *x = match self.derivative {
                true => simd.mul_add_f32s(*x, pdf, cdf),
                false => simd.mul_f32s(*x, cdf),
            };
        }
    }
}

/// The standard normal distribution up to x, and its density `exp(-x^2 / 2) / sqrt(2 pi)`.
#[inline(always)]
fn normal_distribution<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let half = simd.splat_f32s(0.5);
    let (erf, gauss) =
        erf(simd, simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::FRAC_1_SQRT_2)));
    (simd.mul_add_f32s(half, erf, half), simd.mul_f32s(gauss, simd.splat_f32s(0.398_942_3)))
}

/// The error function, absolute error below 1.5e-7, and `exp(-x^2)`, which it takes anyway.
///
/// Odd polynomial in [-1, 1]; outside, `1 - exp(-x^2) q(1 / (1 + |x| / 2))`. The coefficients are minimax fits.
#[inline(always)]
fn erf<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
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
    let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
    let magnitude = simd.abs_f32s(x);
    let square = simd.mul_f32s(x, x);
    let log2_e = simd.splat_f32s(std::f32::consts::LOG2_E);
    let gauss = exp2_nonpositive(simd, simd.neg_f32s(simd.mul_f32s(square, log2_e)));
    let mut near = zero;
    for c in NEAR.into_iter().rev() {
        near = simd.mul_add_f32s(near, square, simd.splat_f32s(c));
    }
    let t = simd.div_f32s(one, simd.mul_add_f32s(simd.splat_f32s(0.5), magnitude, one));
    let mut far = zero;
    for c in FAR.into_iter().rev() {
        far = simd.mul_add_f32s(far, t, simd.splat_f32s(c));
    }
    let far = simd.negate_mul_add_f32s(gauss, simd.mul_f32s(far, t), one);
    let far = simd.select_f32s(simd.less_than_f32s(x, zero), simd.neg_f32s(far), far);
    let near = simd.mul_f32s(near, x);
    (simd.select_f32s(simd.less_than_f32s(magnitude, one), near, far), gauss)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::cpu::erf::erf_f64;

    #[test]
    fn gelu_and_its_derivative_are_accurate() {
        let inputs: Vec<f32> = (-60_003..60_000).map(|i| i as f32 * 1e-4).collect();
        let mut values = inputs.clone();
        gelu(&mut values, false);
        let derivative = gradient(gelu, &inputs, &vec![1.0; inputs.len()]);
        let (mut rational, mut coarse) = (inputs.clone(), inputs.clone());
        gelu_of_inference(&mut rational);
        gelu_of_bf16(&mut coarse);
        for (&x, &y) in inputs.iter().zip(&coarse) {
            let exact = 0.5 * f64::from(x) * (1.0 + erf_f64(f64::from(x) / 2f64.sqrt()));
            let error = (f64::from(y) - exact).abs() / f64::from(x).abs().max(1.0);
            assert!(error < 1e-4, "coarse gelu({x}) = {y}: {error:e}");
        }
        for (&x, &y) in inputs.iter().zip(&rational) {
            let exact = 0.5 * f64::from(x) * (1.0 + erf_f64(f64::from(x) / 2f64.sqrt()));
            let error = (f64::from(y) - exact).abs() / f64::from(x).abs().max(1.0);
            assert!(error < 3e-7, "rational gelu({x}) = {y}: {error:e}");
        }
        let whole = inputs.len() / MAX_LANES * MAX_LANES;
        let (mut both, mut derivatives) = (inputs[..whole].to_vec(), vec![0f32; whole]);
        gelu_with_derivatives(&mut both, &mut derivatives);
        assert!(both == values[..whole] && derivatives == derivative[..whole]);
        for ((&x, &y), &dy) in inputs.iter().zip(&values).zip(&derivative) {
            let x = f64::from(x);
            let cdf = 0.5 * (1.0 + erf_f64(x / 2f64.sqrt()));
            let pdf = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            // GELU grows as x does, and its rounding with it.
            let error = (f64::from(y) - x * cdf).abs() / x.abs().max(1.0);
            assert!(error < 2e-7, "gelu({x}) = {y}: {error:e}");
            let error = (f64::from(dy) - cdf - x * pdf).abs();
            assert!(error < 3e-7, "gelu'({x}) = {dy}: {error:e}");
        }
    }

    #[test]
    fn nan_stays_nan() {
        for (name, activation) in [("gelu", gelu as Activation), ("relu", relu)] {
            let mut values = vec![f32::NAN; 19];
            activation(&mut values, false);
            assert!(values.iter().all(|x| x.is_nan()), "{name}");
        }
        for gelu in [gelu_of_inference, gelu_of_bf16] {
            let mut values = vec![f32::NAN; 19];
            gelu(&mut values);
            assert!(values.iter().all(|x| x.is_nan()));
        }
    }
}
