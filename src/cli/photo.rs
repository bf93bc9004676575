//! Images for the model: which files, how they are read, and what was understood of them.

use super::console::Console;
use crate::sam::{
    has_image_ending, is_transparent, Channels, ImageFolder, LargeImage, ReadOptions, Tiling,
    ValueRange,
};
use crate::Result;
use anyhow::bail;
use image::DynamicImage;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Parts of the names of this program's results, between the image's stem and the ending.
const RESULTS: [&str; 3] = ["mask", "overlay", "labels"];

/// How image files are read
#[derive(clap::Args, Clone, Debug)]
pub struct PhotoArguments {
    /// Values of the image that become black and white: auto, type, min-max, percentile or LOW,HIGH
    #[arg(long, default_value = "auto", value_name = "RANGE", allow_hyphen_values = true)]
    range: ValueRange,
    /// Page, frame or channel of an image that has several, from 1
    #[arg(long, value_name = "N")]
    page: Option<usize>,
    /// Channels of a TIFF that become red, green and blue, from 1
    #[arg(long, value_name = "R,G,B")]
    channels: Option<Channels>,
}

impl PhotoArguments {
    /// How images are read.
    pub fn options(&self) -> ReadOptions {
        ReadOptions { range: self.range, page: self.page, channels: self.channels }
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
        if image.has_unnamed_channel() {
            console.note(unnamed_channel(path));
        }
        if image.has_alpha() {
            console
                .note(format!("{}: where it is transparent, it is laid on white", path.display()));
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
        if picture.unnamed_channel {
            console.note(unnamed_channel(path));
        }
        if is_transparent(&picture.image) {
            console.note(format!("{}: transparent pixels are laid on white", path.display()));
        }
        Ok(picture.image)
    }
}

fn unnamed_channel(path: &Path) -> String {
    let name = path.display();
    format!("{name}: its fourth channel has no meaning in the file and is left out; see --page and --channels")
}

/// The images that are named, and those of the folders that are, in the order of their names; no two with one stem.
/// Says what it left alone in the folders.
pub fn images(named: &[PathBuf], console: Console) -> anyhow::Result<Vec<PathBuf>> {
    let mut images = vec![];
    for path in named {
        if !path.is_dir() {
            images.push(path.clone());
            continue;
        }
        let folder = ImageFolder::list(path)?;
        if folder.images.is_empty() {
            return Err(folder.without_image(path).into());
        }
        let stems: BTreeSet<_> =
            folder.images.iter().map(|image| image.with_extension("")).collect();
        let is_result = |image: &PathBuf| {
            let stem = image.with_extension("");
            let kind = stem.extension().and_then(|kind| kind.to_str());
            kind.is_some_and(|kind| RESULTS.contains(&kind))
                && stems.contains(&stem.with_extension(""))
        };
        let (results, found) = folder.images.into_iter().partition::<Vec<_>, _>(is_result);
        let names = results.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy()));
        left_alone(
            path,
            "named as results of this program",
            names.map(Into::into).collect(),
            console,
        );
        left_alone(path, "files and folders that are no image", folder.others, console);
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

/// Says what was left alone in a folder.
fn left_alone(folder: &Path, what: &str, names: Vec<String>, console: Console) {
    let (folder, count) = (folder.display(), names.len());
    if count > 0 {
        console.note(format!(
            "{folder}: left alone, {what}: {count}: {}",
            ImageFolder::shortened(&names)
        ));
    }
}

/// Refuses a name that ends as an image of another format than PNG, which is written.
pub fn named_as_png(path: &Path, what: &str) -> anyhow::Result<()> {
    let is_png = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("png"));
    if has_image_ending(path) && !is_png {
        bail!("{}: the {what} is written as PNG; choose a name that ends in .png", path.display())
    }
    Ok(())
}

/// Refuses results in the place of an image that is read.
pub fn spare<'a>(
    images: &[PathBuf],
    results: impl IntoIterator<Item = &'a PathBuf>,
) -> anyhow::Result<()> {
    let read: BTreeSet<_> = images.iter().flat_map(|path| path.canonicalize()).collect();
    let is_read = |path: &&PathBuf| path.canonicalize().is_ok_and(|path| read.contains(&path));
    match results.into_iter().find(is_read) {
        Some(path) => {
            bail!("{}: is one of the images itself; choose another place", path.display())
        }
        None => Ok(()),
    }
}

/// An image as it is, with nothing to say about it.
pub fn read_plain(path: &Path) -> Result<DynamicImage> {
    Ok(ReadOptions::default().read(path)?.image)
}

/// Whether a file was changed after its result was written.
pub fn is_newer(file: &Path, result: &Path) -> bool {
    let time = |path: &Path| path.metadata().and_then(|found| found.modified());
    matches!((time(file), time(result)), (Ok(file), Ok(result)) if file > result)
}

/// Whether an image is there that can be read to its end.
pub fn is_whole(path: &Path) -> bool {
    read_plain(path).is_ok()
}
