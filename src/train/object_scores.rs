//! How well a model finds an object that is pointed out to it.
//!
//! ```text
//! iou, dice, boundary_f1     of the single mask for the first prompt
//! iou_at_3, iou_at_5         of the single mask after two and four points more, each where the mask before was wrong
//! iou_error                  |predicted - true IoU|, the mean over the single mask and the alternatives for the first
//!                            prompt
//! ```

#[cfg(feature = "images")]
use super::Scores;
use serde::Serialize;

/// Measures of one object, or their means over several.
///
/// [Example](crate::train::evaluate_image)
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ObjectScores {
    /// Intersection over union for the first prompt.
    pub iou: f64,
    /// Dice coefficient for the first prompt.
    pub dice: f64,
    /// F1 of the boundaries for the first prompt.
    pub boundary_f1: f64,
    /// IoU with three prompts: the first one and two corrections.
    pub iou_at_3: f64,
    /// IoU with five prompts.
    pub iou_at_5: f64,
    /// How far the predicted IoU is off.
    pub iou_error: f64,
}

impl ObjectScores {
    /// The names of the measures.
    pub const NAMES: [&'static str; 6] =
        ["iou", "dice", "boundary_f1", "iou_at_3", "iou_at_5", "iou_error"];

    /// Scores of a first prompt, before anything is corrected.
    #[cfg(feature = "images")]
    pub(super) fn first(Scores { iou, dice, boundary_f1 }: Scores, iou_error: f64) -> Self {
        Self { iou, dice, boundary_f1, iou_at_3: 0.0, iou_at_5: 0.0, iou_error }
    }

    /// The measures, in the order of [`Self::NAMES`].
    pub fn values(&self) -> [f64; 6] {
        [self.iou, self.dice, self.boundary_f1, self.iou_at_3, self.iou_at_5, self.iou_error]
    }

    /// From measures in the order of [`Self::NAMES`].
    pub fn from_values([iou, dice, boundary_f1, iou_at_3, iou_at_5, iou_error]: [f64; 6]) -> Self {
        Self { iou, dice, boundary_f1, iou_at_3, iou_at_5, iou_error }
    }

    /// The mean of each measure; 0 of nothing.
    pub fn mean<'a>(scores: impl IntoIterator<Item = &'a Self>) -> Self {
        let (mut sums, mut count) = ([0.0; 6], 0usize);
        for score in scores {
            sums.iter_mut().zip(score.values()).for_each(|(sum, value)| *sum += value);
            count += 1;
        }
        Self::from_values(sums.map(|sum| sum / count.max(1) as f64))
    }
}
