//! History of the evaluations on the way: which was the best, and how long ago.

use super::HeldOutScores;
use serde::Serialize;

/// One evaluation of a run.
///
/// [Example](crate::train::Schedule)
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepScores {
    /// Steps made before it.
    pub step: u64,
    /// The scores of the held-out images.
    #[serde(flatten)]
    pub scores: HeldOutScores,
}

/// The first of those with the highest IoU.
///
/// [Example](crate::train::Schedule)
pub fn best_evaluation(evaluations: &[StepScores]) -> Option<&StepScores> {
    evaluations.iter().reduce(|best, next| {
        match next.scores.objects.iou > best.scores.objects.iou {
            true => next,
            false => best,
        }
    })
}

/// Evaluations since the best one. Stop early when this reaches the patience.
///
/// [Example](crate::train::Schedule)
pub fn evaluations_since_best(evaluations: &[StepScores]) -> usize {
    let best = best_evaluation(evaluations).map(|best| best.step);
    evaluations.iter().rev().take_while(|evaluated| Some(evaluated.step) != best).count()
}
