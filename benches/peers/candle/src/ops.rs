//! Items that `src/ops/composed.rs` takes: the shapes of its arguments, and candle's own operations instead of the
//! crate's. Candle's sum gradients over rows in the storage's dtype.

#[path = "../../../../src/ops/composed.rs"]
pub mod composed;

use candle_core::{bail, DType, Result, Shape, Tensor};

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

impl Projection<'_> {
    /// The weight, which is never quantized here.
    pub fn float_weight(&self) -> Result<Tensor> {
        Ok(self.weight.clone())
    }
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

/// candle's products.
pub mod product {
    use super::{DType, Dropout, Result, Tensor};

    pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.matmul(b)
    }

    /// `drop(a) b` in `dtype`.
    pub fn product(
        a: &Tensor,
        b: &Tensor,
        dropout: Option<Dropout>,
        dtype: DType,
    ) -> Result<Tensor> {
        let dropped = dropout.map(|dropout| super::dropout(a, dropout)).transpose()?;
        dropped.as_ref().unwrap_or(a).matmul(b)?.to_dtype(dtype)
    }
}

pub fn scale_shift(x: &Tensor, scale: Option<&Tensor>, shift: Option<&Tensor>) -> Result<Tensor> {
    let scaled = scale.map_or_else(|| Ok(x.clone()), |scale| x.broadcast_mul(scale))?;
    shift.map_or_else(|| Ok(scaled.clone()), |shift| scaled.broadcast_add(shift))
}

pub fn broadcast_add(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    x.broadcast_add(shift)
}

pub fn repeat(t: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    t.broadcast_as(shape)?.contiguous()
}

/// The layers measured here have tables of the grid's own length.
pub fn resize_linear(table: &Tensor, len_out: usize) -> Result<Tensor> {
    match table.dim(0)? == len_out {
        true => Ok(table.clone()),
        false => bail!("a table of {} rows does not fit {len_out}", table.dim(0)?),
    }
}

impl RelPosAttention<'_> {
    /// The shape of qkv; the layers measured here are of shapes that fit.
    pub fn validate(&self, qkv: &Tensor) -> Result<[usize; 4]> {
        let (batch, h, w, packed) = qkv.dims4()?;
        Ok([batch, h, w, packed])
    }
}
