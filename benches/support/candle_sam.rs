//! candle-transformers' image encoder with random weights, as plain tensors: weights from a `VarMap` would make it
//! keep the whole graph. Its attention is private, so the encoder alone can be compared, forward only: its gradients
//! stop at the layer norms.

use super::models::{Vit, WINDOW};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use candle_transformers::models::segment_anything::image_encoder::ImageEncoderViT;

/// Every tensor asked for is random.
struct Random;

impl SimpleBackend for Random {
    fn get(&self, s: Shape, _: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::randn(0f32, 0.02f32, s, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name}: a random tensor needs a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// The encoder for images of `grid` patches a side.
pub fn encoder(vit: &Vit, grid: usize, dtype: DType, device: &Device) -> Result<ImageEncoderViT> {
    let weights = VarBuilder::from_backend(Box::new(Random), dtype, device.clone());
    ImageEncoderViT::new(
        16 * grid,
        16,
        3,
        vit.dim,
        vit.depth,
        vit.heads,
        256,
        true,
        true,
        true,
        WINDOW,
        &vit.global,
        weights,
    )
}
