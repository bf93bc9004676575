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
use super::custom::Engine;
#[cfg(any(test, feature = "cuda"))]
use super::params;
use super::{composed, fallback, Activation};
#[cfg(feature = "cuda")]
use super::{computed, custom::operand, gpu::projection::Projections};
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
        let (out, shape, saved) = call.forward(computed::three(inputs), has_residual)?;
        let out = (candle_core::Storage::Cuda(out), shape);
        computed::node(op, inputs, out, move |[x, parameters, residual], _, grad| {
            let dresidual = (has_residual && residual.track_op()).then(|| grad.clone());
            let wanted = [x, parameters].map(Tensor::track_op);
            let (dx, dparameters) = call.backward([x, parameters], wanted, &saved, grad)?;
            Ok((dx, dparameters, dresidual))
        })
    }
}

/// The projections as a GPU's kernels compute them for a contiguous x; their parameters as one input if one of them wants a
/// gradient. `keep` says whether a backward comes in any case.
#[cfg(feature = "cuda")]
pub(super) fn of_gpu(
    x: &Tensor,
    projections: &[Projection<'_>],
    activation: Activation,
    keep: bool,
    gpu: Gpu,
) -> Result<(Projections, Option<Tensor>)> {
    let op = ProjectionProblem::op(projections.len());
    let (layer, parameters) = layer(projections, activation);
    let Layer::Projections { problems, weights, .. } = layer else {
        bail!("{op}: the layer is no projection")
    };
    // Kernels take one dtype; weights in int8, with scales, were refused before.
    let weights = weights.iter().map(|(weight, _)| operand(&weight.to_dtype(x.dtype())?));
    let weights = weights.collect::<Result<Vec<_>>>()?;
    let in_place = in_place(&parameters, x.dtype())?;
    let packed = match in_place {
        Some(_) => None,
        None => Some(params::pack(&parameters, x.device())?),
    };
    let (dims, keep) = (x.dims().to_vec(), keep || packed.is_some());
    Ok((Projections { op, dims, problems, activation, weights, in_place, keep, gpu }, packed))
}

/// The parameters for kernels that read them in place: biases in `dtype` or f32, adapters in f32.
#[cfg(any(test, feature = "cuda"))]
fn in_place(parameters: &[Tensor], dtype: DType) -> Result<Option<Vec<Tensor>>> {
    params::in_place(parameters, |tensor| match (tensor.rank(), tensor.dtype() == dtype) {
        (1, true) => dtype,
        _ => DType::F32,
    })
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
