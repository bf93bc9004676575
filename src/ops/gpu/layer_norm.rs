//! LayerNorm by its kernels; weight and bias cost nothing in the backward while they are frozen.

use crate::driver::Job;
use crate::launch::layer_norm::{self as kernels, Pass};
use crate::ops::Gradients;
use crate::problem::LayerNormProblem;
use candle_core::{CudaStorage, Result, Shape, Tensor};

const OP: &str = LayerNormProblem::OP;

fn problem(shape: &Shape, eps: f64) -> LayerNormProblem {
    let size = shape.dims().last().copied().unwrap_or(1);
    LayerNormProblem { rows: shape.elem_count() / size, size, eps }
}

/// Inputs: x, weight, bias.
pub fn forward(eps: f64, inputs: [&Tensor; 3]) -> Result<(CudaStorage, Shape)> {
    let (shape, dtype) = (inputs[0].shape(), inputs[0].dtype());
    let plan = kernels::plan(&problem(shape, eps), Pass::Forward, dtype)?;
    let job = Job { op: OP, plan: &plan, dropouts: &[] };
    let [y] = job.run(&inputs, [(dtype, shape)])?;
    Ok((y, shape.clone()))
}

/// Inputs: x, weight, bias; the output's gradient; that of a residual, which is added to the one of x.
pub fn backward(
    eps: f64,
    inputs: [&Tensor; 3],
    grad: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Gradients> {
    let [x, weight, bias] = inputs;
    let dtype = x.dtype();
    let trained = weight.track_op() || bias.track_op();
    let pass = Pass::Backward { trained, residual: residual.is_some() };
    let plan = kernels::plan(&problem(x.shape(), eps), pass, dtype)?;
    let (job, mut inputs) = (Job { op: OP, plan: &plan, dropouts: &[] }, vec![x, weight, grad]);
    inputs.extend(residual);
    if !trained {
        let [dx] = job.run_to_tensors(&inputs, [Some((dtype, x.shape()))])?;
        return Ok((dx, None, None));
    }
    let outputs = [x, weight, bias].map(|t| Some((dtype, t.shape())));
    let [dx, dweight, dbias] = job.run_to_tensors(&inputs, outputs)?;
    Ok((dx, dweight, dbias))
}
