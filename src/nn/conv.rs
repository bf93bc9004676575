//! Convolutions as matrix products, channels last: gather each output's inputs in a row, multiply by the weight.
//!
//! ```text
//! y[b, i, j, :] = columns(x)[b, i, j, :] W^T + bias       columns [B, H', W', k k in], W [out, k k in]
//! ```
//! There are two kinds. Where kernel = stride (patches; 1x1 too), the columns are a rearrangement of the input. The
//! other kind is an odd kernel padded by half of it, of stride 1 ("same") or more (downsampling). Written this way each
//! is an [`ops::lora_linear`]: every gradient exists, and a frozen kernel costs none. Weights keep the shape that
//! checkpoints have, `[out, in, k, k]`.
//!
//! A LoRA adapter on a convolution is A, a convolution of the same kernel to `rank` channels, and B, a 1x1. Over the
//! columns both are matrices, as with a linear layer. Source: `Conv2d` in `peft/tuners/lora/layer.py`.

use super::low_rank::{as_matrix, in_turn};
use super::tree::visit_layer;
use super::{Adapters, LayerMut, Mode, ModuleTree, Node, NodeMut};
use crate::module_tree;
use crate::ops::{self, Activation, Projection};
use candle_core::{bail, DType, Result, Tensor};
use candle_nn::{Conv2dConfig, ConvTranspose2dConfig, VarBuilder};

/// A convolution over `[B, H, W, in]`, with kernel = stride or with an odd kernel padded by half of it.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_sam_lora::{nn::{Conv2d, ConvTranspose2d, Embedding, Mode}, ops::Activation};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let conv = Conv2d::load(3, 8, 3, 1, vb.pp("conv"))?;
/// let x = Tensor::zeros((1, 6, 6, 3), DType::F32, &Device::Cpu)?; // channels last
/// let y = conv.forward(&x, Mode::Eval)?;
/// assert_eq!(y.dims(), [1, 6, 6, 8]);
/// let up = ConvTranspose2d::load(8, 4, 2, vb.pp("up"))?;
/// assert_eq!(up.forward(&y, Activation::Gelu)?.dims(), [1, 12, 12, 4]);
/// let tokens = Embedding::load(2, 8, vb.pp("tokens"))?;
/// assert_eq!(tokens.weight.dims(), [2, 8]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// `[out, in, k, k]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
    /// The kernel's size, or less.
    pub stride: usize,
    /// None at first.
    pub adapters: Adapters,
}

impl ModuleTree for Conv2d {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        visit_layer(path, &self.weight, self.bias.as_ref(), &self.adapters, f)
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> crate::Result<()>,
    ) -> crate::Result<()> {
        let Self { weight, bias, adapters, .. } = self;
        LayerMut { weight, scales: None, bias, adapters }.visit(path, f)
    }
}

impl Conv2d {
    /// A convolution without adapters.
    pub fn new(weight: Tensor, bias: Option<Tensor>, stride: usize) -> Self {
        Self { weight, bias, stride, adapters: Adapters::default() }
    }

    /// A convolution with `weight` and `bias` of a `VarBuilder`; a `VarMap` draws them as for `candle_nn::conv2d`.
    ///
    /// # Errors
    /// - a tensor is missing or has another shape;
    /// - the kernel is neither the stride nor odd, or is smaller than the stride.
    pub fn load(
        in_dim: usize,
        out_dim: usize,
        kernel: usize,
        stride: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        candle_nn::conv2d(in_dim, out_dim, kernel, candle_config(kernel, stride), vb)?.try_into()
    }

    /// As [`load`](Self::load), without a bias.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_no_bias(
        in_dim: usize,
        out_dim: usize,
        kernel: usize,
        stride: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        candle_nn::conv2d_no_bias(in_dim, out_dim, kernel, candle_config(kernel, stride), vb)?
            .try_into()
    }

    /// `[B, H, W, in] -> [B, H / stride, W / stride, out]`, rounded up
    ///
    /// # Errors
    /// When the channels differ, or kernel = stride does not divide H and W.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let weight = as_matrix(&self.weight)?;
        let base =
            Projection { weight: &weight, scales: None, bias: self.bias.as_ref(), lora: None };
        let columns = self.columns(x)?;
        let low_rank = self.adapters.low_rank(mode)?;
        // Where windows overlap an input is in several columns, and dropped in all or in none of them.
        let overlaps = self.weight.dim(2)? > self.stride;
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let lora = match low_rank.as_slice() {
            [] => None,
            [part] if part.magnitude().is_none() && !(overlaps && part.drops()) => {
                Some(part.lora())
            }
            parts => {
                return in_turn(&base, parts, |dropout| match dropout {
                    Some(dropout) if overlaps => self.columns(&ops::dropout(&wide(x)?, dropout)?),
                    Some(dropout) => ops::dropout(&wide(&columns)?, dropout),
                    None => Ok(columns.clone()),
                })
            }
        };
        ops::lora_linear(&columns, &Projection { lora, ..base }, Activation::Identity, None)
    }

    /// Each output's inputs in a row: `[B, H, W, in] -> [B, H / stride, W / stride, k k in]`
    fn columns(&self, x: &Tensor) -> Result<Tensor> {
        let (_, in_dim, kernel, _) = self.weight.dims4()?;
        let &[_, h, w, channels] = x.dims() else {
            bail!("conv2d: x must have shape [B, H, W, {in_dim}], got {:?}", x.dims())
        };
        if !(1..=kernel).contains(&self.stride) {
            bail!("conv2d: the stride must be in 1..={kernel}, got {}", self.stride)
        }
        let multiple = if kernel == self.stride { kernel } else { 1 };
        if channels != in_dim || h % multiple != 0 || w % multiple != 0 {
            bail!(
                "conv2d: x must have shape [B, H, W, {in_dim}] with H and W multiples of {multiple}, got {:?}",
                x.dims()
            )
        }
        match (kernel, self.stride) {
            (1, 1) => Ok(x.clone()),
            (kernel, stride) if kernel == stride => patches(x, kernel),
            (kernel, stride) => ops::conv_columns(x, kernel, stride),
        }
    }
}

/// Without padding where the windows do not overlap, else padded by half the kernel.
pub(super) fn candle_config(kernel: usize, stride: usize) -> Conv2dConfig {
    let padding = if kernel == stride { 0 } else { kernel / 2 };
    Conv2dConfig { padding, stride, ..Default::default() }
}

/// `[B, h k, w k, C] -> [B, h, w, k k C]`
fn patches(x: &Tensor, kernel: usize) -> Result<Tensor> {
    let (batch, h, w, channels) = x.dims4()?;
    let (rows, cols) = (h / kernel, w / kernel);
    x.reshape(vec![batch, rows, kernel, cols, kernel, channels])?
        .permute(vec![0, 1, 3, 2, 4, 5])?
        .reshape((batch, rows, cols, kernel * kernel * channels))
}

/// A transposed convolution with kernel = stride: every input position becomes a k x k block of outputs.
///
/// [Example](crate::nn::Conv2d)
#[derive(Clone, Debug)]
pub struct ConvTranspose2d {
    /// `[in, out, k, k]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Tensor,
}

module_tree!(ConvTranspose2d { weight, bias });

impl ConvTranspose2d {
    /// A convolution with `weight` and `bias` of a `VarBuilder`; a `VarMap` draws them as for
    /// `candle_nn::conv_transpose2d`.
    ///
    /// # Errors
    /// - a tensor is missing or has another shape.
    pub fn load(in_dim: usize, out_dim: usize, kernel: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let config = ConvTranspose2dConfig { stride: kernel, ..Default::default() };
        candle_nn::conv_transpose2d(in_dim, out_dim, kernel, config, vb)?.try_into()
    }

    /// `act(conv(x))`: `[B, H, W, in] -> [B, H k, W k, out]`
    pub fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let (_, out_dim, kernel, _) = self.weight.dims4()?;
        let (batch, h, w, _) = x.dims4()?;
        self.forward_taps(x, activation)?
            .reshape(vec![batch, h, w, kernel, kernel, out_dim])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .reshape((batch, h * kernel, w * kernel, out_dim))
    }

    /// As [`forward`](Self::forward), the k x k outputs of a position one after another: `[.., in] -> [.., k k, out]`.
    /// Operations on single pixels need not have them in place.
    pub fn forward_taps(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let (_, out_dim, kernel, _) = self.weight.dims4()?;
        let (weight, bias) = self.taps()?;
        let projection =
            Projection { weight: &weight, scales: None, bias: Some(&bias), lora: None };
        let out = ops::lora_linear(x, &projection, activation, None)?;
        let mut dims = x.dims().to_vec();
        dims.pop();
        dims.extend([kernel * kernel, out_dim]);
        out.reshape(dims)
    }

    /// The weight as a matrix `[k k out, in]`, and the bias of each of its rows.
    pub(crate) fn taps(&self) -> Result<(Tensor, Tensor)> {
        let (in_dim, out_dim, kernel, _) = self.weight.dims4()?;
        let taps = kernel * kernel;
        let weight = self.weight.permute((2, 3, 1, 0))?.reshape((taps * out_dim, in_dim))?;
        // In f32, so that the sum over rows is rounded once, with that over the taps.
        let bias = ops::repeat(&self.bias.to_dtype(DType::F32)?, (taps, out_dim))?;
        Ok((weight, bias.flatten_all()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn random(shape: &[usize], seed: f64) -> Result<Tensor> {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> =
            (0..count).map(|i| (i as f64 * 12.9898 + seed).sin() as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    /// Largest difference in output and in the gradients of x, weight (and bias), seen from the same grad_out.
    fn largest_difference(a: &Tensor, b: &Tensor, inputs: &[&Tensor]) -> Result<f32> {
        let grad_out = random(a.dims(), 9.)?;
        let difference =
            |a: &Tensor, b: &Tensor| (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let mut worst = difference(a, b)?;
        let (ga, gb) = ((a * &grad_out)?.backward()?, (b * &grad_out)?.backward()?);
        for input in inputs {
            let (Some(ga), Some(gb)) = (ga.get(input), gb.get(input)) else {
                bail!("an input has no gradient")
            };
            worst = worst.max(difference(ga, gb)?);
        }
        Ok(worst)
    }

    /// Sums of at most 5 * 6 * 2 * 9 products of numbers below 1: f32 rounding stays below 1e-4.
    const TOLERANCE: f32 = 1e-4;

    #[test]
    fn convolutions_agree_with_candle() -> Result<()> {
        for (kernel, stride, padding, h) in [
            (3, 1, 1, 6),
            (2, 2, 0, 6),
            (1, 1, 0, 6),
            (3, 2, 1, 6),
            (3, 2, 1, 5),
            (5, 2, 2, 7),
            (5, 3, 2, 7),
        ] {
            // Square: the backward of candle's own takes the height for the width.
            let x = candle_core::Var::from_tensor(&random(&[2, h, h, 3], 1.)?)?;
            let weight = candle_core::Var::from_tensor(&random(&[5, 3, kernel, kernel], 2.)?)?;
            let conv = Conv2d::new(weight.as_tensor().clone(), None, stride);
            let ours = conv.forward(&x, Mode::Eval)?;
            let nchw = x.permute((0, 3, 1, 2))?.contiguous()?;
            let theirs = nchw.conv2d(&weight, padding, stride, 1, 1)?.permute((0, 2, 3, 1))?;
            let worst = largest_difference(&ours, &theirs, &[&x, &weight])?;
            assert!(worst < TOLERANCE, "kernel {kernel}, stride {stride}: {worst}");
        }
        Ok(())
    }

    #[test]
    fn transposed_convolution_agrees_with_candle() -> Result<()> {
        let x = candle_core::Var::from_tensor(&random(&[2, 3, 4, 6], 1.)?)?;
        let weight = candle_core::Var::from_tensor(&random(&[6, 5, 2, 2], 2.)?)?;
        let bias = candle_core::Var::from_tensor(&random(&[5], 3.)?)?;
        let conv =
            ConvTranspose2d { weight: weight.as_tensor().clone(), bias: bias.as_tensor().clone() };
        let ours = conv.forward(&x, Activation::Identity)?;
        let nchw = x.permute((0, 3, 1, 2))?.contiguous()?;
        let theirs = nchw.conv_transpose2d(&weight, 0, 0, 2, 1)?.permute((0, 2, 3, 1))?;
        let theirs = theirs.broadcast_add(&bias)?;
        let worst = largest_difference(&ours, &theirs, &[&x, &weight, &bias])?;
        assert!(worst < TOLERANCE, "{worst}");
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let conv = Conv2d::load(3, 5, 2, 2, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
        for shape in [&[1, 4, 5, 3][..], &[1, 4, 4, 2], &[4, 4, 3]] {
            let error = conv.forward(&random(shape, 0.)?, Mode::Eval).map(|_| ());
            let message = error.expect_err("accepted").to_string();
            assert!(message.contains("[B, H, W, 3]"), "{message}");
        }
        Ok(())
    }
}
