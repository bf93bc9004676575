//! Masks that are none by their values: soft edges, traces of JPEG, photographs.
//!
//! The values of a mask form areas. Where almost every area of equal values has three pixels or fewer, values are no
//! labels. Such pixels still show objects if they have two levels. Then most of the dark ones are black, most of the
//! bright ones white, and fewer lie between.

use super::parts::parts;

/// Areas of so few pixels are tiny.
const TINY: usize = 3;
/// So many areas are judged at least.
const FEWEST: usize = 8;

/// Whether the values are noise and no labels. Areas of `background` do not count.
pub(super) fn is_noise(values: &[i64], width: usize, background: i64) -> bool {
    let (_, areas) = parts(values, width, false, |value| value != background);
    let tiny = areas.iter().filter(|part| part.area <= TINY).count();
    tiny >= FEWEST && tiny * 5 >= areas.len() * 4
}

/// The value from which pixels belong to objects, if there are two levels.
pub(super) fn threshold(values: &[i64]) -> Option<i64> {
    let (low, high) = (*values.iter().min()?, *values.iter().max()?);
    // Hundredths of the range that a value is above the lowest.
    let range = i128::from(high) - i128::from(low);
    let level = |value: i64| (i128::from(value) - i128::from(low)) * 100 / range.max(1);
    let count = |from: i128, to: i128| {
        values.iter().map(|value| level(*value)).filter(|level| (from..=to).contains(level)).count()
    };
    let (dark, black, between) = (count(0, 24), count(0, 5), count(25, 74));
    let (bright, white) = (count(75, 100), count(94, 100));
    let two = 4 * black >= 3 * dark && 2 * white >= bright && between <= bright;
    (two && range > 0 && black > 0 && white > 0)
        .then(|| i64::try_from(i128::from(low) + range / 2 + 1).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{imageops, DynamicImage, GrayImage, Luma};

    /// Disks, white on black.
    fn disks(width: u32, height: u32) -> GrayImage {
        let centres = [(20, 15, 9), (60, 40, 15), (25, 60, 6), (90, 20, 12)];
        GrayImage::from_fn(width, height, |x, y| {
            let inside = centres
                .iter()
                .any(|(cx, cy, r)| (x as i32 - cx).pow(2) + (y as i32 - cy).pow(2) < r * r);
            Luma([if inside { 255 } else { 0 }])
        })
    }

    fn values(image: &GrayImage) -> Vec<i64> {
        image.pixels().map(|pixel| i64::from(pixel.0[0])).collect()
    }

    /// The share of pixels that the threshold puts on the right side.
    fn right(soft: &GrayImage, truth: &GrayImage) -> f64 {
        let found = values(soft);
        assert!(is_noise(&found, soft.width() as usize, 0));
        let threshold = threshold(&found).expect("two levels");
        let agree = found.iter().zip(truth.pixels());
        let agree = agree.filter(|(value, truth)| (**value >= threshold) == (truth.0[0] > 127));
        agree.count() as f64 / found.len() as f64
    }

    #[test]
    fn soft_edges_and_jpegs_are_cut_at_half() {
        let truth = disks(110, 80);
        for quality in [30, 60, 75, 90, 98] {
            let mut jpeg = std::io::Cursor::new(Vec::new());
            let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, quality);
            truth.write_with_encoder(encoder).expect("a JPEG");
            let read = image::load_from_memory(jpeg.get_ref()).expect("an image").to_luma8();
            assert!(right(&read, &truth) > 0.995, "quality {quality}");
        }
        for sigma in [0.8, 1.5] {
            assert!(right(&imageops::blur(&truth, sigma), &truth) > 0.98, "blurred by {sigma}");
        }
        for filter in [imageops::FilterType::Triangle, imageops::FilterType::CatmullRom] {
            let large = imageops::resize(&truth, 250, 170, filter);
            let nearest = imageops::resize(&truth, 250, 170, imageops::FilterType::Nearest);
            assert!(right(&large, &nearest) > 0.98);
        }
    }

    #[test]
    fn labels_are_no_noise() {
        let labels: Vec<i64> = (0..10_000).map(|i| (i % 100 / 7) + 15 * (i / 100 / 9)).collect();
        assert!(!is_noise(&labels, 100, 0));
        let dots: Vec<i64> =
            (0..10_000).map(|i| i64::from(i % 100 % 4 < 2) * (1 + i / 4)).collect();
        assert!(is_noise(&dots, 100, 0), "a value for every two pixels");
        assert!(!is_noise(&values(&disks(110, 80)), 110, 0));
    }

    #[test]
    fn photographs_have_no_two_levels() {
        let photograph = DynamicImage::from(GrayImage::from_fn(100, 100, |x, y| {
            let disk = (x as i32 - 50).pow(2) + (y as i32 - 50).pow(2) < 900;
            Luma([(if disk { 150 } else { 30 }) + ((x * 37 + y * 91 + x * y) % 53) as u8])
        }));
        let photograph = values(&photograph.to_luma8());
        assert!(is_noise(&photograph, 100, 0));
        assert_eq!(threshold(&photograph), None);
        assert_eq!(threshold(&[]), None);
        assert_eq!(threshold(&[7, 7]), None);
        assert_eq!(threshold(&[i64::MIN, i64::MAX]), Some(0));
    }
}
