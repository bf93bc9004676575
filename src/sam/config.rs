//! Configuration of a SAM: Hugging Face's `SamConfig`, read from and written to `config.json`.
//!
//! Fields, defaults and meaning are those of `transformers/models/sam/configuration_sam.py`; a key that is absent or
//! unknown is treated as there. [`SamConfig::validate`] refuses what no model can have, before anything is allocated.

use crate::{files, ops, Error, Result};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// The rate of the layers' cross attentions. `attention_downsample_rate` is that of the final attention alone.
pub(super) const CROSS_DOWNSAMPLE_RATE: usize = 2;

/// The activation between two layers, `hidden_act`: the names in transformers' `ACT2FN` whose function has no
/// parameters. Names of one function are kept apart, so that a file is written as it was read.
///
/// [Example](crate::sam::SamConfig)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum HiddenAct {
    Gelu,
    #[serde(rename = "gelu_10")]
    Gelu10,
    GeluAccurate,
    GeluFast,
    GeluNew,
    GeluPython,
    GeluPythonTanh,
    GeluPytorchTanh,
    Hardswish,
    Laplace,
    LeakyRelu,
    Linear,
    Mish,
    QuickGelu,
    Relu,
    Relu2,
    Relu6,
    Sigmoid,
    Silu,
    Swish,
    Tanh,
}

impl From<HiddenAct> for ops::Activation {
    fn from(act: HiddenAct) -> Self {
        match act {
            HiddenAct::Gelu | HiddenAct::GeluPython => Self::Gelu,
            HiddenAct::Gelu10 => Self::GeluClipped,
            HiddenAct::GeluAccurate
            | HiddenAct::GeluFast
            | HiddenAct::GeluNew
            | HiddenAct::GeluPythonTanh
            | HiddenAct::GeluPytorchTanh => Self::GeluTanh,
            HiddenAct::Hardswish => Self::Hardswish,
            HiddenAct::Laplace => Self::Laplace,
            HiddenAct::LeakyRelu => Self::LeakyRelu,
            HiddenAct::Linear => Self::Identity,
            HiddenAct::Mish => Self::Mish,
            HiddenAct::QuickGelu => Self::QuickGelu,
            HiddenAct::Relu => Self::Relu,
            HiddenAct::Relu2 => Self::ReluSquared,
            HiddenAct::Relu6 => Self::Relu6,
            HiddenAct::Sigmoid => Self::Sigmoid,
            HiddenAct::Silu | HiddenAct::Swish => Self::Silu,
            HiddenAct::Tanh => Self::Tanh,
        }
    }
}

/// The image encoder, `SamVisionConfig`.
///
/// [Example](crate::sam::SamConfig)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamVisionConfig {
    /// Width C of the tokens.
    pub hidden_size: usize,
    /// Channels of the image embedding, after the neck.
    pub output_channels: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Channels of the image.
    pub num_channels: usize,
    /// Side S of the square input image; `[S, S]` is read too.
    #[serde(deserialize_with = "side")]
    pub image_size: usize,
    /// Side of a patch, at most `image_size`; a remainder of the image is not looked at.
    #[serde(deserialize_with = "side")]
    pub patch_size: usize,
    /// Activation of the MLPs.
    pub hidden_act: HiddenAct,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// Dropout probability of the attention weights.
    pub attention_dropout: f64,
    /// Standard deviation of a fresh model's weights.
    pub initializer_range: f64,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Width of the MLPs over `hidden_size`, where `mlp_dim` is none.
    pub mlp_ratio: f64,
    /// Whether a position embedding is added to the patches.
    pub use_abs_pos: bool,
    /// Whether attention has relative positions.
    pub use_rel_pos: bool,
    /// Side of the attention window of the layers that are not global; 0: all layers are global.
    pub window_size: usize,
    /// The layers with global attention. Indexes that are no layer's mean nothing, as in Hugging Face. A shallow model
    /// often keeps the default list, and -1 is not the last layer.
    pub global_attn_indexes: Vec<i64>,
    /// Half the channels of the random Fourier position features; `2 * num_pos_feats` is the prompts' width.
    pub num_pos_feats: usize,
    /// Width of the MLPs; see [`mlp_dim`](Self::mlp_dim()).
    pub mlp_dim: Option<usize>,
    /// Keys this crate does not know, kept for writing.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Default for SamVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            output_channels: 256,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 1024,
            patch_size: 16,
            hidden_act: HiddenAct::Gelu,
            layer_norm_eps: 1e-6,
            attention_dropout: 0.0,
            initializer_range: 1e-10,
            qkv_bias: true,
            mlp_ratio: 4.0,
            use_abs_pos: true,
            use_rel_pos: true,
            window_size: 14,
            global_attn_indexes: vec![2, 5, 8, 11],
            num_pos_feats: 128,
            mlp_dim: None,
            extra: Map::new(),
        }
    }
}

impl SamVisionConfig {
    /// The [`model_type`] of a `config.json` that describes an image encoder alone.
    pub const MODEL_TYPE: &str = "sam_vision_model";

    /// Reads and validates the image encoder's part of a `config.json`: all of the file of a `SamVisionModel`,
    /// `vision_config` in the file of a whole SAM.
    ///
    /// # Errors
    /// - the file cannot be read or is no JSON;
    /// - a value is of the wrong kind;
    /// - the file describes no possible model.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if model_type(path)? != Self::MODEL_TYPE {
            return Ok(SamConfig::load(path)?.vision_config);
        }
        let config: Self = read(path, "the configuration of an image encoder")?;
        config.validate().map_err(|e| Error::file(path, e.to_string()))?;
        Ok(config)
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// Width of the MLPs: the field, or `hidden_size * mlp_ratio` rounded down.
    pub fn mlp_dim(&self) -> usize {
        self.mlp_dim.unwrap_or((self.hidden_size as f64 * self.mlp_ratio) as usize)
    }

    /// Side of the token grid, `image_size / patch_size` rounded down.
    pub fn grid_size(&self) -> usize {
        self.image_size / self.patch_size.max(1)
    }

    /// The window of a layer; none for global attention.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let listed = self.global_attn_indexes.contains(&(layer as i64));
        let global = self.window_size == 0 || listed;
        (!global).then_some(self.window_size)
    }

    /// Rows of a layer's relative position tables: `2 * side - 1` of its window or of the grid.
    pub fn rel_pos_len(&self, layer: usize) -> usize {
        (2 * self.window(layer).unwrap_or(self.grid_size())).saturating_sub(1)
    }
}

/// The prompt encoder, `SamPromptEncoderConfig`.
///
/// [Example](crate::sam::SamConfig)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamPromptEncoderConfig {
    /// Width of the prompt embeddings.
    pub hidden_size: usize,
    /// Side of the square input image, that of the vision encoder.
    #[serde(deserialize_with = "side")]
    pub image_size: usize,
    /// Side of a patch, that of the vision encoder.
    #[serde(deserialize_with = "side")]
    pub patch_size: usize,
    /// Channels inside the mask embedding; a multiple of 4.
    pub mask_input_channels: usize,
    /// Number of point embeddings, of which four are used: negative, positive, and a box's two corners.
    pub num_point_embeddings: usize,
    /// Activation of the mask embedding.
    pub hidden_act: HiddenAct,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// Keys this crate does not know, kept for writing.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Default for SamPromptEncoderConfig {
    fn default() -> Self {
        Self {
            hidden_size: 256,
            image_size: 1024,
            patch_size: 16,
            mask_input_channels: 16,
            num_point_embeddings: 4,
            hidden_act: HiddenAct::Gelu,
            layer_norm_eps: 1e-6,
            extra: Map::new(),
        }
    }
}

impl SamPromptEncoderConfig {
    /// Side of the image embedding, `image_size / patch_size`. Mask prompts are four times as large.
    pub fn image_embedding_size(&self) -> usize {
        self.image_size / self.patch_size.max(1)
    }
}

/// The mask decoder, `SamMaskDecoderConfig`.
///
/// [Example](crate::sam::SamConfig)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamMaskDecoderConfig {
    /// Width of the tokens, at least 8.
    pub hidden_size: usize,
    /// Activation of the transformer's MLPs.
    pub hidden_act: HiddenAct,
    /// Width of the transformer's MLPs.
    pub mlp_dim: usize,
    /// Number of two-way layers; may be 0.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// The final attention works on `hidden_size / attention_downsample_rate` channels; the cross attentions of the
    /// two-way layers on `hidden_size / 2`, whatever this says, as in Hugging Face.
    pub attention_downsample_rate: usize,
    /// Masks given for an ambiguous prompt, besides the one for an unambiguous prompt.
    pub num_multimask_outputs: usize,
    /// Layers of the IoU head; fewer than 2 mean 2, as in Hugging Face.
    pub iou_head_depth: usize,
    /// Width inside the IoU head.
    pub iou_head_hidden_dim: usize,
    /// Epsilon of the layer norms but the final one, which has 1e-5.
    pub layer_norm_eps: f64,
    /// Keys this crate does not know, kept for writing.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Default for SamMaskDecoderConfig {
    fn default() -> Self {
        Self {
            hidden_size: 256,
            hidden_act: HiddenAct::Relu,
            mlp_dim: 2048,
            num_hidden_layers: 2,
            num_attention_heads: 8,
            attention_downsample_rate: 2,
            num_multimask_outputs: 3,
            iou_head_depth: 3,
            iou_head_hidden_dim: 256,
            layer_norm_eps: 1e-6,
            extra: Map::new(),
        }
    }
}

/// The whole model, `SamConfig`. The default is ViT-B.
///
/// ```
/// use candle_sam_lora::sam::{checkpoint, model_type, SamConfig};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let vision = SamConfig::vit_b().vision_config;
/// assert_eq!((vision.head_dim(), vision.grid_size()), (64, 64));
/// assert_eq!((vision.window(0), vision.window(2)), (Some(14), None)); // layer 2 attends to the whole grid
/// let tiny = SamConfig::load("assets/tiny-sam/config.json")?;
/// assert_eq!(tiny.vision_config.image_size, 128);
/// assert_eq!(model_type("assets/tiny-sam/config.json")?, "sam");
/// assert_eq!(checkpoint::sizes("assets/tiny-sam")?.config, tiny); // the sizes of the tensors without a config.json
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamConfig {
    /// The image encoder.
    #[serde(deserialize_with = "null_is_default")]
    pub vision_config: SamVisionConfig,
    /// The prompt encoder.
    #[serde(deserialize_with = "null_is_default")]
    pub prompt_encoder_config: SamPromptEncoderConfig,
    /// The mask decoder.
    #[serde(deserialize_with = "null_is_default")]
    pub mask_decoder_config: SamMaskDecoderConfig,
    /// Keys this crate does not know, kept for writing.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl SamConfig {
    /// SAM ViT-B, 93.7 million parameters.
    pub fn vit_b() -> Self {
        Self::default()
    }

    /// SAM ViT-L, 312 million parameters.
    pub fn vit_l() -> Self {
        Self::with_encoder(1024, 24, 16, vec![5, 11, 17, 23])
    }

    /// SAM ViT-H, 641 million parameters.
    pub fn vit_h() -> Self {
        Self::with_encoder(1280, 32, 16, vec![7, 15, 23, 31])
    }

    fn with_encoder(width: usize, layers: usize, heads: usize, global: Vec<i64>) -> Self {
        let mut config = Self::default();
        config.vision_config.hidden_size = width;
        config.vision_config.num_hidden_layers = layers;
        config.vision_config.num_attention_heads = heads;
        config.vision_config.global_attn_indexes = global;
        config
    }

    /// One of the published models by its name: `vit_b`, `vit_l` or `vit_h`.
    pub fn by_name(name: &str) -> Result<Self> {
        match name {
            "vit_b" => Ok(Self::vit_b()),
            "vit_l" => Ok(Self::vit_l()),
            "vit_h" => Ok(Self::vit_h()),
            other => Err(Error::config(format!(
                "no model is called {other:?}; expected vit_b, vit_l, vit_h or a config.json"
            ))),
        }
    }

    /// Reads and validates a `config.json`.
    ///
    /// # Errors
    /// - the file cannot be read or is no JSON;
    /// - a value is of the wrong kind;
    /// - the file describes no possible SAM, or an image encoder alone.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let config: Self = read(path, "a SAM configuration")?;
        config.validate().map_err(|e| Error::file(path, e.to_string()))?;
        Ok(config)
    }

    /// The text of a `config.json` that Hugging Face's `SamModel.from_pretrained` reads.
    pub fn to_json(&self) -> Result<String> {
        let mut config = self.clone();
        // `config.vision_config.mlp_dim` is a number in every file Hugging Face writes.
        config.vision_config.mlp_dim = Some(self.vision_config.mlp_dim());
        config.extra.entry("model_type").or_insert_with(|| "sam".into());
        config.extra.entry("architectures").or_insert_with(|| vec!["SamModel"].into());
        serde_json::to_string_pretty(&config)
            .map_err(|e| Error::config(format!("cannot be written as JSON: {e}")))
    }
}

/// The `model_type` of a `config.json`: `sam` for a whole SAM and where the file names none,
/// [`SamVisionConfig::MODEL_TYPE`] for an image encoder alone.
///
/// [Example](crate::sam::SamConfig)
///
/// # Errors
/// - the file cannot be read or is no JSON object.
pub fn model_type(path: impl AsRef<Path>) -> Result<String> {
    #[derive(Deserialize)]
    struct Header {
        model_type: Option<String>,
    }
    let header: Header = read(path.as_ref(), "a model's configuration")?;
    Ok(header.model_type.unwrap_or_else(|| "sam".into()))
}

pub(super) fn read<T: serde::de::DeserializeOwned>(path: &Path, kind: &str) -> Result<T> {
    files::read_json(path, kind)
}

/// Reads a side given as `S` or, as Hugging Face allows, `[S, S]`.
pub(super) fn side<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<usize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Side {
        One(usize),
        Two([usize; 2]),
    }
    match Side::deserialize(deserializer) {
        Ok(Side::One(side)) => Ok(side),
        Ok(Side::Two([height, width])) if height == width => Ok(width),
        Ok(Side::Two([height, width])) => {
            Err(serde::de::Error::custom(format!("a size of [{height}, {width}] is not square")))
        }
        Err(_) => Err(serde::de::Error::custom("expected a size as a number or two equal numbers")),
    }
}

fn null_is_default<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
