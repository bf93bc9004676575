//! The command line of `finetune`.

use super::super::arguments::{check_fractions, Backend};
use super::super::console::Console;
use super::super::lora_arguments::LoraArguments;
use super::super::processes::Processes;
use super::parts::{Part, Parts};
use crate::sam::{Channels, MaskGenerator, Ranking, ReadOptions, ValueRange};
use crate::train::{
    AdamWConfig, BatchConfig, Corrections, DatasetOptions, Decay, LossWeights, MaskOptions,
    ParameterGroups, Plateau, PromptKind, Schedule, Suffixes, TrainerConfig,
};
use anyhow::bail;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// IoU from which one of two masks is a double, where objects do not overlap.
const AUTOMATIC_NMS: f64 = 0.3;

/// The loss of runs that name none: shape, and the predicted IoU, by which masks are chosen.
const LOSS: LossWeights = LossWeights { iou: 1.0, ..LossWeights::MASK };

/// Trains LoRA adapters of SAM's image encoder, and its decoder, on images with masks
///
/// Without arguments: on the small SAM and the micrographs of cell nuclei that come with the project. The output folder
/// gets adapter/ as PEFT writes it, metrics.json, metrics.csv with a row a step, and report.html with all plots and
/// pictures. In overlays/, before is on the left, after on the right, the truth in white. So it is in automatic/, which
/// has the masks that are found without a prompt. --resume goes on from state.safetensors. With --eval-every,
/// best/ is the adapter that did best on the held-out images.
#[derive(Parser, Clone, Debug)]
pub struct Options {
    /// Folder with config.json and safetensors weights, or, with the feature `hub`, OWNER/NAME[@REVISION] on the
    /// Hugging Face hub [default: the small SAM of this project]
    #[arg(long, value_name = "DIR|NAME")]
    pub model: Option<PathBuf>,
    /// Folder or TAR of images to train on; may be repeated, or be @FILE with a path a line. Without --masks a TAR
    /// holds them, too, as WebDataset has them: 12.jpg with 12.png, 12.mask.png or 12.json [default: the micrographs of
    /// this project]
    #[arg(long, value_name = "DIR|TAR|@FILE")]
    pub images: Vec<PathBuf>,
    /// Folder or TAR of their masks, with the same file stems. Where a mask has one value beside 0, each connected part
    /// is an object; where it has several, each value is one. The run says what it took, and docs/data.md has all
    /// rules. As --images, may be several
    #[arg(long, value_name = "DIR|TAR|@FILE", requires = "images", group = "truth")]
    pub masks: Vec<PathBuf>,
    /// Instead of masks, COCO's instances JSON with polygons or run lengths
    #[arg(long, value_name = "FILE", requires = "images", group = "truth")]
    pub coco: Option<PathBuf>,
    /// Folder or TAR of held-out images, as --images [default: some of --images]
    #[arg(long, value_name = "DIR|TAR|@FILE", requires = "images")]
    pub val_images: Vec<PathBuf>,
    /// Folder or TAR of their masks, as --masks
    #[arg(long, value_name = "DIR|TAR|@FILE", requires = "val_images", group = "val_truth")]
    pub val_masks: Vec<PathBuf>,
    /// Or their COCO JSON
    #[arg(long, value_name = "FILE", requires = "val_images", group = "val_truth")]
    pub val_coco: Option<PathBuf>,
    /// Part of --images that is held out where there are no --val-images
    #[arg(long, default_value_t = 0.2, value_name = "FRACTION")]
    pub val_fraction: f64,
    /// Objects of fewer pixels are left out
    #[arg(long, default_value_t = 20, value_name = "PIXELS")]
    pub min_area: usize,
    /// Text that the stems of masks end with beyond those of their images, as _mask
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub mask_suffix: String,
    /// Text that the stems of images end with beyond those of their masks, as _image
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub image_suffix: String,
    /// Mask values that are neither object nor background, or `none` [default: 255 beside small labels, and the like]
    #[arg(long, value_name = "VALUE,..|none", allow_hyphen_values = true)]
    pub ignore: Option<Ignore>,
    /// Mask value of the background, a number or #rrggbb [default: 0]
    #[arg(long, value_name = "VALUE", allow_hyphen_values = true, value_parser = MaskOptions::parse_value)]
    pub background: Option<i64>,
    /// Each connected part of a mask's value is an object: for masks of classes
    #[arg(long)]
    pub parts: bool,
    /// Values of images that become black and white: auto, type, min-max, percentile or LOW,HIGH
    #[arg(long, default_value = "auto", value_name = "RANGE", allow_hyphen_values = true)]
    pub range: ValueRange,
    /// Page, frame or channel of images that have several, from 1
    #[arg(long, value_name = "N")]
    pub page: Option<usize>,
    /// Channels of TIFFs that become red, green and blue, from 1
    #[arg(long, value_name = "R,G,B")]
    pub channels: Option<Channels>,
    /// Page of masks that have several, from 1
    #[arg(long, value_name = "N")]
    pub mask_page: Option<usize>,
    /// Images without an object are errors, and not left out
    #[arg(long)]
    pub strict: bool,
    /// How the object is pointed out at first
    #[arg(long, value_enum, default_value_t = PromptArg::Point)]
    pub prompt: PromptArg,
    /// Part of the images with boxes, of a mixture of prompts
    #[arg(long, default_value_t = 0.5, value_name = "FRACTION")]
    pub boxes: f64,
    /// How far a side of a training box may be off, over the box's size; at most 20 pixels of SAM's 1024
    #[arg(long, default_value_t = 0.1, value_name = "FRACTION")]
    pub box_jitter: f64,
    /// Rounds after the first prompt, each with one more point where the mask is wrong; the image encoder runs once for
    /// all
    #[arg(long, default_value_t = 1, value_name = "ROUNDS")]
    pub corrections: usize,
    /// Probability that such a round gets the last mask's logits too
    #[arg(long, default_value_t = 0.0, value_name = "PROBABILITY")]
    pub mask_probability: f64,
    /// Rounds with nothing new but these logits, the last one and others at random places; SAM has 2
    #[arg(long, default_value_t = 0, value_name = "ROUNDS")]
    pub mask_rounds: usize,
    /// Weights of the loss's terms: bce, focal, dice, iou (of the predicted IoU) and multimask. The last one repeats
    /// the others for the best of the alternatives for a first prompt
    #[arg(long, default_value_t = LOSS, value_name = "TERM=WEIGHT,..")]
    pub loss: LossWeights,
    /// Trained parts, with commas: adapters (of the image encoder), decoder, prompt-encoder, or all
    #[arg(long, default_value_t, value_name = "PART,..")]
    pub train: Parts,
    /// Go on from the adapter in this folder, on the model that it names, or on --model
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["rank", "alpha", "dropout", "target_modules", "use_dora", "lora_bias", "use_rslora"]
    )]
    pub adapter: Option<PathBuf>,
    #[command(flatten)]
    pub lora: LoraArguments,
    /// Place of the training images' embeddings if nothing of the image encoder is trained. A folder, `memory`, or
    /// `none` [default: memory, up to 4 GiB]
    #[arg(long, value_name = "DIR|memory|none")]
    pub embeddings: Option<PathBuf>,
    /// Embeddings of turned and mirrored images
    #[arg(long, value_enum, default_value_t = Symmetries::Stored)]
    pub symmetries: Symmetries,
    /// Optimizer steps
    #[arg(long, default_value_t = 300)]
    pub steps: u64,
    /// Instead of --steps, as many as show every image so often
    #[arg(long, value_name = "EPOCHS", conflicts_with = "steps")]
    pub epochs: Option<u64>,
    /// Images in a step
    #[arg(long, default_value_t = 2, value_name = "IMAGES")]
    pub batch: usize,
    /// Prompts for each image of a step; they share one pass of the image encoder
    #[arg(long, default_value_t = 6)]
    pub prompts: usize,
    /// Learning rate
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// The learning rate's way after the warm-up. A run that may become longer needs `constant`
    #[arg(
        long,
        value_enum,
        default_value_t = ScheduleArg::Cosine,
        value_name = "SCHEDULE",
        requires_if("plateau", "eval_every")
    )]
    pub lr_schedule: ScheduleArg,
    /// Steps in which the learning rate rises from 0
    #[arg(long, default_value_t = 0, value_name = "STEPS")]
    pub warmup_steps: u64,
    /// Factor of the rate after a plateau
    #[arg(long, default_value_t = 0.1, value_name = "FACTOR")]
    pub plateau_factor: f64,
    /// Evaluations without a higher held-out IoU before the rate falls
    #[arg(long, default_value_t = 10, value_name = "EVALUATIONS")]
    pub plateau_patience: u64,
    /// Keep averages of the trained parameters, an older one's weight falling by this factor a step; they are evaluated
    /// and saved
    #[arg(long, value_name = "DECAY")]
    pub ema: Option<f64>,
    /// Largest norm of all gradients together; longer ones are shortened to it [default: no limit]
    #[arg(long, value_name = "NORM")]
    pub max_grad_norm: Option<f64>,
    /// Batches whose mean gradient makes a step, one after the other: the memory of one, the effect of all
    #[arg(
        long,
        visible_alias = "gradient-accumulation-steps",
        default_value_t = 1,
        value_name = "BATCHES"
    )]
    pub accumulate: u64,
    /// Keep only each encoder layer's input and compute the layer again in the backward: less memory, a third more
    /// time, the same results
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Record training steps as CUDA graphs and replay them: the host launches a step at once, with the same results.
    /// Steps with points as corrections run as ever, so it wants --corrections 0. No GPU has run this yet
    #[cfg(feature = "cuda")]
    #[arg(long)]
    pub cuda_graph: bool,
    /// Weight decay
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Learning rate of the adapters' B and of vectors over that of the rest, as LoRA+ has it; 16 is usual
    #[arg(long, value_name = "RATIO")]
    pub loraplus_lr_ratio: Option<f64>,
    /// Factors of the learning rate of parameters whose names hold these, as mask_decoder=0.1; the last one counts
    #[arg(long, value_name = "NAME=FACTOR,..", value_delimiter = ',')]
    pub lr_factors: Vec<LrFactor>,
    /// Parts of the names of parameters without weight decay, as bias,norm
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub no_decay: Vec<String>,
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
    /// Replace the run in the output folder
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
    /// Steps between two writings of the state
    #[arg(long, default_value_t = 25, value_name = "STEPS")]
    pub save_every: u64,
    /// Evaluate on the held-out images after so many steps, or after every `epoch`, and keep the best adapter
    #[arg(long, value_name = "STEPS|epoch")]
    pub eval_every: Option<EvalEvery>,
    /// Stop when so many evaluations in a row were no better than the best before them
    #[arg(long, value_name = "EVALUATIONS", requires = "eval_every")]
    pub patience: Option<usize>,
    /// Write the figures for TensorBoard, too, into tensorboard/
    #[arg(long)]
    pub tensorboard: bool,
    /// Points along each side of a held-out image for its automatic masks; 0 makes none
    #[arg(long, default_value_t = 16, value_name = "POINTS")]
    pub automatic: usize,
    /// The worse of two automatic masks goes that overlap by a higher IoU; 1 compares boxes alone [default: 0.3, with
    /// annotations 1]
    #[arg(long, value_name = "IOU")]
    pub automatic_nms: Option<f64>,
    /// Which of two automatic masks is better: by predicted IoU (iou), as SAM has it, or by predicted IoU times
    /// stability (iou-stability)
    #[arg(long, default_value_t, value_name = "iou|iou-stability")]
    pub automatic_ranking: Ranking,
    /// Held-out images to draw before and after
    #[arg(long, default_value_t = 8, value_name = "IMAGES")]
    pub overlays: usize,
    #[command(flatten)]
    pub processes: Processes,
    #[command(flatten)]
    pub backend: Backend,
    #[command(flatten)]
    pub console: Console,
}

/// Kinds of prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PromptArg {
    /// A point on the object
    Point,
    /// A box around it
    Box,
    /// The one for some images, the other for the rest; judged by points
    Mixed,
}

/// Learning rates over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScheduleArg {
    /// The same for all steps
    Constant,
    /// Down to 0 in a straight line
    Linear,
    /// Down to 0 along half a cosine
    Cosine,
    /// Lower after evaluations that get no better, see --eval-every
    Plateau,
}

/// Fates of the embeddings of turned and mirrored images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Symmetries {
    /// Kept, eight to an image
    Stored,
    /// Computed in every step
    Recomputed,
}

/// Values of masks to ignore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ignore(Vec<i64>);

impl FromStr for Ignore {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(vec![])),
            _ => text.split(',').map(MaskOptions::parse_value).collect::<Result<_, _>>().map(Self),
        }
    }
}

/// A part of parameters' names, and the factor of their learning rate.
#[derive(Clone, Debug, PartialEq)]
pub struct LrFactor(String, f64);

impl FromStr for LrFactor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=').map(|(name, factor)| (name, factor.parse()));
        match parts {
            Some((name, Ok(factor))) => Ok(Self(name.into(), factor)),
            _ => Err(format!("expected NAME=FACTOR, got {text:?}")),
        }
    }
}

/// How often is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvalEvery {
    /// After so many steps.
    Steps(u64),
    /// After as many steps as show every image once.
    Epoch,
}

impl FromStr for EvalEvery {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("epoch", _) => Ok(Self::Epoch),
            (_, Ok(steps)) if steps > 0 => Ok(Self::Steps(steps)),
            _ => Err("expected a number of steps, at least 1, or `epoch`".into()),
        }
    }
}

impl Options {
    /// How images and masks are read.
    pub fn data(&self) -> DatasetOptions {
        DatasetOptions {
            min_area: self.min_area,
            strict: self.strict,
            suffixes: Suffixes { image: self.image_suffix.clone(), mask: self.mask_suffix.clone() },
            images: ReadOptions { range: self.range, page: self.page, channels: self.channels },
            masks: MaskOptions {
                ignore: self.ignore.clone().map(|Ignore(values)| values),
                background: self.background,
                parts: self.parts,
                page: self.mask_page,
            },
        }
    }

    /// Refuses flags that have no effect beside the others.
    pub fn check_idle(&self) -> anyhow::Result<()> {
        let usual = Self::parse_from(["finetune"]);
        let no_adapters = "where --train has no adapters";
        let (adapts, lora, usual_lora) = (self.train.has(Part::Adapters), &self.lora, &usual.lora);
        let with_masks = self.coco.is_none() || !(self.val_masks.is_empty());
        let beside_coco = "with --coco: it is about masks";
        let paired =
            self.images.is_empty() || !(self.masks.is_empty() && self.val_masks.is_empty());
        let holds_out = !self.images.is_empty() && self.val_images.is_empty();
        let turns = !(adapts || self.no_augment || self.embeddings == Some("none".into()));
        let plateau = self.lr_schedule == ScheduleArg::Plateau;
        let no_plateau = "without --lr-schedule plateau";
        let (mixed, boxed) = (self.prompt == PromptArg::Mixed, self.prompt != PromptArg::Point);
        let given = self.mask_probability != usual.mask_probability;
        let (automatic, no_automatic) = (self.automatic > 0, "with --automatic 0");
        #[rustfmt::skip]
        let flags = [
            ("--boxes", self.boxes != usual.boxes, mixed, "without --prompt mixed"),
            ("--box-jitter", self.box_jitter != usual.box_jitter, boxed, "with --prompt point"),
            ("--mask-probability", given, self.corrections > 0, "with --corrections 0"),
            ("--plateau-factor", self.plateau_factor != usual.plateau_factor, plateau, no_plateau),
            ("--plateau-patience", self.plateau_patience != usual.plateau_patience, plateau, no_plateau),
            ("--symmetries", self.symmetries != usual.symmetries, turns, "where no turned image is embedded"),
            ("--gradient-checkpointing", self.gradient_checkpointing, adapts, no_adapters),
            ("--rank", lora.rank != usual_lora.rank, adapts, no_adapters),
            ("--alpha", lora.alpha != usual_lora.alpha, adapts, no_adapters),
            ("--dropout", lora.dropout != usual_lora.dropout, adapts, no_adapters),
            ("--use-dora", lora.use_dora, adapts, no_adapters),
            ("--lora-bias", lora.lora_bias, adapts, no_adapters),
            ("--use-rslora", lora.use_rslora, adapts, no_adapters),
            ("--val-fraction", self.val_fraction != usual.val_fraction, holds_out, "with these images"),
            ("--mask-suffix", self.mask_suffix != usual.mask_suffix, paired, "without --masks"),
            ("--image-suffix", self.image_suffix != usual.image_suffix, paired, "without --masks"),
            ("--ignore", self.ignore.is_some(), with_masks, beside_coco),
            ("--background", self.background.is_some(), with_masks, beside_coco),
            ("--parts", self.parts, with_masks, beside_coco),
            ("--mask-page", self.mask_page.is_some(), with_masks, beside_coco),
            ("--automatic-nms", self.automatic_nms.is_some(), automatic, no_automatic),
            ("--automatic-ranking", self.automatic_ranking != usual.automatic_ranking, automatic, no_automatic),
        ];
        let idle = flags.iter().find(|(_, is_given, has_effect, _)| *is_given && !has_effect);
        if let Some((flag, .., when)) = idle {
            bail!("{flag} has no effect {when}")
        }
        if lora.alpha == 0.0 && adapts {
            bail!("--alpha 0: adapters would have no effect")
        }
        check_fractions(&[("--automatic-nms", self.automatic_nms)])
    }

    /// The optimizer and how it is used.
    pub fn trainer(&self) -> TrainerConfig {
        let total_steps = self.steps;
        let decay = match self.lr_schedule {
            ScheduleArg::Constant => Decay::Constant,
            ScheduleArg::Linear => Decay::Linear { total_steps },
            ScheduleArg::Cosine => Decay::Cosine { total_steps },
            ScheduleArg::Plateau => Decay::Plateau(Plateau {
                factor: self.plateau_factor,
                patience: self.plateau_patience,
            }),
        };
        TrainerConfig {
            optimizer: AdamWConfig {
                lr: self.lr,
                weight_decay: self.weight_decay,
                ..Default::default()
            },
            schedule: Schedule { warmup_steps: self.warmup_steps, decay },
            accumulation: self.accumulate,
            max_grad_norm: self.max_grad_norm,
            ema: self.ema,
            seed: self.seed,
        }
    }

    /// Parameters with rates of their own.
    pub fn groups(&self) -> ParameterGroups {
        ParameterGroups {
            lr_factors: self.lr_factors.iter().map(|LrFactor(n, f)| (n.clone(), *f)).collect(),
            no_decay: self.no_decay.clone(),
            loraplus_lr_ratio: self.loraplus_lr_ratio,
        }
    }

    /// The batch of a step.
    pub fn batch(&self) -> BatchConfig {
        BatchConfig {
            images: self.batch,
            prompts: self.prompts,
            kind: match (self.prompt, self.box_jitter) {
                (PromptArg::Point, _) => PromptKind::Point,
                (PromptArg::Box, jitter) => PromptKind::Box { jitter },
                (PromptArg::Mixed, jitter) => PromptKind::Mixed { boxes: self.boxes, jitter },
            },
            augment: !self.no_augment,
            corrections: Corrections {
                points: self.corrections,
                mask_probability: self.mask_probability,
                mask_rounds: self.mask_rounds,
            },
            loss: self.loss,
        }
    }

    /// IoU from which one of two automatic masks is a double; 1 where boxes alone tell.
    pub fn nms(&self, may_overlap: bool) -> f64 {
        self.automatic_nms.unwrap_or(if may_overlap { 1.0 } else { AUTOMATIC_NMS })
    }

    /// A line on what the run chose by itself of doubles among automatic masks, if it did.
    pub fn chosen_nms(&self, may_overlap: bool) -> Option<String> {
        let chosen = match may_overlap {
            true => "boxes alone, as objects of annotations may overlap".to_string(),
            false => format!(
                "masks with an IoU above {AUTOMATIC_NMS}, as objects of masks do not overlap"
            ),
        };
        (self.automatic > 0 && self.automatic_nms.is_none())
            .then(|| format!("doubles of automatic masks go by {chosen} (--automatic-nms)"))
    }

    /// Makes the masks of everything whose precision is judged, if it is: all candidates, less the doubles.
    pub fn generator(&self) -> Option<MaskGenerator> {
        (self.automatic > 0).then(|| MaskGenerator {
            points_per_side: self.automatic,
            pred_iou_thresh: 0.0,
            stability_score_thresh: 0.0,
            mask_nms_thresh: self.automatic_nms.filter(|iou| *iou < 1.0),
            ranking: self.automatic_ranking,
            ..MaskGenerator::original()
        })
    }

    /// Steps that show each of `images` images so often, to `processes` together.
    fn steps_of(&self, epochs: u64, images: usize, processes: usize) -> u64 {
        let of_a_step = self.batch as u64 * self.accumulate * processes as u64;
        (epochs * images as u64).div_ceil(of_a_step)
    }

    /// The same options with the steps of all epochs.
    pub fn with_epochs(&self, images: usize, processes: usize) -> Self {
        let steps = self.epochs.map(|epochs| self.steps_of(epochs, images, processes));
        Self { steps: steps.unwrap_or(self.steps), ..self.clone() }
    }

    /// Steps between two evaluations on the way, if there are any.
    pub fn eval_steps(&self, images: usize, processes: usize) -> Option<u64> {
        self.eval_every.map(|every| match every {
            EvalEvery::Steps(steps) => steps,
            EvalEvery::Epoch => self.steps_of(1, images, processes),
        })
    }
}
