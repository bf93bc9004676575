//! `adapter_config.json`, read and written; the parts of it that are passed over, and those that PEFT will refuse, are
//! told.

use super::config::{is_neutral, UNSUPPORTED};
use super::LoraConfig;
use crate::{files, Error, Result};
use serde_json::Value;
use std::path::Path;

/// Keys of PEFT's file that change no result by themselves.
const WITHOUT_EFFECT: [&str; 11] = [
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Task types that PEFT takes for a model of any kind.
const TASK_TYPES: [&str; 4] = ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"];
/// Task types that PEFT takes only for a model that generates text.
const TEXT_TASK_TYPES: [&str; 2] = ["SEQ_2_SEQ_LM", "CAUSAL_LM"];

/// The most characters of a key or a value that a line shows.
const SHOWN: usize = 100;

impl LoraConfig {
    /// Reads and checks an `adapter_config.json`. Writes its [`warnings`](Self::warnings) to standard error.
    ///
    /// # Errors
    /// When the file cannot be read, is no JSON of this kind, or does not pass [`validate`](Self::validate).
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let config: Self = files::read_json(path, "a LoRA configuration")?;
        config.validate().map_err(|e| Error::file(path, e.to_string()))?;
        config.warnings().iter().for_each(|line| warn(&path.display(), line));
        Ok(config)
    }

    /// The text of `adapter_config.json` as PEFT writes it: two spaces, sorted keys, in inference mode.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn to_json(&self) -> Result<String> {
        self.validate()?;
        let failed = |e: serde_json::Error| Error::config(format!("cannot be written: {e}"));
        let mut value = serde_json::to_value(self).map_err(failed)?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("inference_mode".to_string(), Value::Bool(true));
        }
        value.sort_all_objects();
        serde_json::to_string_pretty(&value).map_err(failed)
    }

    /// One line for each key that has a value and no effect here, by its name and value, as a newer PEFT may write
    /// them. One more for a task type that PEFT refuses.
    pub fn warnings(&self) -> Vec<String> {
        let known = |name: &String| {
            WITHOUT_EFFECT.contains(&name.as_str()) || UNSUPPORTED.contains(&name.as_str())
        };
        let unknown = self.other.iter().filter(|(name, value)| !known(name) && !is_neutral(value));
        let lines = unknown.map(|(name, value)| {
            let (name, value) = (shortened(&name.escape_debug()), shortened(value));
            format!("{name} is {value}, a key that is not known here and has no effect: results may differ")
        });
        let idle = || "lora_alpha is 0: the adapter has no effect".to_string();
        lines.chain(self.refused_task_type()).chain((self.alpha == 0.0).then(idle)).collect()
    }

    /// Tells of a task type that PEFT refuses for a model as SAM.
    pub(super) fn refused_task_type(&self) -> Option<String> {
        let name = self.task_type.as_deref().filter(|name| !TASK_TYPES.contains(name))?;
        let whose = match TEXT_TASK_TYPES.contains(&name) {
            true => "PEFT refuses it for a model that generates no text",
            false => "PEFT does not know it and refuses the adapter",
        };
        let name = shortened(&format_args!("{name:?}"));
        Some(format!("task_type is {name}: {whose}; it takes null, {}", TASK_TYPES.join(", ")))
    }
}

/// At most [`SHOWN`] characters of what a file says.
fn shortened(text: &dyn std::fmt::Display) -> String {
    let text = text.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Tells, on standard error, what is passed over in `source`.
pub(super) fn warn(source: &dyn std::fmt::Display, line: &str) {
    eprintln!("warning: {source}: {line}");
}
