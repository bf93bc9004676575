//! The mask decoder: image embedding and prompts to masks and their expected IoU.
//!
//! ```text
//! tokens = [iou_token | mask_tokens | prompts]           tokens, image = transformer(tokens, image + dense)
//! up     = gelu(conv2(gelu(norm(conv1(image)))))         [4h, 4w, C/8], transposed convolutions
//! mask_i = mlp_i(mask token i) . up                      iou = head(iou token)
//! ```
//! Mask 0 is for an unambiguous prompt, the others are the alternatives of an ambiguous one.
//!
//! Source: `SamMaskDecoder` in `modeling_sam.py`.

use super::transformer::SharedImage;
use super::validate::require_dtype;
use super::{SamMaskDecoderConfig, SamTwoWayTransformer};
use crate::module_tree;
use crate::nn::{module_in_evaluation, ConvTranspose2d, Embedding, LayerNorm, Linear, Mode};
use crate::ops::image_side::{upscaled_masks, Upscaling};
use crate::ops::{self, Activation};
use candle_core::{bail, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use std::ops::Range;

/// Prompts of an image that are decoded in one call when nothing is trained; on the CPU two calls run at a time. Each
/// prompt has an image of its own, 4 MB, which stays in the third-level cache. The prompts of a call share the work
/// that it prepares, such as packed weights.
const PROMPTS_TOGETHER: usize = 4;

/// Epsilon of the norm between the upscaling convolutions, whatever the configuration says.
const UPSCALE_EPS: f64 = 1e-6;

/// A perceptron of several layers with ReLU between them.
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Debug)]
pub struct SamFeedForward {
    /// First layer.
    pub proj_in: Linear,
    /// Last layer.
    pub proj_out: Linear,
    /// Layers between `proj_in` and `proj_out`.
    pub layers: Vec<Linear>,
}

module_tree!(SamFeedForward { proj_in, proj_out, layers });

module_in_evaluation! {
    /// `[.., input] -> [.., output]` in evaluation.
    SamFeedForward,
}

impl SamFeedForward {
    pub(super) fn new(
        [input, hidden, output]: [usize; 3],
        depth: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let between = |i: usize| Linear::load(hidden, hidden, vb.pp("layers").pp(i));
        Ok(Self {
            proj_in: Linear::load(input, hidden, vb.pp("proj_in"))?,
            proj_out: Linear::load(hidden, output, vb.pp("proj_out"))?,
            layers: (0..depth.saturating_sub(2)).map(between).collect::<Result<_>>()?,
        })
    }

    /// `[.., input] -> [.., output]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.proj_in.forward_fused(x, Activation::Relu, None, mode)?;
        for layer in &self.layers {
            x = layer.forward_fused(&x, Activation::Relu, None, mode)?;
        }
        self.proj_out.forward(&x, mode)
    }
}

/// Input of the mask decoder: B images, P prompts for each, of N tokens.
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Copy, Debug)]
pub struct SamMaskDecoderInput<'a> {
    /// `[B, C, h, w]`
    pub image_embeddings: &'a Tensor,
    /// `[1, h, w, C]`
    pub image_positions: &'a Tensor,
    /// Points and boxes, `[B, P, N, C]`; without them P is 1.
    pub sparse: Option<&'a Tensor>,
    /// Added to the image: `[B, h, w, C]` or what broadcasts to it.
    pub dense: &'a Tensor,
}

/// Images as their prompts see them; made by [`SamMaskDecoder::prepare`].
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Debug)]
pub struct PreparedImages {
    images: SharedImage,
    batch: usize,
    grid: (usize, usize),
    dtype: DType,
    /// Copies of the parameters that the images were prepared with, where a later change of them has to be noticed.
    pub(super) made_with: Vec<Tensor>,
}

impl PreparedImages {
    /// Number of images.
    pub fn batch(&self) -> usize {
        self.batch
    }
}

/// The mask decoder.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::nn::Mode;
/// use candle_sam_lora::sam::{AttentionKind, SamMaskDecoderInput, SamModel, SamPrompts};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let sam = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let vision = &sam.config().vision_config;
/// let side = vision.grid_size();
/// let image_embeddings = Tensor::zeros((1, vision.output_channels, side, side), DType::F32, &Device::Cpu)?;
/// let points = Tensor::new(&[[[[30f32, 30.0]]]], &Device::Cpu)?; // image, object, point, (x, y)
/// let prompts = SamPrompts { input_points: Some(&points), ..SamPrompts::default() };
/// let shared = &sam.shared_image_embedding;
/// let (sparse, dense) = sam.prompt_encoder.forward(&prompts, shared, 1, Mode::Eval)?;
/// let input = SamMaskDecoderInput {
///     image_embeddings: &image_embeddings,
///     image_positions: &shared.grid(side)?,
///     sparse: sparse.as_ref(),
///     dense: &dense,
/// };
/// let (masks, scores) = sam.mask_decoder.forward(&input, true, Mode::Eval)?;
/// assert_eq!((masks.dims(), scores.dims()), (&[1, 1, 3, 4 * side, 4 * side][..], &[1, 1, 3][..]));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SamMaskDecoder {
    /// `[1, C]`
    pub iou_token: Embedding,
    /// `[1 + num_multimask_outputs, C]`
    pub mask_tokens: Embedding,
    /// Tokens and image look at each other.
    pub transformer: SamTwoWayTransformer,
    /// 2x2, `C -> C/4`
    pub upscale_conv1: ConvTranspose2d,
    /// 2x2, `C/4 -> C/8`
    pub upscale_conv2: ConvTranspose2d,
    /// Between the two.
    pub upscale_layer_norm: LayerNorm,
    /// One for each mask token, `C -> C/8`.
    pub output_hypernetworks_mlps: Vec<SamFeedForward>,
    /// The expected IoU of each mask.
    pub iou_prediction_head: SamFeedForward,
}

module_tree!(SamMaskDecoder {
    iou_token,
    mask_tokens,
    transformer,
    upscale_conv1,
    upscale_conv2,
    upscale_layer_norm,
    output_hypernetworks_mlps,
    iou_prediction_head,
});

impl SamMaskDecoder {
    /// With the tensors of a `VarBuilder`.
    ///
    /// # Errors
    /// - the configuration is impossible, see [`SamMaskDecoderConfig::validate`];
    /// - the dtype is none of f32, f16 and bf16;
    /// - a tensor is missing or has another shape.
    pub fn new(config: &SamMaskDecoderConfig, vb: VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        require_dtype(vb.dtype())?;
        let (size, masks) = (config.hidden_size, config.num_multimask_outputs + 1);
        let (quarter, eighth) = (size / 4, size / 8);
        let hypernetworks = vb.pp("output_hypernetworks_mlps");
        let hypernetwork =
            |mask: usize| SamFeedForward::new([size, size, eighth], 3, hypernetworks.pp(mask));
        let head = [size, config.iou_head_hidden_dim, masks];
        let norm = vb.pp("upscale_layer_norm");
        Ok(Self {
            iou_token: Embedding::load(1, size, vb.pp("iou_token"))?,
            mask_tokens: Embedding::load(masks, size, vb.pp("mask_tokens"))?,
            transformer: SamTwoWayTransformer::new(config, vb.pp("transformer"))?,
            upscale_conv1: ConvTranspose2d::load(size, quarter, 2, vb.pp("upscale_conv1"))?,
            upscale_conv2: ConvTranspose2d::load(quarter, eighth, 2, vb.pp("upscale_conv2"))?,
            upscale_layer_norm: LayerNorm::load(quarter, UPSCALE_EPS, norm)?,
            output_hypernetworks_mlps: (0..masks).map(hypernetwork).collect::<Result<_>>()?,
            iou_prediction_head: SamFeedForward::new(
                head,
                config.iou_head_depth,
                vb.pp("iou_prediction_head"),
            )?,
        })
    }

    /// Masks `[B, P, M, 4h, 4w]` (logits) and IoU scores `[B, P, M]`; M is 1, or `num_multimask_outputs` with
    /// `multimask_output`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(
        &self,
        input: &SamMaskDecoderInput<'_>,
        multimask_output: bool,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        self.forward_masks(input, self.masks_of(multimask_output), mode)
    }

    /// The masks of an output: the single one, or the alternatives.
    pub fn masks_of(&self, multimask_output: bool) -> Range<usize> {
        match multimask_output {
            true => 1..self.output_hypernetworks_mlps.len(),
            false => 0..1,
        }
    }

    /// As `forward`, of the masks `chosen`: 0 is the single one, the alternatives follow.
    ///
    /// # Errors
    /// When shapes do not fit, or there are no such masks.
    pub fn forward_masks(
        &self,
        input: &SamMaskDecoderInput<'_>,
        chosen: Range<usize>,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let prompts = input.sparse.map_or(Ok(1), |sparse| sparse.dim(1))?;
        let images = self.prepare(input, prompts, mode)?;
        self.prompt(&images, input.sparse, chosen, mode)
    }

    /// Everything that all prompts of the images share; the prompts of `input` are not read. About `prompts` of an
    /// image are to come.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn prepare(
        &self,
        input: &SamMaskDecoderInput<'_>,
        prompts: usize,
        mode: Mode,
    ) -> Result<PreparedImages> {
        let SamMaskDecoderInput { image_embeddings, image_positions, dense, .. } = *input;
        let (batch, size, h, w) = image_embeddings.dims4()?;
        if size != self.mask_tokens.weight.dim(1)? {
            bail!(
                "mask_decoder: image_embeddings must have shape [B, {}, h, w], got {:?}",
                self.mask_tokens.weight.dim(1)?,
                image_embeddings.dims()
            )
        }
        let image = ops::broadcast_add(&image_embeddings.permute((0, 2, 3, 1))?, dense)?;
        let image = image.reshape((batch, h * w, size))?;
        let positions = image_positions.to_dtype(image.dtype())?.flatten(1, 2)?;
        let images = self.transformer.share(&image, &positions, prompts, mode)?;
        let (grid, dtype) = ((h, w), image.dtype());
        Ok(PreparedImages { images, batch, grid, dtype, made_with: vec![] })
    }

    /// As [`forward_masks`](Self::forward_masks), of images that were prepared in the same mode, and their prompts
    /// `[B, P, N, C]`.
    ///
    /// # Errors
    /// When shapes do not fit, or there are no such masks.
    pub fn prompt(
        &self,
        prepared: &PreparedImages,
        sparse: Option<&Tensor>,
        chosen: Range<usize>,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let PreparedImages { images, batch, grid: (h, w), dtype, .. } = prepared;
        let (batch, h, w) = (*batch, *h, *w);
        let prompts = sparse.map_or(Ok(1), |sparse| sparse.dim(1))?;
        let groups = batch * prompts;
        let masks = self.output_hypernetworks_mlps.len();
        if chosen.is_empty() || chosen.end > masks {
            bail!("mask_decoder: masks {chosen:?} of {masks}")
        }
        let size = self.mask_tokens.weight.dim(1)?;
        let learned = Tensor::cat(&[&self.iou_token.weight, &self.mask_tokens.weight], 0)?;
        let learned = learned.to_dtype(*dtype)?;
        let learned = ops::repeat(&learned, (groups, 1 + masks, size))?;
        let tokens = match sparse {
            Some(sparse) => {
                let sparse = sparse.reshape((groups, (), size))?.to_dtype(learned.dtype())?;
                Tensor::cat(&[learned, sparse], 1)?.contiguous()?
            }
            None => learned,
        };
        let device = tokens.device();
        let decode = |tokens: &Tensor, images: &SharedImage| {
            self.decode(tokens, images, (h, w), chosen.clone(), mode)
        };
        let (pred_masks, iou) = match mode {
            // One call: the rows of dropout are counted over all prompts.
            Mode::Train { .. } => decode(&tokens, images)?,
            Mode::Eval => {
                let mut parts = vec![];
                for index in 0..batch {
                    let image = images.narrow(index, 1)?;
                    let starts: Vec<_> = (0..prompts).step_by(PROMPTS_TOGETHER).collect();
                    parts.extend(two_at_a_time(device, &starts, &|first| {
                        let count = PROMPTS_TOGETHER.min(prompts - first);
                        decode(&tokens.narrow(0, index * prompts + first, count)?, &image)
                    })?);
                }
                let (masks, iou): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
                (Tensor::cat(&masks, 0)?, Tensor::cat(&iou, 0)?)
            }
        };
        let count = chosen.len();
        Ok((
            pred_masks.reshape((batch, prompts, count, 4 * h, 4 * w))?,
            iou.reshape((batch, prompts, count))?,
        ))
    }

    /// Tokens `[B P, N, C]` and their images -> the chosen masks `[B P, M, 16 h w]` and their IoU `[B P, M]`.
    fn decode(
        &self,
        tokens: &Tensor,
        images: &SharedImage,
        (h, w): (usize, usize),
        chosen: Range<usize>,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let (first, count) = (chosen.start, chosen.len());
        let (queries, image) = self.transformer.layers(tokens, images, mode)?;
        // Tokens that nobody reads need no last look. In training they count in the rows of dropout.
        let few = mode == Mode::Eval && !queries.track_op();
        let read = |tokens: &Tensor| match few {
            false => Ok(tokens.clone()),
            true => {
                let [iou, masks] = [tokens.narrow(1, 0, 1)?, tokens.narrow(1, 1 + first, count)?];
                Tensor::cat(&[iou, masks], 1)
            }
        };
        let before_masks = if few { first } else { 0 };
        let (queries, tokens) = (read(&queries)?, read(tokens)?);
        let looked_at = (&image, images.positions());
        let tokens = self.transformer.last_look([&queries, &tokens], looked_at, mode)?;
        let mlps = self.output_hypernetworks_mlps.iter().enumerate().skip(first).take(count);
        let weights = mlps
            .map(|(i, mlp)| mlp.forward(&tokens.narrow(1, 1 + i - before_masks, 1)?, mode))
            .collect::<Result<Vec<_>>>()?;
        let weights = Tensor::cat(&weights, 1)?;
        let ((weight1, bias1), (weight2, bias2)) =
            (self.upscale_conv1.taps()?, self.upscale_conv2.taps()?);
        let norm = self.upscale_layer_norm.parameters();
        let up = Upscaling { conv1: (&weight1, &bias1), norm, conv2: (&weight2, &bias2) };
        let pred_masks = match upscaled_masks(&image, (h, w), &up, &weights)? {
            Some(masks) => masks,
            None => self.masks(&image, (h, w), &weights)?,
        };
        let iou = self.iou_prediction_head.forward(&tokens.narrow(1, 0, 1)?.squeeze(1)?, mode)?;
        Ok((pred_masks, iou.narrow(1, first, count)?))
    }

    /// Masks `[G, M, 16 h w]` with a gradient, of the image `[G, h w, C]` and the hypernetworks' `[G, M, C/8]`.
    fn masks(&self, image: &Tensor, (h, w): (usize, usize), weights: &Tensor) -> Result<Tensor> {
        let (groups, count, _) = weights.dims3()?;
        let image = &image.to_dtype(weights.dtype())?;
        // Each pixel for itself: the pixels of a position follow each other until the masks are there.
        let up = self.upscale_conv1.forward_taps(image, Activation::Identity)?;
        let up = Activation::Gelu.apply(&self.upscale_layer_norm.forward(&up)?)?;
        let up = self.upscale_conv2.forward_taps(&up, Activation::Gelu)?;
        let up = up.reshape((groups, 16 * h * w, ()))?;
        ops::matmul(weights, &up.transpose(1, 2)?)?
            .reshape(vec![groups * count, h, w, 2, 2, 2, 2])?
            .permute(vec![0, 1, 3, 5, 2, 4, 6])?
            .reshape((groups, count, 16 * h * w))
    }
}

/// `f` of each start, in order; on the CPU two at a time, so that what one computes alone does not let the others wait.
fn two_at_a_time<T: Send>(
    device: &Device,
    starts: &[usize],
    f: &(impl Fn(usize) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    let in_turn =
        |starts: &[usize]| starts.iter().map(|&first| f(first)).collect::<Result<Vec<_>>>();
    if !device.is_cpu() || starts.len() < 2 {
        return in_turn(starts);
    }
    let (front, back) = starts.split_at(starts.len().div_ceil(2));
    let (front, back) = rayon::join(|| in_turn(front), || in_turn(back));
    Ok([front?, back?].into_iter().flatten().collect())
}
