//! Linear projections with LoRA: [`lora_linear`] is one, [`lora_qkv`] three that share their input.
//!
//! ```text
//! y_p = x W_p^T + b_p + scaling_p * (drop_p(x) A_p^T B_p^T + lora_bias_p)      for each projection p
//! out = act(cat(y_0 .. y_n)) + residual
//! ```
//!
//! q, k and v stay three tensors under three names, for checkpoints, adapters and users; the operation writes
//! them side by side into one packed output, so nothing is ever concatenated.

use super::cpu::{Chain, Layer, Residual};
use super::custom::{engine, Engine};
#[cfg(any(test, feature = "cuda"))]
use super::params;
use super::{check, composed, Activation};
#[cfg(feature = "cuda")]
use super::{computed, custom::operand};
use crate::launch::projection as kernels;
#[cfg(feature = "cuda")]
use crate::launch::Gpu;
use crate::philox::Dropout;
use crate::problem::{LoraProblem, ProjectionProblem};
#[cfg(any(test, feature = "cuda"))]
use candle_core::DType;
use candle_core::{bail, Result, Tensor};

/// The low-rank part of a projection.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    /// `[rank, in]`
    pub a: &'a Tensor,
    /// `[out, rank]`
    pub b: &'a Tensor,
    /// `[out]`; multiplied by `scaling` too, as in PEFT.
    pub b_bias: Option<&'a Tensor>,
    /// Factor of the whole low-rank part.
    pub scaling: f64,
    /// Dropout on the input of `a`, over the elements of `x` seen as `[rows, in]`.
    pub dropout: Option<Dropout>,
}

/// One projection: base weight, bias, adapter.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[out, in]`
    pub weight: &'a Tensor,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// The adapter, if any.
    pub lora: Option<Lora<'a>>,
}

/// A linear layer with LoRA, activation and residual: `x [.., in] -> [.., out]`; `residual` is `[.., out]`.
///
/// Gradients go to `x`, `residual`, the biases and the adapter; a weight that is a variable gets one too, on the
/// slower composed path. Every parameter may be f32 while `x` is f16 or bf16; a weight in f32 is rounded to the dtype of
/// `x` for the kernels of a GPU.
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
    validate(OP, x, projection)?;
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
    let call = Call { x, projections: &[*projection], activation, residual };
    call.run(call.engine()?)
}

/// The q, k and v projections of attention, packed: `x [.., C] -> [.., 3C]`, q first, then k, then v.
///
/// Any subset may carry LoRA, each with its own rank, scaling and dropout mask. Gradients as in [`lora_linear`].
///
/// # Errors
/// As [`lora_linear`]; besides, the three projections must have equal output widths.
pub fn lora_qkv(x: &Tensor, projections: &[Projection<'_>; 3]) -> Result<Tensor> {
    const OP: &str = ProjectionProblem::QKV;
    for projection in projections {
        validate(OP, x, projection)?;
    }
    equal_widths(projections)?;
    let call = Call { x, projections, activation: Activation::Identity, residual: None };
    call.run(call.engine()?)
}

/// Projections by one engine, for the self-test and measurements: shapes are not checked.
///
/// # Errors
/// On problems that no kernel covers.
#[cfg(feature = "cuda")]
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

pub(super) fn validate(op: &'static str, x: &Tensor, projection: &Projection<'_>) -> Result<()> {
    check::float(op, "x", x)?;
    check::not_empty(op, "x", x)?;
    let weight = projection.weight;
    check::not_empty(op, "weight", weight)?;
    check::parameter(op, "weight", weight, x)?;
    let in_dim = x.dims()[x.rank() - 1];
    if weight.rank() != 2 || weight.dims()[1] != in_dim {
        bail!("{op}: weight must have shape [out, {in_dim}], got {:?}", weight.dims())
    }
    let out_dim = weight.dims()[0];
    if let Some(bias) = projection.bias {
        check::shape(op, "bias", bias, &[out_dim])?;
        check::parameter(op, "bias", bias, x)?;
    }
    let Some(lora) = &projection.lora else { return Ok(()) };
    let rank = lora.a.dims().first().copied().unwrap_or(0);
    if rank == 0 {
        bail!(
            "{op}: lora A must have shape [rank, {in_dim}] with rank >= 1, got {:?}",
            lora.a.dims()
        )
    }
    check::shape(op, "lora A", lora.a, &[rank, in_dim])?;
    check::shape(op, "lora B", lora.b, &[out_dim, rank])?;
    for (name, tensor) in
        [("lora A", Some(lora.a)), ("lora B", Some(lora.b)), ("lora bias", lora.b_bias)]
    {
        if let Some(tensor) = tensor {
            check::float(op, name, tensor)?;
            check::same_device(op, name, tensor, x)?;
        }
    }
    if let Some(bias) = lora.b_bias {
        check::shape(op, "lora bias", bias, &[out_dim])?;
    }
    check::finite(op, "scaling", lora.scaling)?;
    lora.dropout.map_or(Ok(()), |dropout| dropout.validate(op))
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

impl<'a> Projection<'a> {
    /// Everything differentiable but the weight, in the order of `small_layout`.
    fn parameters(&self) -> Vec<&'a Tensor> {
        let mut parameters = Vec::from_iter(self.bias);
        if let Some(lora) = self.lora {
            parameters.extend([lora.a, lora.b]);
            parameters.extend(lora.b_bias);
        }
        parameters
    }

    fn problem(&self) -> ProjectionProblem {
        ProjectionProblem {
            out_dim: self.weight.dims()[0],
            bias: self.bias.is_some(),
            lora: self.lora.map(|lora| LoraProblem {
                rank: lora.a.dims()[0],
                scaling: lora.scaling as f32,
                dropout: lora.dropout,
                bias: lora.b_bias.is_some(),
            }),
        }
    }
}

/// One call of an operation, checked.
struct Call<'a> {
    x: &'a Tensor,
    projections: &'a [Projection<'a>],
    activation: Activation,
    residual: Option<&'a Tensor>,
}

impl Call<'_> {
    /// What computes the call. A fused operation gives its weights no gradient, so trainable ones take the composed path,
    /// as do devices without kernels.
    fn engine(&self) -> Result<Engine> {
        let (x, projections) = (self.x, self.projections);
        if projections.iter().any(|p| p.weight.track_op()) {
            return Ok(Engine::Composed);
        }
        let problems: Vec<_> = projections.iter().map(Projection::problem).collect();
        let problem = kernel_problem(x.dims(), &problems, self.activation);
        engine(x.device(), x.dtype(), |gpu| {
            kernels::plan(problem, x.dtype(), gpu).map(|plan| plan.family())
        })
    }

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
fn kernel_problem<'a>(
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
