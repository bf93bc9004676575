//! The two-layer perceptron of a transformer block.

use super::{LayerNorm, Linear, Mode};
use crate::module_tree;
use crate::ops::{self, Activation};
use candle_core::{DType, Device, Result, Tensor};

/// `lin2(act(lin1(x))) + residual`
#[derive(Clone, Debug)]
pub struct MlpBlock {
    /// `[C] -> [mlp_dim]`
    pub lin1: Linear,
    /// `[mlp_dim] -> [C]`
    pub lin2: Linear,
    /// Applied between the two.
    pub activation: Activation,
}

module_tree!(MlpBlock { lin1, lin2 });

impl MlpBlock {
    /// All zero.
    pub fn zeros(
        size: usize,
        mlp_dim: usize,
        activation: Activation,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self {
            lin1: Linear::zeros(size, mlp_dim, true, dtype, device)?,
            lin2: Linear::zeros(mlp_dim, size, true, dtype, device)?,
            activation,
        })
    }

    /// `x + mlp(norm(x))`: `[.., C] -> [.., C]`
    pub fn forward_normed(&self, x: &Tensor, norm: &LayerNorm, mode: Mode) -> Result<Tensor> {
        let (low_rank1, low_rank2) = (self.lin1.low_rank(mode)?, self.lin2.low_rank(mode)?);
        match (self.lin1.projection(&low_rank1), self.lin2.projection(&low_rank2)) {
            (Some(lin1), Some(lin2)) => {
                ops::mlp_block(x, &norm.parameters(), &lin1, self.activation, &lin2)
            }
            // Some output is no sum of base and low-rank part, as with DoRA.
            _ => self.forward(&norm.forward(x)?, x, mode),
        }
    }

    /// `[.., C] -> [.., C]`
    pub fn forward(&self, x: &Tensor, residual: &Tensor, mode: Mode) -> Result<Tensor> {
        let hidden = self.lin1.forward_fused(x, self.activation, None, mode)?;
        self.lin2.forward_fused(&hidden, Activation::Identity, Some(residual), mode)
    }
}
