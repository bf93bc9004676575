//! Factorisations of weights, in f64 by nalgebra.
//!
//! ```text
//! svd         the first r triplets of M = U diag(s) V^T        U [m, r], s [r] descending, V^T [r, n]
//!             m <= n: M M^T = U diag(s^2) U^T, V^T = diag(1/s) U^T M;   else from M^T M in the same way
//! range_svd   the same within Q^T M, Q a basis of (M M^T)^iterations M R, R random [n, r]
//! qr          M = Q R                  Q [m, k] orthonormal, R [k, n] upper triangular, k = min(m, n)
//! ```
//! U diag(s) V^T is M projected on the first directions whatever the rounding of s; a direction that M lacks is zero.
//!
//! Source of the second: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 5.1, as `torch.svd_lowrank`.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;

/// The first singular triplets, singular values descending.
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

/// The first `rank` triplets, or all where there are fewer.
pub(super) fn svd(matrix: &DMatrix<f64>, rank: usize) -> Svd {
    if matrix.nrows() > matrix.ncols() {
        let Svd { u, s, vt } = svd(&matrix.transpose(), rank);
        return Svd { u: vt.transpose(), s, vt: u.transpose() };
    }
    let eigen = (matrix * matrix.transpose()).symmetric_eigen();
    let mut order: Vec<usize> = (0..matrix.nrows()).collect();
    order.sort_by(|i, j| eigen.eigenvalues[*j].total_cmp(&eigen.eigenvalues[*i]));
    order.truncate(rank);
    let s: Vec<f64> = order.iter().map(|i| eigen.eigenvalues[*i].max(0.0).sqrt()).collect();
    let u = eigen.eigenvectors.select_columns(&order);
    let mut vt = u.tr_mul(matrix);
    for (mut row, s) in vt.row_iter_mut().zip(&s) {
        row *= if *s > 0.0 { 1.0 / s } else { 0.0 };
    }
    Svd { u, s, vt }
}

/// As many triplets as `random [n, r]` has columns, by iteration.
pub(super) fn range_svd(matrix: &DMatrix<f64>, random: &DMatrix<f64>, iterations: usize) -> Svd {
    let mut q = (matrix * random).qr().q();
    for _ in 0..iterations {
        let back = matrix.tr_mul(&q).qr().q();
        q = (matrix * back).qr().q();
    }
    let small = svd(&q.tr_mul(matrix), random.ncols());
    Svd { u: q * small.u, ..small }
}

pub(super) fn qr(matrix: DMatrix<f64>) -> (DMatrix<f64>, DMatrix<f64>) {
    let qr = matrix.qr();
    (qr.q(), qr.r())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Full rank, singular values some percent apart.
    fn example(m: usize, n: usize) -> DMatrix<f64> {
        DMatrix::from_fn(m, n, |i, j| ((3 * i * j + 7 * j + i * i) as f64 + 0.3).sin())
    }

    /// Sums of at most eight products in f64, squared once.
    const TOLERANCE: f64 = 1e-13;

    #[test]
    fn factors_multiply_to_the_matrix() {
        for (m, n) in [(7, 4), (4, 7), (5, 5)] {
            let whole = example(m, n);
            let Svd { u, s, vt } = svd(&whole, m.min(n));
            assert!(s.windows(2).all(|pair| pair[0] >= pair[1]));
            let product = &u * DMatrix::from_diagonal(&s.into()) * &vt;
            assert!((product - &whole).norm() < TOLERANCE * whole.norm());
            let (q, r) = qr(whole.clone());
            assert!((&q * r - &whole).norm() < TOLERANCE * whole.norm());
            for orthonormal in [&u, &vt.transpose(), &q] {
                let k = orthonormal.ncols();
                let error = orthonormal.tr_mul(orthonormal) - DMatrix::identity(k, k);
                assert!(error.norm() < 10.0 * TOLERANCE, "{error}");
            }
        }
    }

    #[test]
    fn what_is_left_out_is_as_small_as_it_can_be() {
        let (u, v) = (qr(example(8, 8)).0, qr(example(6, 6)).0);
        let s = vec![4.0, 3.0, 1.0, 0.5, 0.0, 0.0];
        let whole = u.columns(0, 6) * DMatrix::from_diagonal(&s.into()) * v.transpose();
        for found in [svd(&whole, 2), range_svd(&whole, &example(6, 2), 16)] {
            assert!((found.s[0] - 4.0).abs() < 1e-12 && (found.s[1] - 3.0).abs() < 1e-12);
            let product = found.u * DMatrix::from_diagonal(&found.s.into()) * found.vt;
            assert!(((whole.clone() - product).norm() - 1.25f64.sqrt()).abs() < 1e-12);
        }
        // Directions that the matrix lacks are no NaN.
        let Svd { u, s, vt } = svd(&whole, 6);
        let product = u * DMatrix::from_diagonal(&s.into()) * vt;
        assert!((product - &whole).norm() < 1e-7, "rounding of a square");
    }

    #[test]
    fn what_is_not_finite_is_refused() -> Result<()> {
        let tensor = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu)?;
        let error = matrix("q.weight", &tensor).map(|_| ()).expect_err("accepted").to_string();
        assert!(error.contains("q.weight"), "{error}");
        Ok(())
    }
}
