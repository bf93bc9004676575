//! LayerNorm over the last dimension.
//!
//! ```text
//! y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps),   the biased variance
//! ```

use super::{check, composed};
use candle_core::{bail, Result, Tensor};

/// LayerNorm: `x [.., C]`, `weight [C]`, `bias [C]` -> `[.., C]`, with gradients for all three.
///
/// # Errors
/// On empty tensors, shapes that do not fit, mixed dtypes or devices, an `eps` that is not a positive number.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    const OP: &str = "layer-norm";
    check::float(OP, "x", x)?;
    check::not_empty(OP, "x", x)?;
    let size = x.dims()[x.rank() - 1];
    for (name, tensor) in [("weight", weight), ("bias", bias)] {
        check::shape(OP, name, tensor, &[size])?;
        check::same_kind(OP, name, tensor, x)?;
    }
    if !(eps.is_finite() && eps > 0.0) {
        bail!("{OP}: eps must be positive and finite, got {eps}")
    }
    composed::layer_norm(x, weight, bias, eps)
}
