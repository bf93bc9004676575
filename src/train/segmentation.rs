//! Training SAM on images with masks.
//!
//! ```text
//! step     some images x some instances each -> random prompts -> embedding of the images, once, or kept ones
//! round    prompts, corrected after the first round -> low-resolution logits -> loss;   the mean over all rounds
//! ```
//! All prompts of an image share one pass of the image encoder. The loss looks at the low-resolution mask where it
//! shows the image, not where it shows the padding. Its targets are the masks at that resolution. It does not look at
//! pixels that masks tell to ignore. An image encoder of which nothing is trained runs without dropout.

use super::corrections::{Corrections, ObjectMasks, PromptedObjects, Round, Script};
use super::labels::ignored;
use super::{
    mask_on_grid, sample_indices, Dataset, FlipRotate, Instance, KeptEmbeddings, LossWeights,
    Prompt, PromptKind, Sample, StepRng,
};
use crate::nn::{trainable_variables, Mode};
use crate::sam::{Frame, ImageEmbedding, SamInput, SamModel, SamOutput, SamProcessor};
use crate::{Error, Result};
use candle_core::{bail, DType, Device, Tensor};
use image::DynamicImage;
use serde::Serialize;

/// Composition of one step.
///
/// [Example](crate::train::Batch)
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BatchConfig {
    /// Images of a step.
    pub images: usize,
    /// Prompts of each image.
    pub prompts: usize,
    /// Points or boxes.
    pub kind: PromptKind,
    /// Whether images are mirrored and turned at random.
    pub augment: bool,
    /// Rounds after the first prompt.
    pub corrections: Corrections,
    /// The terms of the loss.
    pub loss: LossWeights,
}

/// One image with six points, turned at random, without corrections, under [`mask_loss`](super::mask_loss).
impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            images: 1,
            prompts: 6,
            kind: PromptKind::Point,
            augment: true,
            corrections: Corrections::NONE,
            loss: LossWeights::MASK,
        }
    }
}

impl BatchConfig {
    /// Refuses a step without images or prompts, probabilities outside of 0..1, and a loss that says nothing.
    ///
    /// # Errors
    /// As said.
    pub fn validate(&self) -> Result<()> {
        if self.images == 0 || self.prompts == 0 {
            let message = format!(
                "a step needs an image and a prompt at least, got {} images and {} prompts each",
                self.images, self.prompts
            );
            return Err(Error::config(message));
        }
        if self.images.max(self.prompts) > MOST {
            let Self { images, prompts, .. } = self;
            return Err(Error::config(format!(
                "a step takes {MOST} images and prompts each at most, got {images} images and {prompts} prompts each"
            )));
        }
        self.kind.validate()?;
        self.corrections.validate()?;
        self.loss.validate()
    }
}

/// Source of the batches of a run.
///
/// [Example](crate::train::Batch)
#[derive(Clone, Copy, Debug)]
pub struct BatchSource<'a> {
    /// Images and masks.
    pub dataset: &'a Dataset,
    /// The model's.
    pub processor: &'a SamProcessor,
    /// The contents of a step.
    pub config: BatchConfig,
    /// Side of the model's low-resolution masks.
    pub mask_size: usize,
    /// Seed of the run.
    pub seed: u64,
    /// Device of the model.
    pub device: &'a Device,
    /// Embeddings that are computed once, if nothing of the image encoder is trained.
    pub embeddings: Option<&'a KeptEmbeddings<'a>>,
}

/// The images of a step, as the model takes them.
///
/// [Example](crate::train::Batch)
#[derive(Clone, Debug)]
pub enum BatchImages {
    /// `[B, channels, S, S]`
    Pixels(Tensor),
    /// `[B, C, h, w]`, of an image encoder of which nothing is trained.
    Embeddings(Tensor),
}

/// The images, prompts and targets of one step.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::nn::Mode;
/// use candle_sam_lora::sam::{AttentionKind, SamModel, SamProcessor};
/// use candle_sam_lora::train::{Batch, BatchConfig, BatchSource, Corrections, Dataset, DatasetOptions};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let model = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Split, DType::F32, &Device::Cpu)?;
/// let processor = SamProcessor::load("assets/tiny-sam", 128)?;
/// let (images, masks) = ("assets/photos/coins/train/images", "assets/photos/coins/train/masks");
/// let dataset = Dataset::open(images, masks, &DatasetOptions::min_area(20))?;
/// let corrections = Corrections { points: 1, ..Corrections::NONE }; // a second click where the mask is wrong
/// let source = BatchSource {
///     dataset: &dataset,
///     processor: &processor,
///     config: BatchConfig { prompts: 2, augment: true, corrections, ..BatchConfig::default() },
///     mask_size: 4 * model.config().vision_config.grid_size(),
///     seed: 42,
///     device: &Device::Cpu,
///     embeddings: None,
/// };
/// let batch = Batch::draw(&source, 0)?; // a function of seed and step; Trainer::step counts
/// assert_eq!(batch.rounds.len(), 1);
/// assert!(batch.loss(&model, Mode::Eval)?.to_scalar::<f32>()?.is_finite());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Batch {
    /// B images.
    pub images: BatchImages,
    /// The objects of all images: those with points, those with boxes.
    pub groups: Vec<PromptedObjects>,
    /// The rounds after the first.
    pub rounds: Vec<Round>,
    /// Draws of the corrections.
    pub draws: StepRng,
    /// The terms of the loss.
    pub loss: LossWeights,
    /// Side of the masks that the targets are for, [`BatchSource::mask_size`].
    pub mask_size: usize,
}

/// A round with a point asks the host where the mask before it is wrong.
#[cfg(feature = "cuda")]
impl super::StepInput for Batch {
    fn map(
        &self,
        change: &mut dyn FnMut(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Self> {
        let images = match &self.images {
            BatchImages::Pixels(pixels) => BatchImages::Pixels(change(pixels)?),
            BatchImages::Embeddings(kept) => BatchImages::Embeddings(change(kept)?),
        };
        let mut groups = self.groups.clone();
        for PromptedObjects { prompts, objects, .. } in &mut groups {
            let SamInput { input_points, input_labels, input_boxes, .. } = prompts;
            let prompts = [input_points, input_labels, input_boxes].into_iter().flatten();
            let masks = objects.iter_mut();
            let masks = masks.flat_map(|o| std::iter::once(&mut o.targets).chain(&mut o.ignored));
            for tensor in prompts.chain(masks) {
                *tensor = change(tensor)?;
            }
        }
        Ok(Self { images, groups, ..self.clone() })
    }

    fn form(&self) -> Option<String> {
        let Self { images, groups, rounds, loss, .. } = self;
        if rounds.iter().any(|round| round.point) {
            return None;
        }
        let kept = matches!(images, BatchImages::Embeddings(_));
        let places: Vec<_> = groups.iter().map(|group| &group.images).collect();
        Some(format!("{kept} {places:?} {rounds:?} {loss:?}"))
    }
}

/// The logit of a pixel that is to be ignored: as background it adds nothing to the loss.
/// The most images of a step, and the most prompts of an image; more is a mistake that no memory holds.
const MOST: usize = 1 << 16;

const IGNORED_LOGIT: f32 = -100.0;

impl Batch {
    /// Draws the batch of `step`, a function of seed and step. An image with fewer instances than prompts has some of
    /// them prompted again.
    ///
    /// # Errors
    /// - a file became unreadable.
    pub fn draw(source: &BatchSource<'_>, step: u64) -> Result<Self> {
        let BatchSource { dataset, processor, config, mask_size, seed, device, embeddings } =
            *source;
        config.validate()?;
        let mut draws = StepRng::new(seed, "batch", step);
        let (mut images, mut prompted) = (vec![], vec![]);
        for index in sample_indices(dataset.len(), config.images, seed, step) {
            let mut sample = dataset.load(index)?;
            let mut way = FlipRotate::NONE;
            if config.augment {
                way = FlipRotate::draw(&mut draws);
                sample = way.apply(sample);
            }
            let (image, frame) = match embeddings {
                Some(kept) => {
                    let ImageEmbedding { tensor, frame, .. } = kept.get(index, way, &sample)?;
                    (tensor, frame)
                }
                None => {
                    let image = DynamicImage::ImageRgb8(sample.image.clone());
                    processor.preprocess(&image, device)?
                }
            };
            let window = MaskWindow::new(&frame, processor.pad_size, mask_size);
            let kind = config.kind.of_image(&mut draws);
            let chosen = choose(&sample, config.prompts, &mut draws)?;
            let prompt = |found: &Instance| Ok(kind.draw(sample.labels(found)?, found, &mut draws));
            let drawn: Vec<Prompt> = chosen.iter().map(prompt).collect::<Result<_>>()?;
            let prompts = prompt_tensor(&drawn, &frame, device)?;
            images.push(image);
            prompted.push((prompts, window.masks(&sample, &chosen, device)?));
        }
        let mut groups = vec![];
        for boxes in [false, true] {
            let is_box = |prompts: &Tensor| prompts.rank() == 3;
            let alike = prompted.iter().enumerate().filter(|(_, (p, _))| is_box(p) == boxes);
            let (places, alike): (Vec<usize>, Vec<_>) = alike.unzip();
            if places.is_empty() {
                continue;
            }
            let prompts: Vec<&Tensor> = alike.iter().map(|(prompts, _)| prompts).collect();
            let prompts = prompt_input(&Tensor::cat(&prompts, 0)?)?;
            let objects = alike.into_iter().map(|(_, objects)| objects.clone()).collect();
            groups.push(PromptedObjects { images: places, prompts, objects });
        }
        let mut draws = StepRng::new(seed, "corrections", step);
        let rounds = config.corrections.draw(&mut draws);
        let images = Tensor::cat(&images, 0)?;
        let images = match embeddings {
            Some(_) => BatchImages::Embeddings(images),
            None => BatchImages::Pixels(images),
        };
        Ok(Self { images, groups, rounds, draws, loss: config.loss, mask_size })
    }

    /// The mean over images and rounds of the [`LossWeights::loss`].
    ///
    /// The alternatives for a first prompt add theirs, by [`LossWeights::multimask`]. Trained parameters of prompt
    /// encoder and mask decoder that the draws leave out get gradients of zero.
    ///
    /// # Errors
    /// - shapes do not fit;
    /// - the model's masks have another side than [`mask_size`](Self::mask_size).
    pub fn loss(&self, model: &SamModel, mode: Mode) -> candle_core::Result<Tensor> {
        let encoder = &model.vision_encoder;
        let embeddings = match &self.images {
            BatchImages::Embeddings(kept) => kept.clone(),
            BatchImages::Pixels(pixels) => match trainable_variables(encoder)?.is_empty() {
                true => encoder.forward(pixels, Mode::Eval)?,
                false => encoder.forward(pixels, mode)?,
            },
        };
        let mut draws = self.draws.clone();
        let mut losses = vec![];
        for group in &self.groups {
            let all = group.images.len() == embeddings.dim(0)?;
            let embeddings = match all {
                true => embeddings.clone(),
                false => {
                    let one = |image: &usize| embeddings.narrow(0, *image, 1);
                    let own = group.images.iter().map(one).collect::<candle_core::Result<Vec<_>>>();
                    Tensor::cat(&own?, 0)?
                }
            };
            let script = Script {
                rounds: &self.rounds,
                alternatives: self.loss.multimask > 0.0,
                mode,
                draws: &mut draws,
            };
            group.converse(model, &embeddings, script, |output| {
                for (index, objects) in group.objects.iter().enumerate() {
                    losses.push(self.loss_of(index, objects, output)?);
                }
                Ok(())
            })?;
        }
        let mut loss = Tensor::stack(&losses, 0)?.mean_all()?;
        let decoder = trainable_variables(&model.mask_decoder)?;
        for (_, left_out) in trainable_variables(&model.prompt_encoder)?.iter().chain(&decoder) {
            // candle does not follow a product with the number 0.
            let sum = left_out.as_tensor().sum_all()?;
            let nothing = (&sum * sum.zeros_like()?)?;
            loss = (&loss + nothing.to_dtype(loss.dtype())?)?;
        }
        Ok(loss)
    }

    /// The loss of an image's objects in one round.
    fn loss_of(
        &self,
        image: usize,
        objects: &ObjectMasks,
        output: &SamOutput,
    ) -> candle_core::Result<Tensor> {
        let ObjectMasks { targets, ignored } = objects;
        let (_, rows, cols) = targets.dims3()?;
        let (side, mask_size) = (output.pred_masks.dim(3)?, self.mask_size);
        if side != mask_size {
            bail!("batch: its targets are for masks of a side of {mask_size}, and the model's have {side}")
        }
        let mut masks = output.pred_masks.get(image)?.narrow(2, 0, rows)?.narrow(3, 0, cols)?;
        let scores = output.iou_scores.get(image)?;
        if let Some(ignored) = ignored {
            let nothing = Tensor::full(IGNORED_LOGIT, masks.shape(), masks.device())?;
            let ignored = ignored.unsqueeze(1)?.broadcast_as(masks.shape())?;
            masks = ignored.where_cond(&nothing.to_dtype(masks.dtype())?, &masks)?;
        }
        let part = |first: usize, count: usize| {
            let scores = scores.narrow(1, first, count)?;
            self.loss.loss(&masks.narrow(1, first, count)?, &scores, targets)
        };
        match masks.dim(1)? {
            1 => part(0, 1),
            all => part(0, 1)? + (part(1, all - 1)? * self.loss.multimask)?,
        }
    }
}

/// The part of a low-resolution mask that shows the image.
pub(super) struct MaskWindow {
    rows: usize,
    cols: usize,
    /// Image pixels that a mask pixel is high and wide.
    pitch: (f64, f64),
}

impl MaskWindow {
    pub(super) fn new(frame: &Frame, pad_size: usize, mask_size: usize) -> Self {
        let step = pad_size as f64 / mask_size.max(1) as f64;
        // As many pixels as have their centre in the image.
        let count =
            |side: usize| ((side as f64 / step).round() as usize).clamp(1, mask_size.max(1));
        let pitch =
            |original: usize, resized: usize| step * original as f64 / resized.max(1) as f64;
        Self {
            rows: count(frame.resized.0),
            cols: count(frame.resized.1),
            pitch: (
                pitch(frame.original.0, frame.resized.0),
                pitch(frame.original.1, frame.resized.1),
            ),
        }
    }

    /// The masks of some of a sample's instances.
    pub(super) fn masks(
        &self,
        sample: &Sample,
        instances: &[Instance],
        device: &Device,
    ) -> Result<ObjectMasks> {
        let Self { rows, cols, pitch } = *self;
        let shape = (instances.len(), rows, cols);
        let (mut targets, mut left, mut any) = (vec![], vec![], false);
        for instance in instances {
            let labels = sample.labels(instance)?;
            let target = mask_on_grid(labels, instance.label, rows, cols, pitch);
            let ignored = ignored(labels, rows, cols, pitch);
            any |= ignored.is_some();
            let ignored = ignored.unwrap_or_else(|| vec![0.0; rows * cols]);
            left.extend(ignored.iter().zip(&target).map(|(out, inside)| u8::from(*out > *inside)));
            targets.extend(target);
        }
        let ignored = any.then(|| Tensor::from_vec(left, shape, device)).transpose()?;
        Ok(ObjectMasks { targets: Tensor::from_vec(targets, shape, device)?, ignored })
    }
}

/// Random instances of an image, as many as prompts; some again where there are fewer.
fn choose(sample: &Sample, prompts: usize, draws: &mut StepRng) -> Result<Vec<Instance>> {
    let order = draws.permutation(sample.instances.len());
    if order.is_empty() {
        return Err(Error::config(format!("the image {} has no instance", sample.name)));
    }
    let chosen: Vec<Instance> =
        order.into_iter().take(prompts).map(|index| sample.instances[index]).collect();
    Ok(chosen.iter().cycle().take(prompts).copied().collect())
}

/// Prompts of one image and one kind, in pixels of the model's input: points `[1, P, 1, 2]` or boxes `[1, P, 4]`.
pub(super) fn prompt_tensor(
    prompts: &[Prompt],
    frame: &Frame,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let mut coordinates = Vec::new();
    for prompt in prompts {
        match prompt {
            Prompt::Point(point) => coordinates.extend_from_slice(point),
            Prompt::Box(sides) => coordinates.extend_from_slice(sides),
        }
    }
    let width = coordinates.len() / prompts.len().max(1);
    let coordinates = Tensor::from_vec(coordinates, (1, prompts.len(), width), device)?;
    if width == 2 {
        frame.scale_points(&coordinates)?.unsqueeze(2)
    } else {
        frame.scale_boxes(&coordinates)
    }
}

/// The input with these points `[B, P, 1, 2]`, on the objects, or boxes `[B, P, 4]`, and one mask for each.
pub(super) fn prompt_input(prompts: &Tensor) -> candle_core::Result<SamInput> {
    let input = SamInput { multimask_output: false, ..Default::default() };
    Ok(match *prompts.dims() {
        [images, count, points, 2] => {
            let on_object = (images, count, points);
            SamInput {
                input_labels: Some(Tensor::ones(on_object, DType::F32, prompts.device())?),
                input_points: Some(prompts.clone()),
                ..input
            }
        }
        _ => SamInput { input_boxes: Some(prompts.clone()), ..input },
    })
}
