//! Masks of everything in an image: prompts on a grid of points, filtered by what the model and the masks say.
//!
//! ```text
//! crops of the image -> embedding -> points on a grid -> masks     those with a low predicted IoU go
//!                    -> the crop's size -> stability, box          the unstable and the cut off go
//!                    -> run lengths in the image                   of several of the same thing, the best stays
//! ```
//! A mask is stable if it hardly changes with the threshold: its pixels above `mask_threshold + offset`, divided by
//! those above `mask_threshold - offset`. The better of two masks is the one with the higher [`Ranking::score`].
//!
//! Source: `pipeline("mask-generation")` of transformers; `SamAutomaticMaskGenerator` of segment-anything.

mod calibrate;
mod crops;
mod geojson;
mod labels;
mod output;
mod ranking;
mod regions;
mod statistics;
mod stitch;
mod suppress;
mod tiles;

pub use calibrate::{Calibration, Calibrator, ScoredCandidate};
pub use crops::{Crop, Tile};
pub use geojson::{geojson_feature, save_geojson};
pub use labels::{label_image, save_label_strips, save_labels};
pub use output::CocoAnnotations;
pub use ranking::Ranking;
pub use statistics::GenerationStatistics;
pub use tiles::Tiling;

use super::{ImageEmbedding, Prediction, Prompt, Rle, SamPredictor};
use crate::{Error, Result};
use candle_core::Tensor;
use image::DynamicImage;
use rayon::prelude::*;
use statistics::Rejection;

/// A crop's border cuts objects off: boxes that end so near to it, in pixels, are dropped.
const NEAR_EDGE: f32 = 20.0;

/// The most points along a side: more than pixels of the images that SAM sees, and few enough to list.
const MOST_POINTS: usize = 4096;

/// Masks brought to the image's size at one time.
const RESIZED_TOGETHER: usize = 8;

/// How masks of everything are found. The default is that of transformers' pipeline, which is also the original's in
/// all but the suppression of doubles; see [`original`](Self::original).
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::sam::{AttentionKind, MaskGenerator, SamModel, SamPredictor};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let model = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let generator = MaskGenerator { points_per_side: 4, ..MaskGenerator::default() };
/// let image = image::DynamicImage::new_rgb8(320, 240);
/// for mask in generator.generate(&SamPredictor::new(&model), &image)? {
///     println!("{} pixels, expected IoU {:.3}", mask.mask.area(), mask.iou_score);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct MaskGenerator {
    /// Points along each side of the image.
    pub points_per_side: usize,
    /// Points that the decoder takes at a time: more need more memory.
    pub points_per_batch: usize,
    /// Masks of which the model expects no higher IoU are dropped.
    pub pred_iou_thresh: f64,
    /// Masks that are no more stable are dropped; 0 keeps all.
    pub stability_score_thresh: f64,
    /// How far the threshold moves for the stability.
    pub stability_score_offset: f64,
    /// A pixel belongs to the mask if its logit is above.
    pub mask_threshold: f64,
    /// Layers of crops beside the image itself; layer n has 4^n.
    pub crop_n_layers: u32,
    /// Overlap of crops, as a share of the image's short side.
    pub crop_overlap_ratio: f64,
    /// Points along a side are divided by this in each further layer.
    pub crop_n_points_downscale_factor: usize,
    /// Which of two masks is better.
    pub ranking: Ranking,
    /// If the boxes of two masks overlap by a higher IoU, one mask goes. It is the worse one, or, with
    /// `box_nms_thresh`, the one from the larger crop.
    pub crop_nms_thresh: f64,
    /// As `crop_nms_thresh` within each crop, where the worse one goes, before crops are compared. The original has it,
    /// transformers has not.
    pub box_nms_thresh: Option<f64>,
    /// The worse of two masks goes that overlap themselves by a higher IoU. It keeps crossing objects, whose boxes
    /// are alike.
    pub mask_nms_thresh: Option<f64>,
    /// Holes and islands of fewer pixels are filled and removed.
    pub min_mask_region_area: usize,
}

impl Default for MaskGenerator {
    fn default() -> Self {
        Self {
            points_per_side: 32,
            points_per_batch: 64,
            pred_iou_thresh: 0.88,
            stability_score_thresh: 0.95,
            stability_score_offset: 1.0,
            mask_threshold: 0.0,
            crop_n_layers: 0,
            crop_overlap_ratio: 512.0 / 1500.0,
            crop_n_points_downscale_factor: 1,
            ranking: Ranking::PredictedIou,
            crop_nms_thresh: 0.7,
            box_nms_thresh: None,
            mask_nms_thresh: None,
            min_mask_region_area: 0,
        }
    }
}

/// One of an image's masks.
///
/// [Example](crate::sam::MaskGenerator)
#[derive(Clone, Debug)]
pub struct GeneratedMask {
    /// In the image's size.
    pub mask: Rle,
    /// `[x0, y0, x1, y1]`, the first and the last column and row.
    pub bounds: [u32; 4],
    /// The IoU that the model expects.
    pub iou_score: f32,
    /// How little the mask changes with the threshold, 0 to 1.
    pub stability_score: f32,
    /// The point that asked for it, in pixels of the image.
    pub point: [f32; 2],
    /// Where the model looked.
    pub crop: Crop,
}

impl GeneratedMask {
    /// The score by which a ranking orders masks.
    ///
    /// [Example](crate::sam::Ranking)
    pub fn score(&self, ranking: Ranking) -> f32 {
        ranking.score(self.iou_score, self.stability_score)
    }
}

/// Masks, and what became of the other candidates.
///
/// [Example](crate::guide::everything)
#[derive(Clone, Debug, Default)]
pub struct Generated {
    /// Best first; of several tiles, in the order of the tiles.
    pub masks: Vec<GeneratedMask>,
    /// Counts of all candidates.
    pub statistics: GenerationStatistics,
}

impl MaskGenerator {
    /// The original's defaults: doubles go within each crop first.
    pub fn original() -> Self {
        Self { box_nms_thresh: Some(0.7), ..Self::default() }
    }

    /// The masks of everything in an image, best first.
    ///
    /// Memory beside the model's is that of `points_per_batch` prompts, of eight masks of the image's size, and of the
    /// run lengths found.
    ///
    /// # Errors
    /// - a setting is impossible: no point, a factor of 0, an overlap beyond 0 to 1;
    /// - as [`SamPredictor::embed`] for a crop.
    pub fn generate(
        &self,
        predictor: &SamPredictor<'_>,
        image: &DynamicImage,
    ) -> Result<Vec<GeneratedMask>> {
        self.generate_with(predictor, image, |_, _| {})
    }

    /// As [`generate`](Self::generate); `progress` hears of points done and of all.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(
        &self,
        predictor: &SamPredictor<'_>,
        image: &DynamicImage,
        progress: impl FnMut(usize, usize),
    ) -> Result<Vec<GeneratedMask>> {
        Ok(self.generate_counted(predictor, image, progress)?.masks)
    }

    /// As [`generate_with`](Self::generate_with), and counts what each filter drops.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_counted(
        &self,
        predictor: &SamPredictor<'_>,
        image: &DynamicImage,
        progress: impl FnMut(usize, usize),
    ) -> Result<Generated> {
        let size = (image.height(), image.width());
        self.generate_from(predictor, size, embedder(predictor, image), progress)
    }

    /// The masks before the masks themselves are compared.
    fn candidates_of(
        &self,
        predictor: &SamPredictor<'_>,
        image: &DynamicImage,
    ) -> Result<Vec<GeneratedMask>> {
        let size = (image.height(), image.width());
        Ok(self.candidates(predictor, size, embedder(predictor, image), |_, _| {})?.masks)
    }

    /// As [`generate_counted`](Self::generate_counted), of an image that is embedded already.
    ///
    /// # Errors
    /// - as [`generate`](Self::generate);
    /// - there are layers of crops, which need embeddings of their own.
    pub fn generate_embedded(
        &self,
        predictor: &SamPredictor<'_>,
        embedding: &ImageEmbedding,
        progress: impl FnMut(usize, usize),
    ) -> Result<Generated> {
        if self.crop_n_layers > 0 {
            let layers = self.crop_n_layers;
            let message = format!("crop_n_layers is {layers}, expected 0 for one embedding");
            return Err(Error::Config(format!("mask generation: {message}")));
        }
        let (height, width) = embedding.frame.original;
        let size = (height as u32, width as u32);
        self.generate_from(predictor, size, |_| Ok(embedding.clone()), progress)
    }

    /// The masks of an image of a height and width, whose crops `embed` embeds.
    fn generate_from(
        &self,
        predictor: &SamPredictor<'_>,
        size: (u32, u32),
        embed: impl Fn(&Crop) -> Result<ImageEmbedding>,
        progress: impl FnMut(usize, usize),
    ) -> Result<Generated> {
        let Generated { masks, mut statistics } =
            self.candidates(predictor, size, embed, progress)?;
        let passed = statistics.masks;
        let masks = self.without_doubles(masks)?;
        statistics.masks = masks.len();
        statistics.doubles = passed - masks.len();
        Ok(Generated { masks, statistics })
    }

    /// The masks before the masks themselves are compared. The statistics count doubles as masks.
    fn candidates(
        &self,
        predictor: &SamPredictor<'_>,
        size: (u32, u32),
        embed: impl Fn(&Crop) -> Result<ImageEmbedding>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Generated> {
        self.validate()?;
        let crops = crops::crops(size, self.crop_n_layers, self.crop_overlap_ratio);
        let side = |layer: u32| {
            let divisor = self.crop_n_points_downscale_factor.saturating_pow(layer);
            self.points_per_side / divisor
        };
        let total = crops.iter().map(|(_, layer)| side(*layer).pow(2)).sum();
        let score = |mask: &GeneratedMask| mask.score(self.ranking);
        let mut done = 0;
        let mut found = vec![];
        let mut statistics = GenerationStatistics::default();
        for (crop, layer) in &crops {
            let points = crops::grid(side(*layer), crop);
            if points.is_empty() {
                continue;
            }
            let embedding = embed(crop)?;
            let mut of_crop = vec![];
            for batch in points.chunks(self.points_per_batch) {
                let batch_found = self.masks_at(predictor, &embedding, batch, (crop, size))?;
                statistics += &batch_found.statistics;
                of_crop.extend(batch_found.masks);
                done += batch.len();
                progress(done, total);
            }
            if let Some(threshold) = self.box_nms_thresh {
                of_crop = keep(of_crop, |masks| by_boxes(masks, threshold, score));
            }
            found.extend(of_crop);
        }
        if self.box_nms_thresh.is_none() {
            found = keep(found, |masks| by_boxes(masks, self.crop_nms_thresh, score));
        } else if crops.len() > 1 {
            let smallness =
                |mask: &GeneratedMask| 1.0 / (mask.crop.width() as f32 * mask.crop.height() as f32);
            found = keep(found, |masks| by_boxes(masks, self.crop_nms_thresh, smallness));
        }
        Ok(Generated { masks: found, statistics })
    }

    /// The masks without those that overlap a better one, and without small regions.
    fn without_doubles(&self, mut found: Vec<GeneratedMask>) -> Result<Vec<GeneratedMask>> {
        if let Some(threshold) = self.mask_nms_thresh {
            found = keep(found, |masks| {
                let scores: Vec<f32> = masks.iter().map(|mask| mask.score(self.ranking)).collect();
                let masks: Vec<&Rle> = masks.iter().map(|mask| &mask.mask).collect();
                suppress::by_masks(&masks, &scores, threshold)
            });
        }
        self.without_small_regions(found)
    }

    /// Refuses settings that no generator has.
    pub(crate) fn validate(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Config(format!("mask generation: {message}")));
        match self {
            Self { points_per_side: 0, .. } => refuse("points_per_side is 0".into()),
            Self { points_per_side: side, .. } if *side > MOST_POINTS => {
                refuse(format!("points_per_side is {side}, expected at most {MOST_POINTS}"))
            }
            Self { points_per_batch: 0, .. } => refuse("points_per_batch is 0".into()),
            Self { crop_n_points_downscale_factor: 0, .. } => {
                refuse("crop_n_points_downscale_factor is 0".into())
            }
            Self { crop_overlap_ratio: ratio, .. } if !(0.0..1.0).contains(ratio) => {
                refuse(format!("crop_overlap_ratio is {ratio}, expected 0 to below 1"))
            }
            Self { crop_n_layers: layers @ 6.., .. } => {
                refuse(format!("crop_n_layers is {layers}, expected at most 5"))
            }
            Self { stability_score_offset: offset, .. }
                if *offset < 0.0 || offset.is_infinite() =>
            {
                refuse(format!("stability_score_offset is {offset}, expected 0 or more"))
            }
            Self { mask_threshold, .. } if mask_threshold.is_infinite() => {
                refuse(format!("mask_threshold is {mask_threshold}, which is no logit"))
            }
            _ => match self.thresholds().into_iter().find(|(_, value)| value.is_nan()) {
                Some((name, _)) => refuse(format!("{name} is no number (NaN)")),
                None => Ok(()),
            },
        }
    }

    fn thresholds(&self) -> [(&'static str, f64); 7] {
        [
            ("pred_iou_thresh", self.pred_iou_thresh),
            ("stability_score_thresh", self.stability_score_thresh),
            ("stability_score_offset", self.stability_score_offset),
            ("mask_threshold", self.mask_threshold),
            ("crop_nms_thresh", self.crop_nms_thresh),
            ("box_nms_thresh", self.box_nms_thresh.unwrap_or_default()),
            ("mask_nms_thresh", self.mask_nms_thresh.unwrap_or_default()),
        ]
    }

    /// The masks at some points of a crop that are good enough.
    fn masks_at(
        &self,
        predictor: &SamPredictor<'_>,
        embedding: &ImageEmbedding,
        points: &[[f32; 2]],
        (crop, size): (&Crop, (u32, u32)),
    ) -> Result<Generated> {
        let prompts: Vec<Prompt> = points.iter().map(|[x, y]| Prompt::at(*x, *y)).collect();
        let predictions = predictor.predict(embedding, &prompts, true)?;
        // A mask with a low predicted IoU is never resized to the image.
        let candidates: Vec<(usize, usize)> = promising(&predictions, self.pred_iou_thresh);
        let mut masks = vec![];
        let mut statistics = GenerationStatistics::default();
        let scores = predictions.iter().flat_map(|prediction| &prediction.iou_scores);
        scores.clone().for_each(|score| statistics.see_iou(*score));
        statistics.candidates = scores.count();
        statistics.low_iou = statistics.candidates - candidates.len();
        for some in candidates.chunks(RESIZED_TOGETHER) {
            let logits = some
                .iter()
                .map(|(point, index)| predictions[*point].logits.get(*index))
                .collect::<candle_core::Result<Vec<Tensor>>>()?;
            let logits = Tensor::stack(&logits, 0)?;
            let logits = predictor.processor().resize_masks(&logits, &embedding.frame)?;
            let pixels = crop.width() as usize * crop.height() as usize;
            let logits = logits.flatten_all()?.to_vec1::<f32>()?;
            let found: Vec<_> = (some.par_iter().zip(logits.par_chunks(pixels)))
                .map(|(_, logits)| self.mask_of(logits, crop, size))
                .collect();
            for ((point, index), (stability_score, mask)) in some.iter().zip(found) {
                statistics.see_stability(stability_score);
                let mask = match mask {
                    Ok(mask) => mask,
                    Err(rejection) => {
                        statistics.reject(rejection);
                        continue;
                    }
                };
                let [x, y] = points[*point];
                masks.push(GeneratedMask {
                    bounds: mask.bounds().unwrap_or([crop.left, crop.top, crop.left, crop.top]),
                    mask,
                    iou_score: predictions[*point].iou_scores[*index],
                    stability_score,
                    point: [x + crop.left as f32, y + crop.top as f32],
                    crop: *crop,
                });
            }
        }
        statistics.masks = masks.len();
        Ok(Generated { masks, statistics })
    }

    /// The stability of a crop's mask, and the mask in the image unless it is unstable or cut off.
    fn mask_of(
        &self,
        logits: &[f32],
        crop: &Crop,
        size: (u32, u32),
    ) -> (f32, std::result::Result<Rle, Rejection>) {
        let above = |threshold: f64| {
            let threshold = threshold as f32;
            logits.iter().filter(|logit| **logit > threshold).count()
        };
        let (threshold, offset) = (self.mask_threshold, self.stability_score_offset);
        let stability = above(threshold + offset) as f32 / above(threshold - offset) as f32;
        // An empty mask has no stability and is no mask.
        let stable = f64::from(stability) > self.stability_score_thresh;
        if self.stability_score_thresh > 0.0 && !stable {
            return (stability, Err(Rejection::Unstable));
        }
        let inside: Vec<bool> = logits.iter().map(|logit| *logit > threshold as f32).collect();
        let part = (crop.height(), crop.width());
        let mask = Rle::within(&inside, part, (crop.top, crop.left), size);
        // Without a pixel transformers takes the corner of the crop.
        let bounds = mask.bounds().unwrap_or([crop.left, crop.top, crop.left, crop.top]);
        match cut_off(bounds, crop, size) {
            true => (stability, Err(Rejection::CutOff)),
            false => (stability, Ok(mask)),
        }
    }

    /// Removes small holes and islands, and the duplicates that result. An unchanged mask beats its duplicates.
    fn without_small_regions(&self, mut masks: Vec<GeneratedMask>) -> Result<Vec<GeneratedMask>> {
        if self.min_mask_region_area == 0 || masks.is_empty() {
            return Ok(masks);
        }
        let mut unchanged = vec![];
        for mask in &mut masks {
            let size = mask.mask.size();
            let pixels = mask.mask.to_mask();
            let cleaned =
                regions::without_small(&pixels, size.1 as usize, self.min_mask_region_area);
            unchanged.push(if cleaned.is_none() { 1.0 } else { 0.0 });
            if let Some(cleaned) = cleaned {
                mask.mask = Rle::from_mask(&cleaned, size)?;
                mask.bounds = mask.mask.bounds().unwrap_or([0; 4]);
            }
        }
        let threshold = self.box_nms_thresh.unwrap_or(0.0).max(self.crop_nms_thresh);
        Ok(keep(masks, |masks| suppress::by_boxes(&boxes(masks), &unchanged, threshold)))
    }
}

/// Embeds the crops of an image.
fn embedder<'a>(
    predictor: &'a SamPredictor<'_>,
    image: &'a DynamicImage,
) -> impl Fn(&Crop) -> Result<ImageEmbedding> + 'a {
    |crop| predictor.embed(&image.crop_imm(crop.left, crop.top, crop.width(), crop.height()))
}

/// Prompt and mask of what the model expects a higher IoU of; all where the threshold is not positive.
fn promising(predictions: &[Prediction], threshold: f64) -> Vec<(usize, usize)> {
    let masks = predictions.iter().enumerate().flat_map(|(point, prediction)| {
        prediction.iou_scores.iter().enumerate().map(move |(index, score)| (point, index, *score))
    });
    masks
        .filter(|(.., score)| threshold <= 0.0 || f64::from(*score) > threshold)
        .map(|(point, index, _)| (point, index))
        .collect()
}

/// Whether a side of the box lies on a side of its crop that is no side of the image.
fn cut_off(bounds: [u32; 4], crop: &Crop, (height, width): (u32, u32)) -> bool {
    let image = [0, 0, width, height];
    bounds.iter().zip(crop.corners()).zip(image).any(|((side, crop), image)| {
        let near = |edge: u32| (*side as f32 - edge as f32).abs() <= NEAR_EDGE;
        near(crop) && !near(image)
    })
}

fn boxes(masks: &[GeneratedMask]) -> Vec<[f32; 4]> {
    masks.iter().map(|mask| mask.bounds.map(|side| side as f32)).collect()
}

fn by_boxes(
    masks: &[GeneratedMask],
    threshold: f64,
    score: impl Fn(&GeneratedMask) -> f32,
) -> Vec<usize> {
    let scores: Vec<f32> = masks.iter().map(score).collect();
    suppress::by_boxes(&boxes(masks), &scores, threshold)
}

/// The masks at the places that `choose` gives, in their order.
fn keep(
    masks: Vec<GeneratedMask>,
    choose: impl FnOnce(&[GeneratedMask]) -> Vec<usize>,
) -> Vec<GeneratedMask> {
    let chosen = choose(&masks);
    let mut masks: Vec<Option<GeneratedMask>> = masks.into_iter().map(Some).collect();
    chosen.into_iter().filter_map(|place| masks.get_mut(place)?.take()).collect()
}
