//! The files of one image.

use super::super::draw;
use super::super::photo::is_whole;
use crate::sam::{convert_to_rgb, label_image, save_labels, GeneratedMask};
use anyhow::bail;
use image::{DynamicImage, GrayImage, RgbImage};
use serde_json::{json, Value};
use std::path::{Path, PathBuf};

/// Where the files of an image go.
pub struct Results<'a> {
    /// The output folder.
    pub folder: &'a Path,
    /// The image.
    pub image: &'a Path,
    /// Whether each mask gets a file.
    pub each: bool,
}

impl Results<'_> {
    fn file(&self, ending: &str) -> PathBuf {
        let stem = self.image.file_stem().unwrap_or_default().to_string_lossy();
        self.folder.join(format!("{stem}.{ending}"))
    }

    /// The labels' file for so many masks: a PNG, or a TIFF for more than a PNG can number.
    fn labels(&self, masks: usize) -> PathBuf {
        self.file(if masks > 65535 { "labels.tif" } else { "labels.png" })
    }

    /// The image with its masks.
    pub fn overlay(&self) -> PathBuf {
        self.file("overlay.png")
    }

    fn single(&self, index: usize) -> PathBuf {
        self.file(&format!("{:04}.png", index + 1))
    }

    /// Whether all files of so many masks are there and can be read.
    pub fn are_whole(&self, masks: usize) -> bool {
        is_whole(&self.labels(masks))
            && is_whole(&self.overlay())
            && (0..masks).filter(|_| self.each).all(|index| is_whole(&self.single(index)))
    }

    /// Writes the files; returns what a machine wants to know of them.
    pub fn write(&self, image: &DynamicImage, masks: &[GeneratedMask]) -> anyhow::Result<Value> {
        let size = (image.height(), image.width());
        let labels = self.labels(masks.len());
        save_labels(&labels, &label_image(masks, size), size)?;
        let mut overlay = convert_to_rgb(image)?;
        draw_all(&mut overlay, masks);
        draw::save_png(&self.overlay(), &overlay.into())?;
        for (index, mask) in masks.iter().enumerate().filter(|_| self.each) {
            let values = mask.mask.to_mask().into_iter().map(|inside| u8::from(inside) * 255);
            let Some(mask) = GrayImage::from_raw(size.1, size.0, values.collect()) else {
                bail!("{}: a mask is not of the image's size", self.image.display())
            };
            draw::save_png(&self.single(index), &mask.into())?;
        }
        Ok(json!({
            "image": self.image,
            "masks": masks.len(),
            "best_expected_iou": masks.first().map(|mask| mask.iou_score),
            "labels": labels,
            "overlay": self.overlay(),
        }))
    }
}

fn draw_all(image: &mut RgbImage, masks: &[GeneratedMask]) {
    let mut largest_first: Vec<(usize, &GeneratedMask)> = masks.iter().enumerate().collect();
    largest_first.sort_by_key(|(_, mask)| std::cmp::Reverse(mask.mask.area()));
    for (index, mask) in largest_first {
        let inside = mask.mask.to_mask();
        draw::fill(image, &inside, draw::colour(index));
        draw::outline(image, &inside, draw::colour(index));
    }
}
