//! Training: losses, the optimizer, schedules, resumable runs, scores, logs, and images with masks to train on.
//!
//! A [`Trainer`] takes any [`ModuleTree`](crate::nn::ModuleTree) and a closure that computes the loss of a step;
//! `Batch` is such a loss for SAM (feature `images`). All randomness is a function of (seed, step). So a run continued
//! from its state gives the bits of one that was never interrupted.
//!
//! The parts serve a loop of your own too:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Optimizer, VarBuilder, VarMap};
//! use candle_sam_lora::nn::{trainable_variables, Linear};
//! use candle_sam_lora::train::{mask_loss, AdamW, AdamWConfig};
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
//! let model = Linear::load(8, 16, vb)?;
//! let mut optimizer = AdamW::new(trainable_variables(&model)?, AdamWConfig::default())?;
//! let x = Tensor::randn(0f32, 1f32, (2, 8), &Device::Cpu)?;
//! let masks = Tensor::zeros((2, 4, 4), DType::F32, &Device::Cpu)?;
//! for _ in 0..3 {
//!     let loss = mask_loss(&x.apply(&model)?.reshape((2, 4, 4))?, &masks)?;
//!     optimizer.backward_step(&loss)?;
//! }
//! assert_eq!(optimizer.steps(), 3);
//! # Ok(())
//! # }
//! ```

mod adamw;
mod adamw_config;
#[cfg(feature = "images")]
mod augment;
mod averages;
mod checkpoint;
#[cfg(feature = "images")]
mod coco;
#[cfg(feature = "images")]
mod coco_json;
#[cfg(feature = "images")]
mod corrections;
#[cfg(feature = "images")]
mod data;
mod distributed;
#[cfg(feature = "images")]
mod evaluation;
mod event_file;
#[cfg(feature = "images")]
mod exif;
#[cfg(feature = "images")]
mod facts;
#[cfg(feature = "images")]
mod finding;
#[cfg(feature = "images")]
mod folder;
mod gradients;
mod groups;
mod held_out_scores;
mod history;
#[cfg(feature = "images")]
mod kept_embeddings;
#[cfg(feature = "images")]
mod labels;
#[cfg(feature = "images")]
mod listing;
mod loss;
mod lost_gradients;
#[cfg(feature = "images")]
mod mask;
mod mask_scores;
#[cfg(feature = "images")]
mod mask_window;
mod metrics_csv;
mod object_scores;
#[cfg(feature = "images")]
mod prompt;
mod random;
#[cfg(feature = "images")]
mod sample;
mod schedule;
mod scores;
#[cfg(feature = "images")]
mod segmentation;
#[cfg(feature = "images")]
mod shards;
// The check of gradients in `testing` uses all of it.
#[cfg_attr(not(feature = "testing"), allow(dead_code))]
pub(crate) mod slope;
#[cfg(feature = "cuda")]
mod step_graphs;
#[cfg(feature = "images")]
mod stored;
#[cfg(feature = "images")]
mod summary;
#[cfg(feature = "images")]
mod tar_file;
mod trainer;
mod trainer_config;

pub use adamw::{AdamW, Parameter, StepMeasures};
pub use adamw_config::AdamWConfig;
#[cfg(feature = "images")]
pub use augment::{sample_indices, FlipRotate};
pub use checkpoint::{previous_state_path, TrainingState};
#[cfg(feature = "images")]
pub use corrections::{Corrections, ObjectMasks, PromptedObjects, Round};
#[cfg(feature = "images")]
pub use data::Dataset;
#[cfg(feature = "mpi")]
pub use distributed::Mpi;
pub use distributed::{check_agreement, device_of_rank, share, threads_of_rank, together};
pub use distributed::{Alone, Communicator, StepTimes};
#[cfg(feature = "images")]
pub use evaluation::{evaluate_image, AutomaticMasks, Evaluator, ImageEvaluation};
pub use event_file::EventFile;
#[cfg(feature = "images")]
pub use folder::Suffixes;
pub use gradients::Gradients;
pub use groups::ParameterGroups;
pub use held_out_scores::HeldOutScores;
pub use history::{best_evaluation, evaluations_since_best, StepScores};
#[cfg(feature = "images")]
pub use kept_embeddings::KeptEmbeddings;
#[cfg(feature = "images")]
pub use labels::{find_instances, mask_on_grid, Instance, LabelImage, IGNORED};
#[cfg(feature = "images")]
pub use listing::{DataFiles, TruthFiles};
pub use loss::{bce_with_logits, dice_loss, focal_loss, iou_loss, mask_loss, LossWeights};
#[cfg(feature = "images")]
pub use mask::{interpret, read_mask, Mask, MaskOptions, Meaning};
pub use mask_scores::{MaskMatches, MaskScores};
#[cfg(feature = "images")]
pub use mask_window::FoundMask;
pub use metrics_csv::MetricsCsv;
pub use object_scores::ObjectScores;
#[cfg(feature = "images")]
pub use prompt::{jittered_box, random_point, Prompt, PromptKind};
pub use random::StepRng;
#[cfg(feature = "images")]
pub use sample::{DatasetOptions, Sample};
pub use schedule::{Decay, Plateau, Schedule};
pub use scores::{iou, Scores};
#[cfg(feature = "images")]
pub use segmentation::{Batch, BatchConfig, BatchImages, BatchSource};
#[cfg(feature = "cuda")]
pub use step_graphs::{StepGraphs, StepInput};
#[cfg(feature = "images")]
pub use summary::Summary;
pub use trainer::{StepMetrics, Trainer};
pub use trainer_config::TrainerConfig;
