//! The CPU engine: layers in a row as one node of candle's graph, `last(.. first(x))`, and a residual.
//!
//! A single operation is a chain of one layer. In a longer chain intermediates are freed once no backward needs them,
//! and reuse buffers. They are stored in the dtype of `x`, those of f16 in f32. Only the gradients of `x`, of the
//! parameters and of a residual reach candle's store.

use super::check::Outline;
use super::computed::node;
use super::custom::{tensor_like, to_f32, with_f32, Stored};
use super::{params, Activation};
use crate::cpu::projection::{Projections, Weight};
use crate::cpu::{self, activation::Activation as Function, buffer::Elements};
use crate::problem::{AttentionProblem, ProjectionProblem};
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, DType, Layout, Result, Shape, Storage, Tensor};
use half::bf16;
use std::borrow::Cow;
use std::ops::Range;

/// The computation of a layer; its parameters are in the chain.
pub(super) enum Layer {
    /// Parameters: weight, bias.
    Norm { eps: f64 },
    /// Parameters: those of each projection in turn, see [`crate::problem::small_layout`].
    Projections {
        problems: Vec<ProjectionProblem>,
        /// With the scales of those in int8.
        weights: Vec<(Tensor, Option<Tensor>)>,
        activation: Activation,
    },
    /// No parameters.
    Activation(Function),
    /// Parameters: the tables, then the pad if there is one.
    Attention { problem: AttentionProblem, pad: bool },
}

/// A tensor that is added to the last layer's output.
#[derive(Clone, Copy)]
pub(super) enum Residual<'a> {
    None,
    /// The chain's input, `x + last(.. first(x))`.
    Input,
    Other(&'a Tensor),
}

/// Layers that are still to run on `x`.
pub(super) struct Chain<'a> {
    op: &'static str,
    x: &'a Tensor,
    dims: Vec<usize>,
    stages: Vec<Stage>,
    parameters: Vec<Tensor>,
    /// Elements of the parameters so far.
    end: usize,
}

impl<'a> Chain<'a> {
    /// No layer yet; `op` names the chain in errors.
    pub fn new(op: &'static str, x: &'a Tensor) -> Self {
        Self { op, x, dims: x.dims().to_vec(), stages: vec![], parameters: vec![], end: 0 }
    }

    /// The next layer's input, for the checks.
    pub fn next_input(&self) -> Outline<'_> {
        Outline { dims: &self.dims, ..self.x.into() }
    }

    /// One more layer, checked by the caller.
    pub fn push(&mut self, (layer, parameters): (Layer, Vec<Tensor>)) {
        match (&layer, self.dims.last_mut()) {
            (Layer::Projections { problems, .. }, Some(last)) => {
                *last = problems.iter().map(|p| p.out_dim).sum();
            }
            (Layer::Attention { problem: p, .. }, _) => {
                self.dims = vec![p.batch, p.h, p.w, p.channels()];
            }
            _ => {}
        }
        let count: usize = parameters.iter().map(Tensor::elem_count).sum();
        let trainable = parameters.iter().any(Tensor::track_op);
        let range = self.end..self.end + count;
        self.stages.push(Stage { op: self.op, layer, parameters: range, trainable });
        self.end += count;
        self.parameters.extend(parameters);
    }

    /// The last layer's output plus the residual.
    ///
    /// # Errors
    /// - the chain adds its input and does not end in its shape;
    /// - a tensor is not on the CPU.
    pub fn run(self, residual: Residual<'_>) -> Result<Tensor> {
        match self.x.dtype() {
            DType::BF16 => self.run_in::<bf16>(residual),
            _ => self.run_in::<f32>(residual),
        }
    }

    /// [`run`](Self::run) with intermediates of type `T`.
    fn run_in<T: Stored>(self, residual: Residual<'_>) -> Result<Tensor> {
        let Self { op, x, dims, stages, parameters, .. } = self;
        if matches!(residual, Residual::Input) && dims != x.dims() {
            bail!("{op}: a branch from {:?} must lead back to it, got {dims:?}", x.dims())
        }
        let parameters = params::pack(&parameters, x.device())?;
        let keep = x.track_op() || parameters.track_op();
        let (out, kept) = T::with(op, x, |x| {
            with_f32(op, &parameters, |parameters| match residual {
                Residual::None => forward::<T>(&stages, (&x, &parameters), None, keep),
                Residual::Input => forward(&stages, (&x, &parameters), Some(&x), keep),
                Residual::Other(tensor) => T::with(op, tensor, |residual| {
                    forward(&stages, (&x, &parameters), Some(&residual), keep)
                }),
            })
        })?;
        let value = Storage::Cpu(T::storage(op, out.into_vec(), x.dtype())?);
        let other = match residual {
            Residual::Other(tensor) => Some(tensor),
            _ => None,
        };
        let (adds_input, adds_other) = (matches!(residual, Residual::Input), other.is_some());
        let inputs = (x, Some(&parameters), other);
        node(op, inputs, (value, Shape::from(dims)), move |inputs, value, grad| {
            let [x, parameters, other] = inputs;
            let dother = (adds_other && other.track_op()).then(|| grad.clone());
            if !keep {
                return Ok((None, None, dother));
            }
            let (mut dx, dparameters) = T::with(op, x, |rows| {
                with_f32(op, parameters, |parameters| {
                    T::with(op, grad, |grad| {
                        let values = (&*rows, &*parameters, &*grad);
                        backward::<T>(&stages, &kept, values, value, x.track_op())
                    })
                })
            })?;
            if x.track_op() && adds_input {
                T::with(op, grad, |grad| {
                    cpu::add_in_parallel(&mut dx, &grad);
                    Ok(())
                })?;
            }
            let dx = match x.track_op() {
                true => {
                    let storage = Storage::Cpu(T::storage(op, dx.into_vec(), x.dtype())?);
                    Some(Tensor::from_storage(storage, x.shape(), BackpropOp::none(), false))
                }
                false => None,
            };
            let dparameters =
                parameters.track_op().then(|| tensor_like(dparameters, parameters)).transpose()?;
            Ok((dx, dparameters, dother))
        })
    }
}

/// The output and, if `keep`, what the backward reads of each layer.
fn forward<T: Stored>(
    stages: &[Stage],
    (x, parameters): (&[T], &[f32]),
    residual: Option<&[T]>,
    keep: bool,
) -> Result<(Elements<T>, Vec<Kept<T>>)> {
    let mut kept: Vec<Kept<T>> = Vec::with_capacity(stages.len());
    for (index, stage) in stages.iter().enumerate() {
        let input = kept.last().map_or(x, |kept| &*kept.output);
        let residual = residual.filter(|_| index + 1 == stages.len());
        let done = stage.forward(input, parameters, residual, keep)?;
        let read = |last: &Stage| keep && (last.reads_output() || stage.reads_input());
        if let Some(last) = kept.last_mut().filter(|_| !read(&stages[index - 1])) {
            last.output = Elements::default();
        }
        kept.push(done);
    }
    let out = kept.last_mut().map(|last| std::mem::take(&mut last.output)).unwrap_or_default();
    Ok((out, if keep { kept } else { Vec::new() }))
}

/// The gradients of x, if wanted, and of the parameters, for x, the parameters and the gradient of `value`.
fn backward<T: Stored>(
    stages: &[Stage],
    kept: &[Kept<T>],
    (x, parameters, grad): (&[T], &[f32], &[T]),
    value: &Tensor,
    want_x: bool,
) -> Result<(Elements<T>, Vec<f32>)> {
    let mut dparameters = vec![0f32; parameters.len()];
    let mut grad_out: Option<Elements<T>> = None;
    for (index, (stage, done)) in stages.iter().zip(kept).enumerate().rev() {
        let before = want_x || stages[..index].iter().any(|stage| stage.trainable);
        if !before && !stage.trainable {
            break;
        }
        let input = if index == 0 { x } else { &kept[index - 1].output };
        let grad = grad_out.as_deref().unwrap_or(grad);
        let mut run = |output: &[T]| {
            let values = (input, output, &done.saved);
            stage.backward(values, parameters, grad, before, &mut dparameters)
        };
        let last = index + 1 == stages.len();
        grad_out = Some(match last && stage.reads_output() {
            true => T::with(stage.op, value, |value| run(&value))?,
            false => run(&done.output)?,
        });
    }
    Ok((grad_out.unwrap_or_default(), dparameters))
}

/// A layer in a chain.
struct Stage {
    op: &'static str,
    layer: Layer,
    /// Its part of the packed parameters.
    parameters: Range<usize>,
    /// Whether one of its parameters wants a gradient.
    trainable: bool,
}

/// Values kept for a layer's backward.
struct Kept<T: Stored> {
    /// Empty where no backward reads it, and for the last layer, whose output is the chain's.
    output: Elements<T>,
    saved: Saved<T>,
}

enum Saved<T: Stored> {
    Nothing,
    Projections(cpu::projection::Saved<T>),
    Attention(cpu::attention::Saved<T>),
}

impl Stage {
    fn reads_input(&self) -> bool {
        match self.layer {
            Layer::Projections { .. } => self.trainable,
            _ => true,
        }
    }

    fn reads_output(&self) -> bool {
        matches!(self.layer, Layer::Attention { .. })
    }

    fn forward<T: Stored>(
        &self,
        x: &[T],
        parameters: &[f32],
        residual: Option<&[T]>,
        keep: bool,
    ) -> Result<Kept<T>> {
        let parameters = &parameters[self.parameters.clone()];
        let (output, saved) = match &self.layer {
            Layer::Norm { eps } => {
                let (weight, bias) = parameters.split_at(parameters.len() / 2);
                (cpu::layer_norm::forward(x, weight, bias, *eps), Saved::Nothing)
            }
            Layer::Projections { .. } => self.with_projections(parameters, |layer| {
                let (out, saved) = cpu::projection::forward(layer, x, residual, keep);
                (out, Saved::Projections(saved))
            })?,
            Layer::Activation(function) => (cpu::activation::applied(*function, x), Saved::Nothing),
            Layer::Attention { problem, pad } => {
                let inputs = attention_inputs(problem, *pad, x, parameters);
                let (out, saved) = cpu::attention::forward(problem, &inputs, keep);
                (out, Saved::Attention(saved))
            }
        };
        Ok(Kept { output, saved })
    }

    /// The gradient of the input, if wanted; that of the parameters, if one is trainable, goes to its place.
    fn backward<T: Stored>(
        &self,
        (x, out, saved): (&[T], &[T], &Saved<T>),
        parameters: &[f32],
        grad: &[T],
        want_x: bool,
        dparameters: &mut [f32],
    ) -> Result<Elements<T>> {
        let parameters = &parameters[self.parameters.clone()];
        let (dx, mine) = match (&self.layer, saved) {
            (Layer::Norm { eps }, _) => {
                let (weight, _) = parameters.split_at(parameters.len() / 2);
                let (dx, dweight, dbias) = cpu::layer_norm::backward(x, weight, grad, *eps);
                (dx, [dweight, dbias].concat())
            }
            (Layer::Activation(function), _) => {
                (cpu::activation::gradient_in_parallel(*function, x, grad), vec![])
            }
            (Layer::Projections { .. }, Saved::Projections(saved)) => {
                let wanted = (want_x, self.trainable);
                let grads = self.with_projections(parameters, |layer| {
                    cpu::projection::backward(layer, x, saved, grad, wanted)
                })?;
                (grads.x, grads.parameters)
            }
            (Layer::Attention { problem, pad }, Saved::Attention(saved)) => {
                let inputs = attention_inputs(problem, *pad, x, parameters);
                let grads = cpu::attention::backward(problem, &inputs, out, saved, grad);
                (grads.qkv, [grads.tables, grads.pad].concat())
            }
            _ => bail!("{}: backward without a forward", self.op),
        };
        if self.trainable {
            dparameters[self.parameters.clone()].copy_from_slice(&mine);
        }
        Ok(dx)
    }

    /// Calls `f` with the projections as the CPU computes them.
    fn with_projections<R>(
        &self,
        parameters: &[f32],
        f: impl FnOnce(&Projections<'_>) -> R,
    ) -> Result<R> {
        let Layer::Projections { problems, weights, activation } = &self.layer else {
            bail!("{}: the layer is no projection", self.op)
        };
        let in_int8 = weights.iter().any(|(_, scales)| scales.is_some());
        let activation = match (activation, function(*activation)) {
            (Activation::Identity, _) => None,
            // Activations of int8 weights are rounded by far more than this is off.
            (Activation::Gelu, _) if in_int8 => Some(cpu::activation::gelu_by_rational as Function),
            (other, None) => bail!("{}: {other:?} is not fused", self.op),
            (_, function) => function,
        };
        let guards: Vec<_> = weights
            .iter()
            .map(|(weight, scales)| {
                (weight.storage_and_layout(), scales.as_ref().map(Tensor::storage_and_layout))
            })
            .collect();
        let in_dim = weights[0].0.dims()[1];
        let weights = guards.iter().map(|((storage, layout), scales)| {
            let storage = on_the_cpu(self.op, storage)?;
            match scales {
                None => weight(self.op, storage, layout, in_dim),
                Some((scales, at)) => {
                    let scales = to_f32(self.op, on_the_cpu(self.op, scales)?, at)?;
                    int8_weight(self.op, storage, layout, scales)
                }
            }
        });
        let weights = weights.collect::<Result<_>>()?;
        Ok(f(&Projections { in_dim, projections: problems, weights, parameters, activation }))
    }
}

/// The CPU's own code of an activation; none where candle's operations compute it.
pub(super) fn function(activation: Activation) -> Option<Function> {
    match activation {
        Activation::Gelu => Some(cpu::activation::gelu),
        Activation::Relu => Some(cpu::activation::relu),
        _ => None,
    }
}

fn weight<'a>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
    in_dim: usize,
) -> Result<Weight<'a>> {
    if let (CpuStorage::BF16(values), Some((start, end))) = (storage, layout.contiguous_offsets()) {
        return Ok(Weight::from_bf16(&values[start..end], in_dim));
    }
    Ok(Weight::F32(to_f32(op, storage, layout)?))
}

fn on_the_cpu<'a>(op: &'static str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("{op}: the weight left the CPU"),
    }
}

fn int8_weight<'a>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
    scales: Cow<'a, [f32]>,
) -> Result<Weight<'a>> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::U8(bytes), Some((start, end))) => {
            Ok(Weight::from_int8(&bytes[start..end], scales))
        }
        _ => bail!("{op}: an int8 weight must be contiguous"),
    }
}

fn attention_inputs<'a, T: Stored>(
    p: &AttentionProblem,
    pad: bool,
    qkv: &'a [T],
    parameters: &'a [f32],
) -> cpu::attention::Inputs<'a, T> {
    let pad_len = if pad { 3 * p.channels() } else { 0 };
    let (tables, pad) = parameters.split_at(parameters.len() - pad_len);
    cpu::attention::Inputs { qkv, tables, pad: T::rounded(pad) }
}
