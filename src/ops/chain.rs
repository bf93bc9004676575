//! Layers in a row as one operation, `last(.. first(x))`, or a residual branch, `x + last(.. first(x))`.
//!
//! ```text
//! attention_layer   proj(rel_pos_attention(qkv(x)))
//! attention_block   x + proj(rel_pos_attention(qkv(layer_norm(x))))
//! mlp_block         x + lin2(act(lin1(layer_norm(x))))
//! ```
//! Stages are those of the single operations, with the same arithmetic. As one node of candle's graph they hand f32
//! buffers to each other: what no backward reads is dropped at once, nothing is rounded in between, no gradient but that
//! of `x` and of the parameters enters candle's store, which adds every gradient to a tensor of zeros, and buffers are used
//! again, where a tensor's memory goes back to the system and comes back page by page.
//!
//! On the CPU; elsewhere, and with trainable weights, the single operations run one after the other.

use super::custom::{dtype_of, from_f32, tensor_like, to_f32, vec_f32, with_f32};
use super::projection::{problem, with_weights};
use super::{layer_norm, lora_linear, lora_qkv, rel_pos_attention as attention};
use super::{Activation, Projection, RelPosAttention};
use crate::cpu::{self, buffer::Buffer};
use crate::problem::{self as problems, AttentionProblem, ProjectionProblem};
use candle_core::{bail, CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor};
use std::ops::Range;
use std::sync::OnceLock;

const OP: &str = "layer-chain";

/// A LayerNorm's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[C]`
    pub weight: &'a Tensor,
    /// `[C]`
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
}

/// `proj(rel_pos_attention(qkv(x)))`: `[B, H, W, C] -> [B, H, W, C']`, with the gradients of the operations it consists
/// of. `qkv` is one projection, or those of q, k and v.
///
/// # Errors
/// As [`lora_linear`], [`lora_qkv`] and [`rel_pos_attention`](super::rel_pos_attention()).
pub fn attention_layer(
    x: &Tensor,
    qkv: &[Projection<'_>],
    config: &RelPosAttention<'_>,
    proj: &Projection<'_>,
) -> Result<Tensor> {
    attend(x, None, qkv, config, proj)
}

/// `x + proj(rel_pos_attention(qkv(layer_norm(x))))`: `[B, H, W, C] -> [B, H, W, C]`, with the gradients of the
/// operations it consists of. `qkv` is one projection, or those of q, k and v.
///
/// # Errors
/// As [`layer_norm`], [`lora_linear`], [`lora_qkv`] and [`rel_pos_attention`](super::rel_pos_attention()).
pub fn attention_block(
    x: &Tensor,
    norm: &Norm<'_>,
    qkv: &[Projection<'_>],
    config: &RelPosAttention<'_>,
    proj: &Projection<'_>,
) -> Result<Tensor> {
    attend(x, Some(norm), qkv, config, proj)
}

/// The block with a norm, the layer without.
fn attend(
    x: &Tensor,
    norm: Option<&Norm<'_>>,
    qkv: &[Projection<'_>],
    config: &RelPosAttention<'_>,
    proj: &Projection<'_>,
) -> Result<Tensor> {
    if !chained(x, qkv.iter().chain([proj])) {
        let normed = match norm {
            Some(norm) => layer_norm(x, norm.weight, norm.bias, norm.eps)?,
            None => x.clone(),
        };
        let packed = match qkv {
            [q, k, v] => lora_qkv(&normed, &[*q, *k, *v])?,
            [qkv] => lora_linear(&normed, qkv, Activation::None, None)?,
            other => return wrong_count(other),
        };
        let out = attention::rel_pos_attention(&packed, config)?;
        return lora_linear(&out, proj, Activation::None, norm.map(|_| x));
    }
    let mut chain = Chain::new(x);
    if let Some(norm) = norm {
        chain.layer_norm(norm)?;
    }
    chain.projections(qkv, problems::Activation::Identity)?;
    match qkv {
        [_] => {}
        [q, k, v] => super::projection::equal_widths("lora-qkv", &[*q, *k, *v])?,
        other => return wrong_count(other),
    }
    chain.attention(config)?;
    chain.projections(&[*proj], problems::Activation::Identity)?;
    chain.apply(norm.is_some())
}

fn wrong_count(qkv: &[Projection<'_>]) -> Result<Tensor> {
    bail!("{OP}: q, k and v are one projection or three, got {}", qkv.len())
}

/// `x + lin2(act(lin1(layer_norm(x))))`: `[.., C] -> [.., C]`, with the gradients of the operations it consists of.
///
/// # Errors
/// As [`layer_norm`] and [`lora_linear`].
pub fn mlp_block(
    x: &Tensor,
    norm: &Norm<'_>,
    lin1: &Projection<'_>,
    activation: Activation,
    lin2: &Projection<'_>,
) -> Result<Tensor> {
    let fused = activation.fused().filter(|_| chained(x, [lin1, lin2]));
    let Some(activation) = fused else {
        let normed = layer_norm(x, norm.weight, norm.bias, norm.eps)?;
        let hidden = lora_linear(&normed, lin1, activation, None)?;
        return lora_linear(&hidden, lin2, Activation::None, Some(x));
    };
    let mut chain = Chain::new(x);
    chain.layer_norm(norm)?;
    chain.projections(&[*lin1], activation)?;
    chain.projections(&[*lin2], problems::Activation::Identity)?;
    chain.apply(true)
}

fn chained<'a>(x: &Tensor, projections: impl IntoIterator<Item = &'a Projection<'a>>) -> bool {
    matches!(x.device(), Device::Cpu) && projections.into_iter().all(|p| !p.weight.track_op())
}

/// The stages so far, and what they give.
struct Chain<'a> {
    x: &'a Tensor,
    dims: Vec<usize>,
    stages: Vec<Stage>,
    parameters: Vec<Tensor>,
    /// Elements of the parameters so far.
    end: usize,
}

impl<'a> Chain<'a> {
    fn new(x: &'a Tensor) -> Self {
        Self { x, dims: x.dims().to_vec(), stages: vec![], parameters: vec![], end: 0 }
    }

    /// A tensor shaped and typed as the next stage's input, for the checks.
    fn stand_in(&self) -> Result<Tensor> {
        Tensor::zeros(1, self.x.dtype(), self.x.device())?.broadcast_as(self.dims.as_slice())
    }

    fn push(&mut self, kind: Kind, parameters: Vec<Tensor>) {
        let count: usize = parameters.iter().map(Tensor::elem_count).sum();
        let trainable = parameters.iter().any(Tensor::track_op);
        self.stages.push(Stage { kind, parameters: self.end..self.end + count, trainable });
        self.end += count;
        self.parameters.extend(parameters);
    }

    fn layer_norm(&mut self, norm: &Norm<'_>) -> Result<()> {
        layer_norm::validate(&self.stand_in()?, norm.weight, norm.bias, norm.eps)?;
        let parameters = vec![norm.weight.clone(), norm.bias.clone()];
        self.push(Kind::LayerNorm { eps: norm.eps }, parameters);
        Ok(())
    }

    fn projections(
        &mut self,
        parts: &[Projection<'_>],
        activation: problems::Activation,
    ) -> Result<()> {
        let op = if parts.len() == 1 { "lora-linear" } else { "lora-qkv" };
        let x = self.stand_in()?;
        for part in parts {
            super::projection::validate(op, &x, part)?;
        }
        let kind = Kind::Projections {
            problems: parts.iter().map(problem).collect(),
            weights: parts.iter().map(|part| part.weight.clone()).collect(),
            activation,
        };
        if let Some(last) = self.dims.last_mut() {
            *last = parts.iter().map(|part| part.weight.dims()[0]).sum();
        }
        self.push(kind, parts.iter().flat_map(super::projection::small).cloned().collect());
        Ok(())
    }

    fn attention(&mut self, config: &RelPosAttention<'_>) -> Result<()> {
        let (problem, tables, pad) = attention::prepare(&self.stand_in()?, config)?;
        self.dims = vec![problem.batch, problem.h, problem.w, problem.channels()];
        let has_pad = pad.is_some();
        let parameters = tables.into_iter().flatten().chain(pad.cloned()).collect();
        self.push(Kind::Attention { problem, pad: has_pad }, parameters);
        Ok(())
    }

    /// What the last stage gives, plus `x` if that is the residual.
    fn apply(self, residual: bool) -> Result<Tensor> {
        if residual && self.dims != self.x.dims() {
            bail!(
                "{OP}: a branch from {:?} must lead back to it, got {:?}",
                self.x.dims(),
                self.dims
            )
        }
        let parameters = match self.parameters.as_slice() {
            [] => Tensor::zeros(1, DType::F32, self.x.device())?,
            some => {
                let flat = some.iter().map(|p| p.flatten_all()?.to_dtype(DType::F32));
                Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?
            }
        };
        let keep = self.x.track_op() || parameters.track_op();
        let shape = Shape::from(self.dims);
        let op = Layers { stages: self.stages, residual, shape, keep, saved: OnceLock::new() };
        self.x.apply_op2(&parameters, op)
    }
}

/// One layer.
struct Stage {
    kind: Kind,
    /// Its part of the flat parameters.
    parameters: Range<usize>,
    /// Whether they have gradients to come.
    trainable: bool,
}

enum Kind {
    LayerNorm {
        eps: f64,
    },
    Projections {
        problems: Vec<ProjectionProblem>,
        weights: Vec<Tensor>,
        activation: problems::Activation,
    },
    /// Parameters: the tables, then the pad if there is one.
    Attention {
        problem: AttentionProblem,
        pad: bool,
    },
}

/// What a stage's backward needs besides values.
enum Saved {
    Nothing,
    Projections(cpu::projection::Saved),
    Normalizers(Vec<cpu::attention::Normalizer>),
}

impl Stage {
    /// Whether the backward reads the stage's input.
    fn reads_input(&self) -> bool {
        match self.kind {
            Kind::Projections { .. } => self.trainable,
            _ => true,
        }
    }

    /// Whether the backward reads the stage's output.
    fn reads_output(&self) -> bool {
        matches!(self.kind, Kind::Attention { .. })
    }

    fn forward(
        &self,
        x: &[f32],
        parameters: &[f32],
        residual: Option<&[f32]>,
        keep: bool,
    ) -> Result<(Buffer, Saved)> {
        let parameters = &parameters[self.parameters.clone()];
        Ok(match &self.kind {
            Kind::LayerNorm { eps } => {
                let (weight, bias) = parameters.split_at(parameters.len() / 2);
                (cpu::layer_norm::forward(x, weight, bias, *eps), Saved::Nothing)
            }
            Kind::Projections { problems, weights, activation } => {
                let (out, saved) = with_weights(OP, weights, problems, |weights| {
                    let activation = *activation;
                    Ok(cpu::projection::forward(weights, x, parameters, residual, activation, keep))
                })?;
                (out, Saved::Projections(saved))
            }
            Kind::Attention { problem, pad } => {
                let inputs = attention_inputs(problem, *pad, x, parameters);
                let (out, normalizers) = cpu::attention::forward(problem, &inputs);
                (out, Saved::Normalizers(normalizers))
            }
        })
    }

    /// The gradient of the input, if wanted; that of the parameters, if any is trainable, goes to its place.
    fn backward(
        &self,
        (x, out, saved): (&[f32], &[f32], &Saved),
        parameters: &[f32],
        grad: &[f32],
        want_x: bool,
        dparameters: &mut [f32],
    ) -> Result<Buffer> {
        let parameters = &parameters[self.parameters.clone()];
        let (dx, mine) = match (&self.kind, saved) {
            (Kind::LayerNorm { eps }, _) => {
                let (weight, _) = parameters.split_at(parameters.len() / 2);
                let (dx, dweight, dbias) = cpu::layer_norm::backward(x, weight, grad, *eps);
                (dx, [dweight, dbias].concat())
            }
            (Kind::Projections { problems, weights, activation }, Saved::Projections(saved)) => {
                let wanted = (want_x, self.trainable);
                let grads = with_weights(OP, weights, problems, |weights| {
                    let activation = *activation;
                    Ok(cpu::projection::backward(
                        weights, x, parameters, saved, grad, activation, wanted,
                    ))
                })?;
                (grads.x, grads.small)
            }
            (Kind::Attention { problem, pad }, Saved::Normalizers(normalizers)) => {
                let inputs = attention_inputs(problem, *pad, x, parameters);
                let grads = cpu::attention::backward(problem, &inputs, out, normalizers, grad);
                (grads.qkv, [grads.tables, grads.pad].concat())
            }
            _ => bail!("{OP}: backward without a forward"),
        };
        if self.trainable {
            dparameters[self.parameters.clone()].copy_from_slice(&mine);
        }
        Ok(dx)
    }
}

fn attention_inputs<'a>(
    p: &AttentionProblem,
    pad: bool,
    qkv: &'a [f32],
    parameters: &'a [f32],
) -> cpu::attention::Inputs<'a> {
    let pad_len = if pad { 3 * p.channels() } else { 0 };
    let (tables, pad) = parameters.split_at(parameters.len() - pad_len);
    cpu::attention::Inputs { qkv, tables, pad }
}

/// Inputs: x, the flat parameters of all stages.
struct Layers {
    stages: Vec<Stage>,
    /// Whether x is added to what the last stage gives.
    residual: bool,
    /// Of the output.
    shape: Shape,
    /// Whether there may be a backward.
    keep: bool,
    saved: OnceLock<Kept>,
}

/// Of each stage: its output, empty where no backward reads it, and what else it saved.
struct Kept(Vec<(Buffer, Saved)>);

impl Layers {
    /// Whether a backward reads the output of stage `index`.
    fn is_read(&self, index: usize) -> bool {
        self.keep
            && (self.stages[index].reads_output()
                || self.stages.get(index + 1).is_some_and(Stage::reads_input))
    }

    fn backward(
        &self,
        x: &[f32],
        parameters: &[f32],
        grad: &[f32],
        want_x: bool,
    ) -> Result<(Buffer, Vec<f32>)> {
        let Some(Kept(kept)) = self.saved.get() else { bail!("{OP}: backward without a forward") };
        let mut dparameters = vec![0f32; parameters.len()];
        let mut grad_out: Option<Buffer> = None;
        for (index, stage) in self.stages.iter().enumerate().rev() {
            let input = if index == 0 { x } else { &kept[index - 1].0 };
            let (out, saved) = &kept[index];
            let before = want_x || self.stages[..index].iter().any(|stage| stage.trainable);
            if !before && !stage.trainable {
                break;
            }
            let values = (input, &**out, saved);
            let grad = grad_out.as_deref().unwrap_or(grad);
            grad_out = Some(stage.backward(values, parameters, grad, before, &mut dparameters)?);
        }
        let mut dx = grad_out.unwrap_or_default();
        if want_x && self.residual {
            cpu::add_in_parallel(&mut dx, grad);
        }
        Ok((dx, dparameters))
    }
}

impl CustomOp2 for Layers {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        parameters: &CpuStorage,
        parameters_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let rows = to_f32(OP, x, x_layout)?;
        let parameters = to_f32(OP, parameters, parameters_layout)?;
        let mut kept: Vec<(Buffer, Saved)> = Vec::with_capacity(self.stages.len());
        for (index, stage) in self.stages.iter().enumerate() {
            let input = kept.last().map_or(&*rows, |(value, _)| value);
            let last = index + 1 == self.stages.len();
            let residual = (last && self.residual).then_some(&*rows);
            let done = stage.forward(input, &parameters, residual, self.keep)?;
            if let Some((value, _)) = kept.last_mut().filter(|_| !self.is_read(index - 1)) {
                *value = Buffer::default();
            }
            kept.push(done);
        }
        let out = kept.last_mut().map(|(out, _)| std::mem::take(out)).unwrap_or_default();
        if self.keep {
            // The operation runs once; a second value could only be equal.
            let _ = self.saved.set(Kept(kept));
        }
        Ok((from_f32(OP, out.into_vec(), dtype_of(x))?, self.shape.clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let values = vec_f32(OP, parameters)?;
        let (dx, dparameters) = with_f32(OP, x, |rows| {
            with_f32(OP, grad_res, |grad| self.backward(&rows, &values, &grad, x.track_op()))
        })?;
        let wanted =
            |values, like: &Tensor| like.track_op().then(|| tensor_like(values, like)).transpose();
        Ok((wanted(dx.into_vec(), x)?, wanted(dparameters, parameters)?))
    }
}
