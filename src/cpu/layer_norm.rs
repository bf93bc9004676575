//! LayerNorm over rows of `size` values, and its gradient.
//!
//! ```text
//! xhat = (x - mean) rstd,   y = xhat w + b
//! dx = rstd (g w - mean(g w) - xhat mean(g w xhat)),   dw = sum_rows g xhat,   db = sum_rows g
//! ```
//! A row's statistics are summed in f64, the variance around the mean, so a large common offset does not cancel; the
//! backward recomputes them. In a block that is in cache they are summed in f32 and corrected. Rows run in parallel, in
//! blocks of fixed size.

use super::buffer::Elements;
use super::element::Element;
use super::math::{add, dot};
use super::simd::{run, vectors, vectors_mut, MAX_LANES};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Rows that one task handles; the sums over rows are taken block by block, in order.
const ROWS: usize = 64;

/// `x` becomes `y`, row by row; for blocks that are in cache.
pub fn in_place(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f64) {
    run(InPlace { x, weight, bias, eps });
}

struct InPlace<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f64,
}

impl WithSimd for InPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, weight, bias, eps } = self;
        let size = weight.len();
        if size.is_multiple_of(MAX_LANES) {
            let (weight, bias) = (vectors::<S>(weight), vectors::<S>(bias));
            for row in vectors_mut::<S>(x).chunks_exact_mut(weight.len()) {
                normalize(simd, row, (weight, bias), eps as f32);
            }
            return;
        }
        for x in x.chunks_exact_mut(size) {
            let (mean, rstd) = statistics(x, eps);
            for (x, (w, b)) in x.iter_mut().zip(weight.iter().zip(bias)) {
                *x = ((*x - mean[0]) - mean[1]) * rstd * w + b;
            }
        }
    }
}

/// One row of whole vectors. The sums are in f32; the mean of what is left around the mean is its rounding error.
#[inline(always)]
fn normalize<S: Simd>(
    simd: S,
    row: &mut [S::f32s],
    (weight, bias): (&[S::f32s], &[S::f32s]),
    eps: f32,
) {
    let (left, rstd) = centred(simd, row, eps);
    for (x, (&weight, &bias)) in row.iter_mut().zip(weight.iter().zip(bias)) {
        let normed = simd.mul_f32s(simd.sub_f32s(*x, left), rstd);
        *x = simd.mul_add_f32s(normed, weight, bias);
    }
}

/// Takes the mean from a row; returns what is left of it, and the reciprocal standard deviation.
#[inline(always)]
fn centred<S: Simd>(simd: S, row: &mut [S::f32s], eps: f32) -> (S::f32s, S::f32s) {
    let inverse = 1.0 / (row.len() * S::F32_LANES) as f32;
    let mut sum = simd.splat_f32s(0.0);
    for x in row.iter() {
        sum = simd.add_f32s(sum, *x);
    }
    let mean = simd.splat_f32s(simd.reduce_sum_f32s(sum) * inverse);
    let (mut sum, mut squares) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
    for x in row.iter_mut() {
        *x = simd.sub_f32s(*x, mean);
        sum = simd.add_f32s(sum, *x);
        squares = simd.mul_add_f32s(*x, *x, squares);
    }
    let left = simd.reduce_sum_f32s(sum) * inverse;
    let variance = simd.reduce_sum_f32s(squares) * inverse - left * left;
    (simd.splat_f32s(left), simd.splat_f32s(1.0 / (variance + eps).sqrt()))
}

/// `grad` becomes the gradient of `x [rows, size]`, and x its normalised rows; for blocks that are in cache. Those of
/// the weight and the bias are added to `sums`.
pub fn gradient_in_place(
    x: &mut [f32],
    grad: &mut [f32],
    (weight, eps): (&[f32], f64),
    sums: (&mut [f32], &mut [f32]),
) {
    run(GradientInPlace { x, grad, weight, eps, sums });
}

struct GradientInPlace<'a> {
    x: &'a mut [f32],
    grad: &'a mut [f32],
    weight: &'a [f32],
    eps: f64,
    sums: (&'a mut [f32], &'a mut [f32]),
}

impl WithSimd for GradientInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, grad, weight, eps, sums: (dw, db) } = self;
        let size = weight.len();
        if !size.is_multiple_of(MAX_LANES) {
            let given = grad.to_vec();
            let sums = (dw, db);
            return Gradient { x, weight, grad: &given, eps, dx: grad, sums }.with_simd(simd);
        }
        let (weight, dw, db) = (vectors::<S>(weight), vectors_mut::<S>(dw), vectors_mut::<S>(db));
        let inverse = 1.0 / size as f32;
        let rows = vectors_mut::<S>(x).chunks_exact_mut(weight.len());
        for (x, grad) in rows.zip(vectors_mut::<S>(grad).chunks_exact_mut(weight.len())) {
            let (left, rstd) = centred(simd, x, eps as f32);
            let (mut sum, mut along) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
            let parameters = weight.iter().zip(dw.iter_mut().zip(db.iter_mut()));
            for ((x, grad), (&weight, (dw, db))) in
                x.iter_mut().zip(grad.iter_mut()).zip(parameters)
            {
                *x = simd.mul_f32s(simd.sub_f32s(*x, left), rstd);
                *dw = simd.mul_add_f32s(*grad, *x, *dw);
                *db = simd.add_f32s(*db, *grad);
                *grad = simd.mul_f32s(*grad, weight);
                sum = simd.add_f32s(sum, *grad);
                along = simd.mul_add_f32s(*grad, *x, along);
            }
            let mean = simd.splat_f32s(simd.reduce_sum_f32s(sum) * inverse);
            let along = simd.splat_f32s(simd.reduce_sum_f32s(along) * inverse);
            for (x, grad) in x.iter().zip(grad) {
                let rest = simd.negate_mul_add_f32s(*x, along, simd.sub_f32s(*grad, mean));
                *grad = simd.mul_f32s(rest, rstd);
            }
        }
    }
}

/// A row's mean, as the sum of two f32, and its reciprocal standard deviation.
#[inline(always)]
fn statistics(row: &[f32], eps: f64) -> ([f32; 2], f32) {
    let n = row.len() as f64;
    let mean = sum(row, |x| x) / n;
    let var = sum(row, |x| (x - mean) * (x - mean)) / n;
    let high = mean as f32;
    ([high, (mean - f64::from(high)) as f32], (1.0 / (var + eps).sqrt()) as f32)
}

/// The sum of `f` over a row, in eight lanes.
#[inline(always)]
fn sum(row: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0f64; 8];
    let chunks = row.chunks_exact(lanes.len());
    let tail: f64 = chunks.remainder().iter().map(|&x| f(f64::from(x))).sum();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(f64::from(x));
        }
    }
    lanes.iter().sum::<f64>() + tail
}

/// `y` for `x [rows, size]`.
pub fn forward<T: Element>(x: &[T], weight: &[f32], bias: &[f32], eps: f64) -> Elements<T> {
    let size = weight.len();
    let mut y = Elements::any(x.len());
    y.par_chunks_mut(ROWS * size).zip(x.par_chunks(ROWS * size)).for_each(|(y, x)| {
        let (mut wide_x, mut wide_y) = (Vec::new(), Vec::new());
        for (y, x) in y.chunks_mut(size).zip(x.chunks(size)) {
            let x = T::read(x, &mut wide_x);
            T::write(y, &mut wide_y, |y| run(Normalized { x, y, weight, bias, eps }));
        }
    });
    y
}

struct Normalized<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f64,
}

impl WithSimd for Normalized<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (mean, rstd) = statistics(self.x, self.eps);
        let parameters = self.weight.iter().zip(self.bias);
        for ((y, x), (w, b)) in self.y.iter_mut().zip(self.x).zip(parameters) {
            *y = ((x - mean[0]) - mean[1]) * rstd * w + b;
        }
    }
}

/// The gradients of x `[rows, size]`, weight `[size]` and bias `[size]`.
pub fn backward<T: Element>(
    x: &[T],
    weight: &[f32],
    grad: &[T],
    eps: f64,
) -> (Elements<T>, Vec<f32>, Vec<f32>) {
    let size = weight.len();
    let mut dx = Elements::any(x.len());
    let partial: Vec<(Vec<f32>, Vec<f32>)> = dx
        .par_chunks_mut(ROWS * size)
        .zip(x.par_chunks(ROWS * size).zip(grad.par_chunks(ROWS * size)))
        .map(|(dx, (x, grad))| {
            let (mut dw, mut db) = (vec![0f32; size], vec![0f32; size]);
            let mut wide = [Vec::new(), Vec::new(), Vec::new()];
            let [wide_dx, wide_x, wide_grad] = &mut wide;
            let (x, grad) = (T::read(x, wide_x), T::read(grad, wide_grad));
            let sums = (&mut dw[..], &mut db[..]);
            T::write(dx, wide_dx, |dx| run(Gradient { x, weight, grad, eps, dx, sums }));
            (dw, db)
        })
        .collect();
    let (mut dw, mut db) = (vec![0f32; size], vec![0f32; size]);
    for (part_w, part_b) in &partial {
        add(&mut dw, part_w);
        add(&mut db, part_b);
    }
    (dx, dw, db)
}

struct Gradient<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    grad: &'a [f32],
    eps: f64,
    dx: &'a mut [f32],
    /// dw and db.
    sums: (&'a mut [f32], &'a mut [f32]),
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, weight, grad, eps, dx, sums: (dw, db) } = self;
        let size = weight.len();
        let (mut xhat, mut gw) = (vec![0f32; size], vec![0f32; size]);
        let rows = x.chunks_exact(size).zip(grad.chunks_exact(size));
        for (dx, (x, grad)) in dx.chunks_exact_mut(size).zip(rows) {
            let (mean, rstd) = statistics(x, eps);
            for i in 0..size {
                xhat[i] = ((x[i] - mean[0]) - mean[1]) * rstd;
                gw[i] = grad[i] * weight[i];
                dw[i] += grad[i] * xhat[i];
                db[i] += grad[i];
            }
            let mean_gw = gw.iter().sum::<f32>() / size as f32;
            let mean_gwx = dot(&gw, &xhat) / size as f32;
            for i in 0..size {
                dx[i] = rstd * (gw[i] - mean_gw - xhat[i] * mean_gwx);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_cache_agree_with_sums_in_f64() {
        for (size, offset) in [(64, 0.0), (256, 3.0), (256, 1000.0), (24, 1000.0)] {
            let value = |i: usize| ((i * 37 % 101) as f32 - 50.3) / 7.7;
            let x: Vec<f32> = (0..5 * size).map(|i| value(i) + offset).collect();
            let (weight, bias): (Vec<f32>, Vec<f32>) =
                ((0..size).map(|i| value(i + 5)).collect(), (0..size).map(value).collect());
            let mut in_cache = x.clone();
            in_place(&mut in_cache, &weight, &bias, 1e-6);
            let expected = forward(&x, &weight, &bias, 1e-6);
            for (x, y) in in_cache.iter().zip(expected.iter()) {
                assert!((x - y).abs() < 1e-5, "{size} {offset}: {x} {y}");
            }
        }
    }
}
