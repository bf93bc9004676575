//! The flags that would keep a mask, where an image has none.

use crate::sam::{GenerationStatistics, MaskGenerator};

/// The candidates that each filter dropped, and the flags that keep the best one.
pub fn advice(statistics: &GenerationStatistics, generator: &MaskGenerator) -> String {
    let passed = statistics.candidates - statistics.low_iou;
    let flags = match (passed, statistics.best_iou, statistics.best_stability) {
        // The stability of a mask is measured once its predicted IoU passes; 0 keeps every one.
        (0, Some(iou), _) => Some(format!("--iou {:.2} --stability 0", below(iou))),
        (_, _, Some(stability)) if f64::from(stability) <= generator.stability_score_thresh => {
            Some(format!("--stability {:.2}", below(stability)))
        }
        _ => None,
    };
    let keep = match flags {
        Some(flags) => format!("{flags} would keep it"),
        None if statistics.cut_off > 0 => "borders of crops cut off what passed".into(),
        None => "no candidate has a pixel".into(),
    };
    format!("{statistics}; {keep}")
}

/// The next lower hundredth: a threshold that `score` is above.
fn below(score: f32) -> f64 {
    ((f64::from(score) * 100.0).ceil() - 1.0).max(0.0) / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_below_their_scores() {
        for (score, threshold) in [(0.823, 0.82), (0.82, 0.81), (0.001, 0.0), (0.0, 0.0)] {
            assert_eq!(below(score), threshold, "{score}");
        }
    }

    #[test]
    fn flags_are_of_the_filter_that_dropped_all() {
        let all = GenerationStatistics { candidates: 9, best_iou: Some(0.7), ..Default::default() };
        let low = GenerationStatistics { low_iou: 9, ..all.clone() };
        let unstable =
            GenerationStatistics { unstable: 9, best_stability: Some(0.5), ..all.clone() };
        let cut = GenerationStatistics { cut_off: 9, best_stability: Some(0.99), ..all.clone() };
        for (statistics, end) in [
            (low, "; --iou 0.69 --stability 0 would keep it"),
            (unstable, "; --stability 0.49 would keep it"),
            (cut, "; borders of crops cut off what passed"),
            (all, "; no candidate has a pixel"),
        ] {
            let advice = advice(&statistics, &MaskGenerator::default());
            assert!(advice.ends_with(end), "{advice}");
        }
    }
}
