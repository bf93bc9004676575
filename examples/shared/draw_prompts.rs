//! Prompts drawn into photographs.

use image::{Rgb, RgbImage};

/// The colour of the truth and of prompts.
pub const WHITE: [u8; 3] = [255; 3];

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
