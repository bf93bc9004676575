//! Attention on Hopper: whole grids in a forward and two backward passes, windows in one kernel each.

pub mod backward;
pub mod forward;
pub mod tile;
pub mod tiles;
pub mod windows;

use super::native::Native;
use super::portable::{BackwardOperands, Inputs};
use crate::launch::family::Family;
use crate::launch::{device_ptr, AttentionProblem, Gpu, Launch};
use candle_core::{DType, Result};

pub(super) const NATIVE: Native =
    Native { family, forward: run_forward, backward: run_backward, workspace_bytes };

fn family(problem: &AttentionProblem, dtype: DType) -> Option<Family> {
    let head_dim = problem.head_dim;
    if windows::pick(problem, dtype, &[]).is_some() {
        return Some(Family::WindowAttention { head_dim });
    }
    let whole =
        problem.h.is_multiple_of(problem.side_h) && problem.w.is_multiple_of(problem.side_w);
    let covered =
        whole && forward::covers(problem, dtype, &[]) && tiles::pick(problem, None).is_some();
    covered.then_some(Family::GlobalAttention { head_dim })
}

fn run_forward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    [out, lse]: [device_ptr; 2],
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    let launch = match family(problem, dtype) {
        Some(Family::WindowAttention { .. }) => {
            windows::forward(problem, dtype, inputs, [out, lse], gpu)?
        }
        Some(_) => forward::forward(problem, dtype, inputs, [out, lse], gpu)?,
        None => None,
    };
    Ok(launch.map(|launch| vec![launch]))
}

fn run_backward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    operands: &BackwardOperands,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    match family(problem, dtype) {
        Some(Family::WindowAttention { .. }) => {
            windows::backward(problem, dtype, inputs, operands, gpu)
        }
        Some(_) => backward::backward(problem, dtype, inputs, operands, gpu),
        None => Ok(None),
    }
}

/// The passes over whole grids take the portable kernels'.
fn workspace_bytes(
    problem: &AttentionProblem,
    dtype: DType,
    trained: [bool; 2],
    gpu: &Gpu,
) -> usize {
    match family(problem, dtype) {
        Some(Family::WindowAttention { .. }) => windows::workspace_bytes(problem, trained, gpu),
        _ => 0,
    }
}
