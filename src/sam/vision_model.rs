//! The image encoder as a model of its own: image to image embedding, no prompts.
//!
//! Source: `SamVisionModel` in `modeling_sam.py`.

use super::{AttentionKind, SamVisionConfig, SamVisionEncoder};
use crate::nn::Mode;
use crate::{module_tree, Result};
use candle_core::{DType, Device, Tensor};

/// An image encoder under the name that it has in a SAM, `vision_encoder`: the tree of Hugging Face's `SamVisionModel`,
/// of its checkpoints and of adapters trained on it. A clone shares its tensors.
///
/// [`checkpoint::load`](super::checkpoint::load) fills it from a checkpoint of `SamVisionModel`, or with the image
/// encoder of a whole SAM.
#[derive(Clone, Debug)]
pub struct SamVisionModel {
    /// Image to image embedding.
    pub vision_encoder: SamVisionEncoder,
}

module_tree!(SamVisionModel { vision_encoder });

impl SamVisionModel {
    /// All zero.
    ///
    /// # Errors
    /// - the configuration is impossible;
    /// - a tensor cannot be allocated.
    pub fn new(
        config: &SamVisionConfig,
        kind: AttentionKind,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        config.validate()?;
        Ok(Self { vision_encoder: SamVisionEncoder::new(config, kind, dtype, device)? })
    }

    /// `[B, channels, S, S] -> [B, output_channels, h, w]`
    ///
    /// # Errors
    /// As [`SamVisionEncoder::forward`].
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        self.vision_encoder.forward(pixel_values, mode)
    }
}
