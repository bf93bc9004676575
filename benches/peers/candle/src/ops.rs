//! What `src/ops/composed.rs`, the graph in candle's own operations, takes: the shapes of its arguments, and candle's own
//! products, sums and dropout in the place of the crate's.

#[path = "../../../../src/ops/composed.rs"]
pub mod composed;

use candle_core::{Result, Shape, Tensor};

/// candle's matrix product.
pub mod product {
    use super::Dropout;
    use candle_core::{DType, Result, Tensor};

    pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.matmul(b)
    }

    /// All is f32 here.
    pub fn product(a: &Tensor, b: &Tensor, dropout: Option<Dropout>, _: DType) -> Result<Tensor> {
        dropout.map_or(Ok(a.clone()), |dropout| super::dropout(a, dropout))?.matmul(b)
    }
}

/// No check: the layers measured here fit.
pub mod rel_pos_attention {
    pub fn validate(
        qkv: &candle_core::Tensor,
        _: &super::RelPosAttention<'_>,
    ) -> candle_core::Result<(usize, usize)> {
        let (_, h, w, _) = qkv.dims4()?;
        Ok((h, w))
    }
}

pub fn broadcast_add(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    x.broadcast_add(shift)
}

pub fn repeat(t: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    t.broadcast_as(shape)
}

pub fn scale_shift(x: &Tensor, scale: Option<&Tensor>, shift: Option<&Tensor>) -> Result<Tensor> {
    let scaled = scale.map_or(Ok(x.clone()), |scale| x.broadcast_mul(scale))?;
    shift.map_or(Ok(scaled.clone()), |shift| scaled.broadcast_add(shift))
}

/// The tables have the lengths of their grids.
pub fn resize_linear(table: &Tensor, _: usize) -> Result<Tensor> {
    Ok(table.clone())
}

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
    Identity,
}

impl Activation {
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Identity => Ok(x.clone()),
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
