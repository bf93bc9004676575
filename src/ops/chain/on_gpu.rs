//! The chains on a GPU: which of them its kernels compute, and their layers.

use crate::launch::Gpu;
use crate::ops::arguments::{Norm, CHAIN as OP};
use crate::ops::check::Outline;
use crate::ops::custom::{has_kernels, operand, Engine};
use crate::ops::gpu::chain::Chain;
use crate::ops::{fused, layer_norm, projection, rel_pos_attention as attention};
use crate::ops::{Activation, Projection, RelPosAttention};
use crate::problem::ProjectionProblem;
use candle_core::{Result, Tensor};

/// `x + proj(rel_pos_attention(qkv(layer_norm(x))))`, or without a norm the layer alone. None where kernels do not
/// compute all of it.
pub fn attend(
    x: &Tensor,
    norm: Option<&Norm<'_>>,
    qkv: &[Projection<'_>],
    config: &RelPosAttention<'_>,
    proj: &Projection<'_>,
) -> Result<Option<Tensor>> {
    let tables = config.rel_pos.into_iter().flat_map(|(h, w)| [h, w]);
    if tables.chain(config.pad).any(Tensor::track_op) {
        return Ok(None);
    }
    let Some(x) = input(x, norm)? else { return Ok(None) };
    let outline = Outline::from(&x);
    let Some(qkv_gpu) = gpu(outline, qkv, Activation::Identity)? else { return Ok(None) };
    if let [q, k, v] = qkv {
        projection::equal_widths(&[*q, *k, *v])?;
    }
    let packed_dims = with_width(x.dims(), width(qkv));
    let packed = Outline { dims: &packed_dims, ..outline };
    let prepared = attention::prepare(packed, config)?;
    let Engine::Gpu(attention_gpu) = fused::engine_of_attention(packed, &prepared.0)? else {
        return Ok(None);
    };
    let attended_dims = with_width(x.dims(), prepared.0.channels());
    let attended = Outline { dims: &attended_dims, ..outline };
    let Some(proj_gpu) = gpu(attended, &[*proj], Activation::Identity)? else { return Ok(None) };
    if norm.is_some() && width(&[*proj]) != outline.width() {
        return Ok(None); // the single operations say what does not fit
    }

    let mut chain = Chain::new(OP, x);
    normed(&mut chain, norm)?;
    project(&mut chain, qkv, (Activation::Identity, qkv_gpu), false)?;
    let rows = chain.input();
    chain.attention(rows, attention::of_gpu(prepared, attention_gpu)?)?;
    project(&mut chain, &[*proj], (Activation::Identity, proj_gpu), norm.is_some())?;
    chain.run(norm.is_some()).map(Some)
}

/// `x + lin2(act(lin1(layer_norm(x))))`. None where kernels do not compute all of it.
pub fn mlp(
    x: &Tensor,
    norm: &Norm<'_>,
    (lin1, activation): (&Projection<'_>, Activation),
    lin2: &Projection<'_>,
) -> Result<Option<Tensor>> {
    let Some(x) = input(x, Some(norm))? else { return Ok(None) };
    let outline = Outline::from(&x);
    let Some(first) = gpu(outline, &[*lin1], activation)? else { return Ok(None) };
    let hidden_dims = with_width(x.dims(), width(&[*lin1]));
    let hidden = Outline { dims: &hidden_dims, ..outline };
    let Some(second) = gpu(hidden, &[*lin2], Activation::Identity)? else { return Ok(None) };
    if width(&[*lin2]) != outline.width() {
        return Ok(None);
    }

    let mut chain = Chain::new(OP, x);
    normed(&mut chain, Some(norm))?;
    project(&mut chain, &[*lin1], (activation, first), false)?;
    project(&mut chain, &[*lin2], (Activation::Identity, second), true)?;
    chain.run(true).map(Some)
}

/// x as kernels take it, if there are kernels and the norm is frozen.
fn input(x: &Tensor, norm: Option<&Norm<'_>>) -> Result<Option<Tensor>> {
    if !has_kernels(x.device()) || x.elem_count() == 0 {
        return Ok(None);
    }
    if let Some(norm) = norm {
        layer_norm::validate(x, norm.weight, norm.bias, norm.eps)?;
        if norm.weight.track_op() || norm.bias.track_op() {
            return Ok(None);
        }
    }
    operand(x).map(Some)
}

/// The GPU with the kernels that compute projections of `x`, if any do.
fn gpu(x: Outline<'_>, parts: &[Projection<'_>], activation: Activation) -> Result<Option<Gpu>> {
    let op = ProjectionProblem::op(parts.len());
    for part in parts {
        part.validate(op, x)?;
    }
    if !activation.is_fused() {
        return Ok(None);
    }
    Ok(match fused::engine_of_projections(x, parts, activation)? {
        Engine::Gpu(gpu) => Some(gpu),
        _ => None,
    })
}

/// Width of the output of projections that were checked.
fn width(parts: &[Projection<'_>]) -> usize {
    parts.iter().map(|part| part.weight.dims()[0]).sum()
}

/// The same shape with another last dimension.
fn with_width(dims: &[usize], width: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    dims
}

fn normed(chain: &mut Chain, norm: Option<&Norm<'_>>) -> Result<()> {
    let Some(norm) = norm else { return Ok(()) };
    let x = chain.input();
    let parameters = [layer_norm::of_gpu(norm.weight, &x)?, layer_norm::of_gpu(norm.bias, &x)?];
    chain.layer_norm(x, norm.eps, parameters)
}

fn project(
    chain: &mut Chain,
    parts: &[Projection<'_>],
    (activation, gpu): (Activation, Gpu),
    residual: bool,
) -> Result<()> {
    let x = chain.input();
    let call = projection::of_gpu(&x, parts, activation, chain.is_tracked(), gpu)?;
    chain.projections(x, call, residual)
}
