//! The hyperparameters of AdamW, and the numbers that a step makes of them.

use super::groups::Factors;
use crate::problem::{AdamWRates, AdamWStep};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The hyperparameters, with PyTorch's defaults.
///
/// [Example](crate::train)
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2 }
    }
}

impl AdamWConfig {
    pub(super) fn validate(&self) -> Result<()> {
        let finite = |x: f64| x.is_finite() && x >= 0.0;
        let decay = |beta: f64| (0.0..1.0).contains(&beta);
        for (name, value, valid, expected) in [
            ("lr", self.lr, finite(self.lr), "finite and not negative"),
            ("beta1", self.beta1, decay(self.beta1), "in [0, 1)"),
            ("beta2", self.beta2, decay(self.beta2), "in [0, 1)"),
            ("eps", self.eps, finite(self.eps), "finite and not negative"),
            (
                "weight_decay",
                self.weight_decay,
                finite(self.weight_decay),
                "finite and not negative",
            ),
        ] {
            if !valid {
                return Err(Error::config(format!(
                    "adamw: {name} must be {expected}, got {value}"
                )));
            }
        }
        Ok(())
    }

    /// The numbers of a step, from 1.
    pub(super) fn at(&self, step: u64, max_norm: Option<f64>) -> AdamWStep {
        let Self { beta1, beta2, eps, .. } = *self;
        AdamWStep {
            beta1_rest: 1.0 - beta1,
            beta2,
            beta2_rest: 1.0 - beta2,
            root_correction: 1.0 / correction(beta2, step).sqrt(),
            eps,
            max_norm,
        }
    }

    /// The numbers of a step for a parameter.
    pub(super) fn rates(&self, step: u64, factors: Factors) -> AdamWRates {
        let lr = self.lr * factors.lr;
        AdamWRates {
            decay: 1.0 - lr * (self.weight_decay * factors.weight_decay),
            rate: lr / correction(self.beta1, step),
        }
    }
}

/// How far a mean that decays by `beta` from zero is from its end after `step` steps.
fn correction(beta: f64, step: u64) -> f64 {
    1.0 - beta.powf(step as f64)
}
