//! Training SAM on images with masks: one prompt, one mask.
//!
//! ```text
//! step     some images x some instances each -> random prompts -> low-resolution logits -> mask_loss
//! ```
//! All prompts of an image share one pass of the image encoder. The loss looks at the low-resolution mask where it
//! shows the image, not where it shows the padding. Its targets are the masks at that resolution. It does not look at
//! pixels that masks tell to ignore.

use super::labels::ignored;
use super::{
    mask_loss, mask_on_grid, sample_indices, Dataset, FlipRotate, Prompt, PromptKind, Sample,
    StepRng,
};
use crate::nn::Mode;
use crate::sam::{Frame, SamInput, SamModel, SamProcessor};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use image::DynamicImage;
use serde::Serialize;

/// Composition of one step.
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

/// Source of the batches of a run.
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
}

/// The input and the targets of one step.
#[derive(Clone, Debug)]
pub struct Batch {
    /// B images with P prompts each; one mask for each prompt.
    pub input: SamInput,
    /// `[P, rows, cols]` of 0 and 1 for each image: the part of the low-resolution mask that shows the image.
    pub targets: Vec<Tensor>,
    /// 1 where a target is to be ignored, of its shape, for each image; `None` where nothing is.
    pub ignored: Vec<Option<Tensor>>,
}

/// The logit of a pixel that is to be ignored: as background it adds nothing to the loss.
const IGNORED_LOGIT: f32 = -100.0;

impl Batch {
    /// Draws the batch of `step`, a function of seed and step. An image with fewer instances than prompts has some of them
    /// prompted again.
    ///
    /// # Errors
    /// - a file became unreadable.
    pub fn draw(source: &BatchSource<'_>, step: u64) -> Result<Self> {
        let BatchSource { dataset, processor, config, mask_size, seed, device } = *source;
        config.validate()?;
        let mut draws = StepRng::new(seed, "batch", step);
        let (mut pixels, mut prompts, mut targets, mut ignored) = (vec![], vec![], vec![], vec![]);
        for index in sample_indices(dataset.len(), config.images, seed, step) {
            let mut sample = dataset.load(index)?;
            if config.augment {
                sample = FlipRotate::draw(&mut draws).apply(sample);
            }
            let image = DynamicImage::ImageRgb8(sample.image.clone());
            let (pixel_values, frame) = processor.preprocess(&image, device)?;
            let window = MaskWindow::new(&frame, processor.pad_size, mask_size);
            let (drawn, target, left) =
                draw_prompts(&sample, &window, &config, &mut draws, device)?;
            pixels.push(pixel_values);
            prompts.push(prompt_tensor(&drawn, &frame, device)?);
            targets.push(target);
            ignored.push(left);
        }
        let input = prompt_input(config.kind, &Tensor::cat(&prompts, 0)?)?;
        let input = SamInput { pixel_values: Some(Tensor::cat(&pixels, 0)?), ..input };
        Ok(Self { input, targets, ignored })
    }

    /// The mean over the images of [`mask_loss`].
    pub fn loss(&self, model: &SamModel, mode: Mode) -> candle_core::Result<Tensor> {
        let masks = model.forward(&self.input, mode)?.pred_masks;
        let losses = self.targets.iter().enumerate().map(|(image, targets)| {
            let (_, rows, cols) = targets.dims3()?;
            let mut masks = masks.get(image)?.squeeze(1)?.narrow(1, 0, rows)?.narrow(2, 0, cols)?;
            if let Some(Some(ignored)) = self.ignored.get(image) {
                let nothing = Tensor::full(IGNORED_LOGIT, masks.shape(), masks.device())?;
                masks = ignored.where_cond(&nothing.to_dtype(masks.dtype())?, &masks)?;
            }
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

/// Prompts for random instances of an image, their targets, and what of these is to be ignored.
fn draw_prompts(
    sample: &Sample,
    window: &MaskWindow,
    config: &BatchConfig,
    draws: &mut StepRng,
    device: &Device,
) -> Result<(Vec<Prompt>, Tensor, Option<Tensor>)> {
    let MaskWindow { rows, cols, pitch } = *window;
    let mut chosen = Vec::new();
    for index in draws.permutation(sample.instances.len()) {
        if chosen.len() == config.prompts {
            break;
        }
        let instance = sample.instances[index];
        let target = mask_on_grid(sample.labels(&instance), instance.label, rows, cols, pitch);
        chosen.push((instance, target));
    }
    if chosen.is_empty() {
        return Err(Error::config(format!("the image {} has no instance", sample.name)));
    }
    let shape = (config.prompts, rows, cols);
    let (mut prompts, mut targets, mut left, mut any) = (vec![], vec![], vec![], false);
    for (instance, target) in chosen.iter().cycle().take(config.prompts) {
        let labels = sample.labels(instance);
        prompts.push(config.kind.draw(labels, instance, draws));
        targets.extend_from_slice(target);
        let ignored = ignored(labels, rows, cols, pitch);
        any |= ignored.is_some();
        let ignored = ignored.unwrap_or_else(|| vec![0.0; rows * cols]);
        left.extend(ignored.iter().zip(target).map(|(out, inside)| u8::from(*out > *inside)));
    }
    let left = any.then(|| Tensor::from_vec(left, shape, device)).transpose()?;
    Ok((prompts, Tensor::from_vec(targets, shape, device)?, left))
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

/// The input with these prompts and one mask for each.
pub(super) fn prompt_input(kind: PromptKind, prompts: &Tensor) -> candle_core::Result<SamInput> {
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
