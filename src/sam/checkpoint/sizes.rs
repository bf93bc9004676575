//! The sizes of a SAM, told from the shapes of its tensors.
//!
//! Shapes say everything but the heads of the mask decoder, and those of an image encoder without relative positions.
//! These are the published ones of the same width, or the file needs a `config.json`.

use super::SAM;
use crate::nn::checkpoint::{related, shapes, split_prefix, with_prefix};
use crate::sam::{SamConfig, SamVisionConfig};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Widths and heads of the published image encoders: ViT-B, ViT-L, ViT-H.
const ENCODER_HEADS: [(usize, usize); 3] = [(768, 12), (1024, 16), (1280, 16)];
/// Widths and heads of mask decoders: every published SAM, and the small one that comes with this project.
const DECODER_HEADS: [(usize, usize); 2] = [(256, 8), (64, 4)];
const CONFIG_FILE: &str = "config.json";

/// The configuration of a checkpoint. Its `Display` is a few words for a user.
///
/// [Example](crate::sam::SamConfig)
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Sizes {
    /// The configuration.
    pub config: SamConfig,
    /// The `config.json` that it was read from; none where it was told from the tensors.
    pub file: Option<PathBuf>,
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vision = &self.config.vision_config;
        let published = [SamConfig::vit_b(), SamConfig::vit_l(), SamConfig::vit_h()];
        let known = published
            .iter()
            .position(|known| known.vision_config.hidden_size == vision.hidden_size);
        match known.and_then(|index| ["ViT-B", "ViT-L", "ViT-H"].get(index)) {
            Some(name) => write!(f, "{name}")?,
            None => write!(f, "width {}", vision.hidden_size)?,
        }
        write!(f, ", {} layers, images of {}", vision.num_hidden_layers, vision.image_size)?;
        match &self.file {
            Some(file) => write!(f, ", sizes of {}", file.display()),
            None => write!(
                f,
                ", sizes told from the tensors ({} heads of the mask decoder assumed)",
                self.config.mask_decoder_config.num_attention_heads
            ),
        }
    }
}

/// The configuration of the SAM in a checkpoint: `config.json` in its folder, or else the sizes of its tensors. For a
/// single file the `config.json` beside it counts only if it has the sizes of the tensors.
///
/// [Example](crate::sam::SamConfig)
///
/// # Errors
/// - the folder's `config.json` cannot be read or is impossible;
/// - the weights cannot be read, or are of no SAM;
/// - the number of heads cannot be told.
pub fn sizes(path: impl AsRef<Path>) -> Result<Sizes> {
    let (config, file) = configuration(path.as_ref())?;
    Ok(Sizes { config, file })
}

/// Whether a checkpoint is a SAM-HQ's.
///
/// [Example](crate::sam::SamHqModel)
///
/// # Errors
/// - the weights cannot be read.
pub fn is_sam_hq(path: impl AsRef<Path>) -> Result<bool> {
    let token = "mask_decoder.hq_token.weight";
    let models = shapes(path.as_ref(), &SAM, token)?;
    Ok(models.iter().any(|(_, shapes)| shapes.contains_key(token)))
}

/// The configuration of the image encoder in a checkpoint of a whole SAM or of the encoder alone; see [`sizes`].
///
/// [Example](crate::sam::SamConfig)
///
/// # Errors
/// - as [`sizes`].
pub fn vision_sizes(path: impl AsRef<Path>) -> Result<SamVisionConfig> {
    Ok(configuration(path.as_ref())?.0)
}

/// A configuration that stands beside weights or is told from their shapes.
trait Configuration: Clone + PartialEq {
    fn load(file: &Path) -> Result<Self>;
    fn tell(shapes: &Shapes<'_>) -> Result<Self>;
    /// Whether the tensors of `other` have the same shapes.
    fn same_tensors(&self, other: &Self) -> bool;
}

impl Configuration for SamVisionConfig {
    fn load(file: &Path) -> Result<Self> {
        Self::load(file)
    }

    fn tell(shapes: &Shapes<'_>) -> Result<Self> {
        shapes.vision()
    }

    fn same_tensors(&self, other: &Self) -> bool {
        let sizes = |v: &Self| {
            (v.hidden_size, v.num_hidden_layers, v.image_size, v.patch_size, v.mlp_dim())
        };
        sizes(self) == sizes(other)
    }
}

impl Configuration for SamConfig {
    fn load(file: &Path) -> Result<Self> {
        Self::load(file)
    }

    fn tell(shapes: &Shapes<'_>) -> Result<Self> {
        shapes.config()
    }

    fn same_tensors(&self, other: &Self) -> bool {
        let sizes = |config: &Self| {
            let decoder = &config.mask_decoder_config;
            (decoder.hidden_size, decoder.num_hidden_layers, decoder.mlp_dim)
        };
        self.vision_config.same_tensors(&other.vision_config) && sizes(self) == sizes(other)
    }
}

/// The configuration of a checkpoint, and the file that it was read from.
fn configuration<C: Configuration>(path: &Path) -> Result<(C, Option<PathBuf>)> {
    let (weights, _) = split_prefix(path);
    if weights.is_dir() {
        let file = weights.join(CONFIG_FILE);
        if file.exists() {
            return Ok((C::load(&file)?, Some(file)));
        }
        return Ok((told(path)?, None));
    }
    let file = weights.with_file_name(CONFIG_FILE);
    let told = told(path);
    // Whatever else lies in a folder of downloads is no matter.
    let beside = file.exists().then(|| C::load(&file)).and_then(Result::ok);
    match (beside, told) {
        (Some(config), Ok(told)) if config.same_tensors(&told) => Ok((config, Some(file))),
        (Some(config), Err(_)) if weights.exists() => Ok((config, Some(file))),
        (_, told) => Ok((told?, None)),
    }
}

/// Reads a configuration from the shapes of a checkpoint.
fn told<C: Configuration>(path: &Path) -> Result<C> {
    let models = shapes(path, &SAM, "vision_encoder.patch_embed.projection.weight")?;
    if models.is_empty() {
        let known = related(path, &SAM)?.map_or_else(String::new, |what| format!("; {what}"));
        let message =
            format!("holds no image encoder of a SAM: no tensor patch_embed.proj.weight{known}");
        return Err(Error::file(path, message));
    }
    let mut found: Vec<(String, C)> = Vec::new();
    let mut error = None;
    for (prefix, shapes) in models {
        match C::tell(&Shapes { path, shapes: &shapes }) {
            Ok(config) => found.push((prefix, config)),
            Err(e) => drop(error.get_or_insert(e)),
        }
    }
    if let Some((_, bare)) = found.iter().find(|(prefix, _)| prefix.is_empty()) {
        return Ok(bare.clone());
    }
    match (&found[..], error) {
        ([], Some(error)) => Err(error),
        ([], None) => Err(Error::file(path, "holds no SAM")),
        ([(prefix, first), others @ ..], _) => {
            match others.iter().find(|(_, other)| other != first) {
                None => Ok(first.clone()),
                Some((other, _)) => Err(Error::file(
                    path,
                    format!(
                        "holds several SAMs of different sizes, below {prefix:?} and {other:?}: name one behind the \
                         file, as {}",
                        with_prefix(path, prefix)
                    ),
                )),
            }
        }
    }
}

/// The shapes of one model.
struct Shapes<'a> {
    path: &'a Path,
    shapes: &'a BTreeMap<String, Vec<usize>>,
}

impl Shapes<'_> {
    fn wrong(&self, message: String) -> Error {
        Error::file(
            self.path,
            format!("the sizes of the model cannot be told from its tensors: {message}"),
        )
    }

    fn has(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    /// The shape of a tensor, which has to have `N` sides.
    fn shape<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let shape =
            self.shapes.get(name).ok_or_else(|| self.wrong(format!("there is no {name}")))?;
        let sides = shape.as_slice().try_into();
        sides.map_err(|_| self.wrong(format!("{name} has the shape {shape:?}, expected {N} sides")))
    }

    /// How many modules `<start>0.`, `<start>1.` and so on there are.
    fn count(&self, start: &str) -> usize {
        let is_there = |index: &usize| {
            let module = format!("{start}{index}.");
            self.shapes
                .range(module.clone()..)
                .next()
                .is_some_and(|(name, _)| name.starts_with(&module))
        };
        (0..).take_while(is_there).count()
    }

    fn config(&self) -> Result<SamConfig> {
        let mut config = SamConfig { vision_config: self.vision()?, ..SamConfig::default() };
        self.prompts_and_masks(&mut config)?;
        config.validate().map_err(|e| self.wrong(e.to_string()))?;
        Ok(config)
    }

    fn vision(&self) -> Result<SamVisionConfig> {
        let mut vision = SamVisionConfig::default();
        let layer = |index: usize, name: &str| format!("vision_encoder.layers.{index}.{name}");
        let [width, channels, patch, _] =
            self.shape("vision_encoder.patch_embed.projection.weight")?;
        (vision.hidden_size, vision.num_channels, vision.patch_size) = (width, channels, patch);
        vision.num_hidden_layers = self.count("vision_encoder.layers.");
        let mlp: [usize; 2] = self.shape(&layer(0, "mlp.lin1.weight"))?;
        vision.mlp_dim = Some(mlp[0]);
        vision.mlp_ratio = mlp[0] as f64 / width.max(1) as f64;
        vision.qkv_bias =
            ["attn.qkv.bias", "attn.q.bias"].iter().any(|name| self.has(&layer(0, name)));
        vision.output_channels = self.shape::<4>("vision_encoder.neck.conv1.weight")?[0];
        // An image encoder alone has no position features; they are as wide as half the prompts.
        let features = ["shared_image_embedding", "prompt_encoder.shared_embedding"]
            .map(|path| self.shape::<2>(&format!("{path}.positional_embedding")).ok());
        vision.num_pos_feats =
            features.into_iter().flatten().next().map_or(vision.output_channels / 2, |f| f[1]);
        vision.use_abs_pos = self.has("vision_encoder.pos_embed");
        vision.use_rel_pos = self.has(&layer(0, "attn.rel_pos_h"));
        // Sides of the windows that the tables of relative positions have, the grid's where attention is global.
        let mut sides = Vec::new();
        for index in 0..vision.num_hidden_layers {
            if vision.use_rel_pos {
                let [rows, head_dim] = self.shape(&layer(index, "attn.rel_pos_h"))?;
                sides.push(rows / 2 + 1);
                vision.num_attention_heads = width / head_dim.max(1);
            }
        }
        if !vision.use_rel_pos {
            let known = ENCODER_HEADS.iter().find(|(known, _)| *known == width);
            let (_, heads) = known.ok_or_else(|| {
                self.wrong(format!(
                    "an image encoder of width {width} may have any number of heads; put {CONFIG_FILE} beside it"
                ))
            })?;
            vision.num_attention_heads = *heads;
        }
        let grid = match vision.use_abs_pos {
            true => self.shape::<4>("vision_encoder.pos_embed")?[1],
            false => sides.iter().copied().max().unwrap_or(0),
        };
        vision.image_size = grid.saturating_mul(patch);
        vision.window_size = sides.iter().copied().filter(|side| *side < grid).min().unwrap_or(0);
        vision.global_attn_indexes =
            (0..).zip(&sides).filter(|(_, side)| **side >= grid).map(|(index, _)| index).collect();
        vision.validate().map_err(|e| self.wrong(e.to_string()))?;
        Ok(vision)
    }

    fn prompts_and_masks(&self, config: &mut SamConfig) -> Result<()> {
        let prompts = &mut config.prompt_encoder_config;
        (prompts.image_size, prompts.patch_size) =
            (config.vision_config.image_size, config.vision_config.patch_size);
        let [width, inner, _, _] = self.shape("prompt_encoder.mask_embed.conv3.weight")?;
        (prompts.hidden_size, prompts.mask_input_channels) = (width, inner);
        prompts.num_point_embeddings = self.count("prompt_encoder.point_embed.");
        let decoder = &mut config.mask_decoder_config;
        let [masks, width] = self.shape("mask_decoder.mask_tokens.weight")?;
        decoder.hidden_size = width;
        decoder.num_multimask_outputs = masks.saturating_sub(1);
        decoder.num_hidden_layers = self.count("mask_decoder.transformer.layers.");
        decoder.mlp_dim = match decoder.num_hidden_layers {
            0 => decoder.mlp_dim,
            _ => self.shape::<2>("mask_decoder.transformer.layers.0.mlp.lin1.weight")?[0],
        };
        let [inner, _] =
            self.shape("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight")?;
        decoder.attention_downsample_rate = width / inner.max(1);
        decoder.iou_head_depth = self.count("mask_decoder.iou_prediction_head.layers.") + 2;
        decoder.iou_head_hidden_dim =
            self.shape::<2>("mask_decoder.iou_prediction_head.proj_in.weight")?[0];
        let known = DECODER_HEADS.iter().find(|(known, _)| *known == width);
        let (_, heads) = known.ok_or_else(|| {
            self.wrong(format!(
                "a mask decoder of width {width} may have any number of heads; put {CONFIG_FILE} beside it"
            ))
        })?;
        decoder.num_attention_heads = *heads;
        Ok(())
    }
}
