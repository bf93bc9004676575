//! The image encoder: patches, layers of windowed and global attention, and the neck.
//!
//! ```text
//! x  = patch_embed(pixel_values) + pos_embed                    [B, h, w, C]
//! x  = x + attn(layer_norm1(x));  x = x + mlp(layer_norm2(x))   each layer
//! image_embeddings = layer_norm2(conv3x3(layer_norm1(conv1x1(x))))
//! ```
//! Source: `SamVisionEncoder` in `modeling_sam.py`.

use super::validate::require_dtype;
use super::{AttentionKind, LayerContext, SamVisionConfig, VisionAttention};
use crate::module_tree;
use crate::nn::{gradient_checkpoint, module_in_evaluation, Conv2d, LayerNorm, MlpBlock, Mode};
use crate::ops;
use candle_core::{bail, Result, Tensor};
use candle_nn::VarBuilder;

/// Epsilon of [`SamVisionNeck`]'s norms, whatever the configuration says of the others.
const NECK_EPS: f64 = 1e-6;

/// Splits the image into patches and projects each.
///
/// [Example](crate::sam::SamVisionModel)
#[derive(Clone, Debug)]
pub struct SamPatchEmbeddings {
    /// `[C, channels, patch, patch]`
    pub projection: Conv2d,
    image_size: usize,
}

module_tree!(SamPatchEmbeddings { projection });

impl SamPatchEmbeddings {
    /// Side of the input image.
    pub(super) fn image_size(&self) -> usize {
        self.image_size
    }

    /// `[B, channels, S, S] -> [B, h, w, C]`, from any float dtype to that of the weights.
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> Result<Tensor> {
        let (channels, side) = (self.projection.weight.dim(1)?, self.image_size);
        if !matches!(*pixel_values.dims(), [b, c, h, w] if b > 0 && [c, h, w] == [channels, side, side])
        {
            bail!(
                "vision_encoder: pixel_values must have shape [B, {channels}, {side}, {side}], got {:?}",
                pixel_values.dims()
            )
        }
        let pixel_values = pixel_values.to_dtype(self.projection.weight.dtype())?;
        // As a strided convolution: pixels beyond the last whole patch are not looked at.
        let whole = side - side % self.projection.stride.max(1);
        let pixel_values = pixel_values.narrow(2, 0, whole)?.narrow(3, 0, whole)?;
        self.projection.forward(&pixel_values.permute((0, 2, 3, 1))?, mode)
    }
}

/// One layer: attention and MLP, each after a layer norm and with a residual.
///
/// [Example](crate::sam::SamVisionModel)
#[derive(Clone, Debug)]
pub struct SamVisionLayer {
    /// Before the attention.
    pub layer_norm1: LayerNorm,
    /// Ours or the user's; may be replaced at any time.
    pub attn: Box<dyn VisionAttention>,
    /// Before the MLP.
    pub layer_norm2: LayerNorm,
    /// `C -> mlp_dim -> C`
    pub mlp: MlpBlock,
}

module_tree!(SamVisionLayer { layer_norm1, attn, layer_norm2, mlp });

impl SamVisionLayer {
    pub(super) fn new(
        config: &SamVisionConfig,
        attn: Box<dyn VisionAttention>,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (size, activation) = (config.hidden_size, config.hidden_act.into());
        let norm = |name| LayerNorm::load(size, config.layer_norm_eps, vb.pp(name));
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            attn,
            layer_norm2: norm("layer_norm2")?,
            mlp: MlpBlock::load(size, config.mlp_dim(), activation, vb.pp("mlp"))?,
        })
    }

    /// `[B, H, W, C] -> [B, H, W, C]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        ops::joined(|| {
            let x = self.attn.forward_normed(x, &self.layer_norm1, mode)?;
            self.mlp.forward_normed(&x, &self.layer_norm2, mode)
        })
    }

    /// As `forward`, with the attention weights; see [`VisionAttention::forward_with_weights`].
    pub fn forward_with_weights(&self, x: &Tensor, mode: Mode) -> Result<(Tensor, Tensor)> {
        let (out, weights) = self.attn.forward_with_weights(&self.layer_norm1.forward(x)?, mode)?;
        let x = (x + out)?;
        Ok((self.mlp.forward_normed(&x, &self.layer_norm2, mode)?, weights))
    }
}

/// From the encoder's width to that of the image embedding.
///
/// [Example](crate::sam::SamVisionModel)
#[derive(Clone, Debug)]
pub struct SamVisionNeck {
    /// 1x1
    pub conv1: Conv2d,
    /// Over the channels.
    pub layer_norm1: LayerNorm,
    /// 3x3
    pub conv2: Conv2d,
    /// Over the channels.
    pub layer_norm2: LayerNorm,
}

module_tree!(SamVisionNeck { conv1, layer_norm1, conv2, layer_norm2 });

impl SamVisionNeck {
    pub(super) fn new(config: &SamVisionConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (size, out) = (config.hidden_size, config.output_channels);
        Ok(Self {
            conv1: Conv2d::load_no_bias(size, out, 1, 1, vb.pp("conv1"))?,
            layer_norm1: LayerNorm::load(out, NECK_EPS, vb.pp("layer_norm1"))?,
            conv2: Conv2d::load_no_bias(out, out, 3, 1, vb.pp("conv2"))?,
            layer_norm2: LayerNorm::load(out, NECK_EPS, vb.pp("layer_norm2"))?,
        })
    }

    /// `[B, H, W, C] -> [B, H, W, output_channels]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let x = self.layer_norm1.forward(&self.conv1.forward(x, mode)?)?;
        self.layer_norm2.forward(&self.conv2.forward(&x, mode)?)
    }
}

module_in_evaluation! {
    /// `[B, channels, S, S] -> [B, h, w, C]` in evaluation.
    SamPatchEmbeddings,
    /// `[B, H, W, C] -> [B, H, W, C]` in evaluation.
    SamVisionLayer,
    /// `[B, H, W, C] -> [B, H, W, output_channels]` in evaluation.
    SamVisionNeck,
    /// `[B, channels, S, S] -> [B, output_channels, h, w]` in evaluation.
    SamVisionEncoder,
}

/// The image encoder.
///
/// [Example](crate::sam::SamVisionModel)
#[derive(Clone, Debug)]
pub struct SamVisionEncoder {
    /// `[1, h, w, C]`; none without `use_abs_pos`.
    pub pos_embed: Option<Tensor>,
    /// Patches to tokens.
    pub patch_embed: SamPatchEmbeddings,
    /// The transformer.
    pub layers: Vec<SamVisionLayer>,
    /// Tokens to the image embedding.
    pub neck: SamVisionNeck,
    /// Whether layers that train keep their input alone and run once more in the backward: less memory, more time, the
    /// same gradients; see [`gradient_checkpoint`]. Off at first.
    pub gradient_checkpointing: bool,
}

module_tree!(SamVisionEncoder { pos_embed, patch_embed, layers, neck });

/// Output of [`SamVisionEncoder::forward_with_states`].
///
/// [Example](crate::sam::SamVisionModel)
#[derive(Clone, Debug)]
pub struct SamVisionEncoderOutput {
    /// `[B, output_channels, h, w]`
    pub image_embeddings: Tensor,
    /// The embedded patches and the output of each layer, `[B, h, w, C]` each.
    pub hidden_states: Vec<Tensor>,
    /// Each layer's attention weights, `[B * windows * heads, N, N]`; empty unless asked for.
    pub attentions: Vec<Tensor>,
}

impl SamVisionEncoder {
    /// With the tensors of a `VarBuilder` and the same attention in every layer. `VarBuilder::zeros` gives an encoder
    /// to be filled.
    ///
    /// # Errors
    /// - the configuration is impossible, see [`SamVisionConfig::validate`];
    /// - the dtype is none of f32, f16 and bf16;
    /// - a tensor is missing or has another shape.
    pub fn new(config: &SamVisionConfig, kind: AttentionKind, vb: VarBuilder<'_>) -> Result<Self> {
        Self::with_attention(config, vb, |layer| kind.build(layer))
    }

    /// As `new`, with the attention that `build` makes for each layer.
    ///
    /// # Errors
    /// As `new`; besides when `build` fails.
    pub fn with_attention(
        config: &SamVisionConfig,
        vb: VarBuilder<'_>,
        mut build: impl FnMut(&LayerContext<'_>) -> Result<Box<dyn VisionAttention>>,
    ) -> Result<Self> {
        config.validate()?;
        require_dtype(vb.dtype())?;
        let (size, side, patch) = (config.hidden_size, config.grid_size(), config.patch_size);
        let pos_embed = || vb.get((1, side, side, size), "pos_embed");
        let projection = vb.pp("patch_embed.projection");
        let projection = Conv2d::load(config.num_channels, size, patch, patch, projection)?;
        let layers = (0..config.num_hidden_layers).map(|index| {
            let vb = vb.pp("layers").pp(index);
            let attn = build(&LayerContext::new(config, index, vb.pp("attn")))?;
            SamVisionLayer::new(config, attn, vb)
        });
        Ok(Self {
            pos_embed: config.use_abs_pos.then(pos_embed).transpose()?,
            patch_embed: SamPatchEmbeddings { projection, image_size: config.image_size },
            layers: layers.collect::<Result<_>>()?,
            neck: SamVisionNeck::new(config, vb.pp("neck"))?,
            gradient_checkpointing: false,
        })
    }

    /// `[B, channels, S, S] -> [B, output_channels, h, w]`
    ///
    /// # Errors
    /// When `pixel_values` has another shape, or an attention fails.
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> Result<Tensor> {
        self.encode(self.embed(pixel_values, mode)?, mode)?.permute((0, 3, 1, 2))
    }

    /// As `forward`, and the output of one layer, `[B, h, w, C]`; none without an index.
    pub(super) fn forward_with_layer(
        &self,
        pixel_values: &Tensor,
        index: Option<usize>,
        mode: Mode,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (mut x, mut output) = (self.embed(pixel_values, mode)?, None);
        for (i, layer) in self.layers.iter().enumerate() {
            x = self.run(layer, &x, mode)?;
            if index == Some(i) {
                output = Some(x.clone());
            }
        }
        Ok((self.neck.forward(&x, mode)?.permute((0, 3, 1, 2))?, output))
    }

    /// Layers and neck: embedded patches `[B, h, w, C]`, of a grid of any size, to `[B, h, w, output_channels]`.
    pub(super) fn encode(&self, x: Tensor, mode: Mode) -> Result<Tensor> {
        let mut layers = self.layers.iter();
        let x = ops::joined(|| layers.try_fold(x, |x, layer| self.run(layer, &x, mode)))?;
        self.neck.forward(&x, mode)
    }

    /// As `forward`, with every hidden state and, if asked for, the attention weights, which are large: 3.6 GB for
    /// one image and ViT-B in f32.
    ///
    /// # Errors
    /// As `forward`; besides when attentions are asked for and a layer's attention cannot give them.
    pub fn forward_with_states(
        &self,
        pixel_values: &Tensor,
        output_attentions: bool,
        mode: Mode,
    ) -> Result<SamVisionEncoderOutput> {
        let mut x = self.embed(pixel_values, mode)?;
        let (mut hidden_states, mut attentions) = (vec![x.clone()], vec![]);
        for layer in &self.layers {
            if output_attentions {
                let (out, weights) = layer.forward_with_weights(&x, mode)?;
                attentions.push(weights);
                x = out;
            } else {
                x = self.run(layer, &x, mode)?;
            }
            hidden_states.push(x.clone());
        }
        let image_embeddings = self.neck.forward(&x, mode)?.permute((0, 3, 1, 2))?;
        Ok(SamVisionEncoderOutput { image_embeddings, hidden_states, attentions })
    }

    fn run(&self, layer: &SamVisionLayer, x: &Tensor, mode: Mode) -> Result<Tensor> {
        if self.gradient_checkpointing {
            return gradient_checkpoint(layer, x, move |layer, x| layer.forward(x, mode));
        }
        layer.forward(x, mode)
    }

    fn embed(&self, pixel_values: &Tensor, mode: Mode) -> Result<Tensor> {
        let x = self.patch_embed.forward(pixel_values, mode)?;
        match &self.pos_embed {
            Some(pos_embed) => ops::broadcast_add(&x, pos_embed),
            None => Ok(x),
        }
    }
}
