//! Between candle's layers and these: conversions, `candle_nn::Module` in evaluation, and weights from a `VarBuilder`.

use super::adapters::is_adapter_tensor;
use super::conv::config;
use super::{
    Conv2d, ConvTranspose2d, Embedding, LayerNorm, Linear, MlpBlock, ModuleTree, Node, NodeMut,
};
use crate::ops::Activation;
use crate::{Error, Result, TensorMismatch};
use candle_core::{bail, Tensor};
use candle_nn::{Conv2dConfig, ConvTranspose2dConfig, Module, VarBuilder};
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

/// Shares the tensors: variables stay the same variables.
///
/// # Errors
/// - the norm is an RMS norm, which keeps the mean;
/// - it has no bias.
impl TryFrom<candle_nn::LayerNorm> for LayerNorm {
    type Error = candle_core::Error;

    fn try_from(norm: candle_nn::LayerNorm) -> candle_core::Result<Self> {
        match norm.bias() {
            Some(bias) if norm.remove_mean() => {
                Ok(Self::new(norm.weight().clone(), bias.clone(), norm.eps()))
            }
            bias => bail!(
                "layer-norm: needs a norm that removes the mean and has a bias, got one with remove_mean {} and {}",
                norm.remove_mean(),
                if bias.is_some() { "a bias" } else { "no bias" }
            ),
        }
    }
}

/// Shares the tensors: variables stay the same variables. The layer here takes `[B, H, W, in]`, candle's `[B, in, H, W]`.
///
/// # Errors
/// - the kernel is not square;
/// - it is neither the stride without padding, nor odd and padded by half of it with a stride of at most the kernel;
/// - there are groups or a dilation.
impl TryFrom<candle_nn::Conv2d> for Conv2d {
    type Error = candle_core::Error;

    fn try_from(conv: candle_nn::Conv2d) -> candle_core::Result<Self> {
        let (_, _, kernel, width) = conv.weight().dims4()?;
        let Conv2dConfig { padding, stride, dilation, groups, .. } = *conv.config();
        if kernel != width || dilation != 1 || groups != 1 {
            bail!(
                "conv2d: needs a square kernel without groups and dilation, got {kernel} x {width}, {groups} groups, \
                 dilation {dilation}"
            )
        }
        if kernel != stride && kernel.is_multiple_of(2) {
            bail!("conv2d: a kernel that is not the stride must be odd, got {kernel} with stride {stride}")
        }
        if !(1..=kernel).contains(&stride) || padding != config(kernel, stride).padding {
            bail!(
                "conv2d: a kernel of {kernel} needs a stride in 1..={kernel}, and padding by {}, got stride {stride}, \
                 padding {padding}",
                config(kernel, stride).padding
            )
        }
        Ok(Self::new(conv.weight().clone(), conv.bias().cloned(), stride))
    }
}

/// Shares the tensors: variables stay the same variables. The layer here takes `[B, H, W, in]`, candle's `[B, in, H, W]`.
///
/// # Errors
/// - the kernel is not square, or not the stride;
/// - there is a padding or a dilation;
/// - there is no bias.
impl TryFrom<candle_nn::ConvTranspose2d> for ConvTranspose2d {
    type Error = candle_core::Error;

    fn try_from(conv: candle_nn::ConvTranspose2d) -> candle_core::Result<Self> {
        let (_, _, kernel, width) = conv.weight().dims4()?;
        let ConvTranspose2dConfig { padding, output_padding, stride, dilation } = *conv.config();
        if kernel != width || (stride, padding, output_padding, dilation) != (kernel, 0, 0, 1) {
            bail!(
                "conv-transpose2d: needs a square kernel that is the stride, without padding and dilation, got \
                 {kernel} x {width}, {:?}",
                conv.config()
            )
        }
        let Some(bias) = conv.bias() else { bail!("conv-transpose2d: needs a bias") };
        Ok(Self { weight: conv.weight().clone(), bias: bias.clone() })
    }
}

/// `candle_nn::Module` for types whose `forward(x, mode)` takes one tensor, in evaluation.
macro_rules! module_in_evaluation {
    ($($(#[$doc:meta])* $module:ty),* $(,)?) => {$(
        $(#[$doc])*
        impl candle_nn::Module for $module {
            fn forward(&self, x: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
                <$module>::forward(self, x, $crate::nn::Mode::Eval)
            }
        }
    )*};
}
pub(crate) use module_in_evaluation;

module_in_evaluation! {
    /// `[.., in] -> [.., out]` in evaluation.
    Linear,
    /// `[B, H, W, in] -> [B, H', W', out]` in evaluation.
    Conv2d,
    /// `lin2(act(lin1(x)))` in evaluation: `[.., C] -> [.., C]`
    MlpBlock,
}

/// `[.., C] -> [.., C]`
impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        LayerNorm::forward(self, x)
    }
}

/// `[B, H, W, in] -> [B, H k, W k, out]`
impl Module for ConvTranspose2d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ConvTranspose2d::forward(self, x, Activation::Identity)
    }
}

/// Puts the tensors of a `VarBuilder` into a module, by name, in the builder's dtype and on its device. A `VarMap` keeps the
/// dtype of its variables.
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
