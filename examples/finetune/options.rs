//! The command line of `finetune`.

#[path = "../shared/lora_args.rs"]
mod lora_args;

use clap::{Parser, ValueEnum};
use lora_args::LoraArgs;
use std::path::PathBuf;

/// Trains LoRA adapters of SAM's image encoder on images with masks
///
/// Without arguments: on the small SAM and the micrographs of cell nuclei that come with the project. Writes into the
/// output folder: adapter/ (as PEFT does), loss.png, overlays/ (before on the left, after on the right; truth in
/// white), metrics.json, and state.safetensors, from which --resume goes on.
#[derive(Parser, Clone, Debug)]
pub struct Options {
    /// Folder with config.json and safetensors weights [default: the small SAM of this project]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Folder of images to train on [default: the micrographs of this project]
    #[arg(long, value_name = "DIR", requires = "masks")]
    pub images: Option<PathBuf>,
    /// Folder of their masks, with the same file stems: every value but 0 is one object; a mask of 0 and white only is
    /// taken apart into its connected parts
    #[arg(long, value_name = "DIR", requires = "images")]
    pub masks: Option<PathBuf>,
    /// Folder of held-out images [default: some of --images]
    #[arg(long, value_name = "DIR", requires = "val_masks", requires = "images")]
    pub val_images: Option<PathBuf>,
    /// Folder of their masks
    #[arg(long, value_name = "DIR", requires = "val_images")]
    pub val_masks: Option<PathBuf>,
    /// Part of --images that is held out where there are no --val-images
    #[arg(long, default_value_t = 0.2, value_name = "FRACTION")]
    pub val_fraction: f64,
    /// Objects of fewer pixels are left out
    #[arg(long, default_value_t = 20, value_name = "PIXELS")]
    pub min_area: usize,
    /// How the object is pointed out
    #[arg(long, value_enum, default_value_t = PromptArg::Point)]
    pub prompt: PromptArg,
    /// How far a side of a training box may be off, over the box's size
    #[arg(long, default_value_t = 0.1, value_name = "FRACTION")]
    pub box_jitter: f64,
    #[command(flatten)]
    pub lora: LoraArgs,
    /// Optimizer steps
    #[arg(long, default_value_t = 300)]
    pub steps: u64,
    /// Images in a step
    #[arg(long, default_value_t = 2, value_name = "IMAGES")]
    pub batch: usize,
    /// Prompts for each image of a step; they share one pass of the image encoder
    #[arg(long, default_value_t = 6)]
    pub prompts: usize,
    /// Learning rate
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// Weight decay
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Do not mirror and turn the training images
    #[arg(long)]
    pub no_augment: bool,
    /// Seed of everything random; the same seed gives the same adapter, bit for bit
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder for the results
    #[arg(long, default_value = "finetune-output", value_name = "DIR")]
    pub output: PathBuf,
    /// Go on with the run in the output folder
    #[arg(long)]
    pub resume: bool,
    /// Steps between two writings of the state
    #[arg(long, default_value_t = 25, value_name = "STEPS")]
    pub save_every: u64,
    /// Held-out images to draw before and after
    #[arg(long, default_value_t = 8, value_name = "IMAGES")]
    pub overlays: usize,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// Kinds of prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PromptArg {
    /// A point on the object
    Point,
    /// A box around it
    Box,
}
