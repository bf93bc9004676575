//! Learning-rate schedules as transformers' `get_*_schedule_with_warmup` have them, as factors of the learning rate.
//!
//! ```text
//! t < warmup   t / warmup                                        so the first step of a warm-up has a rate of 0
//! constant     1
//! linear       (total - t) / (total - warmup)                    t is the number of steps made before
//! cosine       (1 + cos(pi (t - warmup) / (total - warmup))) / 2
//! ```
//! A function of the step alone: a continued run needs no state of it.
//!
//! Source: `transformers/optimization.py`.

use crate::{Error, Result};
use serde::Serialize;

/// The rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// The full rate.
    #[default]
    Constant,
    /// Down to 0 in a straight line.
    Linear {
        /// Steps of the whole run, warm-up included.
        total_steps: u64,
    },
    /// Down to 0 along half a cosine.
    Cosine {
        /// Steps of the whole run, warm-up included.
        total_steps: u64,
    },
}

/// A warm-up from 0 and a decay. The default is a constant rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// Steps before the full rate is reached.
    pub warmup_steps: u64,
    /// The rate after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// Refuses a warm-up that fills the whole run.
    ///
    /// # Errors
    /// As said.
    pub fn validate(&self) -> Result<()> {
        let (Decay::Linear { total_steps } | Decay::Cosine { total_steps }) = self.decay else {
            return Ok(());
        };
        if self.warmup_steps >= total_steps.max(1) {
            return Err(Error::config(format!(
                "schedule: the warm-up must be shorter than the run of {total_steps} steps, is {} steps",
                self.warmup_steps
            )));
        }
        Ok(())
    }

    /// The factor of the learning rate for the step after `step` steps.
    pub fn factor(&self, step: u64) -> f64 {
        let warmup = self.warmup_steps;
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let length = |total: u64| total.saturating_sub(warmup).max(1) as f64;
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear { total_steps } => {
                total_steps.saturating_sub(step) as f64 / length(total_steps)
            }
            Decay::Cosine { total_steps } => {
                let progress = (step - warmup) as f64 / length(total_steps);
                // One half cosine: beyond the end it stays at 0 here, where transformers goes up again.
                0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())
            }
        }
    }
}
