//! Masks and prompts drawn into images; pictures written.

use crate::{write_atomic, Error, Result};
use anyhow::anyhow;
use image::{DynamicImage, ImageFormat, ImageResult, Rgb, RgbImage};
use plotters::style::{register_font as register, FontStyle};
use std::io::Cursor;
use std::path::Path;

/// The colour of the truth and of prompts.
pub const WHITE: [u8; 3] = [255; 3];

/// Colours that differ well from their neighbours in the row: hues a golden section apart.
pub fn colour(index: usize) -> [u8; 3] {
    let hue = (0.05 + 0.618_034 * index as f32).fract() * 6.0;
    [5.0, 3.0, 1.0].map(|offset: f32| {
        let k = (offset + hue) % 6.0;
        (255.0 * (1.0 - 0.85 * k.min(4.0 - k).clamp(0.0, 1.0))) as u8
    })
}

/// Tints the pixels of a mask (row-major, of the image's size).
pub fn fill(image: &mut RgbImage, mask: &[bool], colour: [u8; 3]) {
    for (pixel, _) in image.pixels_mut().zip(mask).filter(|(_, inside)| **inside) {
        for (value, tint) in pixel.0.iter_mut().zip(colour) {
            *value = ((u16::from(*value) * 11 + u16::from(tint) * 9) / 20) as u8;
        }
    }
}

/// Colours the pixels of a mask that have a 4-neighbour outside it.
pub fn outline(image: &mut RgbImage, mask: &[bool], colour: [u8; 3]) {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let inside = |x: usize, y: usize| mask.get(y * width + x).copied().unwrap_or(false);
    for y in 0..height {
        for x in 0..width {
            let surrounded = x > 0
                && y > 0
                && x + 1 < width
                && y + 1 < height
                && inside(x - 1, y)
                && inside(x + 1, y)
                && inside(x, y - 1)
                && inside(x, y + 1);
            if inside(x, y) && !surrounded {
                image.put_pixel(x as u32, y as u32, Rgb(colour));
            }
        }
    }
}

/// Draws a cross at a point, or as much of it as the image has.
pub fn cross(image: &mut RgbImage, [x, y]: [f32; 2], colour: [u8; 3]) {
    let arm = (image.width().min(image.height()) / 100).max(2) as i64;
    for step in -arm..=arm {
        dot(image, x as i64 + step, y as i64, colour);
        dot(image, x as i64, y as i64 + step, colour);
    }
}

/// Draws the sides of a box, or as much of them as the image has.
pub fn rectangle(image: &mut RgbImage, sides: [f32; 4], colour: [u8; 3]) {
    let [x0, y0, x1, y1] = sides.map(|side| side as i64);
    for x in x0..=x1 {
        dot(image, x, y0, colour);
        dot(image, x, y1, colour);
    }
    for y in y0..=y1 {
        dot(image, x0, y, colour);
        dot(image, x1, y, colour);
    }
}

fn dot(image: &mut RgbImage, x: i64, y: i64, colour: [u8; 3]) {
    if let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) {
        if let Some(pixel) = image.get_pixel_mut_checked(x, y) {
            *pixel = Rgb(colour);
        }
    }
}

/// The bytes of a PNG.
pub fn png(image: &DynamicImage) -> ImageResult<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}

/// Writes a PNG, atomically.
pub fn save_png(path: &Path, image: &DynamicImage) -> Result<()> {
    let bytes =
        png(image).map_err(|e| Error::file(path, format!("cannot be written as PNG: {e}")))?;
    write_atomic(path, |file| file.write_all(&bytes))
}

/// Makes the font of pictures known as `sans-serif`. It comes with a crate, so a machine without fonts draws too.
pub fn register_font() -> anyhow::Result<()> {
    register("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| anyhow!("the font of pictures is not readable"))
}
