//! Refuses, by name, settings that no adapter can have and settings that this crate does not support.

use super::{InitLoraWeights, LoraConfig, ModuleNames, ValueOrList};
use crate::lora::init::pissa_iterations;
use crate::philox::Dropout;
use crate::{Error, Result};
use serde_json::Value;

/// The largest rank taken: above it a configuration is a mistake, and its tensors would not fit any memory.
const MAX_RANK: usize = 1 << 16;

/// PiSSA's iterations converge within some dozens.
const MOST_ITERATIONS: usize = 1000;

/// PEFT features that would change the result and are not followed here; refused unless null, false or empty.
pub(in crate::lora) const UNSUPPORTED: [&str; 12] = [
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Initialisations that leave the base weights as they are, so that an adapter trained from them loads as plain LoRA.
const INIT_KEEPS_BASE: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl LoraConfig {
    /// Checks everything that needs no model.
    ///
    /// # Errors
    /// On a value no adapter can have, or a PEFT feature that is not supported, by name.
    pub fn validate(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::config(message));
        if self.peft_type != "LORA" {
            return refuse(format!("peft_type must be \"LORA\", got {:?}", self.peft_type));
        }
        for (name, rank) in std::iter::once(("r", self.rank))
            .chain(self.rank_pattern.iter().map(|(name, rank)| (name.as_str(), *rank)))
        {
            if !(1..=MAX_RANK).contains(&rank) {
                return refuse(format!("the rank {name} must be in 1..={MAX_RANK}, got {rank}"));
            }
        }
        for (name, alpha) in std::iter::once(("lora_alpha", self.alpha))
            .chain(self.alpha_pattern.iter().map(|(name, alpha)| (name.as_str(), *alpha)))
        {
            if !(alpha as f32).is_finite() {
                return refuse(format!("the alpha {name} must be finite in f32, got {alpha:e}"));
            }
        }
        if !Dropout::is_probability(self.dropout) {
            let range = Dropout::RANGE;
            return refuse(format!("lora_dropout must be in {range}, got {}", self.dropout));
        }
        if self.target_modules.as_ref().is_none_or(ModuleNames::is_empty) {
            return refuse("target_modules is empty: name the layers to adapt".to_string());
        }
        let layers = [
            ("layers_to_transform", self.layers_to_transform.is_some()),
            ("layers_pattern", self.layers_pattern.is_some()),
        ];
        for (name, given) in layers {
            if given && matches!(self.target_modules, Some(ModuleNames::Regex(_))) {
                return refuse(format!("{name} cannot be used when target_modules is a string"));
            }
        }
        let pattern = self.layers_pattern.as_ref().map_or(&[][..], ValueOrList::as_slice);
        let has_pattern = match &self.layers_pattern {
            Some(ValueOrList::Value(name)) => !name.is_empty(),
            _ => !pattern.is_empty(),
        };
        if has_pattern && self.layers_to_transform.is_none() {
            return refuse("layers_pattern needs layers_to_transform too".to_string());
        }
        if self.modules_to_save.iter().flatten().any(String::is_empty) {
            return refuse("modules_to_save holds an empty name".to_string());
        }
        if self.lora_bias && self.use_dora {
            return refuse("lora_bias and use_dora cannot be combined".to_string());
        }
        if self.fan_in_fan_out {
            return refuse("fan_in_fan_out is not supported: weights are [out, in]".to_string());
        }
        if let InitLoraWeights::Named(name) = &self.init_lora_weights {
            if !INIT_KEEPS_BASE.contains(&name.as_str()) && !self.init_lora_weights.changes_base() {
                return refuse(format!(
                    "init_lora_weights {name:?} is not supported: it changes the base weights or the layer; \
                     convert the adapter to plain LoRA with PEFT first"
                ));
            }
            if let Some(Some(iterations @ MOST_ITERATIONS..)) = pissa_iterations(name) {
                return refuse(format!(
                    "init_lora_weights {name:?}: expected fewer than {MOST_ITERATIONS} iterations, got {iterations}"
                ));
            }
            if self.lora_bias {
                return refuse(format!(
                    "lora_bias needs init_lora_weights true or false, got {name:?}"
                ));
            }
        }
        for name in UNSUPPORTED {
            if let Some(value) = self.other.get(name).filter(|value| !is_neutral(value)) {
                return refuse(format!("{name} is not supported, got {value}"));
            }
        }
        Ok(())
    }
}

/// Null, false or empty.
pub(in crate::lora) fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}
