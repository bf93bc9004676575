//! Label images: a number for each pixel.

use super::GeneratedMask;
use crate::{files, Error, Result};
use image::{ImageBuffer, ImageFormat, Luma};
use std::io::{self, Cursor, Seek, Write};
use std::ops::Range;
use std::path::Path;
use tiff::encoder::colortype::Gray32;
use tiff::encoder::{TiffEncoder, TiffKind};
use tiff::{TiffError, TiffResult};

/// Rows of a strip of [`save_label_strips`].
const STRIP_ROWS: u32 = 64;

/// A number for each pixel of an image of a height and width. It is 0 where there is no mask, else the place of the
/// smallest mask on it, from 1. Masks' pixels outside of the image are left out.
///
/// ```
/// use candle_sam_lora::sam::{geojson_feature, label_image, save_labels};
/// use candle_sam_lora::sam::{CocoAnnotations, Crop, GeneratedMask, Rle};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let mask = |pixels: &[bool]| -> candle_sam_lora::Result<GeneratedMask> {
///     let mask = Rle::from_mask(pixels, (2, 2))?;
///     let (bounds, crop) = (mask.bounds().unwrap(), Crop { left: 0, top: 0, right: 2, bottom: 2 });
///     Ok(GeneratedMask { mask, bounds, iou_score: 0.9, stability_score: 0.95, point: [0.0, 0.0], crop })
/// };
/// let masks = [mask(&[true, true, true, false])?, mask(&[true, false, false, false])?]; // MaskGenerator finds them
/// let labels = label_image(&masks, (2, 2));
/// assert_eq!(labels, [2, 1, 1, 0]); // the smaller mask lies above
/// save_labels(std::env::temp_dir().join("candle-sam-lora-labels.tif"), &labels, (2, 2))?;
/// assert_eq!(geojson_feature(1, &masks[0])["properties"]["area"], 3);
/// let mut coco = CocoAnnotations::default();
/// coco.push("photo.png", (2, 2), &masks)?;
/// coco.save(std::env::temp_dir().join("candle-sam-lora-annotations.json"))?;
/// # Ok(())
/// # }
/// ```
pub fn label_image(masks: &[GeneratedMask], (height, width): (u32, u32)) -> Vec<u32> {
    label_rows(masks, &largest_first(masks), (0..height, width))
}

fn largest_first(masks: &[GeneratedMask]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..masks.len()).collect();
    order.sort_by_cached_key(|index| std::cmp::Reverse(masks[*index].mask.area()));
    order
}

/// The labels of some rows, the masks painted in `order`.
fn label_rows(
    masks: &[GeneratedMask],
    order: &[usize],
    (rows, width): (Range<u32>, u32),
) -> Vec<u32> {
    let mut labels = vec![0; rows.len() * width as usize];
    for index in order {
        let mask = &masks[*index];
        let [_, top, _, bottom] = mask.bounds;
        if top >= rows.end || bottom < rows.start {
            continue;
        }
        for (x, y0, y1) in mask.mask.pieces().filter(|piece| piece.0 < width) {
            for y in y0.max(rows.start)..y1.min(rows.end) {
                labels[(y - rows.start) as usize * width as usize + x as usize] = *index as u32 + 1;
            }
        }
    }
    labels
}

/// Writes labels of rows as an image of one channel, by the ending of `path`: a PNG of 16 bits or a TIFF of 32.
///
/// [Example](crate::sam::label_image)
///
/// # Errors
/// - the ending is neither `png` nor `tif` nor `tiff`;
/// - a label is too large for a PNG;
/// - there are not `height * width` labels, or the file cannot be written.
pub fn save_labels(
    path: impl AsRef<Path>,
    labels: &[u32],
    (height, width): (u32, u32),
) -> Result<()> {
    let path = path.as_ref();
    let invalid = |message: String| Error::file(path, message);
    if labels.len() as u64 != u64::from(height) * u64::from(width) {
        return Err(invalid(format!("{} labels for {width} x {height} pixels", labels.len())));
    }
    let mut bytes = Cursor::new(vec![]);
    match ending(path).as_str() {
        "png" => {
            let small: Option<Vec<u16>> =
                labels.iter().map(|label| u16::try_from(*label).ok()).collect();
            let Some(small) = small else {
                let message =
                    "more than 65535 objects need 32 bits: choose a name that ends in .tif";
                return Err(invalid(message.into()));
            };
            ImageBuffer::<Luma<u16>, _>::from_vec(width, height, small)
                .ok_or_else(|| invalid("labels of another size".into()))?
                .write_to(&mut bytes, ImageFormat::Png)
                .map_err(|e| invalid(e.to_string()))?;
        }
        "tif" | "tiff" => {
            TiffEncoder::new(&mut bytes)
                .and_then(|mut tiff| tiff.write_image::<Gray32>(width, height, labels))
                .map_err(|e| invalid(e.to_string()))?;
        }
        other => {
            return Err(invalid(format!("the ending is {other:?}, expected png, tif or tiff")))
        }
    }
    files::write_atomic(path, |file| file.write_all(bytes.get_ref()))
}

fn ending(path: &Path) -> String {
    path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase()
}

/// Writes the [`label_image`] of masks as a TIFF of 32 bits, or a BigTIFF where the labels need more than 4 GiB. It has
/// 64 rows in memory at a time.
///
/// [Example](crate::guide::everything)
///
/// # Errors
/// - the ending of `path` is neither `tif` nor `tiff`;
/// - the file cannot be written.
pub fn save_label_strips(
    path: impl AsRef<Path>,
    masks: &[GeneratedMask],
    size: (u32, u32),
) -> Result<()> {
    let path = path.as_ref();
    let ending = ending(path);
    if !matches!(ending.as_str(), "tif" | "tiff") {
        let message = format!("the ending is {ending:?}, expected tif or tiff");
        return Err(Error::file(path, message));
    }
    // The directory needs room beside the labels.
    let is_big = u64::from(size.0) * u64::from(size.1) * 4 > u64::from(u32::MAX) - (16 << 20);
    let failed = |error: TiffError| match error {
        TiffError::IoError(error) => error,
        other => io::Error::other(other),
    };
    let staged = files::stage_file(path, |file| {
        let written = match is_big {
            true => TiffEncoder::new_big(file).and_then(|tiff| write_strips(tiff, masks, size)),
            false => TiffEncoder::new(file).and_then(|tiff| write_strips(tiff, masks, size)),
        };
        written.map_err(failed)
    })?;
    staged.commit()
}

fn write_strips<W: Write + Seek, K: TiffKind>(
    mut tiff: TiffEncoder<W, K>,
    masks: &[GeneratedMask],
    (height, width): (u32, u32),
) -> TiffResult<()> {
    let order = largest_first(masks);
    let mut image = tiff.new_image::<Gray32>(width, height)?;
    image.rows_per_strip(STRIP_ROWS)?;
    for top in (0..height).step_by(STRIP_ROWS as usize) {
        let rows = top..height.min(top + STRIP_ROWS);
        image.write_strip(&label_rows(masks, &order, (rows, width)))?;
    }
    image.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sam::{Crop, Rle};
    use tiff::decoder::{Decoder, DecodingResult};

    /// The file of an image beyond 4 GiB, at a size that a test can write.
    #[test]
    fn big_tiffs_hold_the_labels() -> Result<()> {
        let size = (150, 9);
        let inside: Vec<bool> = (0..150 * 9).map(|place| place % 9 > 4 && place > 300).collect();
        let mask = Rle::from_mask(&inside, size)?;
        let masks = [GeneratedMask {
            bounds: mask.bounds().unwrap_or_default(),
            mask,
            iou_score: 0.9,
            stability_score: 0.9,
            point: [0.0; 2],
            crop: Crop { left: 0, top: 0, right: 9, bottom: 150 },
        }];
        let mut bytes = Cursor::new(vec![]);
        let read = TiffEncoder::new_big(&mut bytes)
            .and_then(|tiff| write_strips(tiff, &masks, size))
            .and_then(|()| Decoder::new(Cursor::new(bytes.get_ref()))?.read_image());
        assert!(bytes.get_ref().starts_with(b"II+\0"));
        match read {
            Ok(DecodingResult::U32(labels)) => assert_eq!(labels, label_image(&masks, size)),
            other => panic!("{other:?}"),
        }
        Ok(())
    }
}
