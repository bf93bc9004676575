//! A linear layer that can carry a LoRA adapter, as PEFT's `lora.Linear` does.
//!
//! ```text
//! LoRA   y = x W^T + b + scaling * (drop(x) A^T B^T + lora_bias)
//! DoRA   y = x W^T + b + (g - 1) * drop(x) W^T + g * scaling * drop(x) A^T B^T
//!        g = magnitude / || W + scaling B A ||_row, the norm without a gradient
//! ```
//!
//! Source: `peft/tuners/lora/layer.py` and `variants.py`. Arithmetic is in [`crate::ops`]; configuration, files
//! and injection are in the `lora` module.

use super::{Mode, ModuleTree, Node, NodeMut};
use crate::ops::{self, Activation, Lora, Projection};
use crate::{philox, Result};
use candle_core::{DType, Device, Tensor};

/// The low-rank part of an adapted [`Linear`].
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `[rank, in]`
    pub a: Tensor,
    /// `[out, rank]`
    pub b: Tensor,
    /// `[out]`, PEFT's `lora_B.bias`; scaled as the rest.
    pub b_bias: Option<Tensor>,
    /// `[out]`, DoRA's `lora_magnitude_vector`.
    pub magnitude: Option<Tensor>,
    /// `alpha / rank`, or `alpha / sqrt(rank)` with rank stabilisation.
    pub scaling: f64,
    /// Dropout probability of the adapter's input.
    pub dropout: f64,
    /// Stream of the dropout mask, from the layer's name.
    pub stream: u32,
    /// The base weight and bias as they were before merging; none while not merged.
    pub unmerged: Option<(Tensor, Option<Tensor>)>,
}

impl Adapter {
    /// Number of rows of `a`.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// `scaling * B A`, `[out, in]`, in f32.
    pub fn delta(&self) -> candle_core::Result<Tensor> {
        let (a, b) = (self.a.to_dtype(DType::F32)?, self.b.to_dtype(DType::F32)?);
        b.matmul(&a)? * self.scaling
    }
}

/// `y = x W^T + b`, plus an adapter where one was injected.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
    /// The adapter, if one was injected.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// All zero, to be filled from a checkpoint.
    pub fn zeros(
        in_dim: usize,
        out_dim: usize,
        bias: bool,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Self> {
        let weight = Tensor::zeros((out_dim, in_dim), dtype, device)?;
        let bias = bias.then(|| Tensor::zeros(out_dim, dtype, device)).transpose()?;
        Ok(Self { weight, bias, adapter: None })
    }

    /// Width of the input.
    pub fn in_dim(&self) -> usize {
        self.weight.dims().get(1).copied().unwrap_or(0)
    }

    /// Width of the output.
    pub fn out_dim(&self) -> usize {
        self.weight.dims().first().copied().unwrap_or(0)
    }

    /// The adapter, unless it is merged into the weight.
    fn active_adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref().filter(|adapter| adapter.unmerged.is_none())
    }

    /// This layer as one projection of [`ops::lora_linear`] or [`ops::lora_qkv`]; none with DoRA, whose output
    /// is no sum of base and low-rank part.
    pub fn projection(&self, mode: Mode) -> Option<Projection<'_>> {
        let lora = match self.active_adapter() {
            Some(adapter) if adapter.magnitude.is_some() => return None,
            Some(adapter) => Some(Lora {
                a: &adapter.a,
                b: &adapter.b,
                b_bias: adapter.b_bias.as_ref(),
                scaling: adapter.scaling,
                dropout: mode.dropout(adapter.dropout, adapter.stream),
            }),
            None => None,
        };
        Some(Projection { weight: &self.weight, bias: self.bias.as_ref(), lora })
    }

    /// The layer's output on a row of zeros, `[out]`: the bias, plus the scaled LoRA bias.
    pub fn output_at_zero(&self) -> candle_core::Result<Option<Tensor>> {
        let lora_bias = match self.active_adapter() {
            Some(Adapter { b_bias: Some(bias), scaling, .. }) => Some((bias * *scaling)?),
            _ => None,
        };
        match (&self.bias, lora_bias) {
            (Some(bias), Some(lora)) => Ok(Some((bias + lora.to_dtype(bias.dtype())?)?)),
            (None, Some(lora)) => Ok(Some(lora.to_dtype(self.weight.dtype())?)),
            (bias, None) => Ok(bias.clone()),
        }
    }

    /// `[.., in] -> [.., out]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        self.forward_fused(x, Activation::None, None, mode)
    }

    /// `act(x W^T + b + lora) + residual`: `[.., in] -> [.., out]`
    pub fn forward_fused(
        &self,
        x: &Tensor,
        activation: Activation,
        residual: Option<&Tensor>,
        mode: Mode,
    ) -> candle_core::Result<Tensor> {
        match (self.projection(mode), self.active_adapter()) {
            (Some(projection), _) => ops::lora_linear(x, &projection, activation, residual),
            (
                None,
                Some(Adapter {
                    magnitude: Some(magnitude), a, b, scaling, dropout, stream, ..
                }),
            ) => {
                let lora = Lora {
                    a,
                    b,
                    b_bias: None,
                    scaling: *scaling,
                    dropout: mode.dropout(*dropout, *stream),
                };
                let base =
                    Projection { weight: &self.weight, bias: self.bias.as_ref(), lora: Some(lora) };
                let y = activation.apply(&ops::dora_linear(x, &base, magnitude)?)?;
                residual.map_or(Ok(y.clone()), |residual| residual + &y)
            }
            (None, _) => {
                candle_core::bail!("linear: an adapter without magnitude has a projection")
            }
        }
    }

    /// Puts `adapter` on this layer, with the dropout stream of the layer's name.
    pub fn set_adapter(&mut self, name: &str, adapter: Adapter) {
        self.adapter = Some(Adapter { stream: philox::stream_of(name), ..adapter });
    }
}

impl ModuleTree for Linear {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        f(path, Node::Linear(self));
        f(&format!("{path}.weight"), Node::Parameter(&self.weight));
        if let Some(bias) = &self.bias {
            f(&format!("{path}.bias"), Node::Parameter(bias));
        }
        if let Some(adapter) = &self.adapter {
            f(&format!("{path}.lora_A.weight"), Node::Parameter(&adapter.a));
            f(&format!("{path}.lora_B.weight"), Node::Parameter(&adapter.b));
            if let Some(bias) = &adapter.b_bias {
                f(&format!("{path}.lora_B.bias"), Node::Parameter(bias));
            }
            if let Some(magnitude) = &adapter.magnitude {
                f(&format!("{path}.lora_magnitude_vector"), Node::Parameter(magnitude));
            }
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        f(path, NodeMut::Linear(self))?;
        f(&format!("{path}.weight"), NodeMut::Parameter(&mut self.weight))?;
        if let Some(bias) = &mut self.bias {
            f(&format!("{path}.bias"), NodeMut::Parameter(bias))?;
        }
        if let Some(adapter) = &mut self.adapter {
            f(&format!("{path}.lora_A.weight"), NodeMut::Parameter(&mut adapter.a))?;
            f(&format!("{path}.lora_B.weight"), NodeMut::Parameter(&mut adapter.b))?;
            if let Some(bias) = &mut adapter.b_bias {
                f(&format!("{path}.lora_B.bias"), NodeMut::Parameter(bias))?;
            }
            if let Some(magnitude) = &mut adapter.magnitude {
                let name = format!("{path}.lora_magnitude_vector");
                f(&name, NodeMut::Parameter(magnitude))?;
            }
        }
        Ok(())
    }
}
