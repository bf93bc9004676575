//! Functions applied to the output of a projection.
//!
//! The kernels and the CPU path fuse [`Identity`](Activation::Identity), [`Gelu`](Activation::Gelu) and
//! [`Relu`](Activation::Relu). The others follow the projection as a graph of candle's operations, in f32 where the
//! tensor has 16 bits, and differentiate as that graph does.
//!
//! Formulas: `transformers/activations.py`, `ACT2FN`.

use super::cpu::{function, Chain, Layer, Residual};
use crate::problem::Activation;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::sigmoid;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, SQRT_2};

/// Six digits of `1 / sqrt 2`, as transformers has them.
#[allow(clippy::approx_constant)]
const LAPLACE_MU: f64 = 0.707107;
const LAPLACE_SIGMA: f64 = 0.282095;

impl Activation {
    /// Applies the activation: in f32 and rounded once, where `x` has 16 bits. On the CPU GELU and ReLU are one
    /// operation; the rest is a graph of candle's.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        if let (Device::Cpu, Some(function)) = (x.device(), function(self)) {
            let mut chain = Chain::new("activation", x);
            chain.push((Layer::Activation(function), vec![]));
            return chain.run(Residual::None);
        }
        match (self, x.dtype()) {
            (Self::Identity, _) => Ok(x.clone()),
            (_, DType::F16 | DType::BF16) => {
                self.apply(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())
            }
            (Self::Gelu, _) => gelu(x),
            (Self::Relu, _) => relu(x),
            (Self::GeluTanh, _) => {
                let inner = ((x * x.sqr()?)? * 0.044715)? + x;
                let tanh = (inner? * FRAC_2_PI.sqrt())?.tanh()?;
                (x * 0.5)? * (tanh + 1.0)?
            }
            (Self::GeluClipped, _) => {
                let y = gelu(x)?;
                y.ge(10.0)?.where_cond(&constant(x, 10.0)?, &y)
            }
            (Self::QuickGelu, _) => x * sigmoid(&(x * 1.702)?)?,
            (Self::Silu, _) => x * sigmoid(x)?,
            (Self::Mish, _) => {
                // tanh(ln(1 + e)) is 1 / (1 + 2 / (e (e + 2))), in which nothing cancels; it rounds to 1 beyond 20, and
                // to 0 below -40.
                let e = x.clamp(-40.0, 20.0)?.exp()?;
                let inverse = ((&e * (&e + 2.0)?)?.recip()? * 2.0)?;
                x * (inverse + 1.0)?.recip()?
            }
            (Self::Hardswish, _) => x * (relu6(&(x + 3.0)?)? / 6.0)?,
            (Self::LeakyRelu, _) => x.gt(0.0)?.where_cond(x, &(x * 0.01)?),
            (Self::ReluSquared, _) => relu(x)?.sqr(),
            (Self::Relu6, _) => relu6(x),
            (Self::Sigmoid, _) => sigmoid(x),
            (Self::Tanh, _) => x.tanh(),
            (Self::Laplace, _) => {
                ((x - LAPLACE_MU)? / (LAPLACE_SIGMA * SQRT_2))?.erf()?.affine(0.5, 0.5)
            }
        }
    }
}

// candle's own GELU differentiates with constants of six digits, and its ReLU passes the gradient at 0.

fn gelu(x: &Tensor) -> Result<Tensor> {
    (x * 0.5)? * ((x * FRAC_1_SQRT_2)?.erf()? + 1.0)?
}

fn relu(x: &Tensor) -> Result<Tensor> {
    x.le(0.0)?.where_cond(&constant(x, 0.0)?, x)
}

fn relu6(x: &Tensor) -> Result<Tensor> {
    x.ge(6.0)?.where_cond(&constant(x, 6.0)?, &relu(x)?)
}

fn constant(x: &Tensor, value: f64) -> Result<Tensor> {
    Tensor::full(value as f32, x.shape(), x.device())?.to_dtype(x.dtype())
}
