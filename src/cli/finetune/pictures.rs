//! Pictures of held-out images with what a model found in them.

use super::super::draw;
use crate::sam::Rle;
use crate::train::{ImageEvaluation, Prompt, Sample};
use image::{imageops, RgbImage};

/// Small images are enlarged to about this width.
const PANEL: u32 = 400;

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
    let (mut image, factor) = enlarged(sample);
    for (index, found) in evaluation.masks.iter().enumerate() {
        let window = found.window();
        let pixels = found.pixels();
        let inside = |x: u32, y: u32| pixels[(y * window[2] + x) as usize];
        in_window(&mut image, window, factor, &inside, |part, mask| {
            draw::fill(part, mask, draw::colour(index));
        });
    }
    outline_truth(&mut image, sample, factor);
    for prompt in &evaluation.prompts {
        let place = |value: f32| (value + 0.5) * factor as f32;
        match prompt {
            Prompt::Point(point) => draw::cross(&mut image, point.map(place), draw::WHITE),
            Prompt::Box(sides) => draw::rectangle(&mut image, sides.map(place), draw::WHITE),
        }
    }
    image
}

/// The image with masks that were found without a prompt in colour, the best above, and the truth's outlines in white.
pub fn automatic_picture<'a>(
    sample: &Sample,
    masks: impl DoubleEndedIterator<Item = &'a Rle>,
) -> RgbImage {
    let (mut image, factor) = enlarged(sample);
    let masks: Vec<&Rle> = masks.collect();
    for (index, mask) in masks.iter().enumerate().rev() {
        let Some([x0, y0, x1, y1]) = mask.bounds() else { continue };
        let (pixels, width) = (mask.to_mask(), mask.size.1);
        let inside = |x: u32, y: u32| pixels[((y0 + y) * width + x0 + x) as usize];
        let window = [x0, y0, x1 - x0 + 1, y1 - y0 + 1];
        in_window(&mut image, window, factor, &inside, |part, mask| {
            draw::fill(part, mask, draw::colour(index));
        });
    }
    outline_truth(&mut image, sample, factor);
    image
}

/// The image, enlarged if it is small, and by how much.
fn enlarged(sample: &Sample) -> (RgbImage, u32) {
    let (width, height) = sample.image.dimensions();
    let factor = (PANEL / width.max(height)).max(1);
    let (width, height) = (width * factor, height * factor);
    (imageops::resize(&sample.image, width, height, imageops::FilterType::Triangle), factor)
}

fn outline_truth(image: &mut RgbImage, sample: &Sample, factor: u32) {
    for instance in &sample.instances {
        let Ok(labels) = sample.labels(instance) else { continue };
        let [x0, y0, x1, y1] = instance.bounds;
        let inside = |x: u32, y: u32| labels.get_pixel(x0 + x, y0 + y).0[0] == instance.label;
        let window = [x0, y0, x1 - x0 + 1, y1 - y0 + 1];
        in_window(image, window, factor, &inside, |part, mask| {
            draw::outline(part, mask, draw::WHITE);
        });
    }
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
