//! How well a model finds the objects of an image.
//!
//! ```text
//! every instance -> points on it, or its tight box -> low-resolution logits -> mask of the image's size -> scores
//! first of these -> and four corrections, each a point where the mask is wrong -> their IoU
//! the image      -> masks of everything, each with its score -> their matches
//! ```
//! Corrections are points alone: the logits are not fed back. They are the same in every run, as far as masks are.
//! Masks and scores are computed in the window that holds the found and the true object. So an image of a thousand
//! small objects takes the time and memory of small ones. Outside of it both masks are empty: a resized pixel is a
//! weighted mean of logits, and positive only near a positive one.

use super::corrections::{PromptedObjects, Round, Script};
use super::labels::{Instance, LabelImage, IGNORED};
use super::mask_window::{FoundMask, Resizer, Window};
use super::scores::{iou_between, reach, Scores};
use super::segmentation::{prompt_input, prompt_tensor, MaskWindow};
use super::{MaskMatches, ObjectScores, Prompt, PromptKind, Sample, StepRng};
use crate::nn::{without_gradients, Mode};
use crate::sam::{
    ImageEmbedding, MaskGenerator, Rle, SamInput, SamModel, SamPredictor, SamProcessor,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use image::DynamicImage;

/// How well a model finds the instances of one image, in the order of [`Sample::instances`].
///
/// [Example](crate::train::evaluate_image)
#[derive(Clone, Debug)]
pub struct ImageEvaluation {
    /// The first prompt of each.
    pub prompts: Vec<Prompt>,
    /// Masks that the model found for that prompt.
    pub masks: Vec<FoundMask>,
    /// How each is found, the mean over all its prompts.
    pub scores: Vec<ObjectScores>,
    /// Predicted and true IoU of every mask of every first prompt, alternatives included.
    pub predicted_ious: Vec<(f32, f64)>,
    /// Masks of everything, if an [`Evaluator::generator`] makes some.
    pub automatic: Option<AutomaticMasks>,
}

/// The masks that a model finds in an image without a prompt.
///
/// [Example](crate::train::evaluate_image)
#[derive(Clone, Debug)]
pub struct AutomaticMasks {
    /// Each with its score by the generator's ranking, without pixels that the truth ignores.
    pub masks: Vec<(f32, Rle)>,
    /// How they match the image's instances.
    pub matches: MaskMatches,
}

/// Corrections of an object's first prompt.
const CORRECTIONS: [Round; 4] = [Round { point: true, mask: false }; 4];

/// Prompts a model for the instances of images, without dropout, and compares.
///
/// [Example](crate::train::evaluate_image)
#[derive(Clone, Copy, Debug)]
pub struct Evaluator<'a> {
    /// The model.
    pub model: &'a SamModel,
    /// Its processor.
    pub processor: &'a SamProcessor,
    /// Points or boxes.
    pub kind: PromptKind,
    /// Where the model is.
    pub device: &'a Device,
    /// Makes masks of everything to judge, too. Average precision ranks them as it does, so it is to keep those of low
    /// scores.
    pub generator: Option<&'a MaskGenerator>,
}

/// Prompts every instance of an image, without dropout, and compares.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::sam::{AttentionKind, SamModel, SamProcessor};
/// use candle_sam_lora::train::{evaluate_image, Dataset, DatasetOptions, ObjectScores, PromptKind};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let model = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let processor = SamProcessor::load("assets/tiny-sam", 128)?;
/// let folder = "assets/photos/coins/heldout";
/// let dataset = Dataset::open(format!("{folder}/images"), format!("{folder}/masks"), &DatasetOptions::min_area(20))?;
/// let sample = dataset.load(0)?;
/// let found = evaluate_image(&model, &processor, &sample, PromptKind::Box { jitter: 0.0 }, &Device::Cpu)?;
/// assert_eq!(found.scores.len(), sample.instances.len());
/// assert_eq!(found.masks.len(), found.prompts.len());
/// assert!(ObjectScores::mean(&found.scores).iou > 0.5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - as [`Evaluator::evaluate`].
pub fn evaluate_image(
    model: &SamModel,
    processor: &SamProcessor,
    sample: &Sample,
    kind: PromptKind,
    device: &Device,
) -> Result<ImageEvaluation> {
    Evaluator { model, processor, kind, device, generator: None }.evaluate(sample, |_| ())
}

impl Evaluator<'_> {
    /// Prompts every instance of an image, and calls `progress` after each with how many are done.
    ///
    /// # Errors
    /// - model and processor do not fit each other;
    /// - the image is too narrow;
    /// - the sample's image, masks and instances do not fit each other.
    pub fn evaluate(
        &self,
        sample: &Sample,
        progress: impl FnMut(usize),
    ) -> Result<ImageEvaluation> {
        let image = DynamicImage::ImageRgb8(sample.image.clone());
        let (pixel_values, frame) = self.processor.preprocess(&image, self.device)?;
        // A graph would hold each layer's intermediates.
        let model = &without_gradients(self.model)?;
        let tensor = model.vision_encoder.forward(&pixel_values, Mode::Eval)?;
        let embedding = ImageEmbedding { tensor, hq_features: None, frame };
        Evaluator { model, ..*self }.prompted(sample, &embedding, progress)
    }

    /// As [`evaluate`](Self::evaluate), with the image's embedding by this model.
    ///
    /// # Errors
    /// - the embedding does not fit the model, or is of an image of another size;
    /// - the sample's image, masks and instances do not fit each other.
    pub fn evaluate_embedded(
        &self,
        sample: &Sample,
        embedding: &ImageEmbedding,
        progress: impl FnMut(usize),
    ) -> Result<ImageEvaluation> {
        let model = &without_gradients(self.model)?;
        Evaluator { model, ..*self }.prompted(sample, embedding, progress)
    }

    fn prompted(
        &self,
        sample: &Sample,
        embedding: &ImageEmbedding,
        mut progress: impl FnMut(usize),
    ) -> Result<ImageEvaluation> {
        let ImageEmbedding { tensor: embeddings, frame, .. } = embedding;
        sample.check()?;
        let (width, height) = sample.image.dimensions();
        if frame.original != (height as usize, width as usize) {
            let (name, found) = (&sample.name, frame.original);
            let message = format!("an embedding of {found:?} pixels, expected ({height}, {width})");
            return Err(Error::config(format!("{name}: {message}")));
        }
        let mut resizer = None;
        let mut found = ImageEvaluation {
            prompts: vec![],
            masks: vec![],
            scores: vec![],
            predicted_ious: vec![],
            automatic: None,
        };
        for (index, instance) in sample.instances.iter().enumerate() {
            let prompts = self.kind.fixed(sample.labels(instance)?, instance);
            let first = prompt_tensor(&prompts, frame, self.device)?;
            let input =
                SamInput { image_embeddings: Some(embeddings.clone()), ..prompt_input(&first)? };
            let masks = self.model.mask_decoder.output_hypernetworks_mlps.len();
            let output = self.model.forward_masks(&input, 0..masks, Mode::Eval)?;
            let logits = output.pred_masks.squeeze(0)?.to_device(&Device::Cpu)?;
            let (_, _, rows, cols) = logits.dims4()?;
            let resizer = match &mut resizer {
                Some(resizer) => resizer,
                none => none.insert(Resizer::new(self.processor, (rows, cols), frame)?),
            };
            let predicted = output.iou_scores.squeeze(0)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            let truth = Truth::new(sample, instance)?;
            let (mut mask, mut scores) = (None, vec![]);
            for (index, predicted) in predicted.iter().enumerate() {
                let logits = logits.get(index)?;
                let single = truth.beside(&logits.get(0)?, resizer)?;
                let fit = single.scores(truth.reach());
                mask.get_or_insert_with(|| FoundMask::of(single.window, &single.mask));
                let mut error = (f64::from(predicted[0]) - fit.iou).abs();
                found.predicted_ious.push((predicted[0], fit.iou));
                for (alternative, predicted) in predicted.iter().enumerate().skip(1) {
                    let iou = truth.beside(&logits.get(alternative)?, resizer)?.iou();
                    error += (f64::from(*predicted) - iou).abs();
                    found.predicted_ious.push((*predicted, iou));
                }
                scores.push(ObjectScores::first(fit, error / predicted.len() as f64));
            }
            let mut scores = ObjectScores::mean(&scores);
            let window = MaskWindow::new(frame, self.processor.pad_size, rows);
            let objects = PromptedObjects {
                images: vec![0],
                prompts: prompt_input(&first.narrow(1, 0, 1)?)?,
                objects: vec![window.masks(sample, &[*instance], &Device::Cpu)?],
            };
            let corrected = self.corrected(&objects, embeddings, &truth, resizer)?;
            (scores.iou_at_3, scores.iou_at_5) = (corrected[2], corrected[4]);
            found.scores.push(scores);
            found.masks.extend(mask);
            found.prompts.extend(prompts.first().copied());
            progress(index + 1);
        }
        if let Some(generator) = self.generator {
            found.automatic = Some(self.everything(generator, embedding, sample)?);
        }
        Ok(found)
    }

    /// The masks of everything in an image.
    fn everything(
        &self,
        generator: &MaskGenerator,
        embedding: &ImageEmbedding,
        sample: &Sample,
    ) -> Result<AutomaticMasks> {
        let predictor = SamPredictor::with_processor(self.model, self.processor.clone());
        let found = generator.generate_embedded(&predictor, embedding, |_, _| ())?.masks;
        let (width, height) = sample.image.dimensions();
        let ignored = |place: usize| sample.layers.iter().any(|l| l.as_raw()[place] == IGNORED);
        let ignored: Vec<bool> = (0..(width * height) as usize).map(ignored).collect();
        let any = ignored.contains(&true);
        let mut masks = vec![];
        for mask in found {
            let score = mask.score(generator.ranking);
            let mut inside = mask.mask;
            if any {
                let pixels = inside.to_mask();
                let pixels: Vec<bool> =
                    pixels.iter().zip(&ignored).map(|(m, out)| *m && !out).collect();
                inside = Rle::from_mask(&pixels, (height, width))?;
            }
            if inside.area() > 0 {
                masks.push((score, inside));
            }
        }
        let object = |instance| sample.object(instance);
        let objects = sample.instances.iter().map(object).collect::<Result<Vec<_>>>()?;
        let matches = MaskMatches::new(&masks, &objects);
        Ok(AutomaticMasks { masks, matches })
    }

    /// The IoU of one object after its first prompt, and after each of [`CORRECTIONS`].
    fn corrected(
        &self,
        object: &PromptedObjects,
        embeddings: &Tensor,
        truth: &Truth<'_>,
        resizer: &Resizer,
    ) -> Result<Vec<f64>> {
        let mut draws = StepRng::new(0, "evaluation corrections", u64::from(truth.instance.label));
        let script = Script {
            rounds: &CORRECTIONS,
            alternatives: false,
            mode: Mode::Eval,
            draws: &mut draws,
        };
        let mut ious = vec![];
        object.converse(self.model, embeddings, script, |output| {
            let logits = output.pred_masks.flatten(0, 2)?.get(0)?.to_device(&Device::Cpu)?;
            ious.push(truth.beside(&logits, resizer)?.iou());
            Ok(())
        })?;
        Ok(ious)
    }
}

/// One object as it is.
struct Truth<'a> {
    labels: &'a LabelImage,
    instance: &'a Instance,
}

impl<'a> Truth<'a> {
    fn new(sample: &'a Sample, instance: &'a Instance) -> Result<Self> {
        Ok(Self { labels: sample.labels(instance)?, instance })
    }

    fn size(&self) -> (usize, usize) {
        (self.labels.height() as usize, self.labels.width() as usize)
    }

    /// How far a boundary may be off.
    fn reach(&self) -> usize {
        reach(self.size().0, self.size().1)
    }

    /// The mask of some logits beside the object.
    fn beside(&self, logits: &Tensor, resizer: &Resizer) -> Result<Compared> {
        let Self { labels, instance } = *self;
        let size = self.size();
        let [x0, y0, x1, y1] = instance.bounds.map(|side| side as usize);
        let truth_window = Window { x0, y0, x1: x1 + 1, y1: y1 + 1 };
        // Two pixels more than the boundaries reach: a boundary lies a pixel beside its mask.
        let window = match resizer.window(logits)? {
            Some(found) => found.union(truth_window),
            None => truth_window,
        };
        let window = window.widened(self.reach() + 2, size);
        let mut mask = resizer.mask(logits, window)?;
        let mut truth = Vec::with_capacity(mask.len());
        for y in window.y0..window.y1 {
            let row = &labels.as_raw()[y * size.1..(y + 1) * size.1];
            truth.extend(row[window.x0..window.x1].iter().map(|label| *label == instance.label));
            let place = (y - window.y0) * window.width();
            for (offset, label) in row[window.x0..window.x1].iter().enumerate() {
                mask[place + offset] &= *label != IGNORED;
            }
        }
        Ok(Compared { window, mask, truth })
    }
}

/// A found and a true mask, in a window that holds both.
struct Compared {
    window: Window,
    mask: Vec<bool>,
    truth: Vec<bool>,
}

impl Compared {
    fn scores(&self, reach: usize) -> Scores {
        Scores::between(&self.mask, &self.truth, self.window.width(), reach)
    }

    fn iou(&self) -> f64 {
        iou_between(&self.mask, &self.truth)
    }
}
