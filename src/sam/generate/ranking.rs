//! Which of two masks is better.

use std::str::FromStr;

/// The score that orders masks: of two doubles the one with the lower score goes, and average precision ranks by it.
///
/// ```
/// use candle_sam_lora::sam::{MaskGenerator, Ranking};
///
/// let generator = MaskGenerator { ranking: Ranking::IouTimesStability, ..MaskGenerator::default() };
/// assert_eq!(generator.ranking.to_string(), "iou-stability");
/// assert_eq!("iou".parse(), Ok(Ranking::PredictedIou));
/// assert_eq!(generator.ranking.score(0.8, 0.5), 0.4);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ranking {
    /// The predicted IoU, as transformers and the original have it.
    #[default]
    PredictedIou,
    /// The predicted IoU times the stability. A mask without a pixel has no stability, so it is the worst.
    IouTimesStability,
}

impl Ranking {
    /// The score of a mask with this predicted IoU and stability; a higher one is better.
    pub fn score(self, predicted_iou: f32, stability: f32) -> f32 {
        match self {
            Self::PredictedIou => predicted_iou,
            Self::IouTimesStability if stability.is_nan() => f32::NEG_INFINITY,
            Self::IouTimesStability => predicted_iou * stability,
        }
    }
}

impl std::fmt::Display for Ranking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PredictedIou => "iou",
            Self::IouTimesStability => "iou-stability",
        })
    }
}

impl FromStr for Ranking {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::PredictedIou, Self::IouTimesStability];
        let named = all.into_iter().find(|ranking| ranking.to_string() == text);
        named.ok_or_else(|| format!("expected iou or iou-stability, got {text:?}"))
    }
}
