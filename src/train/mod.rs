//! Training: losses, the optimizer, schedules, resumable runs, scores, logs, and images with masks to train on.
//!
//! A [`Trainer`] takes any [`ModuleTree`](crate::nn::ModuleTree) and a closure that computes the loss of a step;
//! `Batch` is such a loss for SAM (feature `images`). Whatever is random is a function of (seed, step), so that a run continued from
//! its state gives the bits of one that was never interrupted. [`check_gradients`] tests the gradients of anything.

mod adamw;
#[cfg(feature = "images")]
mod augment;
mod check_gradients;
mod checkpoint;
mod checksum;
#[cfg(feature = "images")]
mod coco;
#[cfg(feature = "images")]
mod coco_json;
#[cfg(feature = "images")]
mod data;
#[cfg(feature = "images")]
mod evaluation;
mod event_file;
#[cfg(feature = "images")]
mod folder;
mod gradients;
mod history;
#[cfg(feature = "images")]
mod labels;
mod loss;
mod lost_gradients;
#[cfg(feature = "images")]
mod mask;
mod metrics_csv;
#[cfg(feature = "images")]
mod prompt;
mod random;
#[cfg(feature = "images")]
mod rle;
mod schedule;
mod scores;
#[cfg(feature = "images")]
mod segmentation;
mod slope;
#[cfg(feature = "images")]
mod summary;
mod trainer;

pub use adamw::{AdamW, AdamWConfig, Parameter};
#[cfg(feature = "images")]
pub use augment::{sample_indices, FlipRotate};
pub use check_gradients::{check_gradients, GradientCheck, GradientReport, Verdict};
pub use checkpoint::{previous_state_path, State};
#[cfg(feature = "images")]
pub use data::{Dataset, DatasetOptions, Sample};
#[cfg(feature = "images")]
pub use evaluation::{evaluate, Evaluation, Evaluator, FoundMask};
pub use event_file::EventFile;
#[cfg(feature = "images")]
pub use folder::Suffixes;
pub use gradients::Gradients;
pub use history::{best_evaluation, evaluations_since_best, StepScores};
#[cfg(feature = "images")]
pub use labels::{instances, target, Instance, LabelImage, IGNORED};
pub use loss::{bce_with_logits, dice_loss, mask_loss};
#[cfg(feature = "images")]
pub use mask::{interpret, read_mask, Mask, MaskOptions, Meaning};
pub use metrics_csv::MetricsCsv;
#[cfg(feature = "images")]
pub use prompt::{jittered_box, random_point, Prompt, PromptKind};
pub use random::StepRng;
pub use schedule::{Decay, Schedule};
pub use scores::{iou, Scores};
#[cfg(feature = "images")]
pub use segmentation::{Batch, BatchConfig};
#[cfg(feature = "images")]
pub use summary::Summary;
pub use trainer::{Step, Trainer, TrainerConfig};
