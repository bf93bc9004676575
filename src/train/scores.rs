//! How well a mask fits the truth.
//!
//! ```text
//! iou          |m and t| / |m or t|                     dice  2 |m and t| / (|m| + |t|)
//! boundary_f1  2 p r / (p + r):  p = part of m's boundary within d of t's,  r = part of t's boundary within d of m's
//!              d = ceil(0.008 * image diagonal) pixels
//! ```
//! Two empty masks agree: 1. The boundary of a mask are its and its neighbours' pixels at which it changes towards
//! the right, below, or both, as in `seg2bmap`.
//!
//! Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (DAVIS),
//! CVPR 2016; `f_boundary.py` of its evaluation code.

use candle_core::{bail, Result, Tensor};
use serde::Serialize;

/// Part of the diagonal that a boundary may be off.
const TOLERANCE: f64 = 0.008;

/// Measures of one mask, or their means over several.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::sam::Rle;
/// use candle_sam_lora::train::{iou, MaskMatches, MaskScores, Scores};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let mask = Tensor::new(&[[1u8, 1], [1, 0]], &Device::Cpu)?;
/// let target = Tensor::new(&[[1u8, 1], [0, 0]], &Device::Cpu)?;
/// assert_eq!(iou(&mask, &target)?, 2.0 / 3.0);
/// let scores = Scores::of(&mask, &target)?;
/// assert_eq!((scores.iou, scores.dice), (2.0 / 3.0, 0.8));
///
/// // Automatic masks: one with its predicted IoU, and the two objects of the image.
/// let left = Rle::from_mask(&[true, false, true, false], (2, 2))?;
/// let right = Rle::from_mask(&[false, true, false, true], (2, 2))?;
/// let matches = MaskMatches::new(&[(0.9, left.clone())], &[left, right]);
/// assert!((MaskScores::of([&matches]).ap_50 - 0.5).abs() < 0.01);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Intersection over union.
    pub iou: f64,
    /// Dice coefficient, the F1 of the pixels.
    pub dice: f64,
    /// F1 of the boundaries.
    pub boundary_f1: f64,
}

impl Scores {
    /// Scores two masks `[height, width]`; pixels other than 0 are inside.
    pub fn of(mask: &Tensor, target: &Tensor) -> Result<Self> {
        let (mask, target, (height, width)) = masks("scores", mask, target)?;
        Ok(Self::between(&mask, &target, width, reach(height, width)))
    }

    /// Scores two masks with rows of `width` pixels; boundaries may be off by `reach` pixels.
    pub(super) fn between(mask: &[bool], target: &[bool], width: usize, reach: usize) -> Self {
        let Overlap { both, any, sum } = Overlap::of(mask, target);
        let ratio = |part: usize, whole: usize| match whole {
            0 => 1.0,
            _ => part as f64 / whole as f64,
        };
        Self {
            iou: ratio(both, any),
            dice: ratio(2 * both, sum),
            boundary_f1: boundary_f1(mask, target, width, reach),
        }
    }

    /// The mean of each measure; 0 of nothing.
    pub fn mean<'a>(scores: impl IntoIterator<Item = &'a Self>) -> Self {
        let (mut sum, mut count) = (Self::default(), 0usize);
        for score in scores {
            sum.iou += score.iou;
            sum.dice += score.dice;
            sum.boundary_f1 += score.boundary_f1;
            count += 1;
        }
        let mean = |sum: f64| sum / count.max(1) as f64;
        Self { iou: mean(sum.iou), dice: mean(sum.dice), boundary_f1: mean(sum.boundary_f1) }
    }
}

/// Intersection over union of two masks `[height, width]` in which whatever is not 0 is inside.
///
/// [Example](crate::train::Scores)
pub fn iou(mask: &Tensor, target: &Tensor) -> Result<f64> {
    let (mask, target, _) = masks("iou", mask, target)?;
    Ok(iou_between(&mask, &target))
}

/// Intersection over union of two masks, row by row.
pub(super) fn iou_between(mask: &[bool], target: &[bool]) -> f64 {
    let Overlap { both, any, .. } = Overlap::of(mask, target);
    if any == 0 {
        1.0
    } else {
        both as f64 / any as f64
    }
}

/// Pixels in both masks, in any of them, and in each, added.
struct Overlap {
    both: usize,
    any: usize,
    sum: usize,
}

impl Overlap {
    fn of(mask: &[bool], target: &[bool]) -> Self {
        let (mut both, mut any) = (0, 0);
        for (m, t) in mask.iter().zip(target) {
            both += usize::from(*m && *t);
            any += usize::from(*m || *t);
        }
        Self { both, any, sum: both + any }
    }
}

type Masks = (Vec<bool>, Vec<bool>, (usize, usize));

fn masks(op: &str, mask: &Tensor, target: &Tensor) -> Result<Masks> {
    if mask.dims() != target.dims() || mask.rank() != 2 {
        bail!(
            "{op}: mask and target must have equal shapes [height, width], got {:?} and {:?}",
            mask.dims(),
            target.dims()
        )
    }
    let inside = |t: &Tensor| -> Result<Vec<bool>> {
        Ok(t.ne(0.0)?.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|v| v != 0).collect())
    };
    Ok((inside(mask)?, inside(target)?, mask.dims2()?))
}

/// How far a boundary may be off, in pixels, in an image of this size.
pub(super) fn reach(height: usize, width: usize) -> usize {
    (TOLERANCE * (height as f64).hypot(width as f64)).ceil() as usize
}

/// The boundary measure of two masks of rows of `width` pixels.
fn boundary_f1(mask: &[bool], target: &[bool], width: usize, reach: usize) -> f64 {
    let width = width.max(1);
    let (mask, target) = (boundary(mask, width), boundary(target, width));
    let count = |pixels: &[bool]| pixels.iter().filter(|p| **p).count();
    // The part of one boundary that the other, made thick, covers.
    let matched = |of: &[bool], by: &[bool]| {
        let near = dilated(by, width, reach);
        let both = of.iter().zip(&near).filter(|(a, b)| **a && **b).count();
        both as f64 / count(of) as f64
    };
    let (precision, recall) = match (count(&mask), count(&target)) {
        (0, 0) => (1.0, 1.0),
        (0, _) | (_, 0) => return 0.0, // one of precision and recall is 1, the other 0
        _ => (matched(&mask, &target), matched(&target, &mask)),
    };
    match precision + recall {
        0.0 => 0.0,
        sum => 2.0 * precision * recall / sum,
    }
}

/// The pixels that differ from their neighbour on the right, below, or right below. In the last column and row there
/// is one neighbour, at their crossing none.
fn boundary(mask: &[bool], width: usize) -> Vec<bool> {
    let height = mask.len() / width;
    let mut boundary = vec![false; mask.len()];
    for y in 0..height {
        for x in 0..width {
            let place = y * width + x;
            let (right, below) = (x + 1 < width, y + 1 < height);
            let differs = |other: usize| mask[place] != mask[other];
            boundary[place] = (right && differs(place + 1))
                || (below && differs(place + width))
                || (right && below && differs(place + width + 1));
        }
    }
    boundary
}

/// Every pixel within `reach` of one that is set, by Euclid's distance.
fn dilated(pixels: &[bool], width: usize, reach: usize) -> Vec<bool> {
    let height = pixels.len() / width;
    // Each set pixel adds a stretch to each row near it; a row's stretches are summed from their ends.
    let mut ends = vec![0i32; height * (width + 1)];
    let half_widths: Vec<usize> = (0..=reach).map(|dy| (reach * reach - dy * dy).isqrt()).collect();
    for (place, _) in pixels.iter().enumerate().filter(|(_, set)| **set) {
        let (x, y) = (place % width, place / width);
        for row in y.saturating_sub(reach)..(y + reach + 1).min(height) {
            let half = half_widths[y.abs_diff(row)];
            ends[row * (width + 1) + x.saturating_sub(half)] += 1;
            ends[row * (width + 1) + (x + half + 1).min(width)] -= 1;
        }
    }
    let mut dilated = Vec::with_capacity(pixels.len());
    for row in ends.chunks(width + 1) {
        let mut open = 0;
        dilated.extend(row[..width].iter().map(|end| {
            open += end;
            open > 0
        }));
    }
    dilated
}
