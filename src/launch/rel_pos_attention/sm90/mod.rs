//! Attention on Hopper: whole grids in a forward and two backward passes, windows in one kernel each.

pub mod backward;
pub mod forward;
pub mod tile;
pub mod tiles;
pub mod windows;

use super::native::Native;
use super::portable::{self, BackwardOperands, Inputs};
use crate::launch::family::Family;
use crate::launch::plan::Plan;
use crate::launch::{device_ptr, AttentionProblem, Gpu, Launch};
use candle_core::{DType, Result};

pub(super) const NATIVE: Native = Native { family, forward: run_forward, backward: run_backward };

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

/// The passes over whole grids have the portable kernels' scratch memory.
fn run_backward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    operands: &BackwardOperands,
    gpu: &Gpu,
) -> Result<Option<Plan>> {
    let trained = operands.trained();
    let (launches, workspace_bytes) = match family(problem, dtype) {
        Some(Family::WindowAttention { .. }) => (
            windows::backward(problem, dtype, inputs, operands, gpu)?,
            windows::workspace_bytes(problem, trained, gpu),
        ),
        Some(_) => (
            backward::backward(problem, dtype, inputs, operands, gpu)?,
            portable::workspace_bytes(problem, dtype, trained, gpu)?,
        ),
        None => (None, 0),
    };
    Ok(launches.map(|steps| Plan { steps, workspace_bytes, saved: 0 }))
}
