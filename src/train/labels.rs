//! Masks as label images: 0 is background, every other value is one instance.
//!
//! A mask whose only other value is white (255 in 8 bits, 65535 in 16) is taken as binary, and each of its
//! 8-connected parts becomes an instance. A colour mask has one instance per colour.

use crate::sam::read_image;
use crate::{Error, Result};
use image::{ColorType, GenericImageView, ImageBuffer, ImageReader, Luma};
use std::collections::BTreeMap;
use std::path::Path;

/// A label for each pixel, 0 for the background.
pub type LabelImage = ImageBuffer<Luma<u32>, Vec<u32>>;

/// One object of a label image.
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

/// Reads a mask: gray of 8 or 16 bits, or colour (palettes too).
///
/// # Errors
/// When the file is no image, is a JPEG (whose compression invents labels), holds floats, or is all background.
pub fn read_labels(path: impl AsRef<Path>) -> Result<LabelImage> {
    let path = path.as_ref();
    let format = ImageReader::open(path)
        .and_then(ImageReader::with_guessed_format)
        .map_err(|e| Error::io(path, e))?
        .format();
    if format == Some(image::ImageFormat::Jpeg) {
        return Err(Error::file(
            path,
            "a mask must be stored without loss, as PNG or TIFF, not as JPEG",
        ));
    }
    let mask = read_image(path)?;
    let (width, height) = mask.dimensions();
    let (values, white): (Vec<u32>, u32) = match mask.color() {
        ColorType::L8 | ColorType::La8 => {
            (mask.to_luma8().pixels().map(|p| p.0[0].into()).collect(), 0xFF)
        }
        ColorType::L16 | ColorType::La16 => {
            (mask.to_luma16().pixels().map(|p| p.0[0].into()).collect(), 0xFFFF)
        }
        ColorType::Rgb8 | ColorType::Rgba8 => {
            let packed = |[r, g, b]: [u8; 3]| u32::from_be_bytes([0, r, g, b]);
            (mask.to_rgb8().pixels().map(|p| packed(p.0)).collect(), 0xFF_FFFF)
        }
        other => {
            return Err(Error::file(
                path,
                format!("a mask must be gray or 8-bit colour, not {other:?}"),
            ))
        }
    };
    if values.iter().all(|v| *v == 0) {
        return Err(Error::file(path, "the mask is empty: every pixel is 0, the background"));
    }
    let binary = values.iter().all(|v| *v == 0 || *v == white);
    let labels = LabelImage::from_vec(width, height, values)
        .ok_or_else(|| Error::file(path, "the mask has fewer pixels than its size says"))?;
    Ok(if binary { connected_parts(&labels) } else { labels })
}

/// The 8-connected parts of whatever is not 0, numbered from 1 in reading order.
fn connected_parts(mask: &LabelImage) -> LabelImage {
    let (width, height) = mask.dimensions();
    let mut parts = LabelImage::new(width, height);
    let mut count = 0;
    let mut open = Vec::new();
    for (x, y, pixel) in mask.enumerate_pixels() {
        if pixel.0[0] == 0 || parts.get_pixel(x, y).0[0] != 0 {
            continue;
        }
        count += 1;
        parts.put_pixel(x, y, Luma([count]));
        open.push((x, y));
        while let Some((x, y)) = open.pop() {
            for ny in y.saturating_sub(1)..(y + 2).min(height) {
                for nx in x.saturating_sub(1)..(x + 2).min(width) {
                    if mask.get_pixel(nx, ny).0[0] != 0 && parts.get_pixel(nx, ny).0[0] == 0 {
                        parts.put_pixel(nx, ny, Luma([count]));
                        open.push((nx, ny));
                    }
                }
            }
        }
    }
    parts
}

/// The instances of at least `min_area` pixels, by ascending label.
pub fn find_instances(labels: &LabelImage, min_area: usize) -> Vec<Instance> {
    let mut found: BTreeMap<u32, Instance> = BTreeMap::new();
    for (x, y, pixel) in labels.enumerate_pixels() {
        let label = pixel.0[0];
        if label == 0 {
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

/// Masks of rows as label images, numbered from 1: each in the first one in which it covers no other.
///
/// # Errors
/// When a mask is one, or so many objects lie upon each other that their label images would have more pixels than that
/// of the largest image.
pub(super) fn layers_of(
    masks: impl Iterator<Item = Result<Vec<bool>>>,
    width: u32,
    height: u32,
) -> Result<Vec<LabelImage>> {
    let most = ((1 << 30) / (width as usize * height as usize).max(1)).max(1);
    let mut layers: Vec<LabelImage> = Vec::new();
    for (mask, label) in masks.zip(1..) {
        let mask = mask?;
        let pixels = || mask.iter().enumerate().filter(|(_, inside)| **inside).map(|(i, _)| i);
        let free = layers.iter().position(|layer| pixels().all(|i| layer.as_raw()[i] == 0));
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
        pixels().for_each(|i| values[i] = label);
    }
    Ok(layers)
}

/// The mask of `label` on a coarser grid of `rows` x `cols`, 0 or 1, row-major: each pixel of the grid shows the
/// source pixel that holds its centre. `pitch` is how many source pixels a grid pixel is high and wide.
pub fn mask_on_grid(
    labels: &LabelImage,
    label: u32,
    rows: usize,
    cols: usize,
    pitch: (f64, f64),
) -> Vec<f32> {
    let source = |index: usize, pitch: f64, len: u32| {
        (((index as f64 + 0.5) * pitch) as u32).min(len.saturating_sub(1))
    };
    let (width, height) = labels.dimensions();
    let mut values = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        let y = source(row, pitch.0, height);
        for col in 0..cols {
            let inside = labels.get_pixel(source(col, pitch.1, width), y).0[0] == label;
            values.push(f32::from(u8::from(inside)));
        }
    }
    values
}
