//! A few learned vectors under the name a checkpoint gives them.

use crate::module_tree;
use candle_core::{DType, Device, Result, Tensor};

/// A table of learned vectors; the model takes rows of it as they are.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[count, size]`
    pub weight: Tensor,
}

module_tree!(Embedding { weight });

impl Embedding {
    /// All zero.
    pub fn zeros(count: usize, size: usize, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self { weight: Tensor::zeros((count, size), dtype, device)? })
    }
}
