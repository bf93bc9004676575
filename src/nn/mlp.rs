//! The two-layer perceptron of a transformer block.

use super::{LayerNorm, Linear, Mode};
use crate::module_tree;
use crate::ops::{self, Activation};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// `lin2(act(lin1(x)))`
///
/// [Example](crate::nn::load())
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
    /// A perceptron with `lin1` and `lin2` of a `VarBuilder`.
    ///
    /// # Errors
    /// - a tensor is missing or has another shape.
    pub fn load(
        size: usize,
        mlp_dim: usize,
        activation: Activation,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let lin1 = Linear::load(size, mlp_dim, vb.pp("lin1"))?;
        let lin2 = Linear::load(mlp_dim, size, vb.pp("lin2"))?;
        Ok(Self { lin1, lin2, activation })
    }

    /// `x + mlp(norm(x))`: `[.., C] -> [.., C]`
    pub fn forward_normed(&self, x: &Tensor, norm: &LayerNorm, mode: Mode) -> Result<Tensor> {
        let (low_rank1, low_rank2) = (self.lin1.low_rank(mode)?, self.lin2.low_rank(mode)?);
        match (self.lin1.projection(&low_rank1), self.lin2.projection(&low_rank2)) {
            (Some(lin1), Some(lin2)) => {
                ops::mlp_block(x, &norm.parameters(), &lin1, self.activation, &lin2)
            }
            // Some output is no sum of base and low-rank part, as with DoRA.
            _ => self.forward_onto(&norm.forward(x)?, Some(x), mode),
        }
    }

    /// `mlp(x)`: `[.., C] -> [.., C]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.forward_onto(x, None, mode)
    }

    /// `residual + mlp(x)`: `[.., C] -> [.., C]`
    pub fn forward_onto(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let hidden = self.lin1.forward_fused(x, self.activation, None, mode)?;
        self.lin2.forward_fused(&hidden, Activation::Identity, residual, mode)
    }
}
