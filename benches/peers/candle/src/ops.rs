//! What `src/ops/composed.rs`, the graph in candle's own operations, takes: the shapes of its arguments without the
//! crate's own operations behind them.

#[path = "../../../../src/ops/composed.rs"]
pub mod composed;

use candle_core::{Result, Tensor};

/// The low-rank part of a projection.
#[derive(Clone, Copy)]
pub struct Lora<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub b_bias: Option<&'a Tensor>,
    pub scaling: f64,
    pub dropout: Option<Dropout>,
}

/// One projection.
pub struct Projection<'a> {
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub lora: Option<Lora<'a>>,
}

/// None of the layers measured here has another one.
pub enum Activation {
    None,
}

impl Activation {
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x.clone()),
        }
    }
}

/// The attention's settings.
pub struct RelPosAttention<'a> {
    pub num_heads: usize,
    pub softmax_scale: f64,
    pub rel_pos: Option<(&'a Tensor, &'a Tensor)>,
    pub window: Option<usize>,
    pub pad: Option<&'a Tensor>,
    pub dropout: Option<Dropout>,
}

/// The probability.
#[derive(Clone, Copy)]
pub struct Dropout(pub f32);

/// candle's dropout.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    candle_nn::ops::dropout(x, dropout.0)
}
