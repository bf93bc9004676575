//! The tensors and numbers that norms, projections and attention take besides their input, and what does not fit.

use super::check::{self, Outline};
use crate::cpu;
use crate::philox::Dropout;
use crate::problem::{AttentionProblem, LoraProblem, ProjectionProblem};
use candle_core::{bail, DType, Result, Tensor};

/// Largest side of a window.
const MAX_WINDOW: usize = 1024;

/// Name of operations that are several layers, for errors.
pub(super) const CHAIN: &str = "layer-chain";

/// A LayerNorm's parameters.
///
/// [Example](crate::ops::attention_block)
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[C]`
    pub weight: &'a Tensor,
    /// `[C]`
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
}

/// The low-rank part of a projection.
///
/// [Example](crate::ops)
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
///
/// [Example](crate::ops)
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[out, in]`; in int8 bytes, see `scales`.
    pub weight: &'a Tensor,
    /// With them the weight is a frozen one in int8, `(byte - 128) * scale`, on the CPU: `[out]` in f32.
    pub scales: Option<&'a Tensor>,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// The adapter, if any.
    pub lora: Option<Lora<'a>>,
}

/// Everything of [`rel_pos_attention`](super::rel_pos_attention()) but its input.
///
/// [Example](crate::ops::rel_pos_attention())
#[derive(Clone, Copy, Debug)]
pub struct RelPosAttention<'a> {
    /// Number of heads; it divides C.
    pub num_heads: usize,
    /// Factor of `q . k`; `head_dim^-0.5` in SAM.
    pub softmax_scale: f64,
    /// The tables `rel_pos_h` and `rel_pos_w`, `[L, head_dim]` each, shared by the heads. A table of another
    /// length than `2 * side - 1` is resized linearly.
    pub rel_pos: Option<(&'a Tensor, &'a Tensor)>,
    /// Side of the square windows; none for global attention.
    pub window: Option<usize>,
    /// Projection of a padded token, `[3C]`: the bias of the qkv projection. None is zero.
    pub pad: Option<&'a Tensor>,
    /// Dropout on the attention weights, over `[windows, heads, queries, keys]` seen as rows of keys.
    pub dropout: Option<Dropout>,
}

impl<'a> Projection<'a> {
    /// Checks the projection and its input.
    pub(super) fn validate<'x>(&self, op: &'static str, x: impl Into<Outline<'x>>) -> Result<()> {
        let x = x.into();
        check::float(op, "x", x)?;
        check::not_empty(op, "x", x)?;
        let weight = self.weight;
        check::not_empty(op, "weight", weight)?;
        match self.scales {
            Some(scales) => check::int8_weight(op, weight, scales, x)?,
            None => check::parameter(op, "weight", weight, x)?,
        }
        let in_dim = x.width();
        if weight.rank() != 2 || weight.dims()[1] != in_dim {
            bail!("{op}: weight must have shape [out, {in_dim}], got {:?}", weight.dims())
        }
        let out_dim = weight.dims()[0];
        if let Some(bias) = self.bias {
            check::shape(op, "bias", bias, &[out_dim])?;
            check::parameter(op, "bias", bias, x)?;
        }
        let Some(lora) = &self.lora else { return Ok(()) };
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

    /// The weight as floating-point numbers, in f32 where it is in int8.
    pub(super) fn float_weight(&self) -> Result<Tensor> {
        let Some(scales) = self.scales else { return Ok(self.weight.clone()) };
        let integers = (self.weight.to_dtype(DType::F32)? - f64::from(cpu::int8::OFFSET))?;
        integers.broadcast_mul(&scales.unsqueeze(1)?)
    }

    /// Everything differentiable but the weight, in the order of `small_layout`.
    pub(super) fn parameters(&self) -> impl Iterator<Item = &'a Tensor> {
        let lora = self.lora.map(|lora| [Some(lora.a), Some(lora.b), lora.b_bias]);
        self.bias.into_iter().chain(lora.into_iter().flatten().flatten())
    }

    /// The shapes.
    pub(super) fn problem(&self) -> ProjectionProblem {
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

impl RelPosAttention<'_> {
    /// Checks everything; returns the shape of qkv.
    pub(super) fn validate<'x>(&self, qkv: impl Into<Outline<'x>>) -> Result<[usize; 4]> {
        let (op, qkv) = (AttentionProblem::OP, qkv.into());
        check::float(op, "qkv", qkv)?;
        let &[batch, h, w, packed] = qkv.dims else {
            bail!("{op}: qkv must have shape [B, H, W, 3C], got {:?}", qkv.dims)
        };
        check::not_empty(op, "qkv", qkv)?;
        let heads = self.num_heads;
        if heads == 0 || packed % 3 != 0 || (packed / 3) % heads != 0 {
            bail!("{op}: qkv's last dimension must be 3 x {heads} heads x head_dim, got {packed}")
        }
        let head_dim = packed / 3 / heads;
        if let Some((rel_pos_h, rel_pos_w)) = self.rel_pos {
            for (name, table) in [("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)] {
                if table.rank() != 2 || table.dims()[0] == 0 || table.dims()[1] != head_dim {
                    bail!(
                        "{op}: {name} must have shape [length, {head_dim}], got {:?}",
                        table.dims()
                    )
                }
                check::same_kind(op, name, table, qkv)?;
            }
        }
        // A window far larger than the grid is all padding; the bound keeps its size from overflowing.
        if let Some(window) = self.window.filter(|&window| window == 0 || window > MAX_WINDOW) {
            bail!("{op}: the window must be 1 to {MAX_WINDOW} (none is global attention), got {window}")
        }
        if let Some(pad) = self.pad {
            check::shape(op, "pad", pad, &[packed])?;
            check::same_kind(op, "pad", pad, qkv)?;
        }
        check::finite(op, "softmax_scale", self.softmax_scale)?;
        if let Some(dropout) = self.dropout {
            dropout.validate(op)?;
        }
        Ok([batch, h, w, packed])
    }
}
