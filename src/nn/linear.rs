//! A linear layer that can carry LoRA adapters, as PEFT's `lora.Linear` does.
//!
//! ```text
//! LoRA   y = x W^T + b + scaling * (drop(x) A^T B^T + lora_bias)
//! DoRA   y = x W^T + b + (g - 1) * drop(x) W^T + g * scaling * drop(x) A^T B^T
//!        g = magnitude / || W + scaling B A ||_row, the norm without a gradient
//! ```
//!
//! Source: `peft/tuners/lora/layer.py` and `variants.py`. Arithmetic is in [`crate::ops`]; several adapters at once
//! are in `low_rank.rs`; configuration, files and injection are in the `lora` module.

use super::low_rank::{in_turn, LowRank};
use super::tree::{join, visit_layer};
use super::{Adapter, Adapters, LayerMut, Mode, ModuleTree, Node, NodeMut, DEFAULT_ADAPTER};
use crate::ops::{self, Activation, Projection};
use crate::{philox, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// `y = x W^T + b`, plus adapters where they were injected.
///
/// [Example](crate::nn)
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Tensor,
    /// With a weight in int8, see [`quantize_int8`](super::quantize_int8): `[out]` in f32.
    pub scales: Option<Tensor>,
    /// `[out]`
    pub bias: Option<Tensor>,
    /// None at first.
    pub adapters: Adapters,
}

impl Linear {
    /// A layer without adapters.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, scales: None, bias, adapters: Adapters::default() }
    }

    /// A layer with `weight` and `bias` of a `VarBuilder`; a `VarMap` draws them as for `candle_nn::linear`.
    ///
    /// # Errors
    /// - a tensor is missing or has another shape.
    pub fn load(in_dim: usize, out_dim: usize, vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        candle_nn::linear(in_dim, out_dim, vb).map(Self::from)
    }

    /// As [`load`](Self::load), without a bias.
    ///
    /// # Errors
    /// - the weight is missing or has another shape.
    pub fn load_no_bias(
        in_dim: usize,
        out_dim: usize,
        vb: VarBuilder<'_>,
    ) -> candle_core::Result<Self> {
        candle_nn::linear_no_bias(in_dim, out_dim, vb).map(Self::from)
    }

    /// Width of the input.
    pub fn in_dim(&self) -> usize {
        self.weight.dims().get(1).copied().unwrap_or(0)
    }

    /// Width of the output.
    pub fn out_dim(&self) -> usize {
        self.weight.dims().first().copied().unwrap_or(0)
    }

    /// Low-rank parts of the adapters in use for this pass; see [`projection`](Self::projection).
    ///
    /// # Errors
    /// When a tensor cannot be allocated.
    pub fn low_rank(&self, mode: Mode) -> candle_core::Result<Vec<LowRank>> {
        self.adapters.low_rank(mode)
    }

    /// This layer as one projection of [`ops::lora_linear`] or [`ops::lora_qkv`], with the low-rank part that
    /// [`low_rank`](Self::low_rank) gave. None where that part is no single sum, as with DoRA.
    pub fn projection<'a>(&'a self, low_rank: &'a [LowRank]) -> Option<Projection<'a>> {
        let lora = match low_rank {
            [] => None,
            [part] if part.magnitude().is_none() => Some(part.lora()),
            _ => return None,
        };
        Some(Projection { lora, ..self.base() })
    }

    /// This layer without adapters.
    fn base(&self) -> Projection<'_> {
        let Self { weight, scales, bias, .. } = self;
        Projection { weight, scales: scales.as_ref(), bias: bias.as_ref(), lora: None }
    }

    /// The layer's output on a row of zeros, `[out]`: the bias, plus what the adapters make of it. None is zero.
    ///
    /// # Errors
    /// When a tensor cannot be allocated.
    pub fn output_at_zero(&self, mode: Mode) -> candle_core::Result<Option<Tensor>> {
        let low_rank = self.low_rank(mode)?;
        if low_rank.iter().all(|part| part.lora().b_bias.is_none()) {
            return Ok(self.bias.clone());
        }
        let dtype = if self.scales.is_some() { DType::F32 } else { self.weight.dtype() };
        let zeros = Tensor::zeros((1, self.in_dim()), dtype, self.weight.device())?;
        self.forward(&zeros, mode)?.get(0).map(Some)
    }

    /// Every tensor that the output in evaluation depends on; of the adapters those in use.
    pub(crate) fn reads(&self) -> candle_core::Result<Vec<Tensor>> {
        let mut tensors = vec![self.weight.clone()];
        tensors.extend(self.bias.clone());
        for part in self.low_rank(Mode::Eval)? {
            tensors.extend(part.tensors()?);
        }
        Ok(tensors)
    }

    /// `[.., in] -> [.., out]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        self.forward_fused(x, Activation::Identity, None, mode)
    }

    /// `act(x W^T + b + lora) + residual`: `[.., in] -> [.., out]`
    pub fn forward_fused(
        &self,
        x: &Tensor,
        activation: Activation,
        residual: Option<&Tensor>,
        mode: Mode,
    ) -> candle_core::Result<Tensor> {
        let low_rank = self.low_rank(mode)?;
        if let Some(projection) = self.projection(&low_rank) {
            return ops::lora_linear(x, &projection, activation, residual);
        }
        let base = self.base();
        let only = if let [part] = low_rank.as_slice() { Some(part) } else { None };
        let y = match only.and_then(|part| Some((part, part.magnitude()?))) {
            Some((part, magnitude)) => {
                ops::dora_linear(x, &Projection { lora: Some(part.lora()), ..base }, magnitude)?
            }
            None => in_turn(&base, &low_rank, |dropout| match dropout {
                Some(dropout) => ops::dropout(&x.to_dtype(DType::F32)?, dropout),
                None => Ok(x.clone()),
            })?,
        };
        let y = activation.apply(&y)?;
        residual.map_or(Ok(y.clone()), |residual| residual + &y)
    }

    /// Puts `adapter` on this layer as the only one in use, with the dropout stream of the layer's path in its model.
    pub fn put_adapter(&mut self, path: &str, adapter: Adapter) {
        let adapter = Adapter { stream: philox::stream_of(path), ..adapter };
        self.adapters.insert(DEFAULT_ADAPTER, adapter);
        self.adapters.active = vec![DEFAULT_ADAPTER.to_string()];
    }
}

impl ModuleTree for Linear {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        visit_layer(path, &self.weight, self.bias.as_ref(), &self.adapters, f);
        if let Some(scales) = &self.scales {
            f(&join(path, "weight_scale"), Node::Buffer(scales));
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        let Self { weight, scales, bias, adapters } = self;
        LayerMut { weight, scales: Some(&mut *scales), bias, adapters }.visit(path, f)?;
        match scales {
            Some(scales) => f(&join(path, "weight_scale"), NodeMut::Buffer(scales)),
            None => Ok(()),
        }
    }
}
