//! Images for the model: which files, how they are read, and what was understood of them.

use super::console::Console;
use crate::sam::{is_transparent, LargeImage, ReadOptions, Tiling, ValueRange};
use crate::Result;
use anyhow::bail;
use image::DynamicImage;
use std::path::{Path, PathBuf};

/// Endings of the files that are taken as images in a folder.
const ENDINGS: [&str; 9] = ["png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "gif", "pnm"];

/// How image files are read
#[derive(clap::Args, Clone, Debug)]
pub struct PhotoArguments {
    /// Values of the image that become black and white: auto, type, min-max, percentile or LOW,HIGH
    #[arg(long, default_value = "auto", value_name = "RANGE", allow_hyphen_values = true)]
    range: ValueRange,
    /// Page, frame or channel of an image that has several, from 1
    #[arg(long, value_name = "N")]
    page: Option<usize>,
}

impl PhotoArguments {
    /// How images are read.
    pub fn options(&self) -> ReadOptions {
        ReadOptions { range: self.range, page: self.page }
    }

    /// Opens an image that is read in tiles; says if it has several and had to be decoded whole, and
    /// if its values are scaled.
    pub fn open(&self, path: &Path, tiling: &Tiling, console: Console) -> Result<LargeImage> {
        let image = LargeImage::open(path, &self.options())?;
        let several = tiling.tiles(image.size())?.len() > 1;
        if let Some(why) = image.decoded_whole().filter(|_| several) {
            console.note(format!("{}: {why}", path.display()));
        }
        if let Some((low, high)) = image.range() {
            let name = path.display();
            console
                .note(format!("{name}: values {low} to {high} are black to white (see --range)"));
        }
        Ok(image)
    }

    /// Reads an image; says if its values were scaled, are no numbers, and if it is transparent.
    pub fn read(&self, path: &Path, console: Console) -> Result<DynamicImage> {
        let picture = self.options().read(path)?;
        if let Some((low, high)) = picture.range {
            console.note(format!(
                "{}: {}, values {low} to {high} are black to white (see --range)",
                path.display(),
                picture.sample_type
            ));
        }
        if picture.not_numbers > 0 {
            let (name, count) = (path.display(), picture.not_numbers);
            console.note(format!("{name}: {count} samples are no numbers (NaN) and black here"));
        }
        if is_transparent(&picture.image) {
            console.note(format!("{}: transparent pixels are laid on white", path.display()));
        }
        Ok(picture.image)
    }
}

/// The images that are named, and those of the folders that are, in the order of their names; no two with one stem.
pub fn images(named: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut images = vec![];
    for path in named {
        if !path.is_dir() {
            images.push(path.clone());
            continue;
        }
        let ending = |path: &Path| {
            let ending = path.extension().and_then(|ending| ending.to_str());
            ending.is_some_and(|e| ENDINGS.contains(&e.to_ascii_lowercase().as_str()))
        };
        let mut found = vec![];
        for entry in std::fs::read_dir(path)? {
            let path = entry?.path();
            let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            if path.is_file() && ending(&path) && !hidden {
                found.push(path);
            }
        }
        if found.is_empty() {
            bail!("{}: the folder has no image ({})", path.display(), ENDINGS.join(", "))
        }
        found.sort();
        images.extend(found);
    }
    let mut stems: Vec<_> = images.iter().map(|path| (path.file_stem(), path)).collect();
    stems.sort();
    if let Some(two) = stems.windows(2).find(|two| two[0].0 == two[1].0) {
        bail!(
            "{} and {}: the results would have the same names",
            two[0].1.display(),
            two[1].1.display()
        )
    }
    Ok(images)
}

/// An image as it is, with nothing to say about it.
pub fn read_plain(path: &Path) -> Result<DynamicImage> {
    Ok(ReadOptions::default().read(path)?.image)
}

/// Whether an image is there that can be read to its end.
pub fn is_whole(path: &Path) -> bool {
    read_plain(path).is_ok()
}
