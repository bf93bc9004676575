//! Weight-decomposed low-rank adaptation (DoRA), with PEFT's exact semantics.
//!
//! ```text
//! g = magnitude / || W + scaling B A ||_row          the norm is a constant: no gradient goes through it
//! y = x W^T + b + (g - 1) * (drop(x) W^T) + g * scaling * drop(x) A^T B^T
//! ```
//! Without dropout the base product is shared, `y = g * (x W^T + scaling x A^T B^T) + b`; with dropout PEFT computes
//! it once more on the dropped input, and so does this. The bias is not scaled by `g`.
//!
//! Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024; `peft/tuners/lora/dora.py`.

use super::{check, dropout, lora_linear, Activation, Projection};
use candle_core::{bail, DType, Result, Tensor, D};

/// The row norms `|| W + scaling B A ||_2`, `[out]`, in f32 and without a gradient.
pub fn dora_weight_norm(weight: &Tensor, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
    let to_f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
    #[cfg(feature = "cuda")]
    if weight.device().is_cuda()
        && super::custom::fused_on(weight.device(), || {
            a.dims()[0] <= crate::launch::dora::MOST_RANK
        })
    {
        return super::gpu::dora::norm(&weight.detach(), &to_f32(a)?, &to_f32(b)?, scaling);
    }
    let delta = (to_f32(b)?.matmul(&to_f32(a)?)? * scaling)?;
    (to_f32(weight)? + delta)?.sqr()?.sum(D::Minus1)?.sqrt()
}

/// A linear layer with a DoRA adapter: `x [.., in] -> [.., out]`, `magnitude [out]`.
///
/// # Errors
/// As [`lora_linear`]; besides, on a LoRA bias, which PEFT refuses together with DoRA.
pub fn dora_linear(x: &Tensor, projection: &Projection<'_>, magnitude: &Tensor) -> Result<Tensor> {
    const OP: &str = "dora-linear";
    let Projection { weight, bias, lora: Some(lora) } = *projection else {
        bail!("{OP}: the projection has no lora part")
    };
    if lora.b_bias.is_some() {
        bail!("{OP}: a lora bias cannot be combined with DoRA")
    }
    check::shape(OP, "magnitude", magnitude, &[weight.dims().first().copied().unwrap_or(0)])?;
    check::float(OP, "magnitude", magnitude)?;
    check::same_device(OP, "magnitude", magnitude, x)?;
    let base = Projection { weight, bias: None, lora: None };
    // Checked by a projection before the norm touches the shapes.
    let plain = lora_linear(x, &base, Activation::None, None)?;
    let norm = dora_weight_norm(weight, lora.a, lora.b, lora.scaling)?;
    let g = (magnitude.to_dtype(DType::F32)? / norm)?.to_dtype(x.dtype())?;
    let low_rank = |x: &Tensor| -> Result<Tensor> {
        let to = |tensor: &Tensor| tensor.to_dtype(x.dtype());
        let rank = Projection { weight: &to(lora.a)?, bias: None, lora: None };
        let s = lora_linear(x, &rank, Activation::None, None)?;
        let up = Projection { weight: &to(lora.b)?, bias: None, lora: None };
        lora_linear(&s, &up, Activation::None, None)? * lora.scaling
    };
    let y = match lora.dropout {
        None => (plain + low_rank(x)?)?.broadcast_mul(&g)?,
        Some(mask) => {
            let dropped = dropout(x, mask)?;
            let base_dropped = lora_linear(&dropped, &base, Activation::None, None)?;
            let adapted = (&base_dropped + low_rank(&dropped)?)?.broadcast_mul(&g)?;
            ((plain - base_dropped)? + adapted)?
        }
    };
    bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}
