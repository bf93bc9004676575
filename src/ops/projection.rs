//! Linear projections with LoRA: [`lora_linear`] is one, [`lora_qkv`] three that share their input.
//!
//! ```text
//! y_p = x W_p^T + b_p + scaling_p * (drop_p(x) A_p^T B_p^T + lora_bias_p)      for each projection p
//! out = act(cat(y_0 .. y_n)) + residual
//! ```
//!
//! q, k and v stay three tensors under three names, for checkpoints, adapters and users; the operation writes
//! them side by side into one packed output, so nothing is ever concatenated.

use super::custom::{dtype_of, from_f32, operand, tensor_like, to_f32, vec_f32, with_f32};
use super::{check, composed, custom, Activation, Gradients};
use crate::cpu::projection::{self, Saved, Weight, Weights};
use crate::launch::family::{Family, Implementation};
use crate::launch::projection as kernels;
use crate::philox::Dropout;
use crate::problem::{self, LoraProblem, ProjectionProblem};
use candle_core::{
    bail, CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor,
};
use std::sync::OnceLock;

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
    const OP: &str = "lora-linear";
    validate(OP, x, projection)?;
    if let Some(residual) = residual {
        let mut expected = x.dims().to_vec();
        if let Some(last) = expected.last_mut() {
            *last = projection.weight.dims()[0];
        }
        check::shape(OP, "residual", residual, &expected)?;
        check::same_kind(OP, "residual", residual, x)?;
    }
    let Some(fused) = activation.fused() else {
        let y = activation.apply(&lora_linear(x, projection, Activation::None, None)?)?;
        return residual.map_or(Ok(y.clone()), |residual| residual + y);
    };
    match implementation(x, &[*projection], fused)? {
        Some(whose) => apply(OP, x, &[*projection], fused, residual, whose),
        None => composed::lora_linear(x, projection, activation, residual),
    }
}

/// The q, k and v projections of attention, packed: `x [.., C] -> [.., 3C]`, q first, then k, then v.
///
/// Any subset may carry LoRA, each with its own rank, scaling and dropout mask. Gradients as in [`lora_linear`].
///
/// # Errors
/// As [`lora_linear`]; besides, the three projections must have equal output widths.
pub fn lora_qkv(x: &Tensor, projections: &[Projection<'_>; 3]) -> Result<Tensor> {
    const OP: &str = "lora-qkv";
    for projection in projections {
        validate(OP, x, projection)?;
    }
    equal_widths(OP, projections)?;
    const ACTIVATION: problem::Activation = problem::Activation::Identity;
    match implementation(x, projections, ACTIVATION)? {
        Some(whose) => apply(OP, x, projections, ACTIVATION, None, whose),
        None => composed::lora_qkv(x, projections),
    }
}

/// Projections by the kernels of one implementation, for the self-test: shapes are not checked.
///
/// # Errors
/// On problems that no kernel covers.
#[cfg(feature = "cuda")]
pub(super) fn by_kernels(
    x: &Tensor,
    projections: &[Projection<'_>],
    activation: problem::Activation,
    residual: Option<&Tensor>,
    whose: Implementation,
) -> Result<Tensor> {
    apply("projection", x, projections, activation, residual, whose)
}

/// q, k and v, each validated, fill equal parts of the packed output.
pub(super) fn equal_widths(op: &'static str, projections: &[Projection<'_>; 3]) -> Result<()> {
    let [q, k, v] = projections.each_ref().map(|p| p.weight.dims()[0]);
    if q != k || k != v {
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

/// The implementation that computes the projections. The fused operation holds its weights captured, where no gradient reaches them;
/// trainable ones, and devices without kernels, take the composed path.
fn implementation(
    x: &Tensor,
    projections: &[Projection<'_>],
    activation: problem::Activation,
) -> Result<Option<Implementation>> {
    if projections.iter().any(|p| p.weight.track_op()) {
        return Ok(None);
    }
    let problems: Vec<_> = projections.iter().map(problem).collect();
    let problem = kernel_problem(x.dims(), &problems, activation);
    let covered = || kernels::covers(&problem, x.dtype());
    let family = |hopper| Family::of_projections(&problem, x.dtype(), hopper);
    custom::implementation(x.device(), x.dtype(), covered, family)
}

/// The problem as the kernels' launch code takes it.
fn kernel_problem<'a>(
    x_dims: &[usize],
    projections: &'a [ProjectionProblem],
    activation: problem::Activation,
) -> kernels::Problem<'a> {
    let in_dim = x_dims.last().copied().unwrap_or(1);
    let rows = x_dims.iter().product::<usize>() / in_dim.max(1);
    kernels::Problem { rows, in_dim, projections, activation }
}

/// Applies the operation. Everything small is captured by it where it lies, for kernels that read it there; what has a
/// gradient to come is packed into one flat f32 tensor, an input, and so is everything on the CPU.
fn apply(
    name: &'static str,
    x: &Tensor,
    projections: &[Projection<'_>],
    activation: problem::Activation,
    residual: Option<&Tensor>,
    implementation: Implementation,
) -> Result<Tensor> {
    let x = operand(x)?;
    let separate = match x.device() {
        Device::Cpu => None,
        _ => where_they_lie(projections, x.dtype())?,
    };
    // In the place of an input that is not there: nobody reads it.
    let absent = x.detach();
    let small: Vec<_> = projections.iter().flat_map(small).collect();
    let small = match separate {
        Some(_) => absent.clone(),
        None if small.is_empty() => Tensor::zeros(1, DType::F32, x.device())?,
        None => {
            let flat = small.iter().map(|tensor| tensor.flatten_all()?.to_dtype(DType::F32));
            Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?
        }
    };
    let op = FusedProjection {
        name,
        problems: projections.iter().map(problem).collect(),
        weights: projections.iter().map(|p| weight_operand(p.weight, &x)).collect::<Result<_>>()?,
        separate,
        activation,
        residual: residual.is_some(),
        keep: x.track_op() || small.track_op(),
        implementation,
        saved: OnceLock::new(),
    };
    let residual = residual.map_or(Ok(absent), operand)?;
    x.apply_op3(&small, &residual, op)
}

/// The weight as the device's code takes it: kernels in the dtype of `x`.
fn weight_operand(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    match x.device() {
        Device::Cpu => operand(weight),
        _ => operand(&weight.to_dtype(x.dtype())?),
    }
}

/// The small tensors as kernels for `dtype` read them, in the order of `small_layout`: themselves, but for adapters in 16
/// bits, which become f32. None if one of them wants a gradient.
fn where_they_lie(projections: &[Projection<'_>], dtype: DType) -> Result<Option<Vec<Tensor>>> {
    if projections.iter().flat_map(small).any(Tensor::track_op) {
        return Ok(None);
    }
    let f32 = |tensor: &Tensor| operand(&tensor.to_dtype(DType::F32)?);
    let bias = |tensor: &Tensor| match tensor.dtype() == dtype {
        true => operand(tensor),
        false => f32(tensor),
    };
    let mut tensors = Vec::new();
    for projection in projections {
        tensors.extend(projection.bias.map(bias).transpose()?);
        if let Some(lora) = projection.lora {
            tensors.extend([f32(lora.a)?, f32(lora.b)?]);
            tensors.extend(lora.b_bias.map(bias).transpose()?);
        }
    }
    Ok(Some(tensors))
}

/// Everything small and differentiable of a projection, in the order of `small_layout`.
pub(super) fn small<'a>(p: &Projection<'a>) -> Vec<&'a Tensor> {
    let mut small = Vec::from_iter(p.bias);
    if let Some(lora) = p.lora {
        small.extend([lora.a, lora.b]);
        small.extend(lora.b_bias);
    }
    small
}

pub(super) fn problem(p: &Projection<'_>) -> ProjectionProblem {
    ProjectionProblem {
        out_dim: p.weight.dims()[0],
        bias: p.bias.is_some(),
        lora: p.lora.map(|lora| LoraProblem {
            rank: lora.a.dims()[0],
            scaling: lora.scaling as f32,
            dropout: lora.dropout,
            bias: lora.b_bias.is_some(),
        }),
    }
}

/// Inputs: x, the flat small tensors, the residual; placeholders for those that are absent or separate.
struct FusedProjection {
    name: &'static str,
    problems: Vec<ProjectionProblem>,
    weights: Vec<Tensor>,
    /// The small tensors, if they are no input: for kernels.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    separate: Option<Vec<Tensor>>,
    activation: problem::Activation,
    residual: bool,
    keep: bool,
    /// The kernels that compute it on a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    implementation: Implementation,
    saved: OnceLock<Kept>,
}

/// What the backward needs of the forward, where it was computed.
enum Kept {
    Cpu(Saved),
    #[cfg(feature = "cuda")]
    Gpu(super::gpu::projection::Saved),
}

impl FusedProjection {
    #[cfg(feature = "cuda")]
    fn on_gpu(&self, x_dims: &[usize]) -> super::gpu::projection::Projections<'_> {
        let problem = kernel_problem(x_dims, &self.problems, self.activation);
        super::gpu::projection::Projections {
            op: self.name,
            problem,
            weights: &self.weights,
            separate: self.separate.as_deref(),
            keep: self.keep,
            implementation: self.implementation,
        }
    }

    fn with_weights<R>(&self, f: impl FnOnce(&Weights<'_>) -> Result<R>) -> Result<R> {
        with_weights(self.name, &self.weights, &self.problems, f)
    }
}

fn weight<'a>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
    in_dim: usize,
) -> Result<Weight<'a>> {
    if let (CpuStorage::BF16(values), Some((start, end))) = (storage, layout.contiguous_offsets()) {
        if let Some(weight) = Weight::from_bf16(&values[start..end], in_dim) {
            return Ok(weight);
        }
    }
    Ok(Weight::F32(to_f32(op, storage, layout)?))
}

/// Calls `f` with the weights as the CPU path takes them.
pub(super) fn with_weights<R>(
    op: &'static str,
    weights: &[Tensor],
    projections: &[ProjectionProblem],
    f: impl FnOnce(&Weights<'_>) -> Result<R>,
) -> Result<R> {
    let guards: Vec<_> = weights.iter().map(Tensor::storage_and_layout).collect();
    let in_dim = weights[0].dims()[1];
    let values = guards
        .iter()
        .map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => weight(op, storage, layout, in_dim),
            _ => bail!("{op}: the weight left the CPU"),
        })
        .collect::<Result<Vec<_>>>()?;
    f(&Weights { in_dim, projections, weights: values })
}

impl CustomOp3 for FusedProjection {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        small: &CpuStorage,
        small_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let rows = to_f32(self.name, x, x_layout)?;
        let small = to_f32(self.name, small, small_layout)?;
        let residual = match self.residual {
            true => Some(to_f32(self.name, residual, residual_layout)?),
            false => None,
        };
        let (out, saved) = self.with_weights(|weights| {
            let residual = residual.as_deref();
            Ok(projection::forward(weights, &rows, &small, residual, self.activation, self.keep))
        })?;
        let mut dims = x_layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.problems.iter().map(|p| p.out_dim).sum();
        }
        // The operation runs once; a second value could only be equal.
        let _ = self.saved.set(Kept::Cpu(saved));
        Ok((from_f32(self.name, out.into_vec(), dtype_of(x))?, Shape::from(dims)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        small: &candle_core::CudaStorage,
        small_layout: &Layout,
        residual: &candle_core::CudaStorage,
        residual_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let inputs = [(x, x_layout), (small, small_layout), (residual, residual_layout)];
        let (out, shape, saved) = self.on_gpu(x_layout.dims()).forward(inputs, self.residual)?;
        let _ = self.saved.set(Kept::Gpu(saved));
        Ok((out, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        small: &Tensor,
        residual: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<Gradients> {
        let wanted = (x.track_op(), small.track_op());
        let dresidual = (self.residual && residual.track_op()).then(|| grad_res.clone());
        let saved = match self.saved.get() {
            Some(Kept::Cpu(saved)) => saved,
            #[cfg(feature = "cuda")]
            Some(Kept::Gpu(saved)) => {
                let gpu = self.on_gpu(x.dims());
                let (dx, dsmall) = gpu.backward(x, small, saved, grad_res, wanted)?;
                return Ok((dx, dsmall, dresidual));
            }
            None => bail!("{}: backward without a forward", self.name),
        };
        let small_values = vec_f32(self.name, small)?;
        let grads = with_f32(self.name, x, |x| {
            with_f32(self.name, grad_res, |grad| {
                self.with_weights(|weights| {
                    let (activation, small) = (self.activation, &small_values);
                    Ok(projection::backward(weights, &x, small, saved, &grad, activation, wanted))
                })
            })
        })?;
        let dx = wanted.0.then(|| tensor_like(grads.x.into_vec(), x)).transpose()?;
        let dsmall = wanted.1.then(|| tensor_like(grads.small, small)).transpose()?;
        Ok((dx, dsmall, dresidual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn zeros(shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::zeros(shape, dtype, &Device::Cpu)
    }

    #[test]
    fn kernels_read_frozen_biases_and_adapters_where_they_lie() -> Result<()> {
        let (weight, bias) = (zeros(&[6, 4], DType::BF16)?, zeros(&[6], DType::BF16)?);
        let (a, b) = (zeros(&[2, 4], DType::F32)?, zeros(&[6, 2], DType::F32)?);
        let lora = Lora { a: &a, b: &b, b_bias: Some(&bias), scaling: 1.0, dropout: None };
        let base = Projection { weight: &weight, bias: Some(&bias), lora: None };
        let adapted = Projection { lora: Some(lora), ..base };
        let ids = |tensors: Vec<Tensor>| tensors.iter().map(Tensor::id).collect::<Vec<_>>();

        let lie = where_they_lie(&[base, adapted], DType::BF16)?.map(ids);
        assert_eq!(lie, Some([&bias, &bias, &a, &b, &bias].map(Tensor::id).to_vec()));

        // What kernels do not read is converted.
        let a16 = a.to_dtype(DType::BF16)?;
        let adapted = Projection { lora: Some(Lora { a: &a16, ..lora }), ..base };
        let lie = where_they_lie(&[adapted], DType::BF16)?.unwrap_or_default();
        assert_eq!((lie[1].dtype(), lie[2].id()), (DType::F32, b.id()));

        // What is trained is one input, for the gradient.
        let trained = Var::from_tensor(&b)?;
        let adapted = Projection { lora: Some(Lora { b: &trained, ..lora }), ..base };
        assert!(where_they_lie(&[adapted], DType::BF16)?.is_none());
        Ok(())
    }
}
