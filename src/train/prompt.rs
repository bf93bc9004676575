//! The prompt a user might give for an instance: a point anywhere on it, or a box around it.

use super::{Instance, LabelImage, StepRng};
use serde::Serialize;

/// Points that an evaluation tries on each instance; one alone says more of the point than of the model.
const EVALUATION_POINTS: usize = 5;

/// Which prompts are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptKind {
    /// One point on the object.
    Point,
    /// A box around it.
    Box {
        /// How far a side may be from the object's, over the object's width or height.
        jitter: f64,
    },
}

/// A prompt for one instance, in pixels of the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prompt {
    /// `[x, y]`, on the object.
    Point([f32; 2]),
    /// `[x0, y0, x1, y1]`
    Box([f32; 4]),
}

impl PromptKind {
    /// A random prompt, for training.
    pub fn draw(self, labels: &LabelImage, instance: &Instance, draws: &mut StepRng) -> Prompt {
        match self {
            Self::Point => Prompt::Point(random_point(labels, instance, draws)),
            Self::Box { jitter } => Prompt::Box(jittered_box(labels, instance, jitter, draws)),
        }
    }

    /// The prompts of an evaluation, the same in every run: some points on the instance, or the tight box.
    pub fn fixed(self, labels: &LabelImage, instance: &Instance) -> Vec<Prompt> {
        match self {
            Self::Point => {
                let mut draws = StepRng::new(0, "evaluation", u64::from(instance.label));
                let point = |_| Prompt::Point(random_point(labels, instance, &mut draws));
                (0..EVALUATION_POINTS).map(point).collect()
            }
            Self::Box { .. } => vec![Prompt::Box(instance.bounds.map(|side| side as f32))],
        }
    }
}

/// A random pixel `[x, y]` of the instance.
pub fn random_point(labels: &LabelImage, instance: &Instance, draws: &mut StepRng) -> [f32; 2] {
    let [x0, y0, x1, y1] = instance.bounds;
    let pixels = (y0..=y1).flat_map(|y| (x0..=x1).map(move |x| (x, y)));
    let mut inside = pixels.filter(|&(x, y)| labels.get_pixel(x, y).0[0] == instance.label);
    let (x, y) = inside.nth(draws.below(instance.area.max(1))).unwrap_or((x0, y0));
    [x as f32, y as f32]
}

/// The box `[x0, y0, x1, y1]` around the instance, each side moved by up to `jitter` times the box's width or
/// height, within the image. With `jitter` 0 it is tight.
pub fn jittered_box(
    labels: &LabelImage,
    instance: &Instance,
    jitter: f64,
    draws: &mut StepRng,
) -> [f32; 4] {
    let [x0, y0, x1, y1] = instance.bounds.map(f64::from);
    let (right, bottom) = (f64::from(labels.width()) - 1.0, f64::from(labels.height()) - 1.0);
    let mut moved = |side: f64, length: f64, last: f64| {
        (side + (2.0 * draws.uniform() - 1.0) * jitter * length).clamp(0.0, last)
    };
    let (width, height) = (x1 - x0 + 1.0, y1 - y0 + 1.0);
    let xs = [moved(x0, width, right), moved(x1, width, right)];
    let ys = [moved(y0, height, bottom), moved(y1, height, bottom)];
    // Two sides that a large jitter made change places are put in order again.
    [xs[0].min(xs[1]), ys[0].min(ys[1]), xs[0].max(xs[1]), ys[0].max(ys[1])].map(|v| v as f32)
}
