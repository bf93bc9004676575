//! The parts of SAM that are trained, and how they become an adapter.

use crate::lora::LoraConfig;
use crate::nn::{is_adapter_tensor, set_trainable};
use crate::sam::SamModel;
use crate::train::{BatchConfig, PromptKind};
use crate::Result;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// A part of SAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// LoRA adapters of the image encoder.
    Adapters,
    /// The mask decoder, whole.
    Decoder,
    /// The prompt encoder, whole.
    PromptEncoder,
}

impl Part {
    /// Each with its name.
    const ALL: [(&str, Self); 3] = [
        ("adapters", Self::Adapters),
        ("decoder", Self::Decoder),
        ("prompt-encoder", Self::PromptEncoder),
    ];

    /// The module that is trained whole.
    fn module(self) -> Option<&'static str> {
        match self {
            Self::Adapters => None,
            Self::Decoder => Some("mask_decoder"),
            Self::PromptEncoder => Some("prompt_encoder"),
        }
    }
}

/// A choice of parts, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts(BTreeSet<Part>);

impl Default for Parts {
    fn default() -> Self {
        Self([Part::Adapters, Part::Decoder].into())
    }
}

impl FromStr for Parts {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text.trim() == "all" {
            return Ok(Self(Part::ALL.map(|(_, part)| part).into()));
        }
        let part = |wanted: &str| {
            let found = Part::ALL.iter().find(|(name, _)| *name == wanted.trim());
            let names = Part::ALL.map(|(name, _)| name).join(", ");
            found
                .map(|(_, part)| *part)
                .ok_or_else(|| format!("expected some of {names}, or all, got {wanted:?}"))
        };
        text.split(',').map(part).collect::<std::result::Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(","))
    }
}

impl Parts {
    /// Whether a part is trained.
    pub fn has(&self, part: Part) -> bool {
        self.0.contains(&part)
    }

    /// Their names.
    pub fn names(&self) -> Vec<&'static str> {
        let chosen = Part::ALL.iter().filter(|(_, part)| self.has(*part));
        chosen.map(|(name, _)| *name).collect()
    }

    /// Makes the parts trainable in a model with adapters of `config`. Returns the configuration of all that is
    /// trained, to be saved as one adapter. Without trained adapters their B stays as it is, zero if they are new.
    pub fn prepare(
        &self,
        sam: &mut SamModel,
        mut config: LoraConfig,
        batch: &BatchConfig,
    ) -> Result<LoraConfig> {
        let mut whole = config.modules_to_save.take().unwrap_or_default();
        let wanted = self.0.iter().filter_map(|part| part.module()).map(str::to_string);
        whole.extend(wanted.filter(|name| !whole.contains(name)).collect::<Vec<_>>());
        // PEFT saves the frequencies with a whole prompt encoder.
        let own = &mut sam.prompt_encoder.shared_embedding.own;
        if own.is_none() && whole.iter().any(|name| name == "prompt_encoder") {
            *own = Some(sam.shared_image_embedding.positional_embedding.clone());
        }
        config.modules_to_save = (!whole.is_empty()).then_some(whole);
        set_trainable(sam, |name| {
            let part = Part::ALL.iter().map(|(_, part)| *part).find(|part| {
                part.module().is_some_and(|module| name.starts_with(&format!("{module}.")))
            });
            match part {
                Some(part) => self.has(part) && is_reached(name, batch),
                None => self.has(Part::Adapters) && is_adapter_tensor(name),
            }
        })?;
        Ok(config)
    }
}

/// Whether a loss of these batches can depend on a parameter of decoder or prompt encoder: weight decay alone would
/// move the rest.
fn is_reached(name: &str, batch: &BatchConfig) -> bool {
    let corrections = &batch.corrections;
    let (points, boxes) = match batch.kind {
        PromptKind::Point => (true, false),
        PromptKind::Box { .. } => (false, true),
        PromptKind::Mixed { boxes, .. } => (boxes < 1.0, boxes > 0.0),
    };
    let with_point = corrections.points > 0;
    let given = with_point && corrections.mask_probability > 0.0;
    let starts = |prefix: &str| name.starts_with(prefix);
    match name {
        _ if starts("mask_decoder.iou_prediction_head.") => batch.loss.iou > 0.0,
        _ if starts("mask_decoder.output_hypernetworks_mlps.0.") => true,
        _ if starts("mask_decoder.output_hypernetworks_mlps.") => batch.loss.multimask > 0.0,
        _ if starts("prompt_encoder.mask_embed.") => corrections.mask_rounds > 0 || given,
        _ if starts("prompt_encoder.point_embed.0.") => with_point,
        _ if starts("prompt_encoder.point_embed.1.") => points || with_point,
        _ if starts("prompt_encoder.point_embed.") => boxes,
        _ if starts("prompt_encoder.not_a_point_embed.") => points,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_and_written() {
        for (text, shown) in [
            ("decoder,adapters", "adapters,decoder"),
            ("prompt-encoder", "prompt-encoder"),
            ("all", "adapters,decoder,prompt-encoder"),
        ] {
            assert_eq!(text.parse::<Parts>().map(|parts| parts.to_string()), Ok(shown.into()));
        }
        let message = "head".parse::<Parts>().expect_err("no such part");
        assert!(message.contains("adapters, decoder, prompt-encoder, or all"), "{message}");
    }
}
