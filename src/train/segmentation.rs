//! Training and evaluating SAM on images with masks: one prompt, one mask.
//!
//! ```text
//! step     some images x some instances each -> random prompts -> low-resolution logits -> mask_loss
//! evaluate every instance of an image, points on it or its tight box -> masks of the image's size -> mean scores
//! ```
//! All prompts of an image share one pass of the image encoder. The loss looks at the low-resolution mask where it
//! shows the image, not where it shows the padding; its targets are the masks at that resolution.

use super::{
    mask_loss, mask_on_grid, sample_indices, Dataset, FlipRotate, Prompt, PromptKind, Sample,
    Scores, StepRng,
};
use crate::nn::Mode;
use crate::sam::{Frame, SamInput, SamModel, SamProcessor};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use image::DynamicImage;
use serde::Serialize;

/// What makes up one step.
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
}

impl BatchConfig {
    /// Refuses a step without images or prompts, and a jitter that is no number.
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
        match self.kind {
            PromptKind::Box { jitter } if !(0.0..=1.0).contains(&jitter) => {
                Err(Error::config(format!("the box jitter must be in [0, 1], got {jitter}")))
            }
            _ => Ok(()),
        }
    }
}

/// What the batches of a run are drawn from.
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
    /// Of the run.
    pub seed: u64,
    /// Of the model.
    pub device: &'a Device,
}

/// The input and the targets of one step.
#[derive(Clone, Debug)]
pub struct Batch {
    /// B images with P prompts each; one mask for each prompt.
    pub input: SamInput,
    /// `[P, rows, cols]` of 0 and 1 for each image: the part of the low-resolution mask that shows the image.
    pub targets: Vec<Tensor>,
}

impl Batch {
    /// Draws the batch of `step`, a function of seed and step. An image with fewer instances than prompts has some of them
    /// prompted again.
    ///
    /// # Errors
    /// When a file became unreadable, or all instances of an image are too small for a low-resolution mask.
    pub fn draw(source: &BatchSource<'_>, step: u64) -> Result<Self> {
        let BatchSource { dataset, processor, config, mask_size, seed, device } = *source;
        config.validate()?;
        let mut draws = StepRng::new(seed, "batch", step);
        let (mut pixels, mut prompts, mut targets) = (vec![], vec![], vec![]);
        for index in sample_indices(dataset.len(), config.images, seed, step) {
            let mut sample = dataset.load(index)?;
            if config.augment {
                sample = FlipRotate::draw(&mut draws).apply(sample);
            }
            let image = DynamicImage::ImageRgb8(sample.image.clone());
            let (pixel_values, frame) = processor.preprocess(&image, device)?;
            let window = MaskWindow::new(&frame, processor.pad_size, mask_size);
            let (drawn, target) = draw_prompts(&sample, &window, &config, &mut draws, device)?;
            pixels.push(pixel_values);
            prompts.push(prompt_tensor(&drawn, &frame, device)?);
            targets.push(target);
        }
        let input = prompt_input(config.kind, &Tensor::cat(&prompts, 0)?)?;
        let input = SamInput { pixel_values: Some(Tensor::cat(&pixels, 0)?), ..input };
        Ok(Self { input, targets })
    }

    /// The mean over the images of [`mask_loss`].
    pub fn loss(&self, model: &SamModel, mode: Mode) -> candle_core::Result<Tensor> {
        let masks = model.forward(&self.input, mode)?.pred_masks;
        let losses = self.targets.iter().enumerate().map(|(image, targets)| {
            let (_, rows, cols) = targets.dims3()?;
            let masks = masks.get(image)?.squeeze(1)?.narrow(1, 0, rows)?.narrow(2, 0, cols)?;
            mask_loss(&masks, targets)
        });
        let losses = losses.collect::<candle_core::Result<Vec<_>>>()?;
        Tensor::stack(&losses, 0)?.mean_all()
    }
}

/// The part of a low-resolution mask that shows the image.
struct MaskWindow {
    rows: usize,
    cols: usize,
    /// Image pixels that a mask pixel is high and wide.
    pitch: (f64, f64),
}

impl MaskWindow {
    fn new(frame: &Frame, pad_size: usize, mask_size: usize) -> Self {
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
}

/// Prompts for random instances of an image, each a few pixels large in the mask at least, and their targets.
fn draw_prompts(
    sample: &Sample,
    window: &MaskWindow,
    config: &BatchConfig,
    draws: &mut StepRng,
    device: &Device,
) -> Result<(Vec<Prompt>, Tensor)> {
    let MaskWindow { rows, cols, pitch } = *window;
    let mut chosen = Vec::new();
    for index in draws.permutation(sample.instances.len()) {
        if chosen.len() == config.prompts {
            break;
        }
        let instance = sample.instances[index];
        let target = mask_on_grid(sample.labels(&instance), instance.label, rows, cols, pitch);
        if target.iter().any(|inside| *inside > 0.0) {
            chosen.push((instance, target));
        }
    }
    if chosen.is_empty() {
        return Err(Error::config(format!(
            "every instance of the image {} vanishes in a mask of {cols} x {rows} pixels",
            sample.name
        )));
    }
    let (mut prompts, mut targets) = (vec![], vec![]);
    for (instance, target) in chosen.iter().cycle().take(config.prompts) {
        prompts.push(config.kind.draw(sample.labels(instance), instance, draws));
        targets.extend_from_slice(target);
    }
    Ok((prompts, Tensor::from_vec(targets, (config.prompts, rows, cols), device)?))
}

/// Prompts of one image and one kind, in pixels of the model's input: points `[1, P, 1, 2]` or boxes `[1, P, 4]`.
fn prompt_tensor(
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

/// The input with these prompts and one mask for each.
fn prompt_input(kind: PromptKind, prompts: &Tensor) -> candle_core::Result<SamInput> {
    let input = SamInput { multimask_output: false, ..Default::default() };
    Ok(match kind {
        PromptKind::Point => SamInput {
            input_labels: Some(Tensor::ones(
                &prompts.dims()[..3],
                candle_core::DType::F32,
                prompts.device(),
            )?),
            input_points: Some(prompts.clone()),
            ..input
        },
        PromptKind::Box { .. } => SamInput { input_boxes: Some(prompts.clone()), ..input },
    })
}

/// How well a model finds the instances of one image, in the order of [`Sample::instances`].
#[derive(Clone, Debug)]
pub struct ImageEvaluation {
    /// The first prompt of each.
    pub prompts: Vec<Prompt>,
    /// What the model found for it, `[instances, height, width]` in u8, of the image's size.
    pub masks: Tensor,
    /// How each fits the truth, the mean over all its prompts.
    pub scores: Vec<Scores>,
}

/// Prompts every instance of an image, without dropout, and compares.
///
/// # Errors
/// When model and processor do not fit each other, or the image is too narrow.
pub fn evaluate_image(
    model: &SamModel,
    processor: &SamProcessor,
    sample: &Sample,
    kind: PromptKind,
    device: &Device,
) -> Result<ImageEvaluation> {
    let image = DynamicImage::ImageRgb8(sample.image.clone());
    let (pixel_values, frame) = processor.preprocess(&image, device)?;
    let embeddings = model.vision_encoder.forward(&pixel_values, Mode::Eval)?;
    let (mut prompts, mut masks, mut scores) = (vec![], vec![], vec![]);
    for instance in &sample.instances {
        let truth: Vec<u8> =
            sample.labels(instance).pixels().map(|p| u8::from(p.0[0] == instance.label)).collect();
        let truth = Tensor::from_vec(truth, frame.original, device)?;
        let tried = kind.fixed(sample.labels(instance), instance);
        let input = prompt_input(kind, &prompt_tensor(&tried, &frame, device)?)?;
        let input = SamInput { image_embeddings: Some(embeddings.clone()), ..input };
        let logits = model.forward(&input, Mode::Eval)?.pred_masks.squeeze(0)?.squeeze(1)?;
        let found = processor.post_process_masks(&logits, &frame, 0.0)?;
        let tries = (0..tried.len()).map(|index| Scores::of(&found.get(index)?, &truth));
        scores.push(Scores::mean(&tries.collect::<candle_core::Result<Vec<_>>>()?));
        masks.push(found.get(0)?);
        prompts.extend(tried.first().copied());
    }
    Ok(ImageEvaluation { prompts, masks: Tensor::stack(&masks, 0)?, scores })
}
