//! The prompt a user might give for an instance: a point anywhere on it, or a box around it.
//!
//! ```text
//! a box's side moves by up to  min(jitter * its length, 20 pixels of an image 1024 pixels long)
//! ```

use super::{Instance, LabelImage, StepRng};
use crate::{Error, Result};
use serde::Serialize;

/// Points that an evaluation tries on each instance; one alone says more of the point than of the model.
const EVALUATION_POINTS: usize = 5;

/// Most that a box's side moves, over the image's longer side: 20 pixels of SAM's 1024.
const LARGEST_JITTER: f64 = 20.0 / 1024.0;

/// Which prompts are drawn.
///
/// ```
/// use candle_sam_lora::train::{find_instances, jittered_box, mask_on_grid, random_point};
/// use candle_sam_lora::train::{LabelImage, Prompt, PromptKind, StepRng};
///
/// let labels = LabelImage::from_fn(8, 4, |x, _| image::Luma([(x < 4).into()])); // label 1 on the left
/// let instance = &find_instances(&labels, 1)[0];
/// assert_eq!(instance.area, 16);
/// let mut draws = StepRng::new(42, "prompts", 0); // seed, stream, step
/// let Prompt::Point([x, _]) = PromptKind::Point.draw(&labels, instance, &mut draws) else { panic!() };
/// assert!(x < 4.0);
/// let Prompt::Box(around) = PromptKind::Box { jitter: 0.1 }.draw(&labels, instance, &mut draws) else { panic!() };
/// assert!(around[0] < around[2]);
/// assert!(random_point(&labels, instance, &mut draws)[0] < 4.0);
/// assert!(jittered_box(&labels, instance, 0.0, &mut draws)[2] <= 4.0); // the tight box
/// assert_eq!(mask_on_grid(&labels, 1, 2, 4, (2.0, 2.0)), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
/// ```
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
    /// The one or the other, for all objects of an image.
    Mixed {
        /// Probability of boxes.
        boxes: f64,
        /// As of boxes.
        jitter: f64,
    },
}

/// A prompt for one instance, in pixels of the image.
///
/// [Example](crate::train::PromptKind)
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prompt {
    /// `[x, y]`, on the object.
    Point([f32; 2]),
    /// `[x0, y0, x1, y1]`
    Box([f32; 4]),
}

impl PromptKind {
    /// Refuses a jitter or a probability outside of 0..1.
    ///
    /// # Errors
    /// As said.
    pub fn validate(self) -> Result<()> {
        let (boxes, jitter) = match self {
            Self::Point => return Ok(()),
            Self::Box { jitter } => (1.0, jitter),
            Self::Mixed { boxes, jitter } => (boxes, jitter),
        };
        for (name, value) in [("probability of boxes", boxes), ("box jitter", jitter)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::config(format!("the {name} must be in [0, 1], got {value}")));
            }
        }
        Ok(())
    }

    /// Points or boxes, the kind of one image's prompts.
    pub fn of_image(self, draws: &mut StepRng) -> Self {
        match self {
            Self::Mixed { boxes, jitter } if draws.uniform() < boxes => Self::Box { jitter },
            Self::Mixed { .. } => Self::Point,
            one => one,
        }
    }

    /// A random prompt, for training.
    pub fn draw(self, labels: &LabelImage, instance: &Instance, draws: &mut StepRng) -> Prompt {
        match self.of_image(draws) {
            Self::Point => Prompt::Point(random_point(labels, instance, draws)),
            Self::Box { jitter } | Self::Mixed { jitter, .. } => {
                Prompt::Box(jittered_box(labels, instance, jitter, draws))
            }
        }
    }

    /// The prompts of an evaluation, the same in every run: some points on the instance, or the tight box. A mixture is
    /// evaluated by points.
    pub fn fixed(self, labels: &LabelImage, instance: &Instance) -> Vec<Prompt> {
        match self {
            Self::Point | Self::Mixed { .. } => {
                let mut draws = StepRng::new(0, "evaluation", u64::from(instance.label));
                let point = |_| Prompt::Point(random_point(labels, instance, &mut draws));
                (0..EVALUATION_POINTS).map(point).collect()
            }
            Self::Box { .. } => vec![Prompt::Box(instance.bounds.map(|side| side as f32))],
        }
    }
}

/// A random pixel `[x, y]` of the instance.
///
/// [Example](crate::train::PromptKind)
pub fn random_point(labels: &LabelImage, instance: &Instance, draws: &mut StepRng) -> [f32; 2] {
    let [x0, y0, x1, y1] = instance.bounds;
    let pixels = (y0..=y1).flat_map(|y| (x0..=x1).map(move |x| (x, y)));
    let value = |x, y| labels.get_pixel_checked(x, y).map(|pixel| pixel.0[0]);
    let mut inside = pixels.filter(|&(x, y)| value(x, y) == Some(instance.label));
    let (x, y) = inside.nth(draws.below(instance.area.max(1))).unwrap_or((x0, y0));
    [x as f32, y as f32]
}

/// The box `[x0, y0, x1, y1]` around the instance, each side moved by up to `jitter` times the box's width or
/// height, within the image. No side moves further than 20 pixels of SAM's 1024. With `jitter` 0 it is tight.
///
/// [Example](crate::train::PromptKind)
pub fn jittered_box(
    labels: &LabelImage,
    instance: &Instance,
    jitter: f64,
    draws: &mut StepRng,
) -> [f32; 4] {
    let [x0, y0, x1, y1] = instance.bounds.map(f64::from);
    let (right, bottom) = (f64::from(labels.width()) - 1.0, f64::from(labels.height()) - 1.0);
    let most = LARGEST_JITTER * f64::from(labels.width().max(labels.height()));
    let mut moved = |side: f64, length: f64, last: f64| {
        let reach = (jitter * length).min(most);
        (side + (2.0 * draws.uniform() - 1.0) * reach).clamp(0.0, last)
    };
    let (width, height) = (x1 - x0 + 1.0, y1 - y0 + 1.0);
    let xs = [moved(x0, width, right), moved(x1, width, right)];
    let ys = [moved(y0, height, bottom), moved(y1, height, bottom)];
    // Two sides that a large jitter made change places are put in order again.
    [xs[0].min(xs[1]), ys[0].min(ys[1]), xs[0].max(xs[1]), ys[0].max(ys[1])].map(|v| v as f32)
}
