//! The high-resolution vision tower of DeepSeek-VL's hybrid models: SAM's image encoder and a projection. Its tokens
//! are made of the image embedding and of the output of the first global layer.
//!
//! ```text
//! proj(x) = conv2(conv1(bilinear(x)))                       [B, C, h, h] -> [B, 4C, side, side]
//! tokens  = proj(embedding) + alpha proj(neck(global))      [B, side * side, 4C]
//! ```
//! The convolutions are 3x3 of stride 2 without bias or activation.
//!
//! Source: `get_high_res_image_features` in `modeling_deepseek_vl_hybrid.py`.

use super::{checkpoint, AttentionKind, SamVisionConfig, SamVisionModel, SamVisionNeck};
use crate::nn::{self, module_in_evaluation, Conv2d, Mode};
use crate::ops::resize_bilinear;
use crate::{hub, module_tree, Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::path::Path;

/// From a feature map of SAM to the grid of the low-resolution tower.
///
/// [Example](crate::sam::DeepseekVlHighRes)
#[derive(Clone, Debug)]
pub struct DeepseekVlProjection {
    /// `C -> 2 C` of half the side.
    pub conv1: Conv2d,
    /// `2 C -> 4 C` of half the side.
    pub conv2: Conv2d,
    side: usize,
}

module_tree!(DeepseekVlProjection { conv1, conv2 });

impl DeepseekVlProjection {
    /// `[B, h, w, C] -> [B, side, side, 4C]`
    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let x = resize_bilinear(x, [4 * self.side; 2])?;
        self.conv2.forward(&self.conv1.forward(&x, mode)?, mode)
    }
}

/// The high-resolution images' side of DeepSeek-VL. Names are those of transformers'
/// `DeepseekVLHybridForConditionalGeneration`, and adapters on it are PEFT's for that model.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use candle_sam_lora::nn::Mode;
/// use candle_sam_lora::sam::{AttentionKind::Fused, DeepseekVlHighRes, SamConfig};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// // The default configuration and a side of 24 are the published models'.
/// let config = SamConfig::load("assets/tiny-sam/config.json")?.vision_config;
/// let tower = DeepseekVlHighRes::new(&config, 4, Fused, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
/// let side = config.image_size;
/// let pixels = Tensor::zeros((1, 3, side, side), DType::F32, &Device::Cpu)?;
/// assert_eq!(tower.forward(&pixels, Mode::Eval)?.dims()[..2], [1, 4 * 4]); // tokens
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DeepseekVlHighRes {
    /// SAM's encoder.
    pub high_res_vision_model: SamVisionModel,
    /// The neck of the first global layer.
    pub high_res_vision_neck: SamVisionNeck,
    /// To the grid of the low-resolution tower.
    pub high_res_vision_proj: DeepseekVlProjection,
    /// `[1]`, the weight of the first global layer.
    pub high_res_vision_alpha: Tensor,
    first_global: usize,
}

module_tree!(DeepseekVlHighRes {
    high_res_vision_model,
    high_res_vision_neck,
    high_res_vision_proj,
    high_res_vision_alpha,
});

module_in_evaluation! {
    /// `[B, channels, S, S] -> [B, side * side, 4 output_channels]` in evaluation.
    DeepseekVlHighRes,
}

impl DeepseekVlHighRes {
    /// With the tensors of a `VarBuilder`; `VarBuilder::zeros` gives a tower to be filled. DeepSeek-VL 7B has SAM
    /// ViT-B's encoder, the default configuration, and 24 tokens along a `side`.
    ///
    /// # Errors
    /// - the side is 0;
    /// - no layer has global attention;
    /// - as [`SamVisionModel::new`].
    pub fn new(
        config: &SamVisionConfig,
        side: usize,
        kind: AttentionKind,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        if side == 0 {
            return Err(Error::config("deepseek-vl: the side is 0, expected 1 or more"));
        }
        // As in transformers the first that the list names, be it the lowest or not.
        let first_global = config.global_attn_indexes.first().and_then(|first| {
            let index = usize::try_from(*first).ok()?;
            (index < config.num_hidden_layers).then_some(index)
        });
        let first_global = first_global.ok_or_else(|| {
            Error::config("deepseek-vl: global_attn_indexes does not begin with a layer")
        })?;
        let high_res_vision_model =
            SamVisionModel::new(config, kind, vb.pp("high_res_vision_model"))?;
        let channels = config.output_channels;
        let halving = |from, to, name: &str| {
            Conv2d::load_no_bias(from, to, 3, 2, vb.pp("high_res_vision_proj").pp(name))
        };
        Ok(Self {
            high_res_vision_model,
            high_res_vision_neck: SamVisionNeck::new(config, vb.pp("high_res_vision_neck"))?,
            high_res_vision_proj: DeepseekVlProjection {
                conv1: halving(channels, 2 * channels, "conv1")?,
                conv2: halving(2 * channels, 4 * channels, "conv2")?,
                side,
            },
            high_res_vision_alpha: vb.get(1, "high_res_vision_alpha")?,
            first_global,
        })
    }

    /// The tower in a checkpoint of DeepSeek-VL's hybrid models: a file, a folder, or a name on the Hugging Face hub
    /// (feature `hub`, `deepseek-community/deepseek-vl-7b-chat`). The other parts of it are left alone.
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
        let mut tower = Self::new(&config, 24, kind, VarBuilder::zeros(dtype, device))?;
        nn::checkpoint::load(&mut tower, hub::folder(name)?, &checkpoint::DEEPSEEK_VL)?;
        Ok(tower)
    }

    /// `[B, channels, S, S] -> [B, side * side, 4 output_channels]`
    ///
    /// # Errors
    /// - `pixel_values` has another shape.
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let (encoder, project) =
            (&self.high_res_vision_model.vision_encoder, &self.high_res_vision_proj);
        let (embedding, early) =
            encoder.forward_with_layer(pixel_values, Some(self.first_global), mode)?;
        let tokens = project.forward(&embedding.permute((0, 2, 3, 1))?, mode)?;
        let Some(early) = early else { return tokens.flatten(1, 2) };
        let early = project.forward(&self.high_res_vision_neck.forward(&early, mode)?, mode)?;
        let alpha = self.high_res_vision_alpha.to_dtype(early.dtype())?;
        (tokens + early.broadcast_mul(&alpha)?)?.flatten(1, 2)
    }
}
