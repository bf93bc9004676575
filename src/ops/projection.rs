//! Linear projections with LoRA, one or three that share their input, by a given engine.
//!
//! ```text
//! y_p = x W_p^T + b_p + scaling_p * (drop_p(x) A_p^T B_p^T + lora_bias_p)      for each projection p
//! out = act(cat(y_0 .. y_n)) + residual
//! ```
//!
//! q, k and v stay three tensors under three names, for checkpoints, adapters and users; the operation writes
//! them side by side into one packed output, so nothing is ever concatenated.

use super::arguments::Projection;
use super::cpu::{Chain, Layer, Residual};
use super::custom::Engine;
#[cfg(any(test, feature = "cuda"))]
use super::params;
use super::{composed, Activation};
#[cfg(feature = "cuda")]
use super::{computed, custom::operand};
use crate::launch::projection as kernels;
#[cfg(feature = "cuda")]
use crate::launch::Gpu;
use crate::problem::ProjectionProblem;
#[cfg(any(test, feature = "cuda"))]
use candle_core::DType;
use candle_core::{bail, Result, Tensor};

/// Projections by one engine: shapes are not checked.
///
/// # Errors
/// - no kernel covers the problem.
pub(super) fn by(
    x: &Tensor,
    projections: &[Projection<'_>],
    activation: Activation,
    residual: Option<&Tensor>,
    engine: Engine,
) -> Result<Tensor> {
    Call { x, projections, activation, residual }.run(engine)
}

/// q, k and v, each validated, fill equal parts of the packed output.
pub(super) fn equal_widths(projections: &[Projection<'_>; 3]) -> Result<()> {
    let [q, k, v] = projections.each_ref().map(|p| p.weight.dims()[0]);
    if q != k || k != v {
        let op = ProjectionProblem::QKV;
        bail!("{op}: q, k and v must have equal output widths, got {q}, {k} and {v}")
    }
    Ok(())
}

/// The projections as the CPU engine runs them, and their parameters.
pub(super) fn layer(
    projections: &[Projection<'_>],
    activation: Activation,
) -> (Layer, Vec<Tensor>) {
    let problems = projections.iter().map(Projection::problem).collect();
    let weights = projections.iter().map(|p| p.weight.clone()).collect();
    let layer = Layer::Projections { problems, weights, activation };
    (layer, projections.iter().flat_map(Projection::parameters).cloned().collect())
}

/// One call of an operation, checked.
struct Call<'a> {
    x: &'a Tensor,
    projections: &'a [Projection<'a>],
    activation: Activation,
    residual: Option<&'a Tensor>,
}

impl Call<'_> {
    fn run(&self, engine: Engine) -> Result<Tensor> {
        match engine {
            #[cfg(feature = "cuda")]
            Engine::Gpu(gpu) => self.on_gpu(gpu),
            Engine::Composed => match *self.projections {
                [q, k, v] => composed::lora_qkv(self.x, &[q, k, v]),
                [one] => composed::lora_linear(self.x, &one, self.activation, self.residual),
                ref other => bail!("projections are one or three, got {}", other.len()),
            },
            Engine::Cpu => {
                let op = ProjectionProblem::op(self.projections.len());
                let mut chain = Chain::new(op, self.x);
                chain.push(layer(self.projections, self.activation));
                chain.run(self.residual.map_or(Residual::None, Residual::Other))
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn on_gpu(&self, gpu: Gpu) -> Result<Tensor> {
        let (op, activation) = (ProjectionProblem::op(self.projections.len()), self.activation);
        let x = operand(self.x)?;
        let (layer, parameters) = layer(self.projections, activation);
        let Layer::Projections { problems, weights, .. } = layer else {
            bail!("{op}: the layer is no projection")
        };
        // Kernels take one dtype.
        let weights = weights.iter().map(|weight| operand(&weight.to_dtype(x.dtype())?));
        let weights = weights.collect::<Result<Vec<_>>>()?;
        let frozen = in_place(&parameters, x.dtype())?;
        let packed = match frozen {
            Some(_) => None,
            None => Some(params::pack(&parameters, x.device())?),
        };
        let residual = self.residual.map(operand).transpose()?;
        let keep = x.track_op() || packed.as_ref().is_some_and(Tensor::track_op);
        let dims = x.dims().to_vec();
        let inputs = (&x, packed.as_ref(), residual.as_ref());
        let has_residual = residual.is_some();
        let call = OnGpu { op, dims, problems, weights, frozen, activation, keep, gpu };
        let (out, shape, saved) = computed::with_cuda_storages(op, inputs, |inputs| {
            call.projections().forward(inputs, has_residual)
        })?;
        let out = (candle_core::Storage::Cuda(out), shape);
        computed::node(op, inputs, out, move |[x, parameters, residual], _, grad| {
            let wanted = (x.track_op(), parameters.track_op());
            let dresidual = (has_residual && residual.track_op()).then(|| grad.clone());
            let (dx, dparameters) =
                call.projections().backward(x, parameters, &saved, grad, wanted)?;
            Ok((dx, dparameters, dresidual))
        })
    }
}

/// The parameters for kernels that read them in place: biases in `dtype` or f32, adapters in f32.
#[cfg(any(test, feature = "cuda"))]
fn in_place(parameters: &[Tensor], dtype: DType) -> Result<Option<Vec<Tensor>>> {
    params::in_place(parameters, |tensor| match (tensor.rank(), tensor.dtype() == dtype) {
        (1, true) => dtype,
        _ => DType::F32,
    })
}

/// The problem as the kernels' launch code takes it.
pub(super) fn kernel_problem<'a>(
    x_dims: &[usize],
    projections: &'a [ProjectionProblem],
    activation: Activation,
) -> kernels::Problem<'a> {
    let in_dim = x_dims.last().copied().unwrap_or(1);
    let rows = x_dims.iter().product::<usize>() / in_dim.max(1);
    kernels::Problem { rows, in_dim, projections, activation }
}

/// What the backward on a GPU needs besides tensors of candle's graph.
#[cfg(feature = "cuda")]
struct OnGpu {
    op: &'static str,
    /// Of x.
    dims: Vec<usize>,
    problems: Vec<ProjectionProblem>,
    weights: Vec<Tensor>,
    /// The parameters, if kernels read them in place.
    frozen: Option<Vec<Tensor>>,
    activation: Activation,
    keep: bool,
    gpu: Gpu,
}

#[cfg(feature = "cuda")]
impl OnGpu {
    fn projections(&self) -> super::gpu::projection::Projections<'_> {
        super::gpu::projection::Projections {
            op: self.op,
            problem: kernel_problem(&self.dims, &self.problems, self.activation),
            weights: &self.weights,
            separate: self.frozen.as_deref(),
            keep: self.keep,
            gpu: self.gpu,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Lora;
    use candle_core::{Device, Var};

    #[test]
    fn kernels_read_frozen_biases_and_adapters_in_place() -> Result<()> {
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
        let (weight, bias) = (zeros(&[6, 4], DType::BF16)?, zeros(&[6], DType::BF16)?);
        let (a, b) = (zeros(&[2, 4], DType::F32)?, zeros(&[6, 2], DType::F32)?);
        let lora = Lora { a: &a, b: &b, b_bias: Some(&bias), scaling: 1.0, dropout: None };
        let base = Projection { weight: &weight, bias: Some(&bias), lora: None };
        let adapted = Projection { lora: Some(lora), ..base };
        let read = |projections: &[Projection<'_>]| {
            in_place(&layer(projections, Activation::Identity).1, DType::BF16)
        };

        let frozen = read(&[base, adapted])?.unwrap_or_default();
        let expected = [&bias, &bias, &a, &b, &bias].map(Tensor::id);
        assert_eq!(frozen.iter().map(Tensor::id).collect::<Vec<_>>(), expected);

        // A dtype that kernels do not read is converted.
        let a16 = a.to_dtype(DType::BF16)?;
        let frozen = read(&[Projection { lora: Some(Lora { a: &a16, ..lora }), ..base }])?;
        let frozen = frozen.unwrap_or_default();
        assert_eq!((frozen[1].dtype(), frozen[2].id()), (DType::F32, b.id()));

        // A trained parameter is packed, for its gradient.
        let trained = Var::from_tensor(&b)?;
        let adapted = Projection { lora: Some(Lora { b: &trained, ..lora }), ..base };
        assert!(read(&[adapted])?.is_none());
        Ok(())
    }
}
