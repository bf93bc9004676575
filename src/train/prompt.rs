//! The prompt a user might give for an instance: a point inside it, or a box around it.
//!
//! A point is drawn from the pixels that are well inside: at least half as far from the outside as the deepest
//! one is. The distance is counted in steps to a 4-neighbour, and beyond the image's border is outside.

use super::{Draws, Instance, LabelImage};
use serde::Serialize;

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
    pub fn draw(self, labels: &LabelImage, instance: &Instance, draws: &mut Draws) -> Prompt {
        match self {
            Self::Point => Prompt::Point(interior_point(labels, instance, draws)),
            Self::Box { jitter } => Prompt::Box(jittered_box(labels, instance, jitter, draws)),
        }
    }

    /// The central point or the tight box, for evaluation.
    pub fn central(self, labels: &LabelImage, instance: &Instance) -> Prompt {
        match self {
            Self::Point => Prompt::Point(central_point(labels, instance)),
            Self::Box { .. } => Prompt::Box(instance.bounds.map(|side| side as f32)),
        }
    }
}

/// A random point `[x, y]` well inside the instance, in pixels of the image.
pub fn interior_point(labels: &LabelImage, instance: &Instance, draws: &mut Draws) -> [f32; 2] {
    let depths = Depths::new(labels, instance);
    let enough = depths.deepest().div_ceil(2).max(1);
    let candidates = depths.at_least(enough);
    let chosen = if candidates.is_empty() { 0 } else { draws.below(candidates.len()) };
    depths.point(candidates.get(chosen).copied())
}

/// The first, in reading order, of the points that are deepest inside: the prompt of an evaluation.
pub fn central_point(labels: &LabelImage, instance: &Instance) -> [f32; 2] {
    let depths = Depths::new(labels, instance);
    depths.point(depths.at_least(depths.deepest().max(1)).first().copied())
}

/// The box `[x0, y0, x1, y1]` around the instance, each side moved by up to `jitter` times the box's width or
/// height, within the image. With `jitter` 0 it is tight.
pub fn jittered_box(
    labels: &LabelImage,
    instance: &Instance,
    jitter: f64,
    draws: &mut Draws,
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

/// Steps to the outside for each pixel of an instance's box, 0 outside.
struct Depths {
    x0: u32,
    y0: u32,
    width: usize,
    depths: Vec<u32>,
}

impl Depths {
    fn new(labels: &LabelImage, instance: &Instance) -> Self {
        let [x0, y0, x1, y1] = instance.bounds;
        let (width, height) = ((x1 - x0 + 1) as usize, (y1 - y0 + 1) as usize);
        let mut depths = vec![0u32; width * height];
        // Two sweeps give the exact city-block distance.
        for y in 0..height {
            for x in 0..width {
                if labels.get_pixel(x0 + x as u32, y0 + y as u32).0[0] == instance.label {
                    let left = if x > 0 { depths[y * width + x - 1] } else { 0 };
                    let above = if y > 0 { depths[(y - 1) * width + x] } else { 0 };
                    depths[y * width + x] = 1 + left.min(above);
                }
            }
        }
        for y in (0..height).rev() {
            for x in (0..width).rev() {
                let right = if x + 1 < width { depths[y * width + x + 1] } else { 0 };
                let below = if y + 1 < height { depths[(y + 1) * width + x] } else { 0 };
                let here = &mut depths[y * width + x];
                *here = (*here).min(1 + right.min(below));
            }
        }
        Self { x0, y0, width, depths }
    }

    fn deepest(&self) -> u32 {
        self.depths.iter().copied().max().unwrap_or(0)
    }

    fn at_least(&self, depth: u32) -> Vec<usize> {
        (0..self.depths.len()).filter(|&i| self.depths[i] >= depth).collect()
    }

    fn point(&self, index: Option<usize>) -> [f32; 2] {
        let index = index.unwrap_or(0);
        let (x, y) = (index % self.width, index / self.width);
        [(self.x0 + x as u32) as f32, (self.y0 + y as u32) as f32]
    }
}
