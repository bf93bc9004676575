//! Masks as others read them: COCO's JSON, label images.

use super::GeneratedMask;
use crate::{files, Error, Result};
use image::{ImageBuffer, ImageFormat, Luma};
use serde::Serialize;
use std::io::Cursor;
use std::path::Path;
use tiff::encoder::{colortype::Gray32, TiffEncoder};

/// Annotations of images in COCO's JSON, with compressed run lengths; `pycocotools` and its readers take them.
///
/// Beside COCO's fields an annotation has those of segment-anything: `predicted_iou`, `stability_score`,
/// `point_coords`, `crop_box`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CocoAnnotations {
    images: Vec<CocoImage>,
    annotations: Vec<CocoAnnotation>,
    categories: Vec<CocoCategory>,
}

#[derive(Clone, Debug, Serialize)]
struct CocoImage {
    id: usize,
    file_name: String,
    width: u32,
    height: u32,
}

#[derive(Clone, Debug, Serialize)]
struct CocoAnnotation {
    id: usize,
    image_id: usize,
    category_id: usize,
    segmentation: CocoRuns,
    area: u64,
    /// Left, top, width and height.
    bbox: [u32; 4],
    iscrowd: u8,
    predicted_iou: f32,
    stability_score: f32,
    point_coords: [[f32; 2]; 1],
    crop_box: [u32; 4],
}

#[derive(Clone, Debug, Serialize)]
struct CocoRuns {
    size: [u32; 2],
    counts: String,
}

#[derive(Clone, Debug, Serialize)]
struct CocoCategory {
    id: usize,
    name: &'static str,
}

impl CocoAnnotations {
    /// Adds an image of a height and width and its masks, all of the one category "object".
    pub fn push(&mut self, file_name: &str, (height, width): (u32, u32), masks: &[GeneratedMask]) {
        if self.categories.is_empty() {
            self.categories.push(CocoCategory { id: 1, name: "object" });
        }
        let image_id = self.images.len() + 1;
        self.images.push(CocoImage { id: image_id, file_name: file_name.into(), width, height });
        for mask in masks {
            let [x0, y0, x1, y1] = mask.bounds;
            let (height, width) = mask.mask.size();
            self.annotations.push(CocoAnnotation {
                id: self.annotations.len() + 1,
                image_id,
                category_id: 1,
                segmentation: CocoRuns { size: [height, width], counts: mask.mask.compressed() },
                area: mask.mask.area(),
                bbox: [x0, y0, x1 - x0 + 1, y1 - y0 + 1],
                iscrowd: 0,
                predicted_iou: mask.iou_score,
                stability_score: mask.stability_score,
                point_coords: [mask.point],
                crop_box: [mask.crop.left, mask.crop.top, mask.crop.width(), mask.crop.height()],
            });
        }
    }

    /// Writes the file, or leaves what was there.
    ///
    /// # Errors
    /// - the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let text = serde_json::to_vec(self).map_err(|e| Error::file(path, e.to_string()))?;
        files::write_atomic(path, |file| file.write_all(&text))
    }
}

/// A number for each pixel of an image of a height and width: 0 where there is no mask, else the place of the smallest
/// mask that has it, from 1.
pub fn label_image(masks: &[GeneratedMask], (height, width): (u32, u32)) -> Vec<u32> {
    let mut labels = vec![0; height as usize * width as usize];
    let mut order: Vec<usize> = (0..masks.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(masks[*index].mask.area()));
    for index in order {
        let pixels = masks[index].mask.to_mask();
        for (label, _) in labels.iter_mut().zip(pixels).filter(|(_, inside)| *inside) {
            *label = index as u32 + 1;
        }
    }
    labels
}

/// Writes labels of rows as an image of one channel, by the ending of `path`: a PNG of 16 bits or a TIFF of 32.
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
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    match ending.to_ascii_lowercase().as_str() {
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
