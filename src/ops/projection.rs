//! Linear projections with LoRA, one or three that share their input, by a given engine.
//!
//! ```text
//! y_p = x W_p^T + b_p + scaling_p * (drop_p(x) A_p^T B_p^T + lora_bias_p)      for each projection p
//! out = act(cat(y_0 .. y_n)) + residual
//! ```
//!
//! q, k and v stay three tensors under three names, for checkpoints, adapters and users. The operation writes them side
//! by side into one packed output, so nothing is ever concatenated.

use super::arguments::Projection;
use super::cpu::{Chain, Layer, Residual};
#[cfg(any(test, feature = "cuda"))]
use super::custom::operand;
use super::custom::Engine;
#[cfg(feature = "cuda")]
use super::gpu::projection::{Collected, Projections};
#[cfg(feature = "cuda")]
use super::{collector::Collector, computed, params};
use super::{composed, fallback, Activation};
#[cfg(any(test, feature = "cuda"))]
use crate::launch::projection::Parameter;
#[cfg(feature = "cuda")]
use crate::launch::Gpu;
use crate::problem::ProjectionProblem;
#[cfg(any(test, feature = "cuda"))]
use candle_core::DType;
use candle_core::{bail, Result, Tensor};
#[cfg(feature = "cuda")]
use std::sync::Arc;

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
    let weights = projections.iter().map(|p| (p.weight.clone(), p.scales.cloned())).collect();
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
            Engine::Composed => {
                let trained = self.projections.iter().any(|p| p.weight.track_op());
                let reason = if trained { "a base weight is trained" } else { fallback::NO_KERNEL };
                fallback::tell(ProjectionProblem::op(self.projections.len()), self.x, reason);
                match *self.projections {
                    [q, k, v] => composed::lora_qkv(self.x, &[q, k, v]),
                    [one] => composed::lora_linear(self.x, &one, self.activation, self.residual),
                    ref other => bail!("projections are one or three, got {}", other.len()),
                }
            }
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
        let x = operand(self.x)?;
        let (call, packed) = of_gpu(&x, self.projections, self.activation, x.track_op(), gpu)?;
        let residual = self.residual.map(operand).transpose()?;
        let (op, has_residual) = (call.op, residual.is_some());
        let inputs = (&x, packed.as_ref(), residual.as_ref());
        let [second, third] = [&packed, &residual].map(|input| input.as_ref().unwrap_or(&x));
        let (out, shape, saved) = call.forward([&x, second, third], has_residual)?;
        let out = (candle_core::Storage::Cuda(out), shape);
        computed::node(op, inputs, out, move |[x, parameters, residual], _, grad| {
            let dresidual = (has_residual && residual.track_op()).then(|| grad.clone());
            let (dx, dparameters) = call.backward([x, parameters], x.track_op(), &saved, grad)?;
            Ok((dx, dparameters, dresidual))
        })
    }
}

/// The projections as a GPU's kernels compute them for a contiguous x. Their trained parameters are one input, unless a
/// collector takes the gradients. `tracked` says whether a gradient goes to what comes before.
#[cfg(feature = "cuda")]
pub(super) fn of_gpu(
    x: &Tensor,
    projections: &[Projection<'_>],
    activation: Activation,
    tracked: bool,
    gpu: Gpu,
) -> Result<(Projections, Option<Tensor>)> {
    let op = ProjectionProblem::op(projections.len());
    let problems = projections.iter().map(Projection::problem).collect();
    // Kernels take one dtype; weights in int8, with scales, were refused before.
    let weights = projections.iter().map(|part| operand(&part.weight.to_dtype(x.dtype())?));
    let weights = weights.collect::<Result<Vec<_>>>()?;
    let tensors: Vec<_> = projections.iter().flat_map(Projection::parameters).collect();
    let trained: Vec<_> =
        tensors.iter().filter(|tensor| tensor.track_op()).map(|&tensor| tensor.clone()).collect();
    let is_trained = !trained.is_empty();
    let takes_all = |collector: &Arc<Collector>| trained.iter().all(|t| collector.takes(t));
    let collector = Collector::open().filter(|collector| is_trained && takes_all(collector));
    // One trained parameter has to be an input where nothing else ties the operation to the graph.
    let (packed, packs) = match (&collector, trained.first()) {
        (_, None) => (None, 0),
        (Some(_), _) if tracked => (None, 0),
        (Some(_), Some(first)) => (Some(first.clone()), 1),
        (None, _) => (Some(params::pack(&trained, x.device())?), trained.len()),
    };
    let (parameters, in_place) = places(&tensors, x.dtype(), packs)?;
    let collected =
        collector.map(|collector| Collected { collector, tensors: trained, but_first: packs > 0 });
    let (shape, keep) = (x.shape().clone(), tracked || is_trained);
    let call = Projections {
        op,
        shape,
        problems,
        activation,
        weights,
        parameters,
        in_place,
        collected,
        keep,
        gpu,
    };
    Ok((call, packed))
}

/// Where kernels find each parameter, and those that they read in place: biases in `dtype` or f32, adapters in f32. The
/// first `packs` trained ones are packed.
#[cfg(any(test, feature = "cuda"))]
fn places(
    tensors: &[&Tensor],
    dtype: DType,
    mut packs: usize,
) -> Result<(Vec<Parameter>, Vec<Tensor>)> {
    let (mut parameters, mut in_place) =
        (Vec::with_capacity(tensors.len()), Vec::with_capacity(tensors.len()));
    for tensor in tensors {
        let trained = tensor.track_op();
        let (packed, typed) = (trained && packs > 0, tensor.rank() == 1 && tensor.dtype() == dtype);
        packs -= usize::from(packed);
        let typed = typed && dtype != DType::F32;
        parameters.push(Parameter { packed, typed, trained });
        if !packed {
            let read_as = if typed { dtype } else { DType::F32 };
            in_place.push(operand(&tensor.to_dtype(read_as)?)?);
        }
    }
    Ok((parameters, in_place))
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
        let base = Projection { weight: &weight, scales: None, bias: Some(&bias), lora: None };
        let adapted = Projection { lora: Some(lora), ..base };
        let read = |projections: &[Projection<'_>], packs| {
            let tensors: Vec<_> = projections.iter().flat_map(Projection::parameters).collect();
            places(&tensors, DType::BF16, packs)
        };
        let ids = |tensors: &[Tensor]| tensors.iter().map(Tensor::dtype).collect::<Vec<_>>();

        let (frozen, in_place) = read(&[base, adapted], 1)?;
        let typed: Vec<_> = frozen.iter().map(|parameter| parameter.typed).collect();
        assert_eq!(typed, [true, true, false, false, true]);
        assert!(frozen.iter().all(|parameter| !parameter.packed && !parameter.trained));
        let (half, full) = (DType::BF16, DType::F32);
        assert_eq!(ids(&in_place), [half, half, full, full, half]);

        // A dtype that kernels do not read is converted.
        let a16 = a.to_dtype(DType::BF16)?;
        let (_, in_place) =
            read(&[Projection { lora: Some(Lora { a: &a16, ..lora }), ..base }], 1)?;
        assert_eq!(ids(&in_place), [half, full, full, half]);

        // A trained parameter alone is packed, for its gradient, unless a collector takes it.
        let trained = Var::from_tensor(&b)?;
        let adapted = Projection { lora: Some(Lora { b: &trained, ..lora }), ..base };
        for (packs, expected) in [(1, 3), (0, 4)] {
            let (parameters, in_place) = read(&[adapted], packs)?;
            let [_, _, b, _] = parameters[..] else { panic!("{parameters:?}") };
            assert_eq!((b.packed, b.trained, in_place.len()), (packs > 0, true, expected));
        }
        Ok(())
    }
}
