//! Learning-rate schedules as transformers' `get_*_schedule_with_warmup` have them, as factors of the learning rate.
//!
//! ```text
//! t < warmup   t / warmup                                        so the first step of a warm-up has a rate of 0
//! constant     1
//! linear       (total - t) / (total - warmup)                    t is the number of steps made before
//! cosine       (1 + cos(pi (t - warmup) / (total - warmup))) / 2
//! plateau      factor^n after n times more than `patience` evaluations in a row without a higher held-out IoU
//! ```
//! A function of the step and of the evaluations before it, which are in a run's state: a continued run needs no other.
//!
//! Source: `transformers/optimization.py`; `ReduceLROnPlateau` of PyTorch.

use super::StepScores;
use crate::{Error, Result};
use serde::Serialize;

/// The rate after the warm-up.
///
/// [Example](crate::train::Schedule)
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
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
    /// Lower whenever the held-out IoU has not grown for a while.
    Plateau(Plateau),
}

/// Growth of the IoU that counts, over the best one before: PyTorch's default.
const LEAST_GROWTH: f64 = 1e-4;

/// When the rate becomes lower, and by how much.
///
/// [Example](crate::train::Schedule)
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Plateau {
    /// Factor of the rate each time, below 1.
    pub factor: f64,
    /// Evaluations without a higher IoU that are suffered in a row.
    pub patience: u64,
}

impl Plateau {
    /// The factor of the learning rate after these evaluations.
    fn factor(&self, evaluations: &[StepScores]) -> f64 {
        let (mut factor, mut best, mut worse) = (1.0, f64::NEG_INFINITY, 0);
        for iou in evaluations.iter().map(|evaluated| evaluated.scores.objects.iou) {
            if iou > best * (1.0 + LEAST_GROWTH) {
                (best, worse) = (iou, 0);
            } else {
                worse += 1;
            }
            if worse > self.patience {
                (factor, worse) = (factor * self.factor, 0);
            }
        }
        factor
    }
}

/// A warm-up from 0 and a decay. The default is a constant rate.
///
/// ```
/// use candle_sam_lora::train::{best_evaluation, evaluations_since_best, Decay, Plateau, Schedule};
/// use candle_sam_lora::train::{HeldOutScores, ObjectScores, StepScores};
///
/// let cosine = Schedule { warmup_steps: 10, decay: Decay::Cosine { total_steps: 100 } };
/// assert!(cosine.factor(0, &[]) < cosine.factor(9, &[]));
/// assert!(cosine.factor(20, &[]) > cosine.factor(90, &[]));
///
/// let scored = |step, iou| {
///     StepScores { step, scores: HeldOutScores::from(ObjectScores { iou, ..Default::default() }) }
/// };
/// let evaluations = [scored(100, 0.8), scored(200, 0.7)];
/// assert_eq!(best_evaluation(&evaluations).unwrap().step, 100);
/// assert_eq!(evaluations_since_best(&evaluations), 1);
/// let plateau = Schedule { warmup_steps: 0, decay: Decay::Plateau(Plateau { factor: 0.5, patience: 1 }) };
/// assert!(plateau.factor(200, &evaluations) <= plateau.factor(100, &evaluations[..1]));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Schedule {
    /// Steps before the full rate is reached.
    pub warmup_steps: u64,
    /// The rate after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// Refuses a warm-up that fills the whole run, and a plateau's factor that lowers nothing.
    ///
    /// # Errors
    /// As said.
    pub fn validate(&self) -> Result<()> {
        if let Decay::Plateau(Plateau { factor, .. }) = self.decay {
            if !(factor > 0.0 && factor < 1.0) {
                let message =
                    format!("schedule: the plateau's factor must be in (0, 1), got {factor}");
                return Err(Error::config(message));
            }
        }
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

    /// The factor of the learning rate for the step after `step` steps, with the evaluations before it.
    pub fn factor(&self, step: u64, evaluations: &[StepScores]) -> f64 {
        let warmup = self.warmup_steps;
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let length = |total: u64| total.saturating_sub(warmup).max(1) as f64;
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Plateau(plateau) => plateau.factor(evaluations),
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
