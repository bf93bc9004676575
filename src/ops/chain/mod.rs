//! Layers in a row as one operation, `last(.. first(x))`, or a residual branch, `x + last(.. first(x))`.
//!
//! ```text
//! attention_layer   proj(rel_pos_attention(qkv(x)))
//! attention_block   x + proj(rel_pos_attention(qkv(layer_norm(x))))
//! mlp_block         x + lin2(act(lin1(layer_norm(x))))
//! ```
//! Each is one node of candle's graph, see [`crate::ops::cpu`], with the arithmetic of the single operations.
//!
//! On the CPU, and on a GPU whose kernels compute each layer and where only projections are trained. Elsewhere, and
//! with trainable weights, the single operations run one after the other.

use crate::ops::arguments::{Norm, CHAIN as OP};
use crate::ops::cpu::{Chain, Residual};
use crate::ops::{layer_norm, lora_linear, lora_qkv, projection, rel_pos_attention as attention};
use crate::ops::{Activation, Projection, RelPosAttention};
use crate::problem::ProjectionProblem;
use candle_core::{bail, Device, Result, Tensor};

#[cfg(feature = "cuda")]
mod on_gpu;

/// `proj(rel_pos_attention(qkv(x)))`: `[B, H, W, C] -> [B, H, W, C']`, with the gradients of the operations it consists
/// of. `qkv` is one projection, or those of q, k and v.
///
/// [Example](crate::ops::attention_block)
///
/// # Errors
/// As [`lora_linear`], [`lora_qkv`] and [`rel_pos_attention`](crate::ops::rel_pos_attention()).
pub fn attention_layer(
    x: &Tensor,
    qkv: &[Projection<'_>],
    config: &RelPosAttention<'_>,
    proj: &Projection<'_>,
) -> Result<Tensor> {
    attend(x, None, qkv, config, proj)
}

/// `x + proj(rel_pos_attention(qkv(layer_norm(x))))`: `[B, H, W, C] -> [B, H, W, C]`, with the gradients of the
/// operations it consists of. `qkv` is one projection, or those of q, k and v.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::ops::{attention_block, attention_layer, layer_norm, mlp_block, Activation};
/// use candle_sam_lora::ops::{Norm, Projection, RelPosAttention};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let x = Tensor::randn(0f32, 1f32, (1, 4, 4, 8), &Device::Cpu)?;
/// let normal = |dims: (usize, usize)| Tensor::randn(0f32, 0.1f32, dims, &Device::Cpu);
/// let (qkv, proj) = (normal((24, 8))?, normal((8, 8))?);
/// let (weight, bias) = (Tensor::ones(8, DType::F32, &Device::Cpu)?, Tensor::zeros(8, DType::F32, &Device::Cpu)?);
/// let norm = Norm { weight: &weight, bias: &bias, eps: 1e-6 };
/// let linear = |weight| Projection { weight, scales: None, bias: None, lora: None };
/// let config = RelPosAttention {
///     num_heads: 2,
///     softmax_scale: 0.5,
///     rel_pos: None,
///     window: None,
///     pad: None,
///     dropout: None,
/// };
/// let block = attention_block(&x, &norm, &[linear(&qkv)], &config, &linear(&proj))?;
///
/// let normed = layer_norm(&x, &weight, &bias, 1e-6)?;
/// let steps = (&x + attention_layer(&normed, &[linear(&qkv)], &config, &linear(&proj))?)?;
/// assert!((&block - steps)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
///
/// let (lin1, lin2) = (normal((32, 8))?, normal((8, 32))?);
/// let layer = mlp_block(&block, &norm, &linear(&lin1), Activation::Gelu, &linear(&lin2))?;
/// assert_eq!(layer.dims(), [1, 4, 4, 8]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`layer_norm`], [`lora_linear`], [`lora_qkv`] and [`rel_pos_attention`](crate::ops::rel_pos_attention()).
pub fn attention_block(
    x: &Tensor,
    norm: &Norm<'_>,
    qkv: &[Projection<'_>],
    config: &RelPosAttention<'_>,
    proj: &Projection<'_>,
) -> Result<Tensor> {
    attend(x, Some(norm), qkv, config, proj)
}

/// The block with a norm, the layer without.
fn attend(
    x: &Tensor,
    norm: Option<&Norm<'_>>,
    qkv: &[Projection<'_>],
    config: &RelPosAttention<'_>,
    proj: &Projection<'_>,
) -> Result<Tensor> {
    if !matches!(qkv.len(), 1 | 3) {
        bail!("{OP}: q, k and v are one projection or three, got {}", qkv.len())
    }
    #[cfg(feature = "cuda")]
    if let Some(out) = on_gpu::attend(x, norm, qkv, config, proj)? {
        return Ok(out);
    }
    if !chained(x, qkv.iter().chain([proj])) {
        let normed = match norm {
            Some(norm) => layer_norm(x, norm.weight, norm.bias, norm.eps)?,
            None => x.clone(),
        };
        let packed = match qkv {
            [q, k, v] => lora_qkv(&normed, &[*q, *k, *v])?,
            _ => lora_linear(&normed, &qkv[0], Activation::Identity, None)?,
        };
        let out = crate::ops::rel_pos_attention(&packed, config)?;
        return lora_linear(&out, proj, Activation::Identity, norm.map(|_| x));
    }
    let mut chain = Chain::new(OP, x);
    if let Some(norm) = norm {
        chain.layer_norm(norm)?;
    }
    chain.projections(qkv, Activation::Identity)?;
    if let [q, k, v] = qkv {
        projection::equal_widths(&[*q, *k, *v])?;
    }
    chain.attention(config)?;
    chain.projections(&[*proj], Activation::Identity)?;
    chain.run(if norm.is_some() { Residual::Input } else { Residual::None })
}

/// `x + lin2(act(lin1(layer_norm(x))))`: `[.., C] -> [.., C]`, with the gradients of the operations it consists of.
///
/// [Example](crate::ops::attention_block)
///
/// # Errors
/// As [`layer_norm`] and [`lora_linear`].
pub fn mlp_block(
    x: &Tensor,
    norm: &Norm<'_>,
    lin1: &Projection<'_>,
    activation: Activation,
    lin2: &Projection<'_>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(out) = on_gpu::mlp(x, norm, (lin1, activation), lin2)? {
        return Ok(out);
    }
    if !activation.is_fused() || !chained(x, [lin1, lin2]) {
        let normed = layer_norm(x, norm.weight, norm.bias, norm.eps)?;
        let hidden = lora_linear(&normed, lin1, activation, None)?;
        return lora_linear(&hidden, lin2, Activation::Identity, Some(x));
    }
    let mut chain = Chain::new(OP, x);
    chain.layer_norm(norm)?;
    chain.projections(&[*lin1], activation)?;
    chain.projections(&[*lin2], Activation::Identity)?;
    chain.run(Residual::Input)
}

/// Does work whose chains are one node of candle's graph where each takes the output of the one before; on a GPU, see
/// `gpu::chain::joined`.
pub(crate) fn joined<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(feature = "cuda")]
    return crate::ops::gpu::chain::joined(work);
    #[cfg(not(feature = "cuda"))]
    work()
}

fn chained<'a>(x: &Tensor, projections: impl IntoIterator<Item = &'a Projection<'a>>) -> bool {
    matches!(x.device(), Device::Cpu) && projections.into_iter().all(|p| !p.weight.track_op())
}

impl Chain<'_> {
    fn layer_norm(&mut self, norm: &Norm<'_>) -> Result<()> {
        layer_norm::validate(self.next_input(), norm.weight, norm.bias, norm.eps)?;
        self.push(layer_norm::layer(norm.weight, norm.bias, norm.eps));
        Ok(())
    }

    fn projections(&mut self, parts: &[Projection<'_>], activation: Activation) -> Result<()> {
        let (op, x) = (ProjectionProblem::op(parts.len()), self.next_input());
        for part in parts {
            part.validate(op, x)?;
        }
        self.push(projection::layer(parts, activation));
        Ok(())
    }

    fn attention(&mut self, config: &RelPosAttention<'_>) -> Result<()> {
        let prepared = attention::prepare(self.next_input(), config)?;
        self.push(attention::layer(prepared));
        Ok(())
    }
}
