//! The image files of a folder, told by their names, and what else is there.

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Endings of the files that are taken for images, in small letters.
const ENDINGS: [&str; 13] =
    ["png", "apng", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "gif", "pbm", "pgm", "ppm", "pnm"];
/// Files that systems put into folders; they are left alone as hidden ones are.
const OF_SYSTEMS: [&str; 3] = ["thumbs.db", "ehthumbs.db", "desktop.ini"];
/// How many names stand for all.
const NAMES: usize = 3;

/// The visible content of a folder.
pub(crate) struct ImageFolder {
    /// Image files by their names, in order; links that lead nowhere among them.
    pub images: Vec<PathBuf>,
    /// Names of all others, folders with a slash, in order.
    pub others: Vec<String>,
}

impl ImageFolder {
    /// Lists a folder.
    ///
    /// # Errors
    /// - the folder cannot be read.
    pub fn list(folder: &Path) -> Result<Self> {
        let (mut images, mut others) = (vec![], vec![]);
        for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
            let path = entry.map_err(|e| Error::io(folder, e))?.path();
            let Some(name) = path.file_name().map(|name| name.to_string_lossy()) else { continue };
            if name.starts_with('.') || OF_SYSTEMS.contains(&name.to_lowercase().as_str()) {
                continue;
            }
            match path.is_dir() {
                true => others.push(format!("{name}/")),
                false if has_image_ending(&path) => images.push(path),
                false => others.push(name.into_owned()),
            }
        }
        images.sort();
        others.sort();
        Ok(Self { images, others })
    }

    /// The error of a folder without an image.
    pub fn without_image(&self, folder: &Path) -> Error {
        let (count, first) = (self.others.len(), self.others.iter().take(NAMES));
        let first = first.cloned().collect::<Vec<_>>().join(", ");
        let more = if count > NAMES { ", .." } else { "" };
        let endings = ENDINGS.join(", ");
        let content = if count == 0 { "is empty".into() } else { format!("holds {first}{more}") };
        Error::file(folder, format!("the folder has no image ({endings}); it {content}"))
    }
}

/// Whether an ending, in small letters, is an image's.
pub(crate) fn is_image(ending: &str) -> bool {
    ENDINGS.contains(&ending)
}

/// Whether a file has the ending of an image.
pub(crate) fn has_image_ending(path: &Path) -> bool {
    path.extension().is_some_and(|ending| is_image(&ending.to_string_lossy().to_lowercase()))
}
