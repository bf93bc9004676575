//! The vision tower of GOT-OCR 2.0: SAM's image encoder, then a projector to the language model's width.
//!
//! ```text
//! x      = vision_tower(pixel_values)                                  [B, C, h, h]
//! tokens = multimodal_projector(conv_upsampler2(conv_upsampler1(x)))   [B, h/4 * h/4, width]
//! ```
//! The convolutions are 3x3 of stride 2 without bias or activation.
//!
//! Source: `modeling_got_ocr2.py`.

use super::checkpoint;
use super::{AttentionKind, SamVisionConfig, SamVisionEncoder};
use crate::module_tree;
use crate::nn::{self, module_in_evaluation, Conv2d, Linear, Mode};
use crate::{hub, Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::path::Path;

/// From the image embedding to tokens of the language model.
///
/// [Example](crate::sam::DeepSeekOcrEncoder)
#[derive(Clone, Debug)]
pub struct GotOcr2Projector {
    /// `C -> 2 C` of half the side.
    pub conv_upsampler1: Conv2d,
    /// `2 C -> width` of half the side.
    pub conv_upsampler2: Conv2d,
    /// `width -> width`
    pub multimodal_projector: Linear,
}

module_tree!(GotOcr2Projector { conv_upsampler1, conv_upsampler2, multimodal_projector });

/// The images' side of GOT-OCR 2.0: images to tokens. Its names are those of transformers'
/// `GotOcr2ForConditionalGeneration`, and adapters on it are PEFT's for that model.
///
/// [Example](crate::sam::DeepSeekOcrEncoder)
#[derive(Clone, Debug)]
pub struct GotOcr2Encoder {
    /// SAM's encoder.
    pub vision_tower: SamVisionEncoder,
    /// To the language model.
    pub multi_modal_projector: GotOcr2Projector,
}

module_tree!(GotOcr2Encoder { vision_tower, multi_modal_projector });

module_in_evaluation! {
    /// `[B, channels, S, S] -> [B, h/4 * h/4, width]` in evaluation.
    GotOcr2Encoder,
}

impl GotOcr2Encoder {
    /// With the tensors of a `VarBuilder`; `VarBuilder::zeros` gives an encoder to be filled. GOT-OCR 2.0 has SAM
    /// ViT-B's encoder, the default configuration, and a `width` of 1024.
    ///
    /// # Errors
    /// - the width is 0;
    /// - as [`SamVisionEncoder::new`].
    pub fn new(
        config: &SamVisionConfig,
        width: usize,
        kind: AttentionKind,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        if width == 0 {
            return Err(Error::config("got-ocr2: the width is 0, expected 1 or more"));
        }
        let vision_tower = SamVisionEncoder::new(config, kind, vb.pp("vision_tower"))?;
        let (channels, vb) = (config.output_channels, vb.pp("multi_modal_projector"));
        let halving = |from, to, name| Conv2d::load_no_bias(from, to, 3, 2, vb.pp(name));
        let multi_modal_projector = GotOcr2Projector {
            conv_upsampler1: halving(channels, 2 * channels, "conv_upsampler1")?,
            conv_upsampler2: halving(2 * channels, width, "conv_upsampler2")?,
            multimodal_projector: Linear::load(width, width, vb.pp("multimodal_projector"))?,
        };
        Ok(Self { vision_tower, multi_modal_projector })
    }

    /// The encoder in a checkpoint of GOT-OCR 2.0: a file, a folder, or a name on the Hugging Face hub (feature `hub`,
    /// `stepfun-ai/GOT-OCR-2.0-hf`). The language model in it is left alone.
    ///
    /// # Errors
    /// - there is no such path, and the hub does not give it;
    /// - as [`nn::checkpoint::load`].
    pub fn from_pretrained(
        name: impl AsRef<Path>,
        kind: AttentionKind,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let config = SamVisionConfig::default();
        let mut encoder = Self::new(&config, 1024, kind, VarBuilder::zeros(dtype, device))?;
        nn::checkpoint::load(&mut encoder, hub::folder(name)?, &checkpoint::GOT_OCR2)?;
        Ok(encoder)
    }

    /// `[B, channels, S, S] -> [B, h/4 * h/4, width]`, h the patches along a side.
    ///
    /// # Errors
    /// - `pixel_values` has another shape.
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let projector = &self.multi_modal_projector;
        let x = self.vision_tower.forward(pixel_values, mode)?.permute((0, 2, 3, 1))?;
        let x = projector.conv_upsampler1.forward(&x, mode)?;
        let x = projector.conv_upsampler2.forward(&x, mode)?;
        projector.multimodal_projector.forward(&x.flatten(1, 2)?, mode)
    }
}
