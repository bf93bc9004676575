//! Between candle's layers and these: conversions, `candle_nn::Module` in evaluation, and weights from a `VarBuilder`.

use super::adapters::is_adapter_tensor;
use super::{Conv2d, Embedding, LayerNorm, Linear, Mode, ModuleTree, Node, NodeMut};
use crate::{Error, Result, TensorMismatch};
use candle_core::Tensor;
use candle_nn::{Module, VarBuilder};
use std::collections::HashMap;

/// Shares the tensors: variables stay the same variables.
impl From<candle_nn::Linear> for Linear {
    fn from(linear: candle_nn::Linear) -> Self {
        Self::new(linear.weight().clone(), linear.bias().cloned())
    }
}

/// Shares the tensor.
impl From<candle_nn::Embedding> for Embedding {
    fn from(embedding: candle_nn::Embedding) -> Self {
        Self { weight: embedding.embeddings().clone() }
    }
}

/// `[.., in] -> [.., out]` in evaluation.
impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Linear::forward(self, x, Mode::Eval)
    }
}

/// `[B, H, W, in] -> [B, H', W', out]` in evaluation.
impl Module for Conv2d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Conv2d::forward(self, x, Mode::Eval)
    }
}

/// `[.., C] -> [.., C]`
impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        LayerNorm::forward(self, x)
    }
}

impl Linear {
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
}

impl LayerNorm {
    /// A norm with `weight` and `bias` of a `VarBuilder`; a `VarMap` starts them at one and zero.
    ///
    /// # Errors
    /// - a tensor is missing or has another shape.
    pub fn load(size: usize, eps: f64, vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        let weight = vb.get_with_hints(size, "weight", candle_nn::Init::Const(1.0))?;
        let bias = vb.get_with_hints(size, "bias", candle_nn::Init::Const(0.0))?;
        Ok(Self { weight, bias, eps })
    }
}

/// Puts the tensors of a `VarBuilder` into a module, by name, in the builder's dtype and on its device.
///
/// The module's parameters become the builder's tensors: with a `VarMap` behind it, the map's variables. The names are
/// those of [`named_parameters`](super::named_parameters); `vb.pp("..")` puts a prefix before them. Adapters stay as they
/// are, and must not be merged.
///
/// # Errors
/// - a parameter or buffer of the module is missing, or has another shape: all of them are listed;
/// - a tensor cannot be read;
/// - an adapter is merged.
///
/// The module and the map are unchanged then.
pub fn load(module: &mut dyn ModuleTree, vb: &VarBuilder<'_>) -> Result<()> {
    let source = match vb.prefix() {
        prefix if prefix.is_empty() => "VarBuilder".to_string(),
        prefix => format!("VarBuilder at {prefix}"),
    };
    let mut mismatch = TensorMismatch { source, ..Default::default() };
    let (mut values, mut refused, mut merged) = (HashMap::new(), String::new(), None);
    module.visit("", &mut |name, node| {
        let wanted = match node {
            Node::Parameter(wanted) | Node::Buffer(wanted) if !is_adapter_tensor(name) => wanted,
            Node::Layer(layer) if layer.adapters.unmerged.is_some() => {
                merged.get_or_insert(name.to_string());
                return;
            }
            _ => return,
        };
        // `get` would let a map make it.
        if !vb.contains_tensor(name) {
            return mismatch.missing.push(name.to_string());
        }
        // A map has no `get_unchecked`, and says in the error of `get` which shape it has.
        let unchecked = vb.get_unchecked_dtype(name, vb.dtype());
        match unchecked.or_else(|_| vb.get(wanted.shape(), name)) {
            Ok(value) if value.shape() == wanted.shape() => {
                values.insert(name.to_string(), value);
            }
            Ok(value) => {
                let (expected, found) = (wanted.dims().to_vec(), value.dims().to_vec());
                mismatch.misshaped.push((name.to_string(), expected, found));
            }
            Err(error) => refused += &format!("\n  {name}: {error}"),
        }
    });
    if let Some(name) = merged {
        let message = "has a merged adapter; unmerge it before loading other weights";
        return Err(Error::config(format!("{name} {message}")));
    }
    if !refused.is_empty() {
        return Err(candle_core::Error::msg(format!("{mismatch}{refused}")).into());
    }
    if !mismatch.is_empty() {
        return Err(Error::Mismatch(mismatch));
    }
    module.visit_mut("", &mut |name, node| {
        if let NodeMut::Parameter(tensor) | NodeMut::Buffer(tensor) = node {
            if let Some(value) = values.remove(name) {
                *tensor = value;
            }
        }
        Ok(())
    })
}
