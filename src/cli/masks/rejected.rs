//! The flags that would have kept a mask, where an image has none.

use crate::sam::{MaskGenerator, SamPredictor};
use crate::Result;
use image::DynamicImage;

/// Points along each side that are tried again, at most: for a few words of advice they are enough.
const POINTS: usize = 8;

/// Which flags keep the best mask of a coarse grid of points.
pub fn advice(
    generator: &MaskGenerator,
    predictor: &SamPredictor<'_>,
    image: &DynamicImage,
) -> Result<String> {
    let points = generator.points_per_side.min(POINTS);
    let all = MaskGenerator {
        points_per_side: points,
        pred_iou_thresh: 0.0,
        stability_score_thresh: 0.0,
        crop_n_layers: 0,
        min_mask_region_area: 0,
        ..generator.clone()
    };
    let masks = all.generate(predictor, image)?;
    let scores = masks.iter().map(|mask| (mask.iou_score, mask.stability_score));
    let scores: Vec<(f32, f32)> = scores.filter(|(_, stability)| stability.is_finite()).collect();
    let Some((iou, stability)) = scores.iter().copied().max_by(|a, b| a.0.total_cmp(&b.0)) else {
        return Ok("no point gave a mask".into());
    };
    let most_stable = scores.iter().map(|(_, stability)| *stability).fold(0.0, f32::max);
    let flags: Vec<String> = [
        ("--iou", iou, generator.pred_iou_thresh),
        ("--stability", stability, generator.stability_score_thresh),
    ]
    .into_iter()
    .filter(|(_, score, threshold)| f64::from(*score) <= *threshold)
    .map(|(flag, score, _)| format!("{flag} {:.2}", below(score.into())))
    .collect();
    let keep = match flags.is_empty() {
        true => "these thresholds keep it".to_string(),
        false => format!("{} would keep it", flags.join(" ")),
    };
    Ok(format!(
        "of {points} x {points} points the best mask has an expected IoU of {iou:.3} and a stability of {stability:.3}, the \
         most stable mask {most_stable:.3}; {keep}"
    ))
}

/// The next lower hundredth: a threshold that `score` is above.
fn below(score: f64) -> f64 {
    ((score * 100.0).ceil() - 1.0).max(0.0) / 100.0
}

#[cfg(test)]
mod tests {
    use super::below;

    #[test]
    fn thresholds_are_below_their_scores() {
        for (score, threshold) in [(0.823, 0.82), (0.82, 0.81), (0.001, 0.0), (0.0, 0.0)] {
            assert_eq!(below(score), threshold, "{score}");
        }
    }
}
