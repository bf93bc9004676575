//! From an image file to RGB of 8 bits, as Pillow and transformers' `convert_to_rgb` do it.

use crate::{Error, Result};
use candle_core::bail;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, ImageResult};
use image::{Rgb, RgbImage, Rgba, RgbaImage};
use std::fs::File;
use std::io::BufReader;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

/// No side of an image may be longer, in pixels.
pub(super) const MAX_SIDE: u32 = 1 << 15;
/// No image may need more memory to decode, in bytes.
const MAX_DECODED: u64 = 1 << 30;

/// Reads an image, its format told by its content rather than its name, and turns it as its EXIF data say that the
/// camera was held: its pixels are where a viewer shows them. A channel may have up to 16 bits, or be a 32-bit float in
/// a TIFF of RGB or RGBA; a TIFF's associated alpha comes back unassociated.
///
/// # Errors
/// - the file cannot be read, is no image or is damaged;
/// - it is a TIFF of another kind, as one of grey floats or 32-bit integers;
/// - it is larger than 32768 pixels a side or 1 GiB decoded.
pub fn read_image(path: impl AsRef<Path>) -> Result<DynamicImage> {
    let path = path.as_ref();
    let mut reader = ImageReader::open(path)
        .and_then(|reader| reader.with_guessed_format())
        .map_err(|e| Error::io(path, e))?;
    let is_tiff = reader.format() == Some(ImageFormat::Tiff);
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED);
    reader.limits(limits.clone());
    let decode = || -> ImageResult<DynamicImage> {
        let mut decoder = reader.into_decoder()?;
        limits.reserve(decoder.total_bytes())?;
        decoder.set_limits(limits)?;
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let mut image = DynamicImage::from_decoder(decoder)?;
        if is_tiff && image.color().has_alpha() && has_associated_alpha(path) {
            image = unassociated(image);
        }
        image.apply_orientation(orientation);
        Ok(image)
    };
    let failed = |why: &str| Error::file(path, format!("cannot be read as an image: {why}"));
    // A decoder that panics on a damaged file (the one for PNG does on a palette that ends within a colour) is no reason
    // to end the process; it has seen nothing but this file.
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(Err(error @ ImageError::Unsupported(_))) if is_tiff => Err(failed(&format!(
            "{error}; a TIFF may hold grey, RGB, RGBA or CMYK of 8 or 16 bits, or RGB or RGBA of floats in 0 to 1; \
             scale other pixels to 8 bits first, for nothing in the file says by how much"
        ))),
        Ok(decoded) => decoded.map_err(|e| failed(&e.to_string())),
        Err(_) => Err(failed("its decoder panicked")),
    }
}

/// Whether the colours of a TIFF are multiplied by its alpha.
fn has_associated_alpha(path: &Path) -> bool {
    const ASSOCIATED: u16 = 1;
    let first = || {
        let mut decoder =
            tiff::decoder::Decoder::new(BufReader::new(File::open(path).ok()?)).ok()?;
        let extra = decoder.find_tag_unsigned_vec::<u16>(tiff::tags::Tag::ExtraSamples);
        extra.ok().flatten()?.first().copied()
    };
    first() == Some(ASSOCIATED)
}

/// The image with colours that are not multiplied by its alpha, computed in 8 bits as Pillow does, or in floats.
fn unassociated(image: DynamicImage) -> DynamicImage {
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
/// Equals transformers' `convert_to_rgb` of an image that Pillow reads, but for what Pillow does not read and for grey
/// of 16 bits, of which Pillow takes the lower 8 and white above.
///
/// # Errors
/// - a float is not in 0 to 1.
pub fn convert_to_rgb(image: &DynamicImage) -> candle_core::Result<RgbImage> {
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
