//! Training: losses, the optimizer, schedules, resumable runs, scores, logs, and images with masks to train on.
//!
//! A [`Trainer`] takes any [`ModuleTree`](crate::nn::ModuleTree) and a closure that computes the loss of a step;
//! `Batch` is such a loss for SAM (feature `images`). Whatever is random is a function of (seed, step), so that a run continued from
//! its state gives the bits of one that was never interrupted. [`check_gradients`] tests the gradients of anything.

mod adamw;
mod check_gradients;
mod checkpoint;
mod checksum;
#[cfg(feature = "images")]
mod coco;
#[cfg(feature = "images")]
mod data;
mod event_file;
mod gradients;
mod history;
#[cfg(feature = "images")]
mod labels;
mod loss;
mod lost_gradients;
mod metrics_csv;
#[cfg(feature = "images")]
mod prompt;
mod random;
#[cfg(feature = "images")]
mod schedule;
mod scores;
#[cfg(feature = "images")]
mod segmentation;
mod slope;
mod trainer;

pub use adamw::{AdamW, AdamWConfig, Parameter};
pub use check_gradients::{check_gradients, GradientCheck, GradientReport, Verdict};
pub use checkpoint::{previous_state_path, TrainingState};
#[cfg(feature = "images")]
pub use data::{sample_indices, Dataset, FlipRotate, Sample};
pub use event_file::EventFile;
pub use gradients::Gradients;
pub use history::{best_evaluation, evaluations_since_best, StepScores};
#[cfg(feature = "images")]
pub use labels::{find_instances, mask_on_grid, read_labels, Instance, LabelImage};
pub use loss::{bce_with_logits, dice_loss, mask_loss};
pub use metrics_csv::MetricsCsv;
#[cfg(feature = "images")]
pub use prompt::{jittered_box, random_point, Prompt, PromptKind};
pub use random::StepRng;
pub use schedule::{Decay, Schedule};
pub use scores::{iou, Scores};
#[cfg(feature = "images")]
pub use segmentation::{evaluate_image, Batch, BatchConfig, BatchSource, ImageEvaluation};
pub use trainer::{StepMetrics, Trainer, TrainerConfig};
