//! Whether a mask belongs to an image as it is stored or as its EXIF data turn it, where it has the size of both.
//!
//! Borders of objects are edges of the image. Where they lie on clearly stronger edges once the mask is turned as the
//! image was, the mask was drawn on the stored pixels. That is remarked; the mask is taken to be of the turned image
//! all the same.

use super::labels::LabelImage;
use super::mask::turned;
use image::metadata::Orientation;
use image::{GrayImage, RgbImage};

/// How much stronger the edges have to be.
const CLEAR: f64 = 1.5;
/// Differences of grey below this are noise.
const NOISE: f64 = 4.0;

/// A remark for a mask that fits the stored pixels clearly better than the turned ones.
pub(super) fn remark(
    image: &RgbImage,
    orientation: Orientation,
    labels: &LabelImage,
) -> Option<String> {
    if orientation == Orientation::NoTransforms {
        return None;
    }
    let of_stored = turned(labels, orientation);
    if of_stored.dimensions() != image.dimensions() {
        return None;
    }
    let grey = image::DynamicImage::from(image.clone()).into_luma8();
    let (as_turned, as_stored) = (contrast(&grey, labels)?, contrast(&grey, &of_stored)?);
    (as_stored > CLEAR * as_turned.max(NOISE)).then(|| {
        format!(
            "its borders fit the image as it is stored better than as EXIF turns it (differences of grey of {as_stored:.0} \
             against {as_turned:.0}): turn the mask too, or store the image turned"
        )
    })
}

/// The mean difference of grey between neighbours of different labels.
fn contrast(grey: &GrayImage, labels: &LabelImage) -> Option<f64> {
    let (width, height) = grey.dimensions();
    let (mut sum, mut count) = (0u64, 0u64);
    let mut add = |a: (u32, u32), b: (u32, u32)| {
        if labels.get_pixel(a.0, a.1) != labels.get_pixel(b.0, b.1) {
            let value = |(x, y): (u32, u32)| grey.get_pixel(x, y).0[0];
            sum += u64::from(value(a).abs_diff(value(b)));
            count += 1;
        }
    };
    for y in 0..height {
        for x in 0..width {
            if x + 1 < width {
                add((x, y), (x + 1, y));
            }
            if y + 1 < height {
                add((x, y), (x, y + 1));
            }
        }
    }
    (count > 0).then(|| sum as f64 / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Luma, Rgb};

    #[test]
    fn only_masks_of_the_stored_pixels_are_remarked() {
        let inside = |x: u32, y: u32| (3..9).contains(&x) && (20..28).contains(&y);
        let labels = LabelImage::from_fn(32, 32, |x, y| Luma([u32::from(inside(x, y))]));
        let bright = |on: bool, x: u32| Rgb([if on { 200 } else { 40 } + (x % 5) as u8; 3]);
        let image = |labels: &LabelImage| {
            RgbImage::from_fn(32, 32, |x, y| bright(labels.get_pixel(x, y).0[0] > 0, x))
        };
        for orientation in [
            Orientation::Rotate90,
            Orientation::Rotate180,
            Orientation::Rotate270,
            Orientation::FlipVertical,
            Orientation::Rotate90FlipH,
        ] {
            let turned_image = image(&turned(&labels, orientation));
            let found = remark(&turned_image, orientation, &labels);
            assert!(found.is_some_and(|text| text.contains("as it is stored")), "{orientation:?}");
            assert_eq!(remark(&image(&labels), orientation, &labels), None, "{orientation:?}");
        }
        let flat = RgbImage::new(32, 32);
        assert_eq!(remark(&flat, Orientation::Rotate90, &labels), None);
        assert_eq!(remark(&image(&labels), Orientation::NoTransforms, &labels), None);
    }
}
