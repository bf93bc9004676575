//! Masks as label images: 0 is background, every other value is one instance.

use crate::{Error, Result};
use image::{ImageBuffer, Luma};
use std::collections::BTreeMap;

/// A label for each pixel, 0 for the background.
///
/// [Example](crate::train::PromptKind)
pub type LabelImage = ImageBuffer<Luma<u32>, Vec<u32>>;

/// The label of a pixel that is neither object nor background: it is not trained and not scored.
///
/// [Example](crate::train::interpret)
pub const IGNORED: u32 = u32::MAX;

/// One object of a label image.
///
/// [Example](crate::train::PromptKind)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The value of its pixels.
    pub label: u32,
    /// Which of its sample's label images has it.
    pub layer: usize,
    /// How many it has.
    pub area: usize,
    /// `[x0, y0, x1, y1]`, the first and the last pixel that belongs to it.
    pub bounds: [u32; 4],
}

/// The instances of at least `min_area` pixels, by ascending label.
///
/// [Example](crate::train::PromptKind)
pub fn find_instances(labels: &LabelImage, min_area: usize) -> Vec<Instance> {
    let mut found: BTreeMap<u32, Instance> = BTreeMap::new();
    for (x, y, pixel) in labels.enumerate_pixels() {
        let label = pixel.0[0];
        if label == 0 || label == IGNORED {
            continue;
        }
        let instance = found.entry(label).or_insert(Instance {
            label,
            layer: 0,
            area: 0,
            bounds: [x, y, x, y],
        });
        instance.area += 1;
        let [x0, y0, x1, y1] = instance.bounds;
        instance.bounds = [x0.min(x), y0.min(y), x1.max(x), y1.max(y)];
    }
    found.into_values().filter(|instance| instance.area >= min_area.max(1)).collect()
}

/// The instances of several label images, of at least `min_area` pixels, by ascending label.
pub(super) fn layered(layers: &[LabelImage], min_area: usize) -> Vec<Instance> {
    let mut all: Vec<Instance> = (layers.iter().enumerate())
        .flat_map(|(layer, labels)| {
            find_instances(labels, min_area)
                .into_iter()
                .map(move |found| Instance { layer, ..found })
        })
        .collect();
    all.sort_by_key(|instance| instance.label);
    all
}

/// Objects as label images, numbered from 1: each in the first one in which it covers no other. An object is the places
/// of its pixels in rows.
///
/// # Errors
/// - an object is one;
/// - so many objects lie upon each other that their label images would have more pixels than the largest image.
pub(super) fn layers_of(
    objects: impl Iterator<Item = Result<Vec<usize>>>,
    width: u32,
    height: u32,
) -> Result<Vec<LabelImage>> {
    let most = ((1 << 30) / (width as usize * height as usize).max(1)).max(1);
    let mut layers: Vec<LabelImage> = Vec::new();
    for (pixels, label) in objects.zip(1..) {
        let pixels = pixels?;
        let free = layers.iter().position(|layer| pixels.iter().all(|i| layer.as_raw()[*i] == 0));
        let layer = match free {
            Some(layer) => layer,
            None if layers.len() == most => {
                return Err(Error::config(format!(
                    "more than {most} objects lie upon each other in an image of {width} x {height} pixels"
                )))
            }
            None => {
                layers.push(LabelImage::new(width, height));
                layers.len() - 1
            }
        };
        let values: &mut [u32] = &mut layers[layer];
        pixels.into_iter().for_each(|i| values[i] = label);
    }
    Ok(layers)
}

/// The mask of `label` on a coarser grid of `rows` x `cols`, 0 or 1, row-major. Each pixel of the grid shows the source
/// pixel that holds its centre. `pitch` is how many source pixels a grid pixel is high and wide. An object between all
/// centres gets the pixel of the grid that has most of it, so that no object vanishes.
///
/// [Example](crate::train::PromptKind)
pub fn mask_on_grid(
    labels: &LabelImage,
    label: u32,
    rows: usize,
    cols: usize,
    pitch: (f64, f64),
) -> Vec<f32> {
    let mut values = sampled(labels, rows, cols, pitch, |found| found == label);
    if values.contains(&1.0) {
        return values;
    }
    let cell = |place: u32, pitch: f64, count: usize| {
        (((f64::from(place) + 0.5) / pitch) as usize).min(count.saturating_sub(1))
    };
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for (x, y, _) in labels.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] == label) {
        *counts.entry(cell(y, pitch.0, rows) * cols + cell(x, pitch.1, cols)).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|(place, count)| (*count, std::cmp::Reverse(*place)));
    if let Some(value) = most.and_then(|(place, _)| values.get_mut(place)) {
        *value = 1.0;
    }
    values
}

/// The pixels that are neither object nor background on the grid of [`target`]; `None` if there is none.
pub(super) fn ignored(
    labels: &LabelImage,
    rows: usize,
    cols: usize,
    pitch: (f64, f64),
) -> Option<Vec<f32>> {
    let values = sampled(labels, rows, cols, pitch, |found| found == IGNORED);
    values.contains(&1.0).then_some(values)
}

fn sampled(
    labels: &LabelImage,
    rows: usize,
    cols: usize,
    pitch: (f64, f64),
    inside: impl Fn(u32) -> bool,
) -> Vec<f32> {
    let source = |index: usize, pitch: f64, len: u32| {
        (((index as f64 + 0.5) * pitch) as u32).min(len.saturating_sub(1))
    };
    let (width, height) = labels.dimensions();
    let mut values = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        let y = source(row, pitch.0, height);
        for col in 0..cols {
            let found = labels.get_pixel(source(col, pitch.1, width), y).0[0];
            values.push(f32::from(u8::from(inside(found))));
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wherever a small object lies, its target has a pixel, and the nearest one.
    #[test]
    fn no_object_vanishes() {
        for y in 0..40 {
            for x in 0..40 {
                let labels = LabelImage::from_fn(40, 40, |px, py| {
                    Luma([u32::from((px == x || px == x + 1) && py == y) * 5])
                });
                let found = mask_on_grid(&labels, 5, 4, 4, (10.0, 10.0));
                let place = found.iter().position(|value| *value > 0.0);
                assert_eq!(place, Some((y / 10 * 4 + x / 10) as usize), "{x} {y}");
                assert_eq!(found.iter().sum::<f32>(), 1.0);
            }
        }
        // The grid may end before the image does, and a label may be nowhere.
        let corner = LabelImage::from_fn(40, 40, |x, y| Luma([u32::from(x == 39 && y == 39)]));
        assert_eq!(mask_on_grid(&corner, 1, 2, 2, (10.0, 10.0)), [0.0, 0.0, 0.0, 1.0]);
        assert_eq!(mask_on_grid(&corner, 2, 2, 2, (10.0, 10.0)), [0.0; 4]);
    }

    #[test]
    fn ignored_pixels_are_no_instance() {
        let labels = LabelImage::from_fn(4, 1, |x, _| Luma([[0, 3, IGNORED, IGNORED][x as usize]]));
        let found = find_instances(&labels, 1);
        assert_eq!(found.iter().map(|i| (i.label, i.area)).collect::<Vec<_>>(), [(3, 1)]);
        assert_eq!(ignored(&labels, 1, 4, (1.0, 1.0)), Some(vec![0.0, 0.0, 1.0, 1.0]));
        assert_eq!(ignored(&LabelImage::new(4, 1), 1, 4, (1.0, 1.0)), None);
    }
}
