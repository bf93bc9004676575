//! DoRA's row norms by their kernel; no gradient goes through them.

use crate::driver::Job;
use crate::launch::dora::{self as kernels, DoraNorm};
use candle_core::{bail, DType, Result, Shape, Tensor};

/// `|| W + scaling B A ||` of each row, `[out]`, for `weight [out, in]`, and `a [rank, in]`, `b [out, rank]` in f32.
pub fn norm(weight: &Tensor, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims2()?;
    let problem = DoraNorm { out_dim, in_dim, rank: a.dim(0)?, scaling: scaling as f32 };
    let plan = kernels::plan(&problem, weight.dtype())?;
    let job = Job { op: "dora-norm", plan: &plan, dropouts: &[] };
    let norm = Some((DType::F32, &Shape::from(out_dim)));
    let [Some(norm)] = job.run_to_tensors(&[weight, a, b], [norm])? else { bail!("no norm") };
    Ok(norm)
}
