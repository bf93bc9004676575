//! LayerNorm over the last dimension, with a gradient (candle-nn's fast one has none).

use crate::ops::Norm;
use crate::{module_tree, ops};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.
///
/// [Example](crate::nn)
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `[C]`
    pub weight: Tensor,
    /// `[C]`
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f64,
}

module_tree!(LayerNorm { weight, bias });

impl LayerNorm {
    /// A norm with these parameters, `[C]` each.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    /// A norm with `weight` and `bias` of a `VarBuilder`; a `VarMap` starts them at one and zero.
    ///
    /// # Errors
    /// - a tensor is missing or has another shape.
    pub fn load(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        candle_nn::layer_norm(size, eps, vb)?.try_into()
    }

    /// `[.., C] -> [.., C]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }

    /// For operations that the norm is a part of.
    pub fn parameters(&self) -> Norm<'_> {
        Norm { weight: &self.weight, bias: &self.bias, eps: self.eps }
    }
}
