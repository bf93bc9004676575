//! How well scored masks of whole images match their objects: average precision as COCO has it, and micro-sam's
//! segmentation accuracy.
//!
//! ```text
//! match    at IoUs 0.5, 0.55, .. 0.95: best score first, a mask takes the free object of the highest IoU,
//!          if that is enough
//! AP       mean over the ten of the precision at 101 recalls, each the highest at that recall or beyond
//! SA       mean over the ten of true / (true + false + missed), of the masks with a score of at least `sa_cut`
//! ```
//! `sa_cut` is the score whose SA is highest. AP looks at all masks, however many an image has.
//!
//! Source: `COCOeval` of pycocotools; the metric `mSA` of micro-sam.

#[cfg(feature = "images")]
use crate::sam::Rle;
use serde::Serialize;

/// The least IoUs of a match, in hundredths.
const IOUS: [u8; 10] = [50, 55, 60, 65, 70, 75, 80, 85, 90, 95];

/// Matches of one image.
///
/// [Example](crate::train::Scores)
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MaskMatches {
    /// True objects.
    pub objects: usize,
    /// Each mask's score, best first, and the IoUs at which it has an object: bit 0 is 0.5, bit 9 is 0.95.
    pub found: Vec<(f32, u16)>,
}

#[cfg(feature = "images")]
impl MaskMatches {
    /// Matches scored masks with objects of the same size.
    pub fn new(masks: &[(f32, Rle)], objects: &[Rle]) -> Self {
        let areas: Vec<u64> = objects.iter().map(Rle::area).collect();
        let mut order: Vec<&(f32, Rle)> = masks.iter().collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut free = vec![u16::MAX; objects.len()];
        let mut found = vec![];
        for (score, mask) in order {
            let area = mask.area();
            let ious: Vec<f64> = (objects.iter().zip(&areas))
                .map(|(object, object_area)| {
                    let both = mask.intersection(object);
                    both as f64 / (area + object_area - both).max(1) as f64
                })
                .collect();
            let mut matched = 0;
            for (bit, least) in IOUS.iter().enumerate() {
                // pycocotools takes the last of objects with equal IoU.
                let mut best = (None, f64::from(*least) / 100.0);
                for (object, iou) in ious.iter().enumerate() {
                    if free[object] & (1 << bit) != 0 && *iou >= best.1 {
                        best = (Some(object), *iou);
                    }
                }
                if let (Some(object), _) = best {
                    free[object] &= !(1 << bit);
                    matched |= 1 << bit;
                }
            }
            found.push((*score, matched));
        }
        Self { objects: objects.len(), found }
    }
}

/// Measures of the masks of several images.
///
/// [Example](crate::train::Scores)
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MaskScores {
    /// Mean average precision at IoU 0.5 to 0.95.
    pub ap: f64,
    /// Average precision at IoU 0.5.
    pub ap_50: f64,
    /// Segmentation accuracy, mean over IoU 0.5 to 0.95.
    pub sa: f64,
    /// The lowest score of the masks that count for it.
    pub sa_cut: f64,
}

impl MaskScores {
    /// The names of the measures.
    pub const NAMES: [&'static str; 4] = ["ap", "ap_50", "sa", "sa_cut"];

    /// The measures of all images together; 0 without an object or a mask.
    pub fn of<'a>(images: impl IntoIterator<Item = &'a MaskMatches>) -> Self {
        let (mut objects, mut found) = (0, vec![]);
        for image in images {
            objects += image.objects;
            found.extend(&image.found);
        }
        // Stable: images of equal scores stay in their order.
        found.sort_by(|a: &(f32, u16), b| b.0.total_cmp(&a.0));
        if objects == 0 {
            return Self::default();
        }
        let precisions: Vec<f64> =
            (0..IOUS.len()).map(|bit| average_precision(&found, bit, objects)).collect();
        let (sa, sa_cut) = accuracy(&found, objects);
        let ap = precisions.iter().sum::<f64>() / IOUS.len() as f64;
        Self { ap, ap_50: precisions[0], sa, sa_cut }
    }

    /// The measures, in the order of [`Self::NAMES`].
    pub fn values(&self) -> [f64; 4] {
        [self.ap, self.ap_50, self.sa, self.sa_cut]
    }

    /// From measures in the order of [`Self::NAMES`].
    pub fn from_values([ap, ap_50, sa, sa_cut]: [f64; 4]) -> Self {
        Self { ap, ap_50, sa, sa_cut }
    }
}

/// The mean precision at recalls 0, 0.01, .. 1 of masks in the order of their scores.
fn average_precision(found: &[(f32, u16)], bit: usize, objects: usize) -> f64 {
    let mut right = 0;
    let mut curve: Vec<(f64, f64)> = (found.iter().zip(1..))
        .map(|((_, matched), seen)| {
            right += usize::from(matched >> bit & 1);
            (right as f64 / objects as f64, right as f64 / f64::from(seen))
        })
        .collect();
    for place in (1..curve.len()).rev() {
        curve[place - 1].1 = curve[place - 1].1.max(curve[place].1);
    }
    let precision = |hundredths: i32| {
        // As numpy's linspace: the product is now and then a bit above the quotient, and a recall may lie between.
        let recall = f64::from(hundredths) * 0.01;
        curve.get(curve.partition_point(|point| point.0 < recall)).map_or(0.0, |point| point.1)
    };
    (0..=100).map(precision).sum::<f64>() / 101.0
}

/// The highest segmentation accuracy of all cuts, and its score.
fn accuracy(found: &[(f32, u16)], objects: usize) -> (f64, f64) {
    let mut right = [0usize; IOUS.len()];
    let mut best = (0.0, 1.0);
    for (place, (score, matched)) in found.iter().enumerate() {
        right.iter_mut().enumerate().for_each(|(bit, n)| *n += usize::from(matched >> bit & 1));
        // Masks of one score are kept or dropped together.
        if found.get(place + 1).is_some_and(|next| next.0 == *score) {
            continue;
        }
        let of = |right: &usize| *right as f64 / (place + 1 + objects - right) as f64;
        let mean = right.iter().map(of).sum::<f64>() / IOUS.len() as f64;
        if mean > best.0 {
            best = (mean, f64::from(*score));
        }
    }
    best
}
