//! Low-rank parts of adapters: products with the layer's input as a matrix, alone, together or in turn.
//!
//! ```text
//! LoRA       y + scaling (drop(x) A^T B^T + lora_bias)
//! DoRA       y + (g - 1) (y - b) + g scaling drop(x) A^T B^T       g = magnitude / || W + scaling B A ||_row
//!            with dropout, drop(x) W^T in the place of y - b
//! together   A = [A_1; A_2; ..]   B = [s_1 B_1, s_2 B_2, ..]   scaling = 1        the sum of LoRA parts
//! in turn    y = x W^T + b, then one part after the other, as PEFT does
//! ```
//! Several LoRA adapters without dropout are one of the sum of their ranks, so that the fused operation takes them.
//! A convolution's tensors are seen as matrices over columns, see `conv.rs`.
//!
//! Source: `peft/tuners/lora/layer.py` and `variants.py`.

use super::{Adapter, Mode};
use crate::ops::{self, Activation, Lora, Projection};
use crate::philox::Dropout;
use candle_core::{DType, Result, Tensor};

/// The low-rank part of a forward pass, over rows of `in` values.
///
/// [Example](crate::nn::Adapters)
#[derive(Clone, Debug)]
pub struct LowRank {
    a: Tensor,
    b: Tensor,
    b_bias: Option<Tensor>,
    magnitude: Option<Tensor>,
    scaling: f64,
    dropout: Option<Dropout>,
}

/// A linear layer's weight as it is, a convolution's over columns: `[out, in, k, k] -> [out, k k in]`.
pub(super) fn as_matrix(weight: &Tensor) -> Result<Tensor> {
    match weight.rank() {
        4 => weight.permute((0, 2, 3, 1))?.reshape((weight.dims()[0], ())),
        _ => Ok(weight.clone()),
    }
}

impl LowRank {
    pub(super) fn new(adapter: &Adapter, mode: Mode) -> Result<Self> {
        Ok(Self {
            a: as_matrix(&adapter.a)?,
            b: as_matrix(&adapter.b)?,
            b_bias: adapter.b_bias.clone(),
            magnitude: match &adapter.magnitude {
                Some(magnitude) if magnitude.rank() != 1 => Some(magnitude.flatten_all()?),
                magnitude => magnitude.clone(),
            },
            scaling: adapter.scaling,
            dropout: mode.dropout(adapter.dropout, adapter.stream),
        })
    }

    /// One part in the place of several, where their sum is one.
    pub(super) fn together(parts: Vec<Self>) -> Result<Vec<Self>> {
        if parts.len() < 2 || parts.iter().any(|p| p.magnitude.is_some() || p.dropout.is_some()) {
            return Ok(parts);
        }
        let f32s = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let a = parts.iter().map(|part| f32s(&part.a)).collect::<Result<Vec<_>>>()?;
        let scaled = |part: &Self, tensor: &Tensor| f32s(tensor)? * part.scaling;
        let b = parts.iter().map(|part| scaled(part, &part.b)).collect::<Result<Vec<_>>>()?;
        let mut b_bias: Option<Tensor> = None;
        for part in &parts {
            if let Some(bias) = &part.b_bias {
                let bias = scaled(part, bias)?;
                b_bias = Some(b_bias.map_or(Ok(bias.clone()), |sum| sum + bias)?);
            }
        }
        let (a, b) = (Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?);
        Ok(vec![Self { a, b, b_bias, magnitude: None, scaling: 1.0, dropout: None }])
    }

    /// As the operations take it.
    pub(super) fn lora(&self) -> Lora<'_> {
        Lora {
            a: &self.a,
            b: &self.b,
            b_bias: self.b_bias.as_ref(),
            scaling: self.scaling,
            dropout: self.dropout,
        }
    }

    /// DoRA's magnitude, `[out]`.
    pub(super) fn magnitude(&self) -> Option<&Tensor> {
        self.magnitude.as_ref()
    }

    /// Every tensor of it, and the scaling as one.
    pub(super) fn tensors(&self) -> Result<Vec<Tensor>> {
        let mut tensors = vec![self.a.clone(), self.b.clone()];
        tensors.extend([&self.b_bias, &self.magnitude].into_iter().flatten().cloned());
        tensors.push(Tensor::new(self.scaling, self.a.device())?);
        Ok(tensors)
    }

    /// True when part of the input is dropped.
    pub(crate) fn drops(&self) -> bool {
        self.dropout.is_some()
    }

    /// `scaling (x A^T (g B)^T + lora_bias)` in f32, as `x` is, which is dropped already.
    fn product(&self, x: &Tensor, g: Option<&Tensor>) -> Result<Tensor> {
        let linear = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| {
            let projection = Projection { weight, scales: None, bias, lora: None };
            ops::lora_linear(x, &projection, Activation::Identity, None)
        };
        let to_dtype = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let bias = self.b_bias.as_ref().map(to_dtype).transpose()?;
        let mut b = to_dtype(&self.b)?;
        if let Some(g) = g {
            b = ops::scale_shift(&b, Some(&g.unsqueeze(1)?), None)?;
        }
        let s = linear(x, &to_dtype(&self.a)?, None)?;
        linear(&s, &b, bias.as_ref())? * self.scaling
    }
}

/// `x W^T + b` and the parts, one after the other, in f32 between them as in PEFT. `input` gives x as rows, and in f32
/// with dropout.
pub(super) fn in_turn(
    base: &Projection<'_>,
    parts: &[LowRank],
    input: impl Fn(Option<Dropout>) -> Result<Tensor>,
) -> Result<Tensor> {
    let x = input(None)?;
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
    let mut y = wide(&ops::lora_linear(&x, base, Activation::Identity, None)?)?;
    for part in parts {
        let dropped = wide(&input(part.dropout)?)?;
        let Some(magnitude) = &part.magnitude else {
            y = (y + part.product(&dropped, None)?)?;
            continue;
        };
        let norm = ops::dora_weight_norm(base.weight, &part.a, &part.b, part.scaling)?;
        let g = (wide(magnitude)? / norm)?;
        let unscaled = match (part.dropout, base.bias) {
            (Some(_), _) => {
                let weight = Projection {
                    weight: &wide(base.weight)?,
                    scales: None,
                    bias: None,
                    lora: None,
                };
                ops::lora_linear(&dropped, &weight, Activation::Identity, None)?
            }
            (None, Some(bias)) => ops::broadcast_add(&y, &bias.neg()?)?,
            (None, None) => y.clone(),
        };
        let more = ops::scale_shift(&unscaled, Some(&(&g - 1.0)?), None)?;
        y = ((y + more)? + part.product(&dropped, Some(&g))?)?;
    }
    y.to_dtype(x.dtype())
}
