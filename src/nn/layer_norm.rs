//! LayerNorm over the last dimension, with a gradient (candle-nn's fast one has none).

use crate::ops::Norm;
use crate::{module_tree, ops};
use candle_core::{DType, Device, Result, Tensor};

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.
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
    /// Weight one, bias zero.
    pub fn new(size: usize, eps: f64, dtype: DType, device: &Device) -> Result<Self> {
        let weight = Tensor::ones(size, dtype, device)?;
        Ok(Self { weight, bias: Tensor::zeros(size, dtype, device)?, eps })
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
