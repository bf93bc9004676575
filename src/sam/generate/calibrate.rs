//! The thresholds of a mask generator, chosen on images whose true masks are known.
//!
//! ```text
//! true candidate    its best IoU with a true object is at least 0.5
//! found object      one that a kept true candidate shows; others that show it too count as wrong
//! F1                2 found / (kept + objects), the harmonic mean of found / kept and found / objects
//! ```
//! The suppression of doubles by their masks is chosen first, of a few thresholds, by the F1 that it allows.
//! The maximum lies where the last candidate kept by either threshold is a true one. So the search looks at these pairs
//! alone, and at all of them.

use super::{GeneratedMask, MaskGenerator};
use crate::sam::{Rle, SamPredictor};
use crate::{Error, Result};
use image::DynamicImage;
use rayon::prelude::*;

/// The IoU with a true object from which a candidate is true.
const TRUE_IOU: f64 = 0.5;
/// Predicted IoUs that follow the true ones no better are no use to choose by.
const LEAST_RANK_CORRELATION: f64 = 0.3;
/// Predicted IoUs that lie further from the true ones on average need thresholds of their own.
const LARGEST_MEAN_GAP: f64 = 0.2;

/// Thresholds of the masks' suppression that are tried, the gentlest first.
const MASK_NMS: [Option<f64>; 8] =
    [None, Some(0.7), Some(0.6), Some(0.5), Some(0.4), Some(0.3), Some(0.2), Some(0.1)];

/// A candidate's scores, and how good it is.
///
/// [Example](crate::sam::Calibrator)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredCandidate {
    /// The IoU that the model expects.
    pub predicted_iou: f32,
    /// See [`GeneratedMask::stability_score`].
    pub stability_score: f32,
    /// The best IoU with a true object.
    pub true_iou: f64,
    /// The object of that IoU, if it is at least 0.5; numbered through all images.
    pub object: Option<usize>,
}

/// Collects candidates of images with true masks.
///
/// ```
/// use candle_sam_lora::sam::{Calibrator, ScoredCandidate};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let candidate = |predicted_iou, true_iou, object| {
///     ScoredCandidate { predicted_iou, stability_score: 0.9, true_iou, object }
/// };
/// let mut calibrator = Calibrator::default();
/// // Candidates of one image with two objects; MaskGenerator::calibrate makes them.
/// let found = [candidate(0.9, 0.8, Some(0)), candidate(0.8, 0.7, Some(1)), candidate(0.5, 0.1, None)];
/// calibrator.add_scored(&found, 2);
/// let calibration = calibrator.finish()?;
/// assert_eq!((calibration.kept, calibration.found), (2, 2));
/// assert!(calibration.pred_iou_thresh > 0.5 && calibration.pred_iou_thresh < 0.8);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Calibrator {
    candidates: Vec<ScoredCandidate>,
    objects: usize,
}

/// The thresholds with the highest F1, and how they do on the images they were chosen on.
///
/// [Example](crate::sam::Calibrator)
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Calibration {
    /// For [`MaskGenerator::pred_iou_thresh`]: halfway between the lowest score kept and the next one; 0 keeps all.
    pub pred_iou_thresh: f64,
    /// For [`MaskGenerator::stability_score_thresh`], as `pred_iou_thresh`.
    pub stability_score_thresh: f64,
    /// For [`MaskGenerator::mask_nms_thresh`].
    pub mask_nms_thresh: Option<f64>,
    /// Candidates seen.
    pub candidates: usize,
    /// Candidates kept.
    pub kept: usize,
    /// True objects.
    pub objects: usize,
    /// Objects that a kept candidate shows.
    pub found: usize,
    /// Spearman's rank correlation of predicted and true IoU; none where either is the same for all candidates.
    pub rank_correlation: Option<f64>,
    /// Mean of predicted minus true IoU.
    pub mean_gap: f64,
}

impl Calibration {
    /// Found objects among kept candidates.
    pub fn precision(&self) -> f64 {
        self.found as f64 / self.kept as f64
    }

    /// Found objects among all.
    pub fn recall(&self) -> f64 {
        self.found as f64 / self.objects as f64
    }

    /// The harmonic mean of precision and recall.
    pub fn f1(&self) -> f64 {
        2.0 * self.found as f64 / (self.kept + self.objects) as f64
    }

    /// Whether F1 is higher; compared without a division.
    fn is_better(&self, other: &Self) -> bool {
        self.found * (other.kept + other.objects) > other.found * (self.kept + self.objects)
    }

    /// Why the predicted IoUs are a poor guide, in one line. Their order follows the true IoUs too little, or they lie
    /// too far from them.
    pub fn warning(&self) -> Option<String> {
        let order = match self.rank_correlation {
            None => Some("predicted or true IoUs are all the same".to_string()),
            Some(rank) if rank < LEAST_RANK_CORRELATION => Some(format!(
                "their rank correlation with the true IoUs is {rank:.2}, expected at least {LEAST_RANK_CORRELATION}"
            )),
            Some(_) => None,
        };
        let gap = (self.mean_gap.abs() > LARGEST_MEAN_GAP).then(|| {
            let gap = self.mean_gap;
            format!("they differ from the true IoUs by {gap:+.2} on average, expected at most {LARGEST_MEAN_GAP}")
        });
        let reasons: Vec<String> = order.into_iter().chain(gap).collect();
        (!reasons.is_empty())
            .then(|| format!("predicted IoUs are not calibrated: {}", reasons.join("; ")))
    }
}

impl Calibrator {
    /// Adds candidates of one image and the image's true masks.
    pub fn add(&mut self, candidates: &[GeneratedMask], truth: &[Rle]) {
        let areas: Vec<u64> = truth.iter().map(Rle::area).collect();
        for candidate in candidates {
            let area = candidate.mask.area();
            let ious = truth.iter().zip(&areas).map(|(object, object_area)| {
                let both = candidate.mask.intersection(object);
                both as f64 / (area + object_area - both).max(1) as f64
            });
            // The first of the best.
            let best = ious.enumerate().fold((None, 0.0), |best, (object, iou)| {
                if iou > best.1 {
                    (Some(object), iou)
                } else {
                    best
                }
            });
            self.candidates.push(ScoredCandidate {
                predicted_iou: candidate.iou_score,
                stability_score: candidate.stability_score,
                true_iou: best.1,
                object: best.0.filter(|_| best.1 >= TRUE_IOU).map(|object| self.objects + object),
            });
        }
        self.objects += truth.len();
    }

    /// Adds candidates whose truth is known; `objects` more true objects, which they may name from the present count
    /// on.
    pub fn add_scored(&mut self, candidates: &[ScoredCandidate], objects: usize) {
        self.objects += objects;
        self.candidates.extend(candidates);
    }

    /// The thresholds with the highest F1; of several, the highest for the predicted IoU, then the lowest for the
    /// stability.
    ///
    /// # Errors
    /// - no candidate is true.
    pub fn finish(&self) -> Result<Calibration> {
        // Thresholds at 0 or below keep everything, whatever the score.
        let score = |score: f32| if score > 0.0 { score } else { 0.0 };
        let mut sorted: Vec<(f32, f32, Option<usize>)> = (self.candidates.iter())
            .map(|c| (score(c.predicted_iou), score(c.stability_score), c.object))
            .collect();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut levels: Vec<f32> = sorted.iter().map(|candidate| candidate.1).collect();
        levels.sort_by(|a, b| b.total_cmp(a));
        levels.dedup();
        let level = |stability: f32| levels.partition_point(|level| *level > stability);
        let mut kept = vec![0; levels.len()];
        let mut found = vec![0; levels.len()];
        let mut best_level: Vec<Option<usize>> = vec![None; self.objects];
        let mut best: Option<Choice> = None;
        let mut rest = &sorted[..];
        while let Some((predicted, ..)) = rest.first().copied() {
            let equal = rest.iter().take_while(|candidate| candidate.0 == predicted).count();
            let (group, lower) = rest.split_at(equal);
            for (_, stability, object) in group {
                let level = level(*stability);
                kept[level] += 1;
                let Some(shown) = object.and_then(|object| best_level.get_mut(object)) else {
                    continue;
                };
                if shown.is_none_or(|before| level < before) {
                    shown.iter().for_each(|before| found[*before] -= 1);
                    found[level] += 1;
                    *shown = Some(level);
                }
            }
            if group.iter().any(|candidate| candidate.2.is_some()) {
                let next = lower.first().map(|candidate| candidate.0);
                let here = best_stability(&kept, &found, self.objects);
                let here = here.map(|choice| Choice { predicted: (predicted, next), ..choice });
                best = match (best, here) {
                    (Some(best), Some(here)) if !here.is_better(&best, self.objects) => Some(best),
                    (best, here) => here.or(best),
                };
            }
            rest = lower;
        }
        let Some(best) = best else {
            let message = format!(
                "calibration: none of {} candidates has an IoU of {TRUE_IOU} with one of {} true objects",
                self.candidates.len(),
                self.objects
            );
            return Err(Error::Config(message));
        };
        let halfway = |(lowest, next): (f32, Option<f32>)| {
            next.map_or(0.0, |next| (f64::from(lowest) + f64::from(next)) / 2.0)
        };
        let next = levels.get(best.level + 1).copied();
        let (predicted, truth): (Vec<f64>, Vec<f64>) =
            self.candidates.iter().map(|c| (f64::from(c.predicted_iou), c.true_iou)).unzip();
        let gaps: f64 =
            predicted.iter().zip(&truth).map(|(predicted, truth)| predicted - truth).sum();
        Ok(Calibration {
            pred_iou_thresh: halfway(best.predicted),
            stability_score_thresh: halfway((levels[best.level], next)),
            mask_nms_thresh: None,
            candidates: self.candidates.len(),
            kept: best.kept,
            objects: self.objects,
            found: best.found,
            rank_correlation: correlation(&ranks(&predicted), &ranks(&truth)),
            mean_gap: gaps / predicted.len() as f64,
        })
    }
}

/// Where the candidates are cut, and what stays.
#[derive(Clone, Copy)]
struct Choice {
    /// The lowest predicted IoU kept, and the next lower one.
    predicted: (f32, Option<f32>),
    /// The last level of stability kept.
    level: usize,
    kept: usize,
    found: usize,
}

impl Choice {
    /// Whether F1 is higher; compared without a division.
    fn is_better(&self, other: &Self, objects: usize) -> bool {
        self.found * (other.kept + objects) > other.found * (self.kept + objects)
    }
}

/// The best level of stability for candidates counted by level; none without a found object.
fn best_stability(kept: &[usize], found: &[usize], objects: usize) -> Option<Choice> {
    let mut best: Option<Choice> = None;
    let mut here = Choice { predicted: (0.0, None), level: 0, kept: 0, found: 0 };
    for (level, (kept, found)) in kept.iter().zip(found).enumerate() {
        here = Choice { level, kept: here.kept + kept, found: here.found + found, ..here };
        // Ties prefer the lowest threshold.
        if *found > 0 && best.is_none_or(|best| !best.is_better(&here, objects)) {
            best = Some(here);
        }
    }
    best
}

/// Places in ascending order, from 0; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for equal in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let mean = start as f64 + (equal.len() - 1) as f64 / 2.0;
        equal.iter().for_each(|place| ranks[*place] = mean);
        start += equal.len();
    }
    ranks
}

/// Pearson's correlation; none where either is constant.
fn correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let product = |x: &[f64], mean_x: f64, y: &[f64], mean_y: f64| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum()
    };
    let spread = product(a, mean_a, a, mean_a) * product(b, mean_b, b, mean_b);
    (spread > 0.0).then(|| product(a, mean_a, b, mean_b) / spread.sqrt())
}

impl MaskGenerator {
    /// The thresholds of predicted IoU, stability and the masks' overlap with the highest F1 on images with true masks.
    /// The other settings stay as they are, and so does a `mask_nms_thresh` that is set.
    ///
    /// Without one, none and 0.7 to 0.1 are tried. The gentlest of equal ones is taken. Doubles are suppressed among
    /// all candidates, before the thresholds. With a stability threshold the generator may so keep some masks more than
    /// the calibration counts.
    ///
    /// # Errors
    /// - as [`generate`](Self::generate), or an image cannot be had;
    /// - no candidate has an IoU of 0.5 with a true object.
    pub fn calibrate(
        &self,
        predictor: &SamPredictor<'_>,
        images: impl IntoIterator<Item = Result<(DynamicImage, Vec<Rle>)>>,
    ) -> Result<Calibration> {
        let all = Self { pred_iou_thresh: 0.0, stability_score_thresh: 0.0, ..self.clone() };
        let tried = match self.mask_nms_thresh {
            None => MASK_NMS.to_vec(),
            own => vec![own],
        };
        let mut tried: Vec<(Self, Calibrator)> = (tried.into_iter())
            .map(|mask_nms_thresh| (Self { mask_nms_thresh, ..all.clone() }, Calibrator::default()))
            .collect();
        for image in images {
            let (image, truth) = image?;
            let found = all.candidates_of(predictor, &image)?;
            tried.par_iter_mut().try_for_each(|(generator, calibrator)| {
                calibrator.add(&generator.without_doubles(found.clone())?, &truth);
                Ok::<(), Error>(())
            })?;
        }
        let mut best: Option<Calibration> = None;
        let mut error = None;
        for (generator, calibrator) in &tried {
            match calibrator.finish() {
                Ok(found) if best.as_ref().is_none_or(|best| found.is_better(best)) => {
                    best =
                        Some(Calibration { mask_nms_thresh: generator.mask_nms_thresh, ..found });
                }
                Ok(_) => {}
                Err(none) => error = error.or(Some(none)),
            }
        }
        best.ok_or_else(|| error.unwrap_or_else(|| Error::config("calibration: nothing to try")))
    }
}
