//! What evaluations on the way found: which was the best, and how long ago.

use super::Scores;
use serde::Serialize;

/// One evaluation of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluated {
    /// Steps made before it.
    pub step: u64,
    /// The means over the held-out objects.
    #[serde(flatten)]
    pub scores: Scores,
}

/// The first of those with the highest IoU.
pub fn best(evaluations: &[Evaluated]) -> Option<&Evaluated> {
    evaluations.iter().reduce(|best, next| match next.scores.iou > best.scores.iou {
        true => next,
        false => best,
    })
}

/// How many evaluations came after the best one: early stopping is when they are as many as one has patience for.
pub fn since_best(evaluations: &[Evaluated]) -> usize {
    let best = best(evaluations).map(|best| best.step);
    evaluations.iter().rev().take_while(|evaluated| Some(evaluated.step) != best).count()
}
