//! LayerNorm over the last dimension.
//!
//! ```text
//! y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps),   the biased variance
//! ```

use super::check::{self, Outline};
use super::cpu::{Chain, Layer, Residual};
use super::{composed, fallback};
use crate::problem::LayerNormProblem;
use candle_core::{bail, Device, Result, Tensor};

const OP: &str = LayerNormProblem::OP;

/// LayerNorm: `x [.., C]`, `weight [C]`, `bias [C]` -> `[.., C]`, with gradients for all three. Weight and bias may be
/// f32 beside an `x` in 16 bits.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::ops::layer_norm;
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let x = Tensor::new(&[[1f32, 3.0], [0.0, 4.0]], &Device::Cpu)?;
/// let (weight, bias) = (Tensor::new(&[1f32, 1.0], &Device::Cpu)?, Tensor::new(&[0f32, 10.0], &Device::Cpu)?);
/// let y = layer_norm(&x, &weight, &bias, 1e-12)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1.0, 11.0], [-1.0, 11.0]]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// On empty tensors, shapes that do not fit, mixed dtypes or devices, an `eps` that is not a positive number.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    validate(x, weight, bias, eps)?;
    match x.device() {
        Device::Cpu => {
            let mut chain = Chain::new(OP, x);
            chain.push(layer(weight, bias, eps));
            chain.run(Residual::None)
        }
        #[cfg(feature = "cuda")]
        device if super::custom::has_kernels(device) => on_gpu(x, weight, bias, eps),
        _ => {
            fallback::tell(OP, x, fallback::NO_KERNEL);
            composed::layer_norm(x, weight, bias, eps)
        }
    }
}

/// The layer as the CPU engine runs it, and its parameters.
pub(super) fn layer(weight: &Tensor, bias: &Tensor, eps: f64) -> (Layer, Vec<Tensor>) {
    (Layer::Norm { eps }, vec![weight.clone(), bias.clone()])
}

/// A parameter as the kernels take it: in the one dtype of all tensors.
#[cfg(feature = "cuda")]
pub(super) fn of_gpu(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    super::custom::operand(&parameter.to_dtype(x.dtype())?)
}

#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    use super::{computed, custom::operand, gpu::layer_norm as gpu};
    let (x, weight, bias) = (operand(x)?, of_gpu(weight, x)?, of_gpu(bias, x)?);
    let inputs = (&x, Some(&weight), Some(&bias));
    let (out, shape) = gpu::forward(eps, [&x, &weight, &bias])?;
    let out = (candle_core::Storage::Cuda(out), shape);
    computed::node(OP, inputs, out, move |inputs, _, grad| gpu::backward(eps, inputs, grad, None))
}

/// Checks everything.
pub(super) fn validate<'a>(
    x: impl Into<Outline<'a>>,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<()> {
    let x = x.into();
    check::float(OP, "x", x)?;
    check::not_empty(OP, "x", x)?;
    let size = x.width();
    for (name, tensor) in [("weight", weight), ("bias", bias)] {
        check::shape(OP, name, tensor, &[size])?;
        check::parameter(OP, name, tensor, x)?;
    }
    if !(eps.is_finite() && eps > 0.0) {
        bail!("{OP}: eps must be positive and finite, got {eps}")
    }
    Ok(())
}
