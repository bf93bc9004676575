//! Attention with relative positions. No kernel covers it yet: devices run the composed graph.

use super::{device_ptr, Launch};
use crate::problem::AttentionProblem;
use candle_core::{bail, DType, Result};

/// Why no kernel covers the problem: the composed graph computes it.
///
/// # Errors
/// Always.
pub fn check(problem: &AttentionProblem, dtype: DType, _addresses: &[device_ptr]) -> Result<()> {
    bail!("no kernel covers {problem:?} in {dtype:?}")
}

/// The addresses of the inputs, all of one dtype; 0 where absent.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[batch, h, w, 3, heads, head_dim]`
    pub qkv: device_ptr,
    /// rel_pos_h, then rel_pos_w: `[2 side_h - 1 + 2 side_w - 1, head_dim]`; 0 without relative positions.
    pub tables: device_ptr,
    /// What a token outside the grid projects to, `[3, heads, head_dim]`; 0 for zeros.
    pub pad: device_ptr,
}

/// Elements of `lse`, f32.
pub fn lse_elements(problem: &AttentionProblem) -> usize {
    problem.windows() * problem.num_heads * problem.tokens()
}

/// `out [batch, h, w, heads, head_dim]` and `lse` ([`lse_elements`]) of the inputs.
///
/// # Errors
/// As [`check`].
pub fn forward(
    problem: &AttentionProblem,
    dtype: DType,
    _inputs: &Inputs,
    _out: device_ptr,
    _lse: device_ptr,
) -> Result<Launch> {
    bail!("no kernel covers {problem:?} in {dtype:?}")
}

/// The addresses of the backward's operands; 0 is absent.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOperands {
    /// The forward's.
    pub inputs: Inputs,
    /// The forward's output.
    pub out: device_ptr,
    /// The forward's output.
    pub lse: device_ptr,
    /// The gradient of `out`.
    pub dout: device_ptr,
    /// Output, as `qkv`.
    pub dqkv: device_ptr,
    /// Output, as `tables`; absent if it is not wanted.
    pub dtables: device_ptr,
    /// Output, as `pad`; absent if it is not wanted.
    pub dpad: device_ptr,
    /// [`workspace_bytes`] bytes.
    pub workspace: device_ptr,
}

/// Scratch memory of the backward.
pub fn workspace_bytes(_problem: &AttentionProblem, _dtype: DType) -> usize {
    0
}

/// The backward.
///
/// # Errors
/// If no kernel covers the problem.
pub fn backward(
    problem: &AttentionProblem,
    dtype: DType,
    _operands: &BackwardOperands,
) -> Result<Vec<Launch>> {
    bail!("no kernel covers {problem:?} in {dtype:?}")
}
