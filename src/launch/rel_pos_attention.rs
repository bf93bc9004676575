//! Attention with relative positions. No kernel covers it yet: devices run the composed graph.

use super::{device_ptr, Launch};
use crate::problem::AttentionProblem;
use candle_core::{bail, DType, Result};

/// Whether there are kernels for this problem; without, the composed graph computes it.
pub fn covers(_problem: &AttentionProblem, _dtype: DType) -> bool {
    false
}

/// f32 elements of `lse`, `[windows, heads, tokens]`.
pub fn lse_len(problem: &AttentionProblem) -> usize {
    problem.windows() * problem.num_heads * problem.tokens()
}

/// The addresses of the forward's operands; 0 is absent.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOperands {
    /// `[batch, h, w, 3, heads, head_dim]`
    pub qkv: device_ptr,
    /// The rows of both tables, h first; may be absent.
    pub tables: device_ptr,
    /// `[3, heads, head_dim]`; may be absent.
    pub pad: device_ptr,
    /// Output `[batch, h, w, heads, head_dim]`.
    pub out: device_ptr,
    /// Output, [`lse_len`] f32.
    pub lse: device_ptr,
}

/// The forward.
///
/// # Errors
/// If no kernel covers the problem.
pub fn forward(
    problem: &AttentionProblem,
    dtype: DType,
    _operands: &ForwardOperands,
) -> Result<Vec<Launch>> {
    bail!("no kernel covers {problem:?} in {dtype:?}")
}

/// The addresses of the backward's operands; 0 is absent.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOperands {
    /// As in the forward.
    pub qkv: device_ptr,
    /// As in the forward.
    pub tables: device_ptr,
    /// As in the forward.
    pub pad: device_ptr,
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
