//! Attention with relative positions by its kernels; `lse` stays on the GPU for the backward.

use super::Input;
use crate::cuda::{self, Job};
use crate::launch::rel_pos_attention::{self as kernels, BackwardOperands, Inputs};
use crate::launch::{
    rel_pos_attention_bwd_sm90 as hopper_bwd, rel_pos_attention_sm90 as hopper,
    rel_pos_attention_window_sm90 as hopper_windows,
};
use crate::ops::Gradients;
use crate::problem::AttentionProblem;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Result, Shape, Storage, Tensor};

const OP: &str = AttentionProblem::OP;

/// The address of an operand, 0 if it is absent.
fn address(present: bool, address: u64) -> u64 {
    if present {
        address
    } else {
        0
    }
}

/// The addresses of qkv, both tables, pad, of which the latter may be placeholders.
fn present(problem: &AttentionProblem, pad_present: bool, [qkv, tables, pad]: [u64; 3]) -> Inputs {
    let (tables, pad) = (address(problem.rel_pos, tables), address(pad_present, pad));
    Inputs { qkv, tables, pad }
}

/// Inputs: qkv, both tables, pad. Returns the output with its shape, and lse.
pub fn forward(
    problem: &AttentionProblem,
    pad_present: bool,
    inputs: [Input<'_>; 3],
) -> Result<(CudaStorage, Shape, Tensor)> {
    let [(qkv, _), ..] = inputs;
    let dtype = qkv.dtype();
    let shape = Shape::from((problem.batch, problem.h, problem.w, problem.channels()));
    let lse_shape = Shape::from(kernels::lse_elements(problem));
    let outputs = [(dtype, shape.clone()), (DType::F32, lse_shape.clone())];
    let job = Job { op: OP, device: qkv.device(), inputs: &inputs, outputs, workspace_bytes: 0 };
    let [out, lse] = cuda::run(&job, |at| {
        let (inputs, [out, lse]) = (present(problem, pad_present, at.inputs()?), at.outputs);
        let mut launch = None;
        if cuda::is_hopper(qkv.device()) {
            launch = hopper_windows::forward(problem, dtype, &inputs, out, lse)?;
            if launch.is_none() {
                launch = hopper::forward(problem, dtype, &inputs, out, lse)?;
            }
        }
        match launch {
            Some(launch) => Ok(vec![launch]),
            None => Ok(vec![kernels::forward(problem, dtype, &inputs, out, lse)?]),
        }
    })?;
    let lse = Tensor::from_storage(Storage::Cuda(lse), lse_shape, BackpropOp::none(), false);
    Ok((out, shape, lse))
}

/// Inputs: qkv, both tables, pad; the output and lse; the output's gradient.
pub fn backward(
    problem: &AttentionProblem,
    pad_present: bool,
    inputs: [&Tensor; 3],
    (out, lse): (&Tensor, &Tensor),
    grad: &Tensor,
) -> Result<Gradients> {
    let [qkv, tables, pad] = inputs;
    let dtype = qkv.dtype();
    let tables_wanted = problem.rel_pos && tables.track_op();
    let pad_wanted = pad_present && pad.track_op();
    let is_hopper = cuda::is_hopper(qkv.device().as_cuda_device()?);
    let workspace_bytes = kernels::workspace_bytes(problem, dtype, tables_wanted, pad_wanted)?
        .max(hopper_windows::workspace_bytes(problem, tables_wanted, pad_wanted));
    let inputs = [qkv, tables, pad, out, lse, grad];
    let outputs = [qkv, tables, pad].map(|t| (dtype, t.shape()));
    let [dqkv, dtables, dpad] = cuda::with_tensors(OP, &inputs, outputs, workspace_bytes, |at| {
        let ([qkv, tables, pad, out, lse, dout], [dqkv, dtables, dpad]) =
            (at.inputs()?, at.outputs);
        let inputs = present(problem, pad_present, [qkv, tables, pad]);
        let operands = BackwardOperands {
            out,
            lse,
            dout,
            dqkv,
            dtables: address(tables_wanted, dtables),
            dpad: address(pad_wanted, dpad),
            workspace: at.workspace,
        };
        let own = match is_hopper {
            true => match hopper_windows::backward(problem, dtype, &inputs, &operands)? {
                None => hopper_bwd::backward(problem, dtype, &inputs, &operands)?,
                windows => windows,
            },
            false => None,
        };
        match own {
            Some(launches) => Ok(launches),
            None => kernels::backward(problem, dtype, &inputs, &operands),
        }
    })?;
    Ok((Some(dqkv), tables_wanted.then_some(dtables), pad_wanted.then_some(dpad)))
}
