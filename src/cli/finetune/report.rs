//! Figures and pictures of a run.

use super::super::draw;
use super::options::Options;

use crate::train::{best_evaluation, ImageEvaluation, ObjectScores, Prompt, Sample, StepScores};
use image::{imageops, RgbImage};
use serde_json::{json, Value};

/// The results of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The mean over the held-out objects, without the adapter.
    pub before: ObjectScores,
    /// The same with it.
    pub after: ObjectScores,
    /// The same on the way.
    pub evaluations: Vec<StepScores>,
    /// The loss of each step.
    pub losses: Vec<f32>,
}

/// Small images are enlarged to about this width.
const PANEL: u32 = 400;

/// How well one held-out image was segmented.
pub struct Verdict {
    /// The image.
    pub name: String,
    /// How well each of its objects was found.
    pub scores: Vec<ObjectScores>,
    /// The found masks, if they were drawn.
    pub picture: Option<RgbImage>,
}

impl Verdict {
    fn ious(&self) -> Vec<f64> {
        self.scores.iter().map(|scores| scores.iou).collect()
    }
}

/// A verdict as processes tell it: its image's number and name, the bits of each score, and the picture's width and pixels.
type Told = (usize, String, Vec<[u64; 6]>, Option<(u32, Vec<u8>)>);

/// Verdicts by their images' numbers, for another process.
pub fn to_bytes(verdicts: &[(usize, Verdict)]) -> Vec<u8> {
    let told = verdicts.iter().map(|(index, Verdict { name, scores, picture })| {
        let bits = |scores: &ObjectScores| scores.values().map(f64::to_bits);
        let picture = picture.as_ref().map(|picture| (picture.width(), picture.as_raw().clone()));
        (*index, name.clone(), scores.iter().map(bits).collect(), picture)
    });
    json!(told.collect::<Vec<Told>>()).to_string().into_bytes()
}

/// The verdicts that [`to_bytes`] wrote.
pub fn from_bytes(bytes: &[u8]) -> serde_json::Result<Vec<(usize, Verdict)>> {
    let verdict = |(index, name, bits, picture): Told| {
        let scores = |bits: [u64; 6]| ObjectScores::from_values(bits.map(f64::from_bits));
        let scores = bits.into_iter().map(scores).collect();
        let picture = picture.and_then(|(width, pixels)| {
            let height = pixels.len() as u32 / (3 * width).max(1);
            RgbImage::from_raw(width, height, pixels)
        });
        (index, Verdict { name, scores, picture })
    };
    Ok(serde_json::from_slice::<Vec<Told>>(bytes)?.into_iter().map(verdict).collect())
}

/// The mean over all objects.
pub fn mean(verdicts: &[Verdict]) -> ObjectScores {
    ObjectScores::mean(verdicts.iter().flat_map(|verdict| &verdict.scores))
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
        "parameters": trainable,
        "mean_iou_before": outcome.before.iou,
        "mean_iou_after": outcome.after.iou,
        "before": outcome.before,
        "after": outcome.after,
        "best": best_evaluation(&outcome.evaluations),
        "evaluations": outcome.evaluations,
        "held_out": images.collect::<Vec<Value>>(),
        "losses": outcome.losses,
    });
    Ok(serde_json::to_string_pretty(&metrics)? + "\n")
}

/// Two pictures of one size, the first on the left.
pub fn side_by_side(left: &RgbImage, right: &RgbImage) -> RgbImage {
    const GAP: u32 = 8;
    let mut both = RgbImage::new(left.width() + GAP + right.width(), left.height());
    imageops::replace(&mut both, left, 0, 0);
    imageops::replace(&mut both, right, i64::from(left.width() + GAP), 0);
    both
}

/// The image with what the model found in colour, the truth's outlines and the prompts in white.
pub fn picture(sample: &Sample, evaluation: &ImageEvaluation) -> RgbImage {
    let (width, height) = sample.image.dimensions();
    let factor = (PANEL / width.max(height)).max(1);
    let (width, height) = (width * factor, height * factor);
    let mut image = imageops::resize(&sample.image, width, height, imageops::FilterType::Triangle);
    for (index, found) in evaluation.masks.iter().enumerate() {
        let window = found.window();
        let pixels = found.pixels();
        let inside = |x: u32, y: u32| pixels[(y * window[2] + x) as usize];
        in_window(&mut image, window, factor, &inside, |part, mask| {
            draw::fill(part, mask, draw::colour(index));
        });
    }
    for (instance, prompt) in sample.instances.iter().zip(&evaluation.prompts) {
        let labels = sample.labels(instance);
        let [x0, y0, x1, y1] = instance.bounds;
        let inside = |x: u32, y: u32| labels.get_pixel(x0 + x, y0 + y).0[0] == instance.label;
        let window = [x0, y0, x1 - x0 + 1, y1 - y0 + 1];
        in_window(&mut image, window, factor, &inside, |part, mask| {
            draw::outline(part, mask, draw::WHITE);
        });
        let place = |value: f32| (value + 0.5) * factor as f32;
        match prompt {
            Prompt::Point(point) => draw::cross(&mut image, point.map(place), draw::WHITE),
            Prompt::Box(sides) => draw::rectangle(&mut image, sides.map(place), draw::WHITE),
        }
    }
    image
}

/// Draws the mask of a window into its part of the enlarged image alone: a thousand objects are a thousand small ones.
fn in_window(
    image: &mut RgbImage,
    [x0, y0, width, height]: [u32; 4],
    factor: u32,
    inside: &dyn Fn(u32, u32) -> bool,
    draw: impl FnOnce(&mut RgbImage, &[bool]),
) {
    let (left, top) = (x0 * factor, y0 * factor);
    let (width, height) = (width * factor, height * factor);
    let mask = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let mask: Vec<bool> = mask.map(|(x, y)| inside(x / factor, y / factor)).collect();
    let mut part = imageops::crop_imm(image, left, top, width, height).to_image();
    draw(&mut part, &mask);
    imageops::replace(image, &part, left.into(), top.into());
}
