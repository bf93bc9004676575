//! Between candle's layers and these: conversions, and `candle_nn::Module` in evaluation.

use super::conv::candle_config;
use super::{Conv2d, ConvTranspose2d, Embedding, LayerNorm, Linear, MlpBlock};
use crate::ops::Activation;
use candle_core::{bail, Result, Tensor};
use candle_nn::{Conv2dConfig, ConvTranspose2dConfig, Module};

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

    fn try_from(norm: candle_nn::LayerNorm) -> Result<Self> {
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

/// Shares the tensors: variables stay the same variables. The layer here takes `[B, H, W, in]`, candle's
/// `[B, in, H, W]`.
///
/// # Errors
/// - the kernel is not square;
/// - it is neither the stride without padding, nor odd and padded by half of it with a stride of at most the kernel;
/// - there are groups or a dilation.
impl TryFrom<candle_nn::Conv2d> for Conv2d {
    type Error = candle_core::Error;

    fn try_from(conv: candle_nn::Conv2d) -> Result<Self> {
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
        if !(1..=kernel).contains(&stride) || padding != candle_config(kernel, stride).padding {
            bail!(
                "conv2d: a kernel of {kernel} needs a stride in 1..={kernel}, and padding by {}, got stride {stride}, \
                 padding {padding}",
                candle_config(kernel, stride).padding
            )
        }
        Ok(Self::new(conv.weight().clone(), conv.bias().cloned(), stride))
    }
}

/// Shares the tensors: variables stay the same variables. The layer here takes `[B, H, W, in]`, candle's
/// `[B, in, H, W]`.
///
/// # Errors
/// - the kernel is not square, or not the stride;
/// - there is a padding or a dilation;
/// - there is no bias.
impl TryFrom<candle_nn::ConvTranspose2d> for ConvTranspose2d {
    type Error = candle_core::Error;

    fn try_from(conv: candle_nn::ConvTranspose2d) -> Result<Self> {
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
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        LayerNorm::forward(self, x)
    }
}

/// `[B, H, W, in] -> [B, H k, W k, out]`
impl Module for ConvTranspose2d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ConvTranspose2d::forward(self, x, Activation::Identity)
    }
}
