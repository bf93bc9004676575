//! How well a model finds the objects of an image.
//!
//! ```text
//! every instance -> points on it, or its tight box -> low-resolution logits -> mask of the image's size -> scores
//! first of these -> and four corrections, each a point where the mask is wrong                          -> their IoU
//! ```
//! Corrections are points alone: the logits are not fed back. They are the same in every run, as far as masks are.
//! Masks and scores are computed in the window that holds the found and the true object. So an image of a thousand
//! small objects takes the time and memory of small ones. Outside of it both masks are empty: a resized pixel is a
//! weighted mean of logits, and positive only near a positive one.

use super::corrections::{PromptedObjects, Round, Script};
use super::labels::{Instance, LabelImage, IGNORED};
use super::scores::{iou_between, reach, Scores};
use super::segmentation::{prompt_input, prompt_tensor, MaskWindow};
use super::{ObjectScores, Prompt, PromptKind, Sample, StepRng};
use crate::nn::{without_gradients, Mode};
use crate::sam::{Frame, MaskResizer, SamInput, SamModel, SamProcessor};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use image::DynamicImage;

/// How well a model finds the instances of one image, in the order of [`Sample::instances`].
#[derive(Clone, Debug)]
pub struct ImageEvaluation {
    /// The first prompt of each.
    pub prompts: Vec<Prompt>,
    /// Masks that the model found for that prompt.
    pub masks: Vec<FoundMask>,
    /// How each is found, the mean over all its prompts.
    pub scores: Vec<ObjectScores>,
}

/// Corrections of an object's first prompt.
const CORRECTIONS: [Round; 4] = [Round { point: true, mask: false }; 4];

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    x0: usize,
    y0: usize,
    /// Past the last column.
    x1: usize,
    /// Past the last row.
    y1: usize,
}

impl Window {
    fn width(&self) -> usize {
        self.x1 - self.x0
    }

    fn union(self, other: Self) -> Self {
        Self {
            x0: self.x0.min(other.x0),
            y0: self.y0.min(other.y0),
            x1: self.x1.max(other.x1),
            y1: self.y1.max(other.y1),
        }
    }

    /// Wider by `margin` on each side, within an image of this size.
    fn widened(self, margin: usize, (height, width): (usize, usize)) -> Self {
        Self {
            x0: self.x0.saturating_sub(margin),
            y0: self.y0.saturating_sub(margin),
            x1: (self.x1 + margin).min(width),
            y1: (self.y1 + margin).min(height),
        }
    }
}

/// A found mask, as lengths of runs within a window of the image.
#[derive(Clone, Debug)]
pub struct FoundMask {
    window: Window,
    /// Outside and inside in turns, outside first, row by row.
    runs: Vec<u32>,
}

impl FoundMask {
    fn of(window: Window, inside: &[bool]) -> Self {
        let mut runs = vec![0];
        let mut now = false;
        for pixel in inside {
            if *pixel != now {
                now = *pixel;
                runs.push(0);
            }
            if let Some(run) = runs.last_mut() {
                *run += 1;
            }
        }
        Self { window, runs }
    }

    /// `[x, y, width, height]` of the part of the image outside of which nothing was found.
    pub fn window(&self) -> [u32; 4] {
        let Window { x0, y0, x1, y1 } = self.window;
        [x0, y0, x1 - x0, y1 - y0].map(|side| side as u32)
    }

    /// The pixels of the window, row by row: whether each is inside.
    pub fn pixels(&self) -> Vec<bool> {
        let runs = self.runs.iter().zip([false, true].into_iter().cycle());
        runs.flat_map(|(run, inside)| std::iter::repeat_n(inside, *run as usize)).collect()
    }
}

/// Prompts a model for the instances of images, without dropout, and compares.
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
}

/// Prompts every instance of an image, without dropout, and compares.
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
    Evaluator { model, processor, kind, device }.evaluate(sample, |_| ())
}

impl Evaluator<'_> {
    /// Prompts every instance of an image, and calls `progress` after each with how many are done.
    ///
    /// # Errors
    /// - model and processor do not fit each other;
    /// - the image is too narrow.
    pub fn evaluate(
        &self,
        sample: &Sample,
        progress: impl FnMut(usize),
    ) -> Result<ImageEvaluation> {
        // A graph would hold each layer's intermediates.
        let model = &without_gradients(self.model)?;
        Evaluator { model, ..*self }.prompted(sample, progress)
    }

    fn prompted(
        &self,
        sample: &Sample,
        mut progress: impl FnMut(usize),
    ) -> Result<ImageEvaluation> {
        let image = DynamicImage::ImageRgb8(sample.image.clone());
        let (pixel_values, frame) = self.processor.preprocess(&image, self.device)?;
        let embeddings = self.model.vision_encoder.forward(&pixel_values, Mode::Eval)?;
        let mut resizer = None;
        let mut found = ImageEvaluation { prompts: vec![], masks: vec![], scores: vec![] };
        for (index, instance) in sample.instances.iter().enumerate() {
            let prompts = self.kind.fixed(sample.labels(instance), instance);
            let first = prompt_tensor(&prompts, &frame, self.device)?;
            let input =
                SamInput { image_embeddings: Some(embeddings.clone()), ..prompt_input(&first)? };
            let masks = self.model.mask_decoder.output_hypernetworks_mlps.len();
            let output = self.model.forward_masks(&input, 0..masks, Mode::Eval)?;
            let logits = output.pred_masks.squeeze(0)?.to_device(&Device::Cpu)?;
            let (_, _, rows, cols) = logits.dims4()?;
            let resizer = match &mut resizer {
                Some(resizer) => resizer,
                none => none.insert(Resizer::new(self.processor, (rows, cols), &frame)?),
            };
            let predicted = output.iou_scores.squeeze(0)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            let truth = Truth::new(sample, instance);
            let (mut mask, mut scores) = (None, vec![]);
            for (index, predicted) in predicted.iter().enumerate() {
                let logits = logits.get(index)?;
                let single = truth.beside(&logits.get(0)?, resizer)?;
                let fit = single.scores(truth.reach());
                mask.get_or_insert_with(|| FoundMask::of(single.window, &single.mask));
                let mut error = (f64::from(predicted[0]) - fit.iou).abs();
                for (alternative, predicted) in predicted.iter().enumerate().skip(1) {
                    let iou = truth.beside(&logits.get(alternative)?, resizer)?.iou();
                    error += (f64::from(*predicted) - iou).abs();
                }
                scores.push(ObjectScores::first(fit, error / predicted.len() as f64));
            }
            let mut scores = ObjectScores::mean(&scores);
            let window = MaskWindow::new(&frame, self.processor.pad_size, rows);
            let objects = PromptedObjects {
                images: vec![0],
                prompts: prompt_input(&first.narrow(1, 0, 1)?)?,
                objects: vec![window.masks(sample, &[*instance], &Device::Cpu)?],
            };
            let corrected = self.corrected(&objects, &embeddings, &truth, resizer)?;
            (scores.iou_at_3, scores.iou_at_5) = (corrected[2], corrected[4]);
            found.scores.push(scores);
            found.masks.extend(mask);
            found.prompts.extend(prompts.first().copied());
            progress(index + 1);
        }
        Ok(found)
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
    fn new(sample: &'a Sample, instance: &'a Instance) -> Self {
        Self { labels: sample.labels(instance), instance }
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

/// From low-resolution logits to parts of masks of the image's size.
struct Resizer {
    matrices: MaskResizer,
    /// The first and last row of the logits that each row of the image depends on.
    rows: Vec<(usize, usize)>,
    /// The same of columns.
    columns: Vec<(usize, usize)>,
}

impl Resizer {
    fn new(processor: &SamProcessor, low: (usize, usize), frame: &Frame) -> Result<Self> {
        let matrices = processor.mask_resizer(low, frame, &Device::Cpu)?;
        let support = |weights: &Tensor| -> candle_core::Result<Vec<(usize, usize)>> {
            let span = |row: &Vec<f32>| {
                let weighted = |weight: &f32| *weight != 0.0;
                let first = row.iter().position(weighted).unwrap_or(0);
                (first, row.iter().rposition(weighted).unwrap_or(first))
            };
            Ok(weights.to_vec2::<f32>()?.iter().map(span).collect())
        };
        let rows = support(&matrices.rows)?;
        let columns = support(&matrices.columns.t()?)?;
        Ok(Self { matrices, rows, columns })
    }

    /// Where the mask can have pixels.
    fn window(&self, logits: &Tensor) -> Result<Option<Window>> {
        let logits = logits.to_dtype(candle_core::DType::F32)?.to_vec2::<f32>()?;
        // NaN is not above 0, but may lie beside a value that is.
        let positive = |value: &f32| *value > 0.0 || value.is_nan();
        let rows: Vec<usize> =
            (0..logits.len()).filter(|row| logits[*row].iter().any(positive)).collect();
        let (Some(top), Some(bottom)) = (rows.first(), rows.last()) else { return Ok(None) };
        let left = rows.iter().filter_map(|row| logits[*row].iter().position(positive)).min();
        let right = rows.iter().filter_map(|row| logits[*row].iter().rposition(positive)).max();
        let range = |spans: &[(usize, usize)], from: usize, to: usize| {
            let touched = |span: &(usize, usize)| span.1 >= from && span.0 <= to;
            Some((spans.iter().position(touched)?, spans.iter().rposition(touched)? + 1))
        };
        let (Some((y0, y1)), Some((x0, x1))) = (
            range(&self.rows, *top, *bottom),
            range(&self.columns, left.unwrap_or(0), right.unwrap_or(0)),
        ) else {
            return Ok(None);
        };
        Ok(Some(Window { x0, y0, x1, y1 }))
    }

    /// The pixels of a window of the mask.
    fn mask(&self, logits: &Tensor, window: Window) -> Result<Vec<bool>> {
        let Window { x0, y0, x1, y1 } = window;
        let rows = self.matrices.rows.narrow(0, y0, y1 - y0)?;
        let columns = self.matrices.columns.narrow(1, x0, x1 - x0)?.contiguous()?;
        let logits = logits.to_dtype(candle_core::DType::F32)?.contiguous()?;
        let resized = rows.matmul(&logits)?.matmul(&columns)?.flatten_all()?;
        Ok(resized.to_vec1::<f32>()?.into_iter().map(|logit| logit > 0.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows leave out nothing: the mask and its scores are those of the whole image.
    #[test]
    fn windows_change_no_mask_and_no_score() -> anyhow::Result<()> {
        let processor = SamProcessor::new(64);
        for (height, width) in [(50, 90), (200, 120), (64, 64), (7, 9)] {
            let frame = processor.frame(height, width)?;
            let resizer = Resizer::new(&processor, (16, 16), &frame)?;
            for seed in 0..40u32 {
                let blob = |i: u32| {
                    let (x, y) = ((i % 16) as f32, (i / 16) as f32);
                    let (cx, cy, r) =
                        ((seed * 7 % 16) as f32, (seed * 5 % 16) as f32, (seed % 6) as f32);
                    r - (x - cx).hypot(y - cy) + ((i * 31 + seed) % 7) as f32 / 10.0 - 0.5
                };
                let low = Tensor::from_vec((0..256).map(blob).collect(), (16, 16), &Device::Cpu)?;
                let whole = processor.post_process_masks(&low, &frame, 0.0)?;
                let whole: Vec<bool> =
                    whole.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|v| v > 0).collect();
                let window = resizer.window(&low)?;
                let mut pasted = vec![false; height * width];
                if let Some(window) = window {
                    let inside = resizer.mask(&low, window)?;
                    let found = FoundMask::of(window, &inside);
                    assert_eq!(found.pixels(), inside);
                    for (place, inside) in inside.into_iter().enumerate() {
                        let (x, y) = (place % window.width(), place / window.width());
                        pasted[(window.y0 + y) * width + window.x0 + x] = inside;
                    }
                }
                assert!(pasted == whole, "{height} x {width}, seed {seed}");
                // Against a truth elsewhere.
                let truth: Vec<bool> = (0..height * width)
                    .map(|i| i % width > width / 2 && i / width < height / 3)
                    .collect();
                let bounds = Window { x0: width / 2 + 1, y0: 0, x1: width, y1: height.div_ceil(3) };
                let reach = reach(height, width);
                let window =
                    window.map_or(bounds, |w| w.union(bounds)).widened(reach + 2, (height, width));
                let cut = |mask: &[bool]| -> Vec<bool> {
                    let rows = window.y0..window.y1;
                    rows.flat_map(|y| mask[y * width + window.x0..y * width + window.x1].to_vec())
                        .collect()
                };
                let in_window = Scores::between(&cut(&whole), &cut(&truth), window.width(), reach);
                assert_eq!(in_window, Scores::between(&whole, &truth, width, reach));
            }
        }
        Ok(())
    }
}
