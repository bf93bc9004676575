//! The configuration of a training loop.

use super::{AdamWConfig, Schedule};
use crate::{Error, Result};
use serde_json::{json, Map, Value};

/// How the parameters are changed.
///
/// [Example](crate::train::Trainer)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainerConfig {
    /// The optimizer, with the full learning rate.
    pub optimizer: AdamWConfig,
    /// Factors of the learning rate.
    pub schedule: Schedule,
    /// Parts of a step's batch, each with a forward and backward of its own; their mean gradient makes the step. With
    /// several processes, each computes so many.
    pub accumulation: u64,
    /// Largest norm of all gradients together; longer ones are shortened to it.
    pub max_grad_norm: Option<f64>,
    /// Decay of an average of the parameters over the steps, see
    /// [`Trainer::with_averages`](super::Trainer::with_averages); none keeps no average.
    pub ema: Option<f64>,
    /// Whatever is random is drawn from it and from the step.
    pub seed: u64,
}

/// As [`TrainerConfig::new`], with this optimizer.
impl From<AdamWConfig> for TrainerConfig {
    fn from(optimizer: AdamWConfig) -> Self {
        let schedule = Schedule::default();
        Self { optimizer, schedule, accumulation: 1, max_grad_norm: None, ema: None, seed: 0 }
    }
}

impl TrainerConfig {
    /// AdamW at this constant learning rate, a step in one part, without clipping, seed 0.
    pub fn new(learning_rate: f64) -> Self {
        AdamWConfig { lr: learning_rate, ..Default::default() }.into()
    }

    pub(super) fn validate(&self) -> Result<()> {
        self.schedule.validate()?;
        if self.accumulation == 0 {
            return Err(Error::config("a step needs a part at least, got an accumulation of 0"));
        }
        if let Some(decay) = self.ema.filter(|decay| !(0.0..1.0).contains(decay)) {
            let message = format!("the decay of averages must be in [0, 1), got {decay}");
            return Err(Error::config(message));
        }
        match self.max_grad_norm {
            Some(norm) if !(norm.is_finite() && norm > 0.0) => {
                let message = format!("the largest gradient norm must be positive, got {norm}");
                Err(Error::config(message))
            }
            _ => Ok(()),
        }
    }

    /// Settings, besides the seed, that must be equal when a run is continued. Unused settings are left out.
    pub(super) fn settings(&self) -> Map<String, Value> {
        let AdamWConfig { lr, beta1, beta2, eps, weight_decay } = self.optimizer;
        let mut settings = Map::new();
        let optimizer = [
            ("lr", lr),
            ("beta1", beta1),
            ("beta2", beta2),
            ("eps", eps),
            ("weight_decay", weight_decay),
        ];
        settings.extend(optimizer.map(|(name, value)| (name.to_string(), value.into())));
        if self.schedule != Schedule::default() {
            settings.insert("schedule".into(), json!(self.schedule));
        }
        if self.accumulation > 1 {
            settings.insert("accumulation".into(), self.accumulation.into());
        }
        if let Some(norm) = self.max_grad_norm {
            settings.insert("max_grad_norm".into(), norm.into());
        }
        if let Some(decay) = self.ema {
            settings.insert("ema".into(), decay.into());
        }
        settings
    }
}
