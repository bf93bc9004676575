//! ViTDet's backbone: layers of SAM's image encoder, some with a convolutional block behind, on images of any size.
//!
//! ```text
//! x = projection(pixel_values) + cubic(position_embeddings)        [B, h, w, C]
//! x = layer(x);  x = x + norm3(conv3(act(norm2(conv2(act(norm1(conv1(x)))))))   the block, where there is one
//! ```
//! The position embeddings are a ViT's, of a grid of another size, its class token first.
//!
//! Source: `modeling_vitdet.py`; Li et al., "Exploring Plain Vision Transformer Backbones for Object
//! Detection", ECCV 2022.

use super::config::{read, side, HiddenAct};
use super::{checkpoint, AttentionKind, LayerContext, SamVisionConfig, SamVisionLayer};
use crate::nn::{self, module_in_evaluation, Conv2d, LayerNorm, Mode};
use crate::ops::{broadcast_add, resize_cubic, Activation};
use crate::{hub, module_tree, Error, Result};
use candle_core::{bail, DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;
use std::path::Path;

/// Epsilon of the blocks' norms, whatever the configuration says of the others.
const BLOCK_EPS: f64 = 1e-6;

/// ViTDet's configuration; fields and defaults are those of transformers' `VitDetConfig`.
///
/// [Example](crate::sam::VitDetBackbone)
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct VitDetConfig {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub mlp_ratio: f64,
    pub hidden_act: HiddenAct,
    /// Must be 0: dropout is not there.
    pub dropout_prob: f64,
    pub layer_norm_eps: f64,
    #[serde(deserialize_with = "side")]
    pub image_size: usize,
    #[serde(deserialize_with = "side")]
    pub pretrain_image_size: usize,
    #[serde(deserialize_with = "side")]
    pub patch_size: usize,
    pub num_channels: usize,
    pub qkv_bias: bool,
    /// Must be 0: stochastic depth is not there.
    pub drop_path_rate: f64,
    /// The layers with windows.
    pub window_block_indices: Vec<usize>,
    /// The layers with a block.
    pub residual_block_indices: Vec<usize>,
    pub use_absolute_position_embeddings: bool,
    pub use_relative_position_embeddings: bool,
    pub window_size: usize,
}

impl Default for VitDetConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            mlp_ratio: 4.0,
            hidden_act: HiddenAct::Gelu,
            dropout_prob: 0.0,
            layer_norm_eps: 1e-6,
            image_size: 224,
            pretrain_image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
            drop_path_rate: 0.0,
            window_block_indices: vec![],
            residual_block_indices: vec![],
            use_absolute_position_embeddings: true,
            use_relative_position_embeddings: false,
            window_size: 0,
        }
    }
}

impl VitDetConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// - the file cannot be read or is no JSON;
    /// - a value is of the wrong kind.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        read(path.as_ref(), "the configuration of a ViTDet")
    }

    /// The configuration of the layers, which are SAM's.
    fn layers(&self) -> Result<SamVisionConfig> {
        for (name, value) in
            [("dropout_prob", self.dropout_prob), ("drop_path_rate", self.drop_path_rate)]
        {
            if value != 0.0 {
                let message = "trained with neither dropout nor stochastic depth: set it to 0";
                return Err(Error::config(format!(
                    "vitdet: {name} is {value}; a ViTDet is {message}"
                )));
            }
        }
        let is_global = |layer: &i64| !self.window_block_indices.contains(&(*layer as usize));
        let config = SamVisionConfig {
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_channels: self.num_channels,
            image_size: self.image_size,
            patch_size: self.patch_size,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            qkv_bias: self.qkv_bias,
            mlp_ratio: self.mlp_ratio,
            use_rel_pos: self.use_relative_position_embeddings,
            window_size: self.window_size,
            global_attn_indexes: (0..self.num_hidden_layers as i64).filter(is_global).collect(),
            ..Default::default()
        };
        config.validate()?;
        Ok(config)
    }
}

/// The bottleneck block behind some layers.
///
/// [Example](crate::sam::VitDetBackbone)
#[derive(Clone, Debug)]
pub struct VitDetResBottleneckBlock {
    /// 1x1, `C -> C/2`
    pub conv1: Conv2d,
    /// After it.
    pub norm1: LayerNorm,
    /// 3x3
    pub conv2: Conv2d,
    /// After it.
    pub norm2: LayerNorm,
    /// 1x1, `C/2 -> C`
    pub conv3: Conv2d,
    /// After it.
    pub norm3: LayerNorm,
    activation: Activation,
}

module_tree!(VitDetResBottleneckBlock { conv1, norm1, conv2, norm2, conv3, norm3 });

impl VitDetResBottleneckBlock {
    fn new(config: &VitDetConfig, vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        let (size, inner) = (config.hidden_size, config.hidden_size / 2);
        let conv = |from, to, kernel, name| Conv2d::load_no_bias(from, to, kernel, 1, vb.pp(name));
        let norm = |size, name| LayerNorm::load(size, BLOCK_EPS, vb.pp(name));
        Ok(Self {
            conv1: conv(size, inner, 1, "conv1")?,
            norm1: norm(inner, "norm1")?,
            conv2: conv(inner, inner, 3, "conv2")?,
            norm2: norm(inner, "norm2")?,
            conv3: conv(inner, size, 1, "conv3")?,
            norm3: norm(size, "norm3")?,
            activation: config.hidden_act.into(),
        })
    }

    /// `[B, h, w, C] -> [B, h, w, C]`
    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let out = self.norm1.forward(&self.conv1.forward(x, mode)?)?;
        let out = self.conv2.forward(&self.activation.apply(&out)?, mode)?;
        let out = self.activation.apply(&self.norm2.forward(&out)?)?;
        x + self.norm3.forward(&self.conv3.forward(&out, mode)?)?
    }
}

/// A layer, and the block behind it if there is one.
///
/// [Example](crate::sam::VitDetBackbone)
#[derive(Clone, Debug)]
pub struct VitDetLayer {
    /// SAM's.
    pub layer: SamVisionLayer,
    /// The block.
    pub residual: Option<VitDetResBottleneckBlock>,
}

module_tree!(VitDetLayer { layer => "", residual });

/// ViTDet's backbone, transformers' `VitDetBackbone` and `VitDetModel`. A clone shares its tensors.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use candle_sam_lora::nn::Mode;
/// use candle_sam_lora::sam::{AttentionKind::Fused, VitDetBackbone, VitDetConfig};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let config = VitDetConfig { hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 2, ..Default::default() };
/// let backbone = VitDetBackbone::new(&config, Fused, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
/// let image = Tensor::zeros((1, 3, 64, 96), DType::F32, &Device::Cpu)?; // of any size
/// assert_eq!(backbone.forward(&image, Mode::Eval)?.dims(), [1, 32, 4, 6]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct VitDetBackbone {
    /// `[1, 1 + n * n, C]`, the class token first; none without absolute positions.
    pub position_embeddings: Option<Tensor>,
    /// `[C, channels, patch, patch]`
    pub projection: Conv2d,
    /// The transformer.
    pub layers: Vec<VitDetLayer>,
}

module_tree!(VitDetBackbone {
    position_embeddings => "embeddings.position_embeddings",
    projection => "embeddings.projection",
    layers => "encoder.layer",
});

module_in_evaluation! {
    /// `[B, channels, H, W] -> [B, C, h, w]` in evaluation.
    VitDetBackbone,
}

impl VitDetBackbone {
    /// With the tensors of a `VarBuilder`; `VarBuilder::zeros` gives a backbone to be filled.
    ///
    /// # Errors
    /// - the configuration is impossible, or has dropout or stochastic depth;
    /// - a tensor is missing or has another shape.
    pub fn new(config: &VitDetConfig, kind: AttentionKind, vb: VarBuilder<'_>) -> Result<Self> {
        let (layers, size, patch) = (config.layers()?, config.hidden_size, config.patch_size);
        let embeddings = vb.pp("embeddings");
        let positions = 1 + (config.pretrain_image_size / patch).pow(2);
        let position_embeddings = (config.use_absolute_position_embeddings)
            .then(|| embeddings.get((1, positions, size), "position_embeddings"))
            .transpose()?;
        let projection = embeddings.pp("projection");
        let projection = Conv2d::load(config.num_channels, size, patch, patch, projection)?;
        let layer = |index: usize| {
            let vb = vb.pp("encoder.layer").pp(index);
            let attn = kind.build(&LayerContext::new(&layers, index, vb.pp("attn")))?;
            let has_block = config.residual_block_indices.contains(&index);
            let block = || VitDetResBottleneckBlock::new(config, vb.pp("residual"));
            Ok(VitDetLayer {
                residual: has_block.then(block).transpose()?,
                layer: SamVisionLayer::new(&layers, attn, vb.clone())?,
            })
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { position_embeddings, projection, layers })
    }

    /// The backbone in a folder with `config.json` and weights, or by a name on the Hugging Face hub (feature `hub`).
    /// Other tensors of the checkpoint are left alone.
    ///
    /// # Errors
    /// - there is no such folder, and the hub does not give it;
    /// - as [`VitDetConfig::load`], [`new`](Self::new) and [`nn::checkpoint::load`].
    pub fn from_pretrained(
        name: impl AsRef<Path>,
        kind: AttentionKind,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let folder = hub::folder(name)?;
        let config = VitDetConfig::load(folder.join("config.json"))?;
        let mut backbone = Self::new(&config, kind, VarBuilder::zeros(dtype, device))?;
        nn::checkpoint::load(&mut backbone, folder, &checkpoint::VITDET)?;
        Ok(backbone)
    }

    /// `[B, channels, H, W] -> [B, C, h, w]`, the output of the last layer. Pixels beyond the last whole patch are not
    /// looked at.
    ///
    /// # Errors
    /// - `pixel_values` has other channels, or no whole patch.
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let mut x = self.embed(pixel_values, mode)?;
        for layer in &self.layers {
            x = layer.forward(&x, mode)?;
        }
        x.permute((0, 3, 1, 2))
    }

    /// The maps that detectors choose from, `[B, C, h, w]` each: the embedded patches (`stem`) and the output of each
    /// layer (`stage1` and so on).
    ///
    /// # Errors
    /// - as [`forward`](Self::forward).
    pub fn feature_maps(
        &self,
        pixel_values: &Tensor,
        mode: Mode,
    ) -> candle_core::Result<Vec<Tensor>> {
        let mut x = self.embed(pixel_values, mode)?;
        let mut maps = vec![x.permute((0, 3, 1, 2))?];
        for layer in &self.layers {
            x = layer.forward(&x, mode)?;
            maps.push(x.permute((0, 3, 1, 2))?);
        }
        Ok(maps)
    }

    /// `[B, channels, H, W] -> [B, h, w, C]`
    fn embed(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let (channels, patch) = (self.projection.weight.dim(1)?, self.projection.stride);
        let (h, w) = match *pixel_values.dims() {
            [_, c, h, w] if c == channels && h >= patch && w >= patch => (h / patch, w / patch),
            ref other => bail!(
                "vitdet: pixel_values must have shape [B, {channels}, H, W] with sides of {patch} or more, got {other:?}"
            ),
        };
        let x = pixel_values.to_dtype(self.projection.weight.dtype())?;
        let x = x.narrow(2, 0, h * patch)?.narrow(3, 0, w * patch)?;
        let x = self.projection.forward(&x.permute((0, 2, 3, 1))?, mode)?;
        let Some(positions) = &self.position_embeddings else { return Ok(x) };
        let (_, count, size) = positions.dims3()?;
        let side = (count - 1).isqrt();
        let positions = positions.narrow(1, 1, count - 1)?.reshape((1, side, side, size))?;
        broadcast_add(&x, &resize_cubic(&positions, [h, w])?)
    }
}

impl VitDetLayer {
    /// `[B, h, w, C] -> [B, h, w, C]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let x = self.layer.forward(x, mode)?;
        match &self.residual {
            Some(residual) => residual.forward(&x, mode),
            None => Ok(x),
        }
    }
}
