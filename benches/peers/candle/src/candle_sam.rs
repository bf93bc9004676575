//! candle-transformers' image encoder with random weights, as plain tensors: weights from a `VarMap` would make it
//! keep the whole graph. Its attention is private, so the encoder alone can be compared, forward only: its gradients
//! stop at the layer norms.

use super::vit::{Vit, WINDOW};
use candle_core::{DType, Device, Module, Result};
use candle_transformers::models::segment_anything::image_encoder::ImageEncoderViT;

/// The encoder for images of `grid` patches a side.
pub fn encoder(vit: &Vit, grid: usize, dtype: DType, device: &Device) -> Result<impl Module> {
    let backend = Box::new(random::Random);
    let weights = candle_nn::VarBuilder::from_backend(backend, dtype, device.clone());
    let (side, global) = (16 * grid, &vit.global);
    let (dim, depth, heads) = (vit.dim, vit.depth, vit.heads);
    ImageEncoderViT::new(
        side, 16, 3, dim, depth, heads, 256, true, true, true, WINDOW, global, weights,
    )
}

mod random {
    use candle_core::{DType, Device, Result, Shape, Tensor};
    use candle_nn::var_builder::SimpleBackend;
    use candle_nn::Init;

    /// Every tensor asked for is random.
    pub struct Random;

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
}
