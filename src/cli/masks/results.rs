//! The files of one image.

use super::super::draw;
use super::super::photo::{is_newer, is_whole};
use crate::sam::{
    convert_to_rgb, label_image, save_geojson, save_label_strips, save_labels, Crop, Generated,
    GeneratedMask, LargeImage,
};
use anyhow::bail;
use image::{GrayImage, RgbImage};
use serde::de::IgnoredAny;
use serde_json::{json, Value};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use tiff::decoder::Decoder;
use tiff::TiffResult;

/// Images of more pixels are large: they had better be segmented in tiles.
pub fn is_large((height, width): (u32, u32)) -> bool {
    u64::from(height) * u64::from(width) > 50_000_000
}

/// The highest IoU that the model expects of a mask.
pub fn best_iou(masks: &[GeneratedMask]) -> Option<f32> {
    masks.iter().map(|mask| mask.iou_score).max_by(f32::total_cmp)
}

/// Where the files of an image go.
pub struct Results<'a> {
    /// The output folder.
    pub folder: &'a Path,
    /// The image.
    pub image: &'a Path,
    /// Whether each mask gets a file.
    pub each: bool,
    /// Whether the masks are written as polygons.
    pub geojson: bool,
    /// Whether the image is segmented in tiles.
    pub tiled: bool,
}

impl Results<'_> {
    fn file(&self, ending: &str) -> PathBuf {
        let stem = self.image.file_stem().unwrap_or_default().to_string_lossy();
        self.folder.join(format!("{stem}.{ending}"))
    }

    /// The labels' file for so many masks: a PNG, or a TIFF for tiles and for more than a PNG can number.
    fn labels(&self, masks: usize) -> PathBuf {
        self.file(if self.tiled || masks > 65535 { "labels.tif" } else { "labels.png" })
    }

    fn geojson(&self) -> Option<PathBuf> {
        self.geojson.then(|| self.file("geojson"))
    }

    /// Whether an overlay is drawn: a large image in tiles need not fit into memory.
    pub fn is_drawn(&self, size: (u32, u32)) -> bool {
        !(self.tiled && is_large(size))
    }

    /// The image with its masks.
    pub fn overlay(&self) -> PathBuf {
        self.file("overlay.png")
    }

    /// The files that an image may get, but for single masks after the first.
    pub fn all(&self) -> Vec<PathBuf> {
        let labels = [0, usize::MAX].map(|masks| self.labels(masks));
        let first = self.each.then(|| self.single(0));
        labels.into_iter().chain([self.overlay()]).chain(self.geojson()).chain(first).collect()
    }

    fn single(&self, index: usize) -> PathBuf {
        self.file(&format!("{:04}.png", index + 1))
    }

    /// Whether all files of an image of this size and of so many masks are there, can be read, and are not older than
    /// it.
    pub fn are_whole(&self, size: (u32, u32), masks: usize) -> bool {
        let labels = self.labels(masks);
        !is_newer(self.image, &labels)
            && (if self.tiled { has_all_strips(&labels) } else { is_whole(&labels) })
            && (!self.is_drawn(size) || is_whole(&self.overlay()))
            && self.geojson().is_none_or(|path| is_json(&path))
            && (0..masks).filter(|_| self.each).all(|index| is_whole(&self.single(index)))
    }

    /// Writes the files; returns what a machine wants to know of them.
    pub fn write(&self, image: &mut LargeImage, found: &Generated) -> anyhow::Result<Value> {
        let (size, masks) = (image.size(), &found.masks);
        let labels = self.labels(masks.len());
        match self.tiled {
            true => save_label_strips(&labels, masks, size)?,
            false => save_labels(&labels, &label_image(masks, size), size)?,
        }
        let (geojson, overlay) = (self.geojson(), self.is_drawn(size).then(|| self.overlay()));
        if let Some(path) = &geojson {
            save_geojson(path, masks)?;
        }
        if let Some(path) = &overlay {
            let whole = Crop { left: 0, top: 0, right: size.1, bottom: size.0 };
            let mut picture = convert_to_rgb(&image.region(&whole)?)?;
            draw_all(&mut picture, masks);
            draw::save_png(path, &picture.into())?;
        }
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
            "best_expected_iou": best_iou(masks),
            "statistics": found.statistics,
            "labels": labels,
            "overlay": overlay,
            "geojson": geojson,
        }))
    }
}

/// Whether a TIFF can be read to its end, strip by strip: it may be larger than memory.
fn has_all_strips(path: &Path) -> bool {
    let read = |file: File| -> TiffResult<()> {
        let mut tiff = Decoder::new(BufReader::new(file))?;
        (0..tiff.strip_count()?).try_for_each(|strip| tiff.read_chunk(strip).map(drop))
    };
    File::open(path).is_ok_and(|file| read(file).is_ok())
}

/// Whether a file holds JSON to its end.
fn is_json(path: &Path) -> bool {
    let read = |file| serde_json::from_reader::<_, IgnoredAny>(BufReader::new(file));
    File::open(path).is_ok_and(|file| read(file).is_ok())
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
