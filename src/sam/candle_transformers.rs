//! candle-transformers' `Sam` with this crate's model behind it: its constructor, its methods, its names of tensors.
//!
//! ```text
//! - use candle_transformers::models::segment_anything::sam;
//! + use candle_sam_lora::sam::candle_transformers as sam;
//! ```
//! Embeddings and IoU scores agree to f32's rounding. Mask logits differ by a few thousandths: candle-transformers'
//! mask decoder approximates the exact GELU that SAM was trained with, and this one does not. Masks of everything are
//! in [`MaskGenerator`](super::MaskGenerator) in the place of `generate_masks`; `new_tiny`, MobileSAM, is not here.
//!
//! Source: `candle_transformers::models::segment_anything::sam` 0.11.

use super::checkpoint::SAM;
use super::{AttentionKind, SamConfig, SamInput, SamModel};
use crate::nn::{join, Mode, ModuleTree, Node};
use crate::Result;
use candle_core::{bail, DType, IndexOp, Result as CandleResult, Tensor};
use candle_nn::VarBuilder;
use std::collections::HashMap;

/// Side of the model's images.
///
/// [Example](crate::guide::link)
pub const IMAGE_SIZE: usize = 1024;

/// Mean and standard deviation of the pixels of each channel.
const PIXELS: [[f32; 3]; 2] = [[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]];

/// As candle-transformers' `Sam`, in evaluation.
///
/// [Example](crate::guide::link)
#[derive(Clone, Debug)]
pub struct Sam {
    /// The model, for all else: LoRA, training, boxes and masks as prompts.
    pub model: SamModel,
    mean: Tensor,
    std: Tensor,
}

impl Sam {
    /// With the tensors of a `VarBuilder`, under the names of the original segment-anything.
    ///
    /// # Errors
    /// - the sizes are impossible, or a global layer is none of the encoder's;
    /// - a tensor is missing or has another shape.
    pub fn new(
        encoder_embed_dim: usize,
        encoder_depth: usize,
        encoder_num_heads: usize,
        encoder_global_attn_indexes: &[usize],
        vb: VarBuilder<'_>,
    ) -> CandleResult<Self> {
        if let Some(index) = encoder_global_attn_indexes.iter().find(|i| **i >= encoder_depth) {
            bail!("sam: layer {index} of {encoder_depth} has no attention that could be global")
        }
        let mut config = SamConfig::vit_b();
        let vision = &mut config.vision_config;
        vision.hidden_size = encoder_embed_dim;
        vision.num_hidden_layers = encoder_depth;
        vision.num_attention_heads = encoder_num_heads;
        vision.global_attn_indexes =
            encoder_global_attn_indexes.iter().map(|&index| index as i64).collect();
        vision.mlp_dim = None;
        // The original's, where transformers has 1e-6.
        config.mask_decoder_config.layer_norm_eps = 1e-5;
        let device = vb.device().clone();
        let [mean, std] = PIXELS.map(|values| Tensor::new(&values, &device)?.reshape((3, 1, 1)));
        let model = SamModel::new(&config, AttentionKind::Fused, original(&config, &vb)?)?;
        Ok(Self { model, mean: mean?, std: std? })
    }

    /// `[3, h, w]` of 0 to 255 to the image embedding `[1, 256, 64, 64]`.
    ///
    /// # Errors
    /// - the image is larger than 1024 pixels, or has another shape.
    pub fn embeddings(&self, img: &Tensor) -> CandleResult<Tensor> {
        self.model.vision_encoder.forward(&self.preprocess(img)?.unsqueeze(0)?, Mode::Eval)
    }

    /// Mask logits `[masks, h, w]` and IoU scores `[1, masks]` for `points`; see
    /// [`forward_for_embeddings`](Self::forward_for_embeddings).
    ///
    /// # Errors
    /// - as [`embeddings`](Self::embeddings).
    pub fn forward(
        &self,
        img: &Tensor,
        points: &[(f64, f64, bool)],
        multimask_output: bool,
    ) -> CandleResult<(Tensor, Tensor)> {
        let (_, height, width) = img.dims3()?;
        let embeddings = self.embeddings(img)?;
        let (masks, iou) =
            self.forward_for_embeddings(&embeddings, height, width, points, multimask_output)?;
        let masks = masks.upsample_nearest2d(IMAGE_SIZE, IMAGE_SIZE)?.get(0)?;
        Ok((masks.i((.., ..height, ..width))?, iou))
    }

    /// Mask logits `[1, masks, 256, 256]` and IoU scores `[1, masks]`. A point is `(x, y, inside)`, x and y as
    /// fractions of the image's width and height.
    ///
    /// # Errors
    /// - a shape does not fit.
    pub fn forward_for_embeddings(
        &self,
        img_embeddings: &Tensor,
        original_h: usize,
        original_w: usize,
        points: &[(f64, f64, bool)],
        multimask_output: bool,
    ) -> CandleResult<(Tensor, Tensor)> {
        let device = img_embeddings.device();
        let prompts = || -> CandleResult<(Tensor, Tensor)> {
            let place = |&(x, y, _): &(f64, f64, bool)| {
                [x as f32 * original_w as f32, y as f32 * original_h as f32]
            };
            let places: Vec<f32> = points.iter().flat_map(place).collect();
            let labels: Vec<i64> = points.iter().map(|point| i64::from(point.2)).collect();
            let labels = Tensor::from_vec(labels, (1, 1, points.len()), device)?;
            Ok((Tensor::from_vec(places, (1, 1, points.len(), 2), device)?, labels))
        };
        let (input_points, input_labels) = (!points.is_empty()).then(prompts).transpose()?.unzip();
        let input = SamInput {
            image_embeddings: Some(img_embeddings.clone()),
            input_points,
            input_labels,
            multimask_output,
            ..Default::default()
        };
        let output = self.model.forward(&input, Mode::Eval)?;
        Ok((output.pred_masks.squeeze(1)?, output.iou_scores.squeeze(1)?))
    }

    /// `[3, h, w]` of 0 to 255, normalised and padded with zeros to `[3, 1024, 1024]`.
    ///
    /// # Errors
    /// - the image is larger, or has another shape.
    pub fn preprocess(&self, img: &Tensor) -> CandleResult<Tensor> {
        let &[3, height, width] = img.dims() else {
            bail!("sam: an image must have shape [3, h, w], got {:?}", img.dims())
        };
        if height.max(width) > IMAGE_SIZE {
            bail!("image is too large ({width}, {height}), maximum size {IMAGE_SIZE}")
        }
        let img = img.to_dtype(DType::F32)?.broadcast_sub(&self.mean)?.broadcast_div(&self.std)?;
        img.pad_with_zeros(1, 0, IMAGE_SIZE - height)?.pad_with_zeros(2, 0, IMAGE_SIZE - width)
    }

    /// The pixels before [`preprocess`](Self::preprocess), 0 to 255.
    ///
    /// # Errors
    /// - the image has another shape.
    pub fn unpreprocess(&self, img: &Tensor) -> CandleResult<Tensor> {
        img.broadcast_mul(&self.std)?.broadcast_add(&self.mean)?.clamp(0f32, 255f32)
    }
}

/// The builder under Hugging Face's names of tensors.
fn original<'a>(config: &SamConfig, vb: &VarBuilder<'a>) -> Result<VarBuilder<'a>> {
    // A head's last layer has a number in the original, so a name alone does not tell the other.
    let zeros = VarBuilder::zeros(vb.dtype(), vb.device());
    let mut names = Vec::new();
    SamModel::new(config, AttentionKind::Fused, zeros)?.visit("", &mut |name, node| {
        if let Node::Parameter(_) | Node::Buffer(_) = node {
            names.push(name.to_string());
        }
    });
    let original = SAM.to_file(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let prefix = vb.prefix();
    let original: HashMap<String, String> =
        names.into_iter().zip(original.iter().map(|name| join(&prefix, name))).collect();
    // candle puts a builder's prefix before the name that is given and the one that is found.
    Ok(vb.root().rename_f(move |name| original.get(name).cloned().unwrap_or(name.to_string())))
}
