//! DoRA's row norms by their kernel; no gradient goes through them.

use crate::driver;
use crate::launch::dora::{self as kernels, DoraNorm};
use candle_core::{DType, Result, Shape, Tensor};

/// `|| W + scaling B A ||` of each row, `[out]`, for `weight [out, in]`, and `a [rank, in]`, `b [out, rank]` in f32.
pub fn norm(weight: &Tensor, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims2()?;
    let problem = DoraNorm { out_dim, in_dim, rank: a.dim(0)?, scaling: scaling as f32 };
    let shape = Shape::from(out_dim);
    let outputs = [(DType::F32, &shape)];
    let [norm] = driver::with_tensors("dora-norm", &[weight, a, b], outputs, 0, |at| {
        let ([weight_at, a, b], [norm]) = (at.inputs()?, at.outputs);
        Ok(vec![kernels::norm(&problem, weight.dtype(), weight_at, a, b, norm)?])
    })?;
    Ok(norm)
}
