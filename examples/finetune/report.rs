//! Figures and pictures of a run.

use super::draw;
use super::options::Options;
use super::run::Outcome;
use candle_sam_lora::train::{Dataset, Evaluation, Prompt, Sample};
use image::{imageops, RgbImage};
use serde_json::{json, Value};

/// Small images are enlarged to about this width.
const PANEL: u32 = 400;

/// The mean IoU over all objects.
pub fn mean_iou(evaluations: &[Evaluation]) -> f64 {
    let ious: Vec<f64> = evaluations.iter().flat_map(|e| e.ious.iter().copied()).collect();
    ious.iter().sum::<f64>() / ious.len().max(1) as f64
}

/// The text of `metrics.json`. It holds no times, so that equal runs give equal files.
pub fn metrics(
    options: &Options,
    trainable: &str,
    outcome: &Outcome,
    held_out: &Dataset,
    before: &[Evaluation],
    after: &[Evaluation],
) -> anyhow::Result<String> {
    let images: Vec<Value> = (held_out.names().zip(before.iter().zip(after)))
        .map(|(name, (before, after))| {
            json!({ "name": name, "iou_before": before.ious, "iou_after": after.ious })
        })
        .collect();
    let metrics = json!({
        "steps": outcome.losses.len(),
        "seed": options.seed,
        "prompt": format!("{:?}", options.prompt).to_lowercase(),
        "parameters": trainable,
        "mean_iou_before": outcome.before,
        "mean_iou_after": outcome.after,
        "held_out": images,
        "losses": outcome.losses,
    });
    Ok(serde_json::to_string_pretty(&metrics)? + "\n")
}

/// The image twice, with what the model found in colour, the truth's outlines and the prompts in white.
pub fn before_and_after(
    sample: &Sample,
    before: &Evaluation,
    after: &Evaluation,
) -> anyhow::Result<RgbImage> {
    let left = panel(sample, before)?;
    let mut both = RgbImage::new(2 * left.width() + 8, left.height());
    imageops::replace(&mut both, &panel(sample, after)?, i64::from(left.width()) + 8, 0);
    imageops::replace(&mut both, &left, 0, 0);
    Ok(both)
}

fn panel(sample: &Sample, evaluation: &Evaluation) -> anyhow::Result<RgbImage> {
    let (width, height) = sample.image.dimensions();
    let factor = (PANEL / width.max(height)).max(1);
    let (width, height) = (width * factor, height * factor);
    let mut image = imageops::resize(&sample.image, width, height, imageops::FilterType::Triangle);
    let enlarged = |inside: &dyn Fn(u32, u32) -> bool| -> Vec<bool> {
        (0..height)
            .flat_map(|y| (0..width).map(move |x| (x, y)))
            .map(|(x, y)| inside(x / factor, y / factor))
            .collect()
    };
    for index in 0..sample.instances.len() {
        let mask = evaluation.masks.get(index)?.to_vec2::<u8>()?;
        let mask = enlarged(&|x, y| mask[y as usize][x as usize] > 0);
        draw::fill(&mut image, &mask, draw::colour(index));
    }
    for (instance, prompt) in sample.instances.iter().zip(&evaluation.prompts) {
        let truth = enlarged(&|x, y| sample.labels.get_pixel(x, y).0[0] == instance.label);
        draw::outline(&mut image, &truth, draw::WHITE);
        let place = |value: f32| (value + 0.5) * factor as f32;
        match prompt {
            Prompt::Point(point) => draw::cross(&mut image, point.map(place), draw::WHITE),
            Prompt::Box(sides) => draw::rectangle(&mut image, sides.map(place), draw::WHITE),
        }
    }
    Ok(image)
}
