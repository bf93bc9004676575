//! The command line's words for a LoRA configuration.

use crate::lora::LoraConfig;
use crate::sam::AttentionKind;
use crate::{Error, Result};
use clap::Args;

/// The layers that are adapted, and how.
#[derive(Args, Clone, Debug)]
pub struct LoraArguments {
    /// Rank of the adapters
    #[arg(long, short, visible_alias = "r", default_value_t = 16, value_name = "RANK")]
    pub rank: usize,
    /// Scaling of the adapters is alpha / rank
    #[arg(long, visible_alias = "lora-alpha", default_value_t = 32.0)]
    pub alpha: f64,
    /// Dropout on the adapters' input while training
    #[arg(long, visible_alias = "lora-dropout", default_value_t = 0.1)]
    pub dropout: f64,
    /// Linear layers to adapt: names separated by commas, or a regular expression for their whole path, as in PEFT
    #[arg(long, default_value = "q,v", value_name = "NAMES")]
    pub target_modules: String,
    /// Weight-decomposed adapters (DoRA)
    #[arg(long)]
    pub use_dora: bool,
    /// A bias for the adapters' B
    #[arg(long)]
    pub lora_bias: bool,
    /// Scaling alpha / sqrt(rank) instead (rank stabilisation)
    #[arg(long)]
    pub use_rslora: bool,
}

impl LoraArguments {
    /// The same as PEFT's `LoraConfig`.
    pub fn config(&self) -> LoraConfig {
        let config = LoraConfig::new(self.rank).alpha(self.alpha).dropout(self.dropout);
        let mut config = match self.names() {
            Some(names) => config.target_modules(names),
            None => config.target_regex(&self.target_modules),
        };
        config.use_dora = self.use_dora;
        config.lora_bias = self.lora_bias;
        config.use_rslora = self.use_rslora;
        config
    }

    /// The targets, if they are names.
    fn names(&self) -> Option<Vec<&str>> {
        let names: Vec<&str> = self.target_modules.split(',').map(str::trim).collect();
        let is_name = |name: &&str| name.chars().all(|c| c.is_alphanumeric() || "_.".contains(c));
        let named = names.iter().all(is_name);
        named.then(|| names.into_iter().filter(|name| !name.is_empty()).collect())
    }

    /// Refuses a name that no layer has among those that were adapted, where others have one.
    pub fn check_targets(&self, adapted: &[String]) -> Result<()> {
        let is_there = |name: &&str| {
            let ends = |path: &String| path == name || path.ends_with(&format!(".{name}"));
            adapted.iter().any(ends)
        };
        match self.names().into_iter().flatten().find(|name| !is_there(name)) {
            Some(name) => Err(Error::config(format!(
                "--target-modules {}: no layer to adapt is called {name:?}",
                self.target_modules
            ))),
            None => Ok(()),
        }
    }

    /// The attention whose names the targets mean: one `qkv`, or `q`, `k` and `v`.
    pub fn attention(&self) -> AttentionKind {
        if self.target_modules.contains("qkv") {
            AttentionKind::Fused
        } else {
            AttentionKind::Split
        }
    }
}
