//! Weight-decomposed low-rank adaptation (DoRA), with PEFT's exact semantics.
//!
//! ```text
//! g = magnitude / || W + scaling B A ||_row          the norm is a constant: no gradient goes through it
//! y = x W^T + b + (g - 1) * (drop(x) W^T) + g * scaling * drop(x) A^T B^T
//!   = x W^T + b + drop(x) ((g - 1) W)^T + scaling * drop(x) A^T (g B)^T          (g W)_oi = g_o W_oi
//! ```
//! `g` scales rows of the matrices, so its gradient comes from theirs, in f32: dg_o = sum_i d(g W)_oi W_oi + ...
//! `g` itself is never rounded: in bf16 a magnitude within 0.4 % of the norm would have no effect. Without dropout
//! `x (g W)^T` is all of the base product. The bias is not scaled by `g`.
//!
//! Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024; `peft/tuners/lora/dora.py`.

use super::product::product;
use super::{check, lora_linear, scale_shift, Activation, Lora, Projection};
use candle_core::{bail, DType, Result, Tensor, D};

/// The row norms `|| W + scaling B A ||_2`, `[out]`, in f32 and without a gradient.
///
/// [Example](crate::ops::dora_linear)
pub fn dora_weight_norm(weight: &Tensor, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
    check::float("dora-weight-norm", "weight", weight)?;
    let to_f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
    #[cfg(feature = "cuda")]
    if super::custom::has_kernels(weight.device()) && a.dims()[0] <= crate::launch::dora::MOST_RANK
    {
        return super::gpu::dora::norm(&weight.detach(), &to_f32(a)?, &to_f32(b)?, scaling);
    }
    let delta = (to_f32(b)?.matmul(&to_f32(a)?)? * scaling)?;
    (to_f32(weight)? + delta)?.sqr()?.sum(D::Minus1)?.sqrt()
}

/// A linear layer with a DoRA adapter: `x [.., in] -> [.., out]`, `magnitude [out]`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::ops::{dora_linear, dora_weight_norm, lora_linear, Activation, Lora, Projection};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let normal = |dims: (usize, usize)| Tensor::randn(0f32, 1f32, dims, &Device::Cpu);
/// let (x, weight, a, b) = (normal((4, 8))?, normal((6, 8))?, normal((2, 8))?, normal((6, 2))?);
/// let lora = Some(Lora { a: &a, b: &b, b_bias: None, scaling: 2.0, dropout: None });
/// let projection = Projection { weight: &weight, scales: None, bias: None, lora };
/// // With the norm itself as the magnitude, DoRA is LoRA.
/// let magnitude = dora_weight_norm(&weight, &a, &b, 2.0)?;
/// let dora = dora_linear(&x, &projection, &magnitude)?;
/// let lora = lora_linear(&x, &projection, Activation::Identity, None)?;
/// assert!((dora - lora)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-3);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`lora_linear`]; besides, on a LoRA bias, which PEFT refuses together with DoRA.
pub fn dora_linear(x: &Tensor, projection: &Projection<'_>, magnitude: &Tensor) -> Result<Tensor> {
    const OP: &str = "dora-linear";
    let Projection { weight, lora: Some(lora), .. } = *projection else {
        bail!("{OP}: the projection has no lora part")
    };
    if projection.scales.is_some() {
        bail!("{OP}: DoRA scales the weight's rows, which is not done to one in int8")
    }
    if lora.b_bias.is_some() {
        bail!("{OP}: a lora bias cannot be combined with DoRA")
    }
    check::shape(OP, "magnitude", magnitude, &[weight.dims().first().copied().unwrap_or(0)])?;
    check::float(OP, "magnitude", magnitude)?;
    check::same_device(OP, "magnitude", magnitude, x)?;
    // Checked before the norm touches the shapes.
    projection.validate(OP, x)?;
    let norm = dora_weight_norm(weight, lora.a, lora.b, lora.scaling)?;
    let g = (magnitude.to_dtype(DType::F32)? / norm)?;
    let rows_scaled = |g: &Tensor, matrix: &Tensor| {
        scale_shift(&matrix.to_dtype(DType::F32)?, Some(&g.unsqueeze(1)?), None)
    };
    let b = rows_scaled(&g, lora.b)?;
    let adapted = Projection { lora: Some(Lora { b: &b, ..lora }), ..*projection };
    if lora.dropout.is_none() && x.device().is_cpu() {
        // A GPU's kernels would round g W to 16 bits, and g with it.
        let weight = rows_scaled(&g, weight)?;
        let adapted = Projection { weight: &weight, ..adapted };
        return lora_linear(x, &adapted, Activation::Identity, None);
    }
    let (out_dim, in_dim) = weight.dims2()?;
    let weight = rows_scaled(&(g - 1.0)?, weight)?;
    let more = product(&x.reshape(((), in_dim))?, &weight.t()?, lora.dropout, x.dtype())?;
    let mut dims = x.dims().to_vec();
    dims[x.rank() - 1] = out_dim;
    // As the residual it meets the rest before that is rounded, which would swallow it where g is near one.
    lora_linear(x, &adapted, Activation::Identity, Some(&more.reshape(dims)?))
}
