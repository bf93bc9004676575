//! The whole of SAM: images and prompts to masks.
//!
//! Source: `SamModel` in `modeling_sam.py`.

use super::{
    checkpoint, AttentionKind, LayerContext, PreparedImages, SamConfig, SamMaskDecoder,
    SamMaskDecoderInput, SamPositionalEmbedding, SamPromptEncoder, SamPrompts, SamVisionEncoder,
    VisionAttention,
};
use crate::nn::{self, Mode};
use crate::{hub, module_tree, Result};
use candle_core::{bail, DType, Device, Tensor};
use candle_nn::VarBuilder;
use safetensors::View;
use std::ops::Range;
use std::path::Path;

/// Segment Anything. The tree's names are those of Hugging Face's checkpoints; with the split attention, those of
/// checkpoints that hold q, k and v apart. A clone shares its tensors.
///
/// [Example](crate::sam)
#[derive(Clone, Debug)]
pub struct SamModel {
    /// The positional encoding that image and prompts share, unless the prompts have their own.
    pub shared_image_embedding: SamPositionalEmbedding,
    /// Image to image embedding.
    pub vision_encoder: SamVisionEncoder,
    /// Points, boxes and masks to tokens.
    pub prompt_encoder: SamPromptEncoder,
    /// Image embedding and tokens to masks.
    pub mask_decoder: SamMaskDecoder,
    config: SamConfig,
}

module_tree!(SamModel { shared_image_embedding, vision_encoder, prompt_encoder, mask_decoder });

/// Input of [`SamModel::forward`]: an image (or its embedding) and any prompts. B images, P masks wanted of each.
///
/// [Example](crate::sam)
#[derive(Clone, Debug)]
pub struct SamInput {
    /// `[B, channels, S, S]`, normalised; or else `image_embeddings`.
    pub pixel_values: Option<Tensor>,
    /// `[B, output_channels, h, w]` from [`SamVisionEncoder::forward`], to prompt an image many times.
    pub image_embeddings: Option<Tensor>,
    /// See [`SamPrompts::input_points`].
    pub input_points: Option<Tensor>,
    /// See [`SamPrompts::input_labels`].
    pub input_labels: Option<Tensor>,
    /// See [`SamPrompts::input_boxes`].
    pub input_boxes: Option<Tensor>,
    /// See [`SamPrompts::input_masks`].
    pub input_masks: Option<Tensor>,
    /// Several masks for an ambiguous prompt, or one.
    pub multimask_output: bool,
}

/// No image, no prompt, several masks.
impl Default for SamInput {
    fn default() -> Self {
        Self {
            pixel_values: None,
            image_embeddings: None,
            input_points: None,
            input_labels: None,
            input_boxes: None,
            input_masks: None,
            multimask_output: true,
        }
    }
}

/// Output of [`SamModel::forward`].
///
/// [Example](crate::sam)
#[derive(Clone, Debug)]
pub struct SamOutput {
    /// Expected IoU of each mask, `[B, P, M]`.
    pub iou_scores: Tensor,
    /// Logits, `[B, P, M, 4h, 4w]`; a pixel is in the mask where they are positive.
    pub pred_masks: Tensor,
}

impl SamModel {
    /// The model in a file of weights (`sam_vit_b_01ec64.pth`), or in a folder with weights and perhaps a
    /// `config.json`. Also by a name on the Hugging Face hub (`facebook/sam-vit-base`, feature `hub`). See
    /// [`checkpoint::sizes`], [`checkpoint::load`] and [`hub::folder`].
    ///
    /// # Errors
    /// - there is no such folder, and the hub does not give it;
    /// - the configuration cannot be read or is impossible;
    /// - the weights do not fit it;
    /// - the dtype is none of f32, f16 and bf16.
    pub fn from_pretrained(
        name: impl AsRef<Path>,
        kind: AttentionKind,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let folder = hub::folder(name)?;
        let config = checkpoint::sizes(&folder)?.config;
        let mut model = Self::new(&config, kind, VarBuilder::zeros(dtype, device))?;
        checkpoint::load(&mut model, folder)?;
        Ok(model)
    }

    /// The configuration that the model was made from.
    pub fn config(&self) -> &SamConfig {
        &self.config
    }

    /// With the tensors of a `VarBuilder`, under the names of Hugging Face's checkpoints, `qkv` as `kind` has it.
    ///
    /// `VarBuilder::zeros` gives a model to be filled from a checkpoint of any naming ([`checkpoint::load`]) or with
    /// [`randomize`](Self::randomize).
    ///
    /// # Errors
    /// - the configuration is impossible;
    /// - the dtype is none of f32, f16 and bf16;
    /// - a tensor is missing or has another shape.
    pub fn new(config: &SamConfig, kind: AttentionKind, vb: VarBuilder<'_>) -> Result<Self> {
        Self::with_attention(config, vb, |layer| kind.build(layer))
    }

    /// As `new`, with the attention that `build` makes for each layer of the image encoder.
    ///
    /// # Errors
    /// As `new`; besides when `build` fails.
    pub fn with_attention(
        config: &SamConfig,
        vb: VarBuilder<'_>,
        build: impl FnMut(&LayerContext<'_>) -> candle_core::Result<Box<dyn VisionAttention>>,
    ) -> Result<Self> {
        config.validate()?;
        let (vision, decoder) = (&config.vision_config, &config.mask_decoder_config);
        let shared = vb.pp("shared_image_embedding");
        let shared = SamPositionalEmbedding::new(vision.num_pos_feats, shared)?;
        let encoder = vb.pp("vision_encoder");
        let mut prompt_encoder = SamPromptEncoder::new(config, vb.pp("prompt_encoder"))?;
        let own = vb.pp("prompt_encoder.shared_embedding");
        if own.contains_tensor("positional_embedding") {
            let own = SamPositionalEmbedding::new(vision.num_pos_feats, own)?.positional_embedding;
            let differs = own.0.ne(&shared.positional_embedding.0)?.to_dtype(DType::F32)?;
            if differs.max_all()?.to_scalar::<f32>()? > 0.0 {
                prompt_encoder.shared_embedding.own = Some(own);
            }
        }
        Ok(Self {
            shared_image_embedding: shared,
            vision_encoder: SamVisionEncoder::with_attention(vision, encoder, build)?,
            prompt_encoder,
            mask_decoder: SamMaskDecoder::new(decoder, vb.pp("mask_decoder"))?,
            config: config.clone(),
        })
    }

    /// Fills the model with random numbers; see [`nn::randomize`].
    pub fn randomize(&mut self, seed: u64, std: f64) -> Result<()> {
        nn::randomize(self, seed, std)
    }

    /// Masks and IoU scores; without any prompt, the masks of what the model takes for the object.
    ///
    /// # Errors
    /// When there is not exactly one of `pixel_values` and `image_embeddings`, or a shape does not fit.
    pub fn forward(&self, input: &SamInput, mode: Mode) -> candle_core::Result<SamOutput> {
        self.forward_masks(input, self.mask_decoder.masks_of(input.multimask_output), mode)
    }

    /// As `forward`, with the masks `chosen` whatever `multimask_output` says: 0 is the single one, the alternatives
    /// follow.
    ///
    /// # Errors
    /// As `forward`, or when there are no such masks.
    pub fn forward_masks(
        &self,
        input: &SamInput,
        chosen: Range<usize>,
        mode: Mode,
    ) -> candle_core::Result<SamOutput> {
        let image_embeddings = match (&input.pixel_values, &input.image_embeddings) {
            (Some(pixel_values), None) => self.vision_encoder.forward(pixel_values, mode)?,
            (None, Some(embeddings)) => {
                self.check_embeddings(embeddings)?;
                embeddings.clone()
            }
            (Some(_), Some(_)) => {
                bail!(
                    "sam: both pixel_values and image_embeddings were given; expected one of them"
                )
            }
            (None, None) => {
                bail!("sam: neither pixel_values nor image_embeddings was given; expected one of them")
            }
        };
        let (sparse, dense) = self.prompts(input, image_embeddings.dim(0)?, mode)?;
        let looked_at = SamMaskDecoderInput {
            image_embeddings: &image_embeddings,
            image_positions: &self.image_positions()?,
            sparse: sparse.as_ref(),
            dense: &dense,
        };
        let (pred_masks, iou_scores) = self.mask_decoder.forward_masks(&looked_at, chosen, mode)?;
        Ok(SamOutput { iou_scores, pred_masks })
    }

    /// Image embeddings `[B, C, h, w]` ready for many prompts without logits, in evaluation. On the CPU the result
    /// remembers the parameters that it was made with: 400 kB in a published SAM.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn prepare(&self, image_embeddings: &Tensor) -> candle_core::Result<PreparedImages> {
        self.check_embeddings(image_embeddings)?;
        let batch = image_embeddings.dim(0)?;
        let (_, dense) = self.prompts(&SamInput::default(), batch, Mode::Eval)?;
        let input = SamMaskDecoderInput {
            image_embeddings,
            image_positions: &self.image_positions()?,
            sparse: None,
            dense: &dense,
        };
        let mut images = self.mask_decoder.prepare(&input, usize::MAX, Mode::Eval)?;
        if image_embeddings.device().is_cpu() {
            let copies = self.prepare_reads()?;
            images.made_with =
                copies.iter().map(Tensor::copy).collect::<candle_core::Result<_>>()?;
        }
        Ok(images)
    }

    /// Whether [`prepare`](Self::prepare) would give these images again: no weight or adapter that it reads has changed
    /// since. Always false on a GPU, where making them costs less than asking.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn is_current(&self, images: &PreparedImages) -> candle_core::Result<bool> {
        let (reads, made_with) = (self.prepare_reads()?, &images.made_with);
        let same = |(a, b): (&Tensor, &Tensor)| {
            a.dtype() == b.dtype() && a.dims() == b.dims() && a.data() == b.data()
        };
        Ok(reads.len() == made_with.len() && reads.iter().zip(made_with).all(same))
    }

    /// Every parameter that [`prepare`](Self::prepare) reads.
    fn prepare_reads(&self) -> candle_core::Result<Vec<Tensor>> {
        let mut reads = self.mask_decoder.transformer.shared_reads()?;
        reads.push(self.prompt_encoder.no_mask_embed.weight.clone());
        Ok(reads.iter().map(Tensor::detach).collect())
    }

    /// As [`forward`](Self::forward) in evaluation, of images that [`prepare`](Self::prepare) made ready.
    ///
    /// # Errors
    /// - `input` has `pixel_values`, `image_embeddings` or `input_masks`;
    /// - on the CPU, a weight or an adapter has changed since the images were prepared;
    /// - a shape does not fit.
    pub fn prompt(
        &self,
        images: &PreparedImages,
        input: &SamInput,
    ) -> candle_core::Result<SamOutput> {
        let SamInput { pixel_values, image_embeddings, input_masks, multimask_output, .. } = input;
        if [pixel_values, image_embeddings, input_masks].iter().any(|tensor| tensor.is_some()) {
            bail!("sam: prepared images take points and boxes alone")
        }
        if !images.made_with.is_empty() && !self.is_current(images)? {
            bail!("sam: a weight or an adapter has changed since the images were prepared")
        }
        let (sparse, _) = self.prompts(input, images.batch(), Mode::Eval)?;
        let chosen = self.mask_decoder.masks_of(*multimask_output);
        let (pred_masks, iou_scores) =
            self.mask_decoder.prompt(images, sparse.as_ref(), chosen, Mode::Eval)?;
        Ok(SamOutput { iou_scores, pred_masks })
    }

    /// Sparse tokens and the dense map.
    pub(super) fn prompts(
        &self,
        input: &SamInput,
        batch: usize,
        mode: Mode,
    ) -> candle_core::Result<(Option<Tensor>, Tensor)> {
        let prompts = SamPrompts {
            input_points: input.input_points.as_ref(),
            input_labels: input.input_labels.as_ref(),
            input_boxes: input.input_boxes.as_ref(),
            input_masks: input.input_masks.as_ref(),
        };
        self.prompt_encoder.forward(&prompts, &self.shared_image_embedding, batch, mode)
    }

    pub(super) fn image_positions(&self) -> candle_core::Result<Tensor> {
        self.shared_image_embedding.grid(self.config.vision_config.grid_size())
    }

    fn check_embeddings(&self, embeddings: &Tensor) -> candle_core::Result<()> {
        let (channels, side) =
            (self.mask_decoder.mask_tokens.weight.dim(1)?, self.config.vision_config.grid_size());
        if !matches!(*embeddings.dims(), [b, c, h, w] if b > 0 && [c, h, w] == [channels, side, side])
        {
            bail!(
                "sam: image_embeddings must have shape [B, {channels}, {side}, {side}], got {:?}",
                embeddings.dims()
            )
        }
        Ok(())
    }
}
