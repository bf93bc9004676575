//! Projections that share an input, with LoRA. No kernel covers them yet: devices run the composed graph.

use super::{device_ptr, Launch};
use crate::problem::{Activation, ProjectionProblem};
use candle_core::{bail, DType, Result};

/// Projections of `x [rows, in_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Rows of x.
    pub rows: usize,
    /// Columns of x.
    pub in_dim: usize,
    /// Each projection's part of the output, side by side.
    pub projections: &'a [ProjectionProblem],
    /// Applied to the sum.
    pub activation: Activation,
}

/// Whether there are kernels for this problem; without, the composed graph computes it.
pub fn covers(_problem: &Problem<'_>, _dtype: DType) -> bool {
    false
}

/// f32 elements of S, the inputs times A of all projections; 0 without LoRA.
pub fn low_rank_len(problem: &Problem<'_>) -> usize {
    let ranks = problem.projections.iter().filter_map(|p| p.lora).map(|lora| lora.rank);
    problem.rows * ranks.sum::<usize>()
}

/// The addresses of the forward's operands; 0 is absent.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOperands<'a> {
    /// `[rows, in_dim]`
    pub x: device_ptr,
    /// Of each projection, `[out_dim, in_dim]`.
    pub weights: &'a [device_ptr],
    /// f32, as [`crate::problem::small_layout`] has it.
    pub small: device_ptr,
    /// `[rows, out_dims]`; may be absent.
    pub residual: device_ptr,
    /// Output `[rows, out_dims]`.
    pub out: device_ptr,
    /// Output, [`low_rank_len`] f32; absent without LoRA.
    pub low_rank: device_ptr,
    /// Output `[rows, out_dims]`: what the activation is applied to; absent if it is not kept.
    pub sum: device_ptr,
}

/// The forward.
///
/// # Errors
/// If no kernel covers the problem.
pub fn forward(
    problem: &Problem<'_>,
    dtype: DType,
    _operands: &ForwardOperands<'_>,
) -> Result<Vec<Launch>> {
    bail!("no kernel covers {problem:?} in {dtype:?}")
}

/// The addresses of the backward's operands; 0 is absent.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOperands<'a> {
    /// As in the forward.
    pub x: device_ptr,
    /// As in the forward.
    pub weights: &'a [device_ptr],
    /// As in the forward.
    pub small: device_ptr,
    /// The forward's output.
    pub low_rank: device_ptr,
    /// The forward's output; absent without an activation.
    pub sum: device_ptr,
    /// The gradient of `out`.
    pub dout: device_ptr,
    /// Output, as `x`; absent if it is not wanted.
    pub dx: device_ptr,
    /// Output, as `small`; absent if it is not wanted.
    pub dsmall: device_ptr,
    /// [`workspace_bytes`] bytes.
    pub workspace: device_ptr,
}

/// Scratch memory of the backward.
pub fn workspace_bytes(_problem: &Problem<'_>, _dtype: DType) -> usize {
    0
}

/// The backward.
///
/// # Errors
/// If no kernel covers the problem.
pub fn backward(
    problem: &Problem<'_>,
    dtype: DType,
    _operands: &BackwardOperands<'_>,
) -> Result<Vec<Launch>> {
    bail!("no kernel covers {problem:?} in {dtype:?}")
}
