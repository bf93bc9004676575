//! The image encoder as a model of its own: image to image embedding, no prompts.
//!
//! Source: `SamVisionModel` in `modeling_sam.py`.

use super::{checkpoint, AttentionKind, SamVisionConfig, SamVisionEncoder};
use crate::nn::{module_in_evaluation, Mode};
use crate::{hub, module_tree, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::path::Path;

/// An image encoder under the name that it has in a SAM, `vision_encoder`. Its tree is that of Hugging Face's
/// `SamVisionModel`, of its checkpoints and of adapters trained on it. A clone shares its tensors.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::sam::{AttentionKind, SamVisionModel};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let encoder = SamVisionModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let images = Tensor::zeros((1, 3, 128, 128), DType::F32, &Device::Cpu)?;
/// let embeddings = images.apply(&encoder)?; // it is a candle_nn::Module
/// # Ok(())
/// # }
/// ```
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
    /// The image encoder in a file of weights, or in a folder with weights and perhaps a `config.json`. Also by a name
    /// on the Hugging Face hub (feature `hub`). The weights are of a whole SAM, a `SamVisionModel`, or the original's
    /// encoder alone.
    ///
    /// # Errors
    /// As [`SamModel::from_pretrained`](super::SamModel::from_pretrained).
    pub fn from_pretrained(
        name: impl AsRef<Path>,
        kind: AttentionKind,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let folder = hub::folder(name)?;
        let config = checkpoint::vision_sizes(&folder)?;
        let mut model = Self::new(&config, kind, VarBuilder::zeros(dtype, device))?;
        checkpoint::load(&mut model, folder)?;
        Ok(model)
    }

    /// With the tensors of a `VarBuilder`; `VarBuilder::zeros` gives a model to be filled.
    ///
    /// # Errors
    /// As [`SamVisionEncoder::new`].
    pub fn new(config: &SamVisionConfig, kind: AttentionKind, vb: VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        let vb = vb.pp("vision_encoder");
        Ok(Self { vision_encoder: SamVisionEncoder::new(config, kind, vb)? })
    }

    /// `[B, channels, S, S] -> [B, output_channels, h, w]`
    ///
    /// # Errors
    /// As [`SamVisionEncoder::forward`].
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        self.vision_encoder.forward(pixel_values, mode)
    }
}

module_in_evaluation! {
    /// `[B, channels, S, S] -> [B, output_channels, h, w]` in evaluation.
    SamVisionModel,
}
