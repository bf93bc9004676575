//! Fate of the candidates: why there are few masks, or none.

use std::fmt;
use std::ops::AddAssign;

/// How many candidates each filter dropped, in the order of the filters, and the best scores seen.
///
/// `candidates` is the sum of the six counts after it.
///
/// [Example](crate::guide::everything)
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct GenerationStatistics {
    /// Masks that the decoder gave, three a point.
    pub candidates: usize,
    /// Dropped: the model expects too low an IoU.
    pub low_iou: usize,
    /// Dropped: the mask changes too much with the threshold.
    pub unstable: usize,
    /// Dropped: a crop's border cuts the mask off.
    pub cut_off: usize,
    /// Dropped: a better mask shows the same thing.
    pub doubles: usize,
    /// Dropped: a fragment at a tile's border, or another tile's view of the same thing.
    pub united: usize,
    /// Masks that are left.
    pub masks: usize,
    /// The highest IoU that the model expects of a candidate.
    pub best_iou: Option<f32>,
    /// The highest stability of a candidate whose predicted IoU passed.
    pub best_stability: Option<f32>,
}

/// The filter that drops a candidate once its mask is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rejection {
    Unstable,
    CutOff,
}

impl GenerationStatistics {
    pub(super) fn reject(&mut self, rejection: Rejection) {
        match rejection {
            Rejection::Unstable => self.unstable += 1,
            Rejection::CutOff => self.cut_off += 1,
        }
    }

    pub(super) fn see_stability(&mut self, stability: f32) {
        self.best_stability = best(self.best_stability, Some(stability));
    }

    pub(super) fn see_iou(&mut self, iou: f32) {
        self.best_iou = best(self.best_iou, Some(iou));
    }
}

/// The higher score; a score that is no number counts as none.
fn best(a: Option<f32>, b: Option<f32>) -> Option<f32> {
    a.into_iter().chain(b).filter(|score| !score.is_nan()).max_by(f32::total_cmp)
}

impl AddAssign<&Self> for GenerationStatistics {
    fn add_assign(&mut self, other: &Self) {
        self.candidates += other.candidates;
        self.low_iou += other.low_iou;
        self.unstable += other.unstable;
        self.cut_off += other.cut_off;
        self.doubles += other.doubles;
        self.united += other.united;
        self.masks += other.masks;
        self.best_iou = best(self.best_iou, other.best_iou);
        self.best_stability = best(self.best_stability, other.best_stability);
    }
}

/// One line: `3072 candidates, 2 masks: 3000 dropped by predicted IoU (highest 0.93), ..`.
impl fmt::Display for GenerationStatistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let highest = |score: Option<f32>| {
            score.map_or(String::new(), |score| format!(" (highest {score:.3})"))
        };
        write!(f, "{} candidates, {} masks: ", self.candidates, self.masks)?;
        write!(f, "{} dropped by predicted IoU{}, ", self.low_iou, highest(self.best_iou))?;
        write!(f, "{} by stability{}, ", self.unstable, highest(self.best_stability))?;
        write!(f, "{} cut off, {} doubles", self.cut_off, self.doubles)?;
        match self.united {
            0 => Ok(()),
            united => write!(f, ", {united} united across tiles"),
        }
    }
}
