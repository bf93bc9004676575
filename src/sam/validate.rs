//! Refuses sizes, ratios and parts that contradict each other before anything is allocated. An error gives the name in
//! `config.json`, its value and what it should be.

use super::config::CROSS_DOWNSAMPLE_RATE;
use super::{SamConfig, SamMaskDecoderConfig, SamVisionConfig};
use crate::{Error, Result};
use candle_core::DType;
use serde_json::Value;

/// No side of a model may be larger than this: far above any real SAM, far below an allocation that hurts.
const MAX_SIZE: usize = 1 << 16;
/// No attention window may be larger than this: it is padded to, so it costs even where the grid is small.
const MAX_WINDOW: usize = 1 << 10;
/// No model may have more parameters than this; ViT-H has 0.64e9.
const MAX_PARAMETERS: u128 = 1 << 32;

/// Name and value of a field: `field!(vision_config.patch_size of self)`.
macro_rules! field {
    ($part:ident.$field:ident of $config:expr) => {
        (concat!(stringify!($part), ".", stringify!($field)), $config.$field)
    };
}

impl SamVisionConfig {
    /// Refuses an encoder that cannot be, naming the field, its value and what it should be.
    pub fn validate(&self) -> Result<()> {
        require_sizes([
            (field!(vision_config.hidden_size of self), 1),
            (field!(vision_config.output_channels of self), 1),
            (field!(vision_config.num_hidden_layers of self), 0),
            (field!(vision_config.num_attention_heads of self), 1),
            (field!(vision_config.num_channels of self), 1),
            (field!(vision_config.image_size of self), 1),
            (field!(vision_config.patch_size of self), 1),
            (("vision_config.mlp_dim", self.mlp_dim()), 1),
            (field!(vision_config.window_size of self), 0),
        ])?;
        require_multiples([(
            field!(vision_config.hidden_size of self),
            ("num_attention_heads", self.num_attention_heads),
        )])?;
        require(self.grid_size() > 0, || {
            format!(
                "vision_config.image_size is {}, less than a patch of {}",
                self.image_size, self.patch_size
            )
        })?;
        require_epsilons([field!(vision_config.layer_norm_eps of self)])?;
        let (name, dropout) = field!(vision_config.attention_dropout of self);
        require((0.0..1.0).contains(&dropout), || {
            format!("{name} is {dropout}, expected at least 0 and below 1")
        })?;
        require_parameters(self.parameter_estimate())
    }

    /// The number of parameters but for biases, norms and other small ones.
    fn parameter_estimate(&self) -> u128 {
        let width = self.hidden_size;
        let tables =
            2 * self.rel_pos_len(0).max(2 * self.grid_size()) * usize::from(self.use_rel_pos);
        let layer = product(&[4, width, width])
            + product(&[2, width, self.mlp_dim()])
            + product(&[tables, self.head_dim()]);
        let patches = product(&[width, self.num_channels, self.patch_size, self.patch_size]);
        let positions = product(&[self.grid_size(), self.grid_size(), width]);
        let neck = product(&[self.output_channels, width])
            + product(&[9, self.output_channels, self.output_channels]);
        layer * self.num_hidden_layers as u128 + patches + positions + neck
    }
}

impl SamConfig {
    /// Refuses a configuration that no model can have, naming the field, its value and what it should be.
    pub fn validate(&self) -> Result<()> {
        let (v, p, d) =
            (&self.vision_config, &self.prompt_encoder_config, &self.mask_decoder_config);
        if let Some(Value::String(kind)) = self.extra.get("model_type") {
            let missing = match kind == SamVisionConfig::MODEL_TYPE {
                true => ": an image encoder alone, without the prompt encoder and the mask decoder that masks need",
                false => "",
            };
            require(["sam", "sam_hq"].contains(&kind.as_str()), || {
                format!("model_type is {kind:?}, expected \"sam\"{missing}")
            })?;
        }
        v.validate()?;
        require_sizes([
            (field!(vision_config.num_pos_feats of v), 1),
            (field!(prompt_encoder_config.hidden_size of p), 1),
            (field!(prompt_encoder_config.mask_input_channels of p), 4),
            (field!(prompt_encoder_config.num_point_embeddings of p), 4),
        ])?;
        let (name, channels) = field!(prompt_encoder_config.mask_input_channels of p);
        require_multiples([((name, channels), ("the", 4))])?;
        d.validate()?;
        let width = field!(vision_config.output_channels of v);
        let positions = ("2 * vision_config.num_pos_feats", 2 * v.num_pos_feats);
        require_equal([
            (field!(prompt_encoder_config.image_size of p), field!(vision_config.image_size of v)),
            (field!(prompt_encoder_config.patch_size of p), field!(vision_config.patch_size of v)),
            (field!(prompt_encoder_config.hidden_size of p), width),
            (field!(mask_decoder_config.hidden_size of d), width),
            (field!(prompt_encoder_config.hidden_size of p), positions),
        ])?;
        require_epsilons([field!(prompt_encoder_config.layer_norm_eps of p)])?;
        let prompts = product(&[p.hidden_size, p.num_point_embeddings + p.mask_input_channels + 2]);
        require_parameters(v.parameter_estimate() + prompts + d.parameter_estimate())
    }
}

impl SamMaskDecoderConfig {
    /// Refuses a mask decoder that cannot be, naming the field, its value and what it should be.
    pub fn validate(&self) -> Result<()> {
        require_sizes([
            (field!(mask_decoder_config.mlp_dim of self), 1),
            (field!(mask_decoder_config.hidden_size of self), 8),
            (field!(mask_decoder_config.num_hidden_layers of self), 0),
            (field!(mask_decoder_config.num_attention_heads of self), 1),
            (field!(mask_decoder_config.attention_downsample_rate of self), 1),
            (field!(mask_decoder_config.num_multimask_outputs of self), 1),
            (field!(mask_decoder_config.iou_head_depth of self), 0),
            (field!(mask_decoder_config.iou_head_hidden_dim of self), 1),
        ])?;
        for rate in [1, CROSS_DOWNSAMPLE_RATE, self.attention_downsample_rate] {
            let (inner, heads) = (self.hidden_size / rate, self.num_attention_heads);
            require(inner > 0 && inner.is_multiple_of(heads), || {
                format!(
                    "mask_decoder_config.hidden_size is {}, and an attention works on 1/{rate} of it: {inner} \
                     channels, expected a multiple of num_attention_heads {heads}",
                    self.hidden_size
                )
            })?;
        }
        require_epsilons([field!(mask_decoder_config.layer_norm_eps of self)])?;
        require_parameters(self.parameter_estimate())
    }

    /// The number of parameters but for biases, norms and other small ones.
    fn parameter_estimate(&self) -> u128 {
        let (size, hidden) = (self.hidden_size, self.iou_head_hidden_dim);
        let layer = product(&[12, size, size]) + product(&[2, size, self.mlp_dim]);
        let heads = product(&[self.num_multimask_outputs + 1, 3, size, size])
            + product(&[self.iou_head_depth, hidden, hidden]);
        layer * self.num_hidden_layers as u128 + heads
    }
}

/// A name and a size.
type Named<'a> = (&'a str, usize);

/// A product of sizes, each at most [`MAX_SIZE`], that cannot overflow.
fn product(factors: &[usize]) -> u128 {
    factors.iter().map(|&factor| factor as u128).product()
}

fn require_sizes<const N: usize>(fields: [(Named<'_>, usize); N]) -> Result<()> {
    fields.into_iter().try_for_each(|((field, value), least)| {
        let most = if field.ends_with("window_size") { MAX_WINDOW } else { MAX_SIZE };
        require((least..=most).contains(&value), || {
            format!("{field} is {value}, expected {least} to {most}")
        })
    })
}

fn require_multiples<const N: usize>(fields: [(Named<'_>, Named<'_>); N]) -> Result<()> {
    fields.into_iter().try_for_each(|((field, value), (what, divisor))| {
        require(value % divisor == 0, || {
            format!("{field} is {value}, expected a multiple of {what} {divisor}")
        })
    })
}

fn require_equal<const N: usize>(fields: [(Named<'_>, Named<'_>); N]) -> Result<()> {
    fields.into_iter().try_for_each(|((field, value), (other, wanted))| {
        require(value == wanted, || {
            format!("{field} is {value}, but {other} is {wanted}; they must be equal")
        })
    })
}

fn require_epsilons<const N: usize>(fields: [(&str, f64); N]) -> Result<()> {
    fields.into_iter().try_for_each(|(field, value)| {
        require(value > 0.0 && value < 1.0, || {
            format!("{field} is {value}, expected between 0 and 1")
        })
    })
}

fn require_parameters(parameters: u128) -> Result<()> {
    require(parameters <= MAX_PARAMETERS, || {
        format!(
            "the model would have {parameters} parameters, at most {MAX_PARAMETERS} are supported"
        )
    })
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::config(message()))
    }
}

/// Refuses a dtype that the operations do not have.
pub(super) fn require_dtype(dtype: DType) -> Result<()> {
    require(matches!(dtype, DType::F32 | DType::F16 | DType::BF16), || {
        format!("the dtype of a model is {dtype:?}, expected F32, F16 or BF16")
    })
}
