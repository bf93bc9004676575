//! SAM-HQ: a SAM with one more mask token, whose mask is made of finer features and added to SAM's.
//!
//! ```text
//! features = encoder_conv(image) + compress_vit_conv(early)     [4h, 4w, C/8], once an image
//! fine     = mask_conv(up) + features                           up as in SAM's mask decoder
//! mask_hq  = hq_mask_mlp(hq token) . fine                       masks = SAM's masks + mask_hq
//! conv     = conv2(gelu(norm(conv1(x))))                        early: the first layer with global attention
//! ```
//! SAM's weights are the frozen ones of a SAM; the HQ parts are what was trained.
//!
//! Masks are those of SAM-HQ's own code. Those of transformers 5.23 differ: it upscales the image as it was before the
//! transformer, its sides exchanged. As there, several masks come in the order of their scores.
//!
//! Source: `mask_decoder_hq.py` of SAM-HQ, names of `modeling_sam_hq.py`; Ke et al., "Segment Anything in High
//! Quality", NeurIPS 2023.

use super::mask_decoder::SamFeedForward;
use super::{checkpoint, AttentionKind, SamConfig, SamInput, SamModel, SamOutput};
use crate::nn::{Conv2d, ConvTranspose2d, Embedding, LayerNorm, Mode};
use crate::ops::{self, Activation};
use crate::{hub, module_tree, Result};
use candle_core::{bail, DType, Device, IndexOp, Result as CandleResult, Tensor};
use candle_nn::VarBuilder;
use std::path::Path;

/// Epsilon of the norms between convolutions, whatever the configuration says.
const EPS: f64 = 1e-6;

/// The parts of SAM-HQ's mask decoder that SAM's has not.
///
/// [Example](crate::sam::SamHqModel)
#[derive(Clone, Debug)]
pub struct SamHqParts {
    /// `[1, C]`
    pub hq_token: Embedding,
    /// `C -> C/8`
    pub hq_mask_mlp: SamFeedForward,
    /// 2x2, from the encoder's width to C.
    pub compress_vit_conv1: ConvTranspose2d,
    /// After it.
    pub compress_vit_norm: LayerNorm,
    /// 2x2, `C -> C/8`
    pub compress_vit_conv2: ConvTranspose2d,
    /// 2x2, `C -> C/4`
    pub encoder_conv1: ConvTranspose2d,
    /// After it.
    pub encoder_norm: LayerNorm,
    /// 2x2, `C/4 -> C/8`
    pub encoder_conv2: ConvTranspose2d,
    /// 3x3, `C/8 -> C/4`
    pub mask_conv1: Conv2d,
    /// After it.
    pub mask_norm: LayerNorm,
    /// 3x3, `C/4 -> C/8`
    pub mask_conv2: Conv2d,
}

module_tree!(SamHqParts {
    hq_token,
    hq_mask_mlp,
    compress_vit_conv1,
    compress_vit_norm,
    compress_vit_conv2,
    encoder_conv1,
    encoder_norm,
    encoder_conv2,
    mask_conv1,
    mask_norm,
    mask_conv2,
});

impl SamHqParts {
    fn new(config: &SamConfig, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let (width, size) =
            (config.vision_config.hidden_size, config.mask_decoder_config.hidden_size);
        let (quarter, eighth) = (size / 4, size / 8);
        let up = |from, to, name: &str| ConvTranspose2d::load(from, to, 2, vb.pp(name));
        let norm = |size, name: &str| LayerNorm::load(size, EPS, vb.pp(name));
        Ok(Self {
            hq_token: Embedding::load(1, size, vb.pp("hq_token"))?,
            hq_mask_mlp: SamFeedForward::new([size, size, eighth], 3, vb.pp("hq_mask_mlp"))?,
            compress_vit_conv1: up(width, size, "compress_vit_conv1")?,
            compress_vit_norm: norm(size, "compress_vit_norm")?,
            compress_vit_conv2: up(size, eighth, "compress_vit_conv2")?,
            encoder_conv1: up(size, quarter, "encoder_conv1")?,
            encoder_norm: norm(quarter, "encoder_norm")?,
            encoder_conv2: up(quarter, eighth, "encoder_conv2")?,
            mask_conv1: Conv2d::load(eighth, quarter, 3, 1, vb.pp("mask_conv1"))?,
            mask_norm: norm(quarter, "mask_norm")?,
            mask_conv2: Conv2d::load(quarter, eighth, 3, 1, vb.pp("mask_conv2"))?,
        })
    }

    /// `[B, h, w, C]` and the early layer's `[B, h, w, width]` -> `[B, 4h, 4w, C/8]`
    fn features(&self, image: &Tensor, early: Option<&Tensor>) -> CandleResult<Tensor> {
        let up =
            |x: &Tensor, conv1: &ConvTranspose2d, norm: &LayerNorm, conv2: &ConvTranspose2d| {
                let x = norm.forward(&conv1.forward(x, Activation::Identity)?)?;
                conv2.forward(&Activation::Gelu.apply(&x)?, Activation::Identity)
            };
        let encoded = up(image, &self.encoder_conv1, &self.encoder_norm, &self.encoder_conv2)?;
        let Some(early) = early else { return Ok(encoded) };
        let (conv1, conv2) = (&self.compress_vit_conv1, &self.compress_vit_conv2);
        encoded + up(early, conv1, &self.compress_vit_norm, conv2)?
    }

    /// `[G, 4h, 4w, C/8] -> [G, 4h, 4w, C/8]`
    fn refine(&self, up: &Tensor, mode: Mode) -> CandleResult<Tensor> {
        let x = self.mask_norm.forward(&self.mask_conv1.forward(up, mode)?)?;
        self.mask_conv2.forward(&Activation::Gelu.apply(&x)?, mode)
    }
}

/// SAM-HQ. The tree's names are those of Hugging Face's checkpoints. A clone shares its tensors.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use candle_sam_lora::nn::Mode;
/// use candle_sam_lora::sam::{read_image, AttentionKind, SamHqModel, SamInput, SamProcessor};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let (folder, device) = ("sam-hq-vit-base", Device::Cpu);
/// let model = SamHqModel::from_pretrained(folder, AttentionKind::Fused, DType::F32, &device)?;
/// let processor = SamProcessor::load(folder, 1024)?;
/// let (pixel_values, frame) = processor.preprocess(&read_image("photo.jpg")?, &device)?;
/// let input = SamInput { pixel_values: Some(pixel_values), multimask_output: false, ..Default::default() };
/// let output = model.forward(&input, false, Mode::Eval)?;
/// let mask = processor.post_process_masks(&output.pred_masks, &frame, 0.0)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SamHqModel {
    /// The SAM inside.
    pub sam: SamModel,
    /// The HQ parts of its mask decoder.
    pub hq: SamHqParts,
}

module_tree!(SamHqModel { sam => "", hq => "mask_decoder" });

/// Images as the prompts see them, from [`SamHqModel::encode`].
///
/// [Example](crate::sam::SamHqModel)
#[derive(Clone, Debug)]
pub struct SamHqImages {
    /// `[B, C, h, w]`
    pub image_embeddings: Tensor,
    /// `[B, 4h, 4w, C/8]`
    pub hq_features: Tensor,
}

impl SamHqModel {
    /// As [`SamModel::from_pretrained`], from Hugging Face's checkpoints (`syscv-community/sam-hq-vit-base`) and the
    /// original ones (`sam_hq_vit_b.pth`).
    ///
    /// # Errors
    /// - as [`SamModel::from_pretrained`].
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

    /// With the tensors of a `VarBuilder`; see [`SamModel::new`].
    ///
    /// # Errors
    /// - as [`SamModel::new`].
    pub fn new(config: &SamConfig, kind: AttentionKind, vb: VarBuilder<'_>) -> Result<Self> {
        let sam = SamModel::new(config, kind, vb.clone())?;
        Ok(Self { hq: SamHqParts::new(config, vb.pp("mask_decoder"))?, sam })
    }

    /// Masks and IoU scores. With `multimask_output` the masks are in the order of their scores, the best first.
    /// `hq_token_only` leaves SAM's own masks out: one mask a prompt then.
    ///
    /// # Errors
    /// - `input` has no `pixel_values`, or has `image_embeddings`;
    /// - a shape does not fit.
    pub fn forward(
        &self,
        input: &SamInput,
        hq_token_only: bool,
        mode: Mode,
    ) -> CandleResult<SamOutput> {
        let Some(pixel_values) = &input.pixel_values else {
            bail!("sam-hq: pixel_values are missing; prompts of encoded images go to `prompt`")
        };
        let images = self.encode(pixel_values, mode)?;
        self.prompt(&images, &SamInput { pixel_values: None, ..input.clone() }, hq_token_only, mode)
    }

    /// Images `[B, channels, S, S]`, to be prompted many times.
    ///
    /// # Errors
    /// - the shape does not fit.
    pub fn encode(&self, pixel_values: &Tensor, mode: Mode) -> CandleResult<SamHqImages> {
        let vision = &self.sam.config().vision_config;
        let first_global =
            (0..vision.num_hidden_layers).find(|&layer| vision.window(layer).is_none());
        let (image_embeddings, early) =
            self.sam.vision_encoder.forward_with_layer(pixel_values, first_global, mode)?;
        let image = image_embeddings.permute((0, 2, 3, 1))?;
        let hq_features = self.hq.features(&image, early.as_ref())?;
        Ok(SamHqImages { image_embeddings, hq_features })
    }

    /// As [`forward`](Self::forward), of images that are encoded.
    ///
    /// # Errors
    /// - `input` has `pixel_values` or `image_embeddings`;
    /// - a shape does not fit.
    pub fn prompt(
        &self,
        images: &SamHqImages,
        input: &SamInput,
        hq_token_only: bool,
        mode: Mode,
    ) -> CandleResult<SamOutput> {
        if input.pixel_values.is_some() || input.image_embeddings.is_some() {
            bail!("sam-hq: encoded images take prompts alone")
        }
        let (batch, size, h, w) = images.image_embeddings.dims4()?;
        let (sparse, dense) = self.sam.prompts(input, batch, mode)?;
        let prompts = sparse.as_ref().map_or(Ok(1), |sparse| sparse.dim(1))?;
        let groups = batch * prompts;

        let decoder = &self.sam.mask_decoder;
        let image = images.image_embeddings.permute((0, 2, 3, 1))?;
        let image = ops::broadcast_add(&image, &dense)?.reshape((batch, h * w, size))?;
        let learned = [&decoder.iou_token, &decoder.mask_tokens, &self.hq.hq_token];
        let learned = Tensor::cat(&learned.map(|token| &token.weight), 0)?;
        let learned = learned.to_dtype(image.dtype())?;
        let masks = decoder.mask_tokens.weight.dim(0)?;
        let mut tokens = ops::repeat(&learned, (groups, 2 + masks, size))?;
        if let Some(sparse) = sparse {
            let sparse = sparse.reshape((groups, (), size))?.to_dtype(image.dtype())?;
            tokens = Tensor::cat(&[tokens, sparse], 1)?.contiguous()?;
        }
        let positions = self.sam.image_positions()?.to_dtype(image.dtype())?.flatten(1, 2)?;
        let shared = decoder.transformer.share(&image, &positions, prompts, mode)?;
        let (tokens, image) = decoder.transformer.forward(&tokens, &shared, mode)?;

        let image = image.to_dtype(tokens.dtype())?.reshape((groups, h, w, size))?;
        let up = decoder.upscale_conv1.forward(&image, Activation::Identity)?;
        let up = Activation::Gelu.apply(&decoder.upscale_layer_norm.forward(&up)?)?;
        let up = decoder.upscale_conv2.forward(&up, Activation::Gelu)?;
        let features = images.hq_features.unsqueeze(1)?;
        let (_, _, height, width, channels) = features.dims5()?;
        let features = features.broadcast_as((batch, prompts, height, width, channels))?;
        let fine = (self.hq.refine(&up, mode)? + features.flatten(0, 1)?)?;

        let token = |index: usize| tokens.narrow(1, 1 + index, 1);
        let weights = decoder.output_hypernetworks_mlps.iter().enumerate();
        let weights = weights.map(|(i, mlp)| mlp.forward(&token(i)?, mode));
        let weights = Tensor::cat(&weights.collect::<CandleResult<Vec<_>>>()?, 1)?;
        let pixels =
            |map: &Tensor| map.reshape((groups, height * width, channels))?.transpose(1, 2);
        let hq_weights = self.hq.hq_mask_mlp.forward(&token(masks)?, mode)?;
        let hq = ops::matmul(&hq_weights, &pixels(&fine)?)?;
        let iou = decoder.iou_prediction_head.forward(&tokens.i((.., 0))?, mode)?;

        let chosen = decoder.masks_of(input.multimask_output);
        let iou = iou.narrow(1, chosen.start, chosen.len())?;
        let order = iou.contiguous()?.arg_sort_last_dim(false)?;
        let iou = iou.contiguous()?.gather(&order, 1)?;
        let pred_masks = if hq_token_only {
            hq
        } else {
            let sam = ops::matmul(&weights.narrow(1, chosen.start, chosen.len())?, &pixels(&up)?)?;
            let order = order.unsqueeze(2)?.broadcast_as(sam.shape())?.contiguous()?;
            ops::broadcast_add(&sam.contiguous()?.gather(&order, 1)?, &hq)?
        };
        Ok(SamOutput {
            iou_scores: iou.reshape((batch, prompts, ()))?,
            pred_masks: pred_masks.reshape((batch, prompts, (), height, width))?,
        })
    }
}
