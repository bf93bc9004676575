//! LayerNorm by its kernels; weight and bias cost nothing in the backward while they are frozen.

use super::Input;
use crate::driver::{self, Job};
use crate::launch::layer_norm::{self as kernels, BackwardOperands, TrainedOperands};
use crate::ops::Gradients;
use crate::problem::LayerNormProblem;
use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result, Shape, Tensor};

const OP: &str = LayerNormProblem::OP;

fn problem(shape: &Shape, eps: f64) -> LayerNormProblem {
    let size = shape.dims().last().copied().unwrap_or(1);
    LayerNormProblem { rows: shape.elem_count() / size, size, eps }
}

/// Inputs: x, weight, bias.
pub fn forward(eps: f64, inputs: [Input<'_>; 3]) -> Result<(CudaStorage, Shape)> {
    let [(x, layout), ..] = inputs;
    let (problem, dtype) = (problem(layout.shape(), eps), x.dtype());
    let outputs = [(dtype, layout.shape().clone())];
    let job = Job { op: OP, device: x.device(), inputs: &inputs, outputs, workspace_bytes: 0 };
    let [y] = driver::run(&job, |at| {
        let ([x, weight, bias], [y]) = (at.inputs()?, at.outputs);
        Ok(vec![kernels::forward(&problem, dtype, x, weight, bias, y)?])
    })?;
    Ok((y, layout.shape().clone()))
}

/// Inputs: x, weight, bias; the output's gradient.
pub fn backward(eps: f64, inputs: [&Tensor; 3], grad: &Tensor) -> Result<Gradients> {
    let [x, weight, bias] = inputs;
    let (problem, dtype) = (problem(x.shape(), eps), x.dtype());
    let inputs = [x, weight, grad];
    if !weight.track_op() && !bias.track_op() {
        let [dx] = driver::with_tensors(OP, &inputs, [(dtype, x.shape())], 0, |at| {
            let ([x, weight, dy], [dx]) = (at.inputs()?, at.outputs);
            let operands = BackwardOperands { x, weight, dy, dx, trained: None };
            kernels::backward(&problem, dtype, &operands)
        })?;
        return Ok((Some(dx), None, None));
    }
    let outputs = [x, weight, bias].map(|t| (dtype, t.shape()));
    let workspace_bytes = kernels::workspace_bytes(&problem);
    let [dx, dweight, dbias] = driver::with_tensors(OP, &inputs, outputs, workspace_bytes, |at| {
        let ([x, weight, dy], [dx, dweight, dbias]) = (at.inputs()?, at.outputs);
        let trained = Some(TrainedOperands { dweight, dbias, workspace: at.workspace });
        kernels::backward(&problem, dtype, &BackwardOperands { x, weight, dy, dx, trained })
    })?;
    Ok((Some(dx), Some(dweight), Some(dbias)))
}
