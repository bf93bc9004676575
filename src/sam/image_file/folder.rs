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
            match std::fs::metadata(&path) {
                Ok(found) if found.is_dir() => others.push(format!("{name}/")),
                // Reading a pipe would wait for its writer.
                Ok(found) if !found.is_file() => others.push(name.into_owned()),
                _ if has_image_ending(&path) => images.push(path),
                _ => others.push(name.into_owned()),
            }
        }
        images.sort();
        others.sort();
        Ok(Self { images, others })
    }

    /// The error of a folder without an image.
    pub fn without_image(&self, folder: &Path) -> Error {
        let endings = ENDINGS.join(", ");
        let content = match self.others.is_empty() {
            true => "is empty".into(),
            false => format!("holds {}", Self::shortened(&self.others)),
        };
        Error::file(folder, format!("the folder has no image ({endings}); it {content}"))
    }

    /// The first names of a list, and dots in the place of others.
    pub fn shortened(names: &[String]) -> String {
        let more = if names.len() > NAMES { ", .." } else { "" };
        format!("{}{more}", names[..names.len().min(NAMES)].join(", "))
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
