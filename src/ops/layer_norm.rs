//! LayerNorm over the last dimension.
//!
//! ```text
//! y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(var + eps),   the biased variance
//! ```

use super::custom::{
    dtype_of, from_f32, fused_on, operand, tensor_like, to_f32, vec_f32, with_f32,
};
use super::{check, composed, Gradients};
use crate::cpu;
use crate::problem::LayerNormProblem;
use candle_core::{bail, CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor};

const OP: &str = LayerNormProblem::OP;

/// LayerNorm: `x [.., C]`, `weight [C]`, `bias [C]` -> `[.., C]`, with gradients for all three. Weight and bias may be f32
/// beside an `x` in 16 bits.
///
/// # Errors
/// On empty tensors, shapes that do not fit, mixed dtypes or devices, an `eps` that is not a positive number.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    validate(x, weight, bias, eps)?;
    if !fused_on(x.device(), || true) {
        return composed::layer_norm(x, weight, bias, eps);
    }
    let parameter = |tensor: &Tensor| match x.device() {
        Device::Cpu => operand(tensor),
        // Kernels take one dtype.
        _ => operand(&tensor.to_dtype(x.dtype())?),
    };
    operand(x)?.apply_op3(&parameter(weight)?, &parameter(bias)?, FusedLayerNorm { eps })
}

/// Checks everything.
pub(super) fn validate(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<()> {
    check::float(OP, "x", x)?;
    check::not_empty(OP, "x", x)?;
    let size = x.dims()[x.rank() - 1];
    for (name, tensor) in [("weight", weight), ("bias", bias)] {
        check::shape(OP, name, tensor, &[size])?;
        check::parameter(OP, name, tensor, x)?;
    }
    if !(eps.is_finite() && eps > 0.0) {
        bail!("{OP}: eps must be positive and finite, got {eps}")
    }
    Ok(())
}

struct FusedLayerNorm {
    eps: f64,
}

impl CustomOp3 for FusedLayerNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let rows = to_f32(OP, x, x_layout)?;
        let weight = to_f32(OP, weight, weight_layout)?;
        let bias = to_f32(OP, bias, bias_layout)?;
        let y = cpu::layer_norm::forward(&rows, &weight, &bias, self.eps);
        Ok((from_f32(OP, y.into_vec(), dtype_of(x))?, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let inputs = [(x, x_layout), (weight, weight_layout), (bias, bias_layout)];
        super::gpu::layer_norm::forward(self.eps, inputs)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<Gradients> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::gpu::layer_norm::backward(self.eps, [x, weight, bias], grad_res);
        }
        let weight_values = vec_f32(OP, weight)?;
        let (dx, dweight, dbias) = with_f32(OP, x, |x| {
            with_f32(OP, grad_res, |grad| {
                Ok(cpu::layer_norm::backward(&x, &weight_values, &grad, self.eps))
            })
        })?;
        let wanted =
            |values, like: &Tensor| like.track_op().then(|| tensor_like(values, like)).transpose();
        Ok((wanted(dx.into_vec(), x)?, wanted(dweight, weight)?, wanted(dbias, bias)?))
    }
}
