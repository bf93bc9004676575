//! From an image to RGB of 8 bits, as Pillow and transformers' `convert_to_rgb` do it.

use candle_core::{bail, Result};
use image::{DynamicImage, Rgb, RgbImage, Rgba, RgbaImage};

/// The image with colours that are not multiplied by its alpha, computed in 8 bits as Pillow does, or in floats.
pub(super) fn unassociated(image: DynamicImage) -> DynamicImage {
    if let DynamicImage::ImageRgba32F(mut pixels) = image {
        for Rgba([red, green, blue, alpha]) in pixels.pixels_mut() {
            for channel in [red, green, blue] {
                *channel = if *alpha == 0.0 { 0.0 } else { *channel / *alpha };
            }
        }
        return pixels.into();
    }
    let mut pixels = rgba8(&image);
    for Rgba([red, green, blue, alpha]) in pixels.pixels_mut() {
        for channel in [red, green, blue] {
            let whole = u32::from(*channel) * 255;
            *channel = whole.checked_div(u32::from(*alpha)).map_or(0, |value| value.min(255) as u8);
        }
    }
    pixels.into()
}

/// An image as RGB of 8 bits: grey is repeated, of 16 bits the upper 8 stay, transparent pixels are laid on white.
///
/// Equals transformers' `convert_to_rgb` of an image that Pillow reads, but for grey of 16 bits. There Pillow takes the
/// lower 8, and white above.
///
/// [Example](crate::sam::read_image)
///
/// # Errors
/// - a float is not in 0 to 1.
pub fn convert_to_rgb(image: &DynamicImage) -> Result<RgbImage> {
    Ok(match image {
        DynamicImage::ImageRgb8(pixels) => pixels.clone(),
        DynamicImage::ImageLuma16(_) | DynamicImage::ImageRgb16(_) => {
            let pixels = image.to_rgb16();
            RgbImage::from_fn(pixels.width(), pixels.height(), |x, y| {
                Rgb(pixels.get_pixel(x, y).0.map(high_byte))
            })
        }
        DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_) => {
            let pixels = image.to_rgba32f();
            let is_outside = |value: &&f32| !(0.0..=1.0).contains(*value);
            if let Some(value) = pixels.as_raw().iter().find(is_outside) {
                bail!("an image of floats must have values in 0 to 1, found {value}")
            }
            RgbImage::from_fn(pixels.width(), pixels.height(), |x, y| {
                let Rgba([red, green, blue, alpha]) = *pixels.get_pixel(x, y);
                let on_white = |channel: f32| channel * alpha + (1.0 - alpha);
                Rgb([red, green, blue].map(|channel| (on_white(channel) * 255.0).round() as u8))
            })
        }
        image if image.color().has_alpha() => {
            let pixels = rgba8(image);
            RgbImage::from_fn(pixels.width(), pixels.height(), |x, y| {
                let Rgba([red, green, blue, alpha]) = *pixels.get_pixel(x, y);
                Rgb([red, green, blue].map(|channel| on_white(channel, alpha)))
            })
        }
        image => image.to_rgb8(),
    })
}

/// Whether an image has pixels that are not opaque, which [`convert_to_rgb`] lays on white.
///
/// [Example](crate::sam::read_image)
pub fn is_transparent(image: &DynamicImage) -> bool {
    image.color().has_alpha() && rgba8(image).pixels().any(|pixel| pixel.0[3] < u8::MAX)
}

/// Grey or colour with alpha; of 16 bits the upper 8.
fn rgba8(image: &DynamicImage) -> RgbaImage {
    match image {
        DynamicImage::ImageLumaA16(_) | DynamicImage::ImageRgba16(_) => {
            let pixels = image.to_rgba16();
            RgbaImage::from_fn(pixels.width(), pixels.height(), |x, y| {
                Rgba(pixels.get_pixel(x, y).0.map(high_byte))
            })
        }
        image => image.to_rgba8(),
    }
}

fn high_byte(value: u16) -> u8 {
    (value >> 8) as u8
}

/// `channel * alpha + 255 * (1 - alpha)`, rounded to the nearest, with alpha as a fraction of 255.
fn on_white(channel: u8, alpha: u8) -> u8 {
    let (channel, alpha) = (u32::from(channel), u32::from(alpha));
    ((channel * alpha + 255 * (255 - alpha) + 127) / 255) as u8
}
