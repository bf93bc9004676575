//! Figures of a run.

use super::calibration::{bins, Bin};
use super::judge::Verdict;
use super::options::Options;
use crate::train::{best_evaluation, HeldOutScores, StepScores};
use serde_json::{json, Value};

/// The results of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The scores of the held-out images, without the adapter.
    pub before: HeldOutScores,
    /// The same with it.
    pub after: HeldOutScores,
    /// The same on the way.
    pub evaluations: Vec<StepScores>,
    /// The loss of each step.
    pub losses: Vec<f32>,
}

/// The text of `metrics.json`. It holds no times, so that equal runs give equal files.
pub fn metrics(
    options: &Options,
    trainable: &str,
    outcome: &Outcome,
    before: &[Verdict],
    after: &[Verdict],
) -> anyhow::Result<String> {
    let images = before.iter().zip(after).map(|(before, after)| {
        json!({ "name": before.name, "iou_before": before.ious(), "iou_after": after.ious() })
    });
    let metrics = json!({
        "steps": outcome.losses.len(),
        "seed": options.seed,
        "prompt": format!("{:?}", options.prompt).to_lowercase(),
        "batch": options.batch(),
        "train": options.train.names(),
        "automatic": {
            "points_per_side": options.automatic,
            "nms": options.automatic_nms,
            "ranking": options.automatic_ranking.to_string(),
        },
        "parameters": trainable,
        "mean_iou_before": outcome.before.objects.iou,
        "mean_iou_after": outcome.after.objects.iou,
        "before": outcome.before,
        "after": outcome.after,
        "best": best_evaluation(&outcome.evaluations),
        "evaluations": outcome.evaluations,
        "calibration": { "before": calibration(before), "after": calibration(after) },
        "held_out": images.collect::<Vec<Value>>(),
        "losses": outcome.losses,
    });
    Ok(serde_json::to_string_pretty(&metrics)? + "\n")
}

/// The bins of all images together.
pub fn calibration(verdicts: &[Verdict]) -> Vec<Bin> {
    bins(verdicts.iter().flat_map(|verdict| &verdict.predicted_ious))
}
