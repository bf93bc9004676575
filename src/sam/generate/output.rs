//! Masks as COCO's JSON.

use super::GeneratedMask;
use crate::{files, Error, Result};
use serde::Serialize;
use std::path::Path;

/// Annotations of images in COCO's JSON, with compressed run lengths; `pycocotools` and its readers take them.
///
/// Beside COCO's fields an annotation has those of segment-anything: `predicted_iou`, `stability_score`,
/// `point_coords`, `crop_box`.
///
/// [Example](crate::sam::label_image)
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
    ///
    /// # Errors
    /// - a mask is of another size, or its bounds are no box within the image; nothing was added then.
    pub fn push(
        &mut self,
        file_name: &str,
        (height, width): (u32, u32),
        masks: &[GeneratedMask],
    ) -> Result<()> {
        for (place, mask) in masks.iter().enumerate() {
            let (size, bounds) = (mask.mask.size(), mask.bounds);
            let [x0, y0, x1, y1] = bounds;
            if size != (height, width) || x0 > x1 || y0 > y1 || x1 >= width || y1 >= height {
                let message = format!(
                    "{file_name}: mask {place} has (height, width) {size:?} and bounds {bounds:?}, the image has \
                     {:?}",
                    (height, width)
                );
                return Err(Error::Config(message));
            }
        }
        if self.categories.is_empty() {
            self.categories.push(CocoCategory { id: 1, name: "object" });
        }
        let image_id = self.images.len() + 1;
        self.images.push(CocoImage { id: image_id, file_name: file_name.into(), width, height });
        for mask in masks {
            let [x0, y0, x1, y1] = mask.bounds;
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
        Ok(())
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
