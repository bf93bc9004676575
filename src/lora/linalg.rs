//! Factorisations of weights, in f64 by nalgebra.
//!
//! ```text
//! svd         M = U diag(s) V^T        U [m, k], s [k] descending, V^T [k, n]      k = min(m, n)
//! range_svd   the first r of them, from Q^T M with Q a basis of (M M^T)^iterations M R, R random [n, r]
//! qr          M = Q R                  Q [m, k] orthonormal, R [k, n] upper triangular
//! ```
//!
//! Source of the second: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 5.1, as `torch.svd_lowrank`.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;

/// Sweeps after which an SVD is given up; convergence takes a few for each singular value.
const MAX_SWEEPS: usize = 1 << 20;

/// `M = U diag(s) V^T`, singular values descending.
pub(super) struct Svd {
    pub(super) u: DMatrix<f64>,
    pub(super) s: Vec<f64>,
    pub(super) vt: DMatrix<f64>,
}

/// A tensor `[m, ..]` as the matrix `[m, rest]`.
///
/// # Errors
/// On a value that is not finite, which no factorisation survives.
pub(super) fn matrix(name: &str, tensor: &Tensor) -> Result<DMatrix<f64>> {
    let rows = tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_from(1)?;
    let (m, n) = rows.dims2()?;
    let values: Vec<f64> = rows.flatten_all()?.to_vec1()?;
    if !values.iter().all(|value| value.is_finite()) {
        return Err(Error::config(format!("{name} has values that are not finite")));
    }
    Ok(DMatrix::from_row_slice(m, n, &values))
}

/// Back to a tensor, in f32.
pub(super) fn tensor(matrix: &DMatrix<f64>, device: &Device) -> Result<Tensor> {
    // nalgebra is column-major.
    let values: Vec<f32> = matrix.transpose().iter().map(|value| *value as f32).collect();
    Ok(Tensor::from_vec(values, matrix.shape(), device)?)
}

pub(super) fn svd(name: &str, matrix: DMatrix<f64>) -> Result<Svd> {
    let failed = || Error::config(format!("{name}: the singular value decomposition failed"));
    let epsilon = 5.0 * f64::EPSILON;
    let svd = matrix.try_svd(true, true, epsilon, MAX_SWEEPS).ok_or_else(failed)?;
    let (u, vt) = svd.u.zip(svd.v_t).ok_or_else(failed)?;
    Ok(Svd { u, s: svd.singular_values.iter().copied().collect(), vt })
}

/// The first singular triplets, as many as `random [n, r]` has columns.
pub(super) fn range_svd(
    name: &str,
    matrix: &DMatrix<f64>,
    random: &DMatrix<f64>,
    iterations: usize,
) -> Result<Svd> {
    let mut q = (matrix * random).qr().q();
    for _ in 0..iterations {
        let back = matrix.tr_mul(&q).qr().q();
        q = (matrix * back).qr().q();
    }
    let small = svd(name, q.tr_mul(matrix))?;
    Ok(Svd { u: q * small.u, ..small })
}

pub(super) fn qr(matrix: DMatrix<f64>) -> (DMatrix<f64>, DMatrix<f64>) {
    let qr = matrix.qr();
    (qr.q(), qr.r())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(m: usize, n: usize) -> DMatrix<f64> {
        DMatrix::from_fn(m, n, |i, j| ((3 * i + 7 * j) as f64 + 0.3).sin() * (1.0 + j as f64))
    }

    /// Sums of at most seven products in f64.
    const TOLERANCE: f64 = 1e-13;

    #[test]
    fn factors_multiply_to_the_matrix() -> Result<()> {
        for (m, n) in [(7, 4), (4, 7), (5, 5)] {
            let whole = example(m, n);
            let Svd { u, s, vt } = svd("m", whole.clone())?;
            assert!(s.windows(2).all(|pair| pair[0] >= pair[1]));
            let product = &u * DMatrix::from_diagonal(&s.clone().into()) * &vt;
            assert!((product - &whole).norm() < TOLERANCE * whole.norm());
            let (q, r) = qr(whole.clone());
            assert!((&q * r - &whole).norm() < TOLERANCE * whole.norm());
            assert!(
                (q.tr_mul(&q) - DMatrix::identity(4, 4).resize(q.ncols(), q.ncols(), 0.0))
                    .view((0, 0), (4, 4))
                    .norm()
                    < TOLERANCE * 4.0
            );
        }
        Ok(())
    }

    #[test]
    fn iterating_finds_the_first_singular_values() -> Result<()> {
        // Singular values 4, 3, 2, 1, ..: after 16 iterations (2/3)^33 of the rest is left.
        let (u, v) = (example(8, 8).qr().q(), example(6, 6).qr().q());
        let s = [4.0, 3.0, 1.0, 0.5, 0.2, 0.1];
        let whole = u.columns(0, 6) * DMatrix::from_diagonal(&s.to_vec().into()) * v;
        let found = range_svd("m", &whole, &example(6, 2), 16)?;
        assert!((found.s[0] - 4.0).abs() < 1e-10 && (found.s[1] - 3.0).abs() < 1e-10);
        Ok(())
    }

    #[test]
    fn what_is_not_finite_is_refused() -> Result<()> {
        let tensor = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu)?;
        let error = matrix("q.weight", &tensor).map(|_| ()).expect_err("accepted").to_string();
        assert!(error.contains("q.weight"), "{error}");
        Ok(())
    }
}
