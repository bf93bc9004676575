//! The operations whose problems several engines compute: checked, then run by the one that is fastest here and
//! trusted.
//!
//! The first use of a GPU's kernels tests them, which runs the same problems by each engine. So what runs an engine
//! stands below this file, in `projection.rs` and `rel_pos_attention.rs`.

use super::arguments::{Projection, RelPosAttention};
use super::check::{self, Outline};
use super::custom::Engine;
use super::{projection, rel_pos_attention as attention, Activation};
use crate::launch::{self, family::Family, Gpu};
use crate::problem::{AttentionProblem, ProjectionProblem};
use candle_core::{DType, Device, Result, Tensor};

/// A linear layer with LoRA, activation and residual: `x [.., in] -> [.., out]`; `residual` is `[.., out]`.
///
/// Gradients go to `x`, `residual`, the biases and the adapter; a weight that is a variable gets one too, on the
/// slower composed path. Every parameter may be f32 while `x` is f16 or bf16. A weight in f32 is rounded to the dtype
/// of `x` for the kernels of a GPU.
///
/// [Example](crate::ops)
///
/// # Errors
/// On shapes that do not fit, mixed dtypes or devices, non-finite scaling, impossible dropout.
pub fn lora_linear(
    x: &Tensor,
    projection: &Projection<'_>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    const OP: &str = ProjectionProblem::LINEAR;
    projection.validate(OP, x)?;
    if let Some(residual) = residual {
        let mut expected = x.dims().to_vec();
        if let Some(last) = expected.last_mut() {
            *last = projection.weight.dims()[0];
        }
        check::shape(OP, "residual", residual, &expected)?;
        check::same_kind(OP, "residual", residual, x)?;
    }
    if !activation.is_fused() {
        let y = activation.apply(&lora_linear(x, projection, Activation::Identity, None)?)?;
        return residual.map_or(Ok(y.clone()), |residual| residual + y);
    }
    let projections = &[*projection];
    let engine = engine_of_projections(x, projections, activation)?;
    projection::by(x, projections, activation, residual, engine)
}

/// The q, k and v projections of attention, packed: `x [.., C] -> [.., 3C]`, q first, then k, then v.
///
/// Any subset may carry LoRA, each with its own rank, scaling and dropout mask. Gradients as in [`lora_linear`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::ops::{lora_qkv, Lora, Projection};
///
/// # fn main() -> candle_core::Result<()> {
/// let normal = |dims: (usize, usize)| Tensor::randn(0f32, 1f32, dims, &Device::Cpu);
/// let (x, weight) = (normal((5, 8))?, normal((3 * 8, 8))?);
/// let (a, b) = (normal((2, 8))?, normal((8, 2))?);
/// let lora = Some(Lora { a: &a, b: &b, b_bias: None, scaling: 2.0, dropout: None });
/// let [q, k, v] = [weight.narrow(0, 0, 8)?, weight.narrow(0, 8, 8)?, weight.narrow(0, 16, 8)?];
/// let part = |weight, lora| Projection { weight, scales: None, bias: None, lora };
/// let packed = lora_qkv(&x, &[part(&q, lora), part(&k, None), part(&v, lora)])?;
/// assert_eq!(packed.dims(), [5, 3 * 8]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`lora_linear`]; besides, the three projections must have equal output widths.
pub fn lora_qkv(x: &Tensor, projections: &[Projection<'_>; 3]) -> Result<Tensor> {
    const OP: &str = ProjectionProblem::QKV;
    for projection in projections {
        projection.validate(OP, x)?;
    }
    projection::equal_widths(projections)?;
    let engine = engine_of_projections(x, projections, Activation::Identity)?;
    projection::by(x, projections, Activation::Identity, None, engine)
}

/// Attention over a grid: packed `qkv [B, H, W, 3C] -> [B, H, W, C]`.
///
/// Gradients go to `qkv`, the tables and `pad`. On the CPU, and on a GPU whose kernels cover the shape, nothing of size
/// N x N is allocated. A graph of candle's operations, which holds the N x N weights, runs on Metal, on GPUs before
/// 8.0, and for shapes without a kernel. A head dim above 80 is such a shape. A process is warned of that once.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::ops::{rel_pos_attention, RelPosAttention};
///
/// # fn main() -> candle_core::Result<()> {
/// let qkv = Tensor::randn(0f32, 1f32, (1, 20, 20, 3 * 64), &Device::Cpu)?; // q's channels, then k's, then v's
/// let table = Tensor::randn(0f32, 1f32, (2 * 14 - 1, 16), &Device::Cpu)?; // of windows of 14 x 14, head dim 16
/// let config = RelPosAttention {
///     num_heads: 4,
///     softmax_scale: 0.25,
///     rel_pos: Some((&table, &table)),
///     window: Some(14), // None: global
///     pad: None,        // the projection's bias, where windows hang over the grid
///     dropout: None,
/// };
/// assert_eq!(rel_pos_attention(&qkv, &config)?.dims(), [1, 20, 20, 64]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// On shapes that do not fit, mixed dtypes or devices, a window of 0, non-finite scale, impossible dropout.
pub fn rel_pos_attention(qkv: &Tensor, config: &RelPosAttention<'_>) -> Result<Tensor> {
    let prepared = attention::prepare(qkv, config)?;
    let engine = engine_of_attention(qkv, &prepared.0)?;
    attention::run(qkv, config, prepared, engine)
}

/// The engine for attention.
pub(super) fn engine_of_attention<'a>(
    qkv: impl Into<Outline<'a>>,
    problem: &AttentionProblem,
) -> Result<Engine> {
    let Outline { dtype, device, .. } = qkv.into();
    engine(device, dtype, |gpu| launch::rel_pos_attention::family(problem, dtype, gpu))
}

/// The engine for projections. A fused operation gives its weights no gradient, so trainable ones take the composed
/// path, as do devices without kernels.
pub(super) fn engine_of_projections<'a>(
    x: impl Into<Outline<'a>>,
    projections: &[Projection<'_>],
    activation: Activation,
) -> Result<Engine> {
    if projections.iter().any(|p| p.weight.track_op()) {
        return Ok(Engine::Composed);
    }
    let problems: Vec<_> = projections.iter().map(Projection::problem).collect();
    let Outline { dims, dtype, device } = x.into();
    let problem = launch::projection::Problem::of(dims, &problems, activation);
    engine(device, dtype, |gpu| launch::projection::family(&problem, dtype, gpu))
}

/// The engine for a problem. `covered` says whether kernels of a GPU compute it, and whether a native family does.
///
/// # Errors
/// If a GPU cannot run the family's self-test.
fn engine(
    device: &Device,
    dtype: DType,
    covered: impl FnOnce(&Gpu) -> Option<Option<Family>>,
) -> Result<Engine> {
    match device {
        Device::Cpu => Ok(Engine::Cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let gpu = super::gpu::choice::gpu(device, dtype, covered)?;
            Ok(gpu.map_or(Engine::Composed, Engine::Gpu))
        }
        _ => {
            let _ = (dtype, covered);
            Ok(Engine::Composed)
        }
    }
}
