//! A few learned vectors under the name a checkpoint gives them.

use crate::module_tree;
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// A table of learned vectors; the model takes rows of it as they are.
///
/// [Example](crate::nn::Conv2d)
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[count, size]`
    pub weight: Tensor,
}

module_tree!(Embedding { weight });

impl Embedding {
    /// A table with the `weight` of a `VarBuilder`; a `VarMap` draws it as for `candle_nn::embedding`.
    ///
    /// # Errors
    /// - the weight is missing or has another shape.
    pub fn load(count: usize, size: usize, vb: VarBuilder<'_>) -> Result<Self> {
        candle_nn::embedding(count, size, vb).map(Self::from)
    }
}
