//! Thresholds chosen on true masks are the best there are; counts of the generator's filters add up.

use crate::common::model::shipped;
use crate::common::property;
use anyhow::{ensure, Context, Result};
use candle_sam_lora::sam::{
    AttentionKind, Calibration, Calibrator, MaskGenerator, Rle, SamPredictor, ScoredCandidate,
};
use image::{DynamicImage, Rgb, RgbImage};
use proptest::prelude::*;

fn candidate(predicted_iou: f32, stability_score: f32, object: Option<usize>) -> ScoredCandidate {
    let true_iou = if object.is_some() { 0.8 } else { 0.1 };
    ScoredCandidate { predicted_iou, stability_score, true_iou, object }
}

fn calibrated(candidates: &[ScoredCandidate], objects: usize) -> Result<Calibration> {
    let mut calibrator = Calibrator::default();
    calibrator.add_scored(candidates, objects);
    Ok(calibrator.finish()?)
}

/// Candidates kept and objects found, by the generator's rule.
fn kept(candidates: &[ScoredCandidate], iou: f64, stability: f64) -> (usize, usize) {
    let above = |score: f32, threshold: f64| threshold <= 0.0 || f64::from(score) > threshold;
    let kept = candidates
        .iter()
        .filter(|c| above(c.predicted_iou, iou) && above(c.stability_score, stability));
    let mut objects: Vec<usize> = kept.clone().filter_map(|c| c.object).collect();
    objects.sort_unstable();
    objects.dedup();
    (kept.count(), objects.len())
}

#[test]
fn thresholds_lie_halfway_between_scores() -> Result<()> {
    let candidates = [
        candidate(0.875, 0.75, Some(0)),
        candidate(0.75, 0.5, Some(1)),
        candidate(0.75, 0.25, None),
        candidate(0.5, 0.75, None),
        candidate(0.25, 0.75, None),
    ];
    let found = calibrated(&candidates, 3)?;
    ensure!(found.pred_iou_thresh == 0.625 && found.stability_score_thresh == 0.375, "{found:?}");
    ensure!((found.kept, found.found, found.objects, found.candidates) == (2, 2, 3, 5));
    ensure!(found.precision() == 1.0 && found.recall() == 2.0 / 3.0 && found.f1() == 0.8);
    // With nothing to drop there is no threshold.
    let found = calibrated(&candidates[..2], 2)?;
    ensure!((found.pred_iou_thresh, found.stability_score_thresh) == (0.0, 0.0), "{found:?}");
    Ok(())
}

#[test]
fn doubles_of_an_object_count_once() -> Result<()> {
    let candidates =
        [candidate(0.9, 0.9, Some(0)), candidate(0.8, 0.9, Some(0)), candidate(0.7, 0.9, Some(0))];
    let found = calibrated(&candidates, 1)?;
    ensure!((found.kept, found.found) == (1, 1), "{found:?}");
    Ok(())
}

#[test]
fn nothing_true_is_an_error() {
    let error = calibrated(&[candidate(0.9, 0.9, None)], 4).expect_err("chosen").to_string();
    assert!(error.contains("none of 1 candidates") && error.contains("4 true objects"), "{error}");
    assert!(calibrated(&[], 0).is_err());
}

#[test]
fn uncalibrated_scores_are_told() -> Result<()> {
    let scored = |pairs: &[(f32, f64)]| {
        let candidates: Vec<ScoredCandidate> = (pairs.iter().enumerate())
            .map(|(object, (predicted_iou, true_iou))| ScoredCandidate {
                predicted_iou: *predicted_iou,
                stability_score: 1.0,
                true_iou: *true_iou,
                object: Some(object),
            })
            .collect();
        calibrated(&candidates, pairs.len())
    };
    let good = scored(&[(0.9, 0.95), (0.8, 0.75), (0.6, 0.55)])?;
    ensure!(good.rank_correlation == Some(1.0) && good.warning().is_none(), "{good:?}");
    let high = scored(&[(0.95, 0.6), (0.9, 0.55), (0.85, 0.5)])?;
    let warning = high.warning().context("no warning")?;
    ensure!(warning.contains("+0.35") && !warning.contains("rank"), "{warning}");
    let reversed = scored(&[(0.6, 0.9), (0.7, 0.8), (0.8, 0.7)])?;
    let warning = reversed.warning().context("no warning")?;
    ensure!(warning.contains("rank correlation") && warning.contains("-1.00"), "{warning}");
    let constant = scored(&[(0.7, 0.6), (0.7, 0.8)])?;
    ensure!(constant.warning().context("no warning")?.contains("all the same"));
    Ok(())
}

proptest! {
    #![proptest_config(property::config(512))]

    /// No pair of thresholds has a higher F1, and the counts are the generator's.
    #[test]
    fn no_thresholds_are_better(
        scores in prop::collection::vec((-1i32..6, 0i32..6, 0usize..9), 1..14),
        objects in 5usize..8,
    ) {
        let candidates: Vec<ScoredCandidate> = scores
            .iter()
            .map(|(iou, stability, object)| {
                let object = (*object < 5).then_some(*object);
                candidate(*iou as f32 / 5.0, *stability as f32 / 5.0, object)
            })
            .collect();
        let f1 = |(kept, found): (usize, usize)| 2.0 * found as f64 / (kept + objects) as f64;
        let all = || (-1..6).map(|step| (f64::from(step) + 0.5) / 5.0);
        let best = all()
            .flat_map(|iou| all().map(move |stability| (iou, stability)))
            .map(|(iou, stability)| f1(kept(&candidates, iou, stability)))
            .fold(0.0, f64::max);
        match calibrated(&candidates, objects) {
            Ok(chosen) => {
                let (iou, stability) = (chosen.pred_iou_thresh, chosen.stability_score_thresh);
                prop_assert_eq!(kept(&candidates, iou, stability), (chosen.kept, chosen.found));
                prop_assert_eq!(chosen.f1(), best);
            }
            Err(_) => prop_assert!(candidates.iter().all(|c| c.object.is_none())),
        }
    }
}

/// Two bright squares on a dark ground, and their masks.
fn squares() -> Result<(DynamicImage, Vec<Rle>)> {
    let inside = |corner: u32, x: u32, y: u32| {
        (corner..corner + 24).contains(&x) && (corner..corner + 24).contains(&y)
    };
    let image = RgbImage::from_fn(96, 96, |x, y| match inside(8, x, y) || inside(56, x, y) {
        true => Rgb([230, 220, 210]),
        false => Rgb([30, 35, 40]),
    });
    let masks = [8, 56].map(|corner| {
        let pixels: Vec<bool> = (0..96 * 96).map(|p| inside(corner, p % 96, p / 96)).collect();
        Rle::from_mask(&pixels, (96, 96))
    });
    Ok((image.into(), masks.into_iter().collect::<candle_sam_lora::Result<_>>()?))
}

#[test]
fn counts_of_the_filters_add_up() -> Result<()> {
    let model = shipped(AttentionKind::Fused)?;
    let predictor = SamPredictor::new(&model);
    let (image, _) = squares()?;
    let usual = MaskGenerator { points_per_side: 6, crop_n_layers: 1, ..MaskGenerator::default() };
    let strict = MaskGenerator { pred_iou_thresh: 2.0, ..usual.clone() };
    let steady =
        MaskGenerator { pred_iou_thresh: 0.0, stability_score_thresh: 2.0, ..usual.clone() };
    let all = MaskGenerator { pred_iou_thresh: 0.0, stability_score_thresh: 0.0, ..usual.clone() };
    for generator in [&usual, &strict, &steady, &all] {
        let found = generator.generate_counted(&predictor, &image, |_, _| {})?;
        let counts = &found.statistics;
        ensure!(counts.candidates == 5 * 36 * 3, "{counts}");
        let sum = counts.low_iou + counts.unstable + counts.cut_off + counts.doubles;
        ensure!(sum + counts.united + counts.masks == counts.candidates, "{counts}");
        ensure!(counts.masks == found.masks.len(), "{counts}");
        let plain = generator.generate(&predictor, &image)?;
        ensure!(plain.len() == found.masks.len());
        let best = found.masks.iter().map(|mask| mask.iou_score).fold(f32::MIN, f32::max);
        ensure!(counts.best_iou.is_some_and(|iou| iou >= best), "{counts}");
    }
    let none = strict.generate_counted(&predictor, &image, |_, _| {})?.statistics;
    ensure!(none.low_iou == none.candidates && none.best_stability.is_none(), "{none}");
    let line = none.to_string();
    ensure!(line.starts_with("540 candidates, 0 masks: 540 dropped by predicted IoU (highest "));
    let none = steady.generate_counted(&predictor, &image, |_, _| {})?.statistics;
    ensure!(none.unstable == none.candidates && none.best_stability.is_some(), "{none}");
    Ok(())
}

#[test]
fn calibrated_generator_finds_what_was_counted() -> Result<()> {
    let model = shipped(AttentionKind::Fused)?;
    let predictor = SamPredictor::new(&model);
    let generator = MaskGenerator { points_per_side: 8, ..MaskGenerator::default() };
    let chosen = generator.calibrate(&predictor, [Ok(squares()?)])?;
    ensure!(chosen.objects == 2 && chosen.found > 0, "{chosen:?}");
    for threshold in [0.1, 0.3, 0.7] {
        let own = MaskGenerator { mask_nms_thresh: Some(threshold), ..generator.clone() };
        let own = own.calibrate(&predictor, [Ok(squares()?)])?;
        ensure!(own.mask_nms_thresh == Some(threshold) && own.f1() <= chosen.f1(), "{own:?}");
    }
    let (image, truth) = squares()?;
    let generator = MaskGenerator {
        pred_iou_thresh: chosen.pred_iou_thresh,
        stability_score_thresh: chosen.stability_score_thresh,
        mask_nms_thresh: chosen.mask_nms_thresh,
        ..generator
    };
    let masks = generator.generate(&predictor, &image)?;
    ensure!(masks.len() >= chosen.kept, "{} masks, {chosen:?}", masks.len());
    let shown = truth.iter().filter(|object| {
        masks.iter().any(|mask| {
            let both = mask.mask.intersection(object) as f64;
            both / (mask.mask.area() as f64 + object.area() as f64 - both) >= 0.5
        })
    });
    ensure!(shown.count() >= chosen.found, "{chosen:?}");
    Ok(())
}
