//! The images of a data set and where their truth is, before any of them is read.

use super::coco;
use super::folder::{on_disk, pairs, Found, Named as NamedPair};
use super::sample::{DatasetOptions, Pair, Truth};
use super::shards::{self, ShardSample, ShardTruth, Shards};
use super::stored::Stored;
use super::summary::Named;
use crate::files::Checksum;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where the images of a data set are and their truth. Several places are read as one with all their files, in the
/// order of the names.
///
/// [Example](crate::train::Dataset)
#[derive(Clone, Debug)]
pub struct DataFiles {
    /// Folders or TARs.
    pub images: Vec<PathBuf>,
    /// Their truth.
    pub truth: TruthFiles,
}

/// Where the truth of images is.
///
/// [Example](crate::train::Dataset)
#[derive(Clone, Debug)]
pub enum TruthFiles {
    /// Masks in folders or TARs, paired with the images by their names.
    Masks(Vec<PathBuf>),
    /// COCO's instances, of images in folders.
    Coco(PathBuf),
    /// In the TARs of the images, in WebDataset's layout.
    Beside,
}

const LEFT_ALONE: &str = "left alone, files and folders beside images and masks";

/// The pairs of a data set, and what there is to tell of them.
pub(super) struct Listing {
    pub pairs: Vec<Pair>,
    /// Everything that is wrong with names.
    pub faults: Vec<Error>,
    /// The place of the truth, for errors.
    pub truth: PathBuf,
    pub notes: Vec<(String, Named)>,
    pub shards: Option<String>,
}

impl Listing {
    /// Lists the pairs of a data set.
    ///
    /// # Errors
    /// - a folder, TAR or file of annotations is unreadable or damaged;
    /// - a place has no image.
    pub fn of(files: &DataFiles, options: &DatasetOptions) -> Result<Self> {
        let DataFiles { images, truth } = files;
        if images.is_empty() {
            return Err(Error::config("a data set has a folder or a TAR of images at least"));
        }
        match truth {
            TruthFiles::Masks(masks) => {
                let Found { pairs: found, faults, left_alone } =
                    pairs(images, masks, &options.suffixes)?;
                let pair =
                    |NamedPair { name, image, mask }| Pair::new(name, image, Truth::Mask(mask));
                let truth = masks.first().cloned().unwrap_or_default();
                let pairs = found.into_iter().map(pair).collect();
                let name = |path: &PathBuf| match path.is_dir() {
                    true => path.display().to_string(),
                    false => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                };
                let mut others = Named::default();
                others.extend(left_alone.iter().map(name));
                let mut notes = vec![];
                if others.count() > 0 {
                    notes.push((LEFT_ALONE.to_string(), others));
                }
                Ok(Self { pairs, faults, truth, notes, shards: None })
            }
            TruthFiles::Coco(annotations) => of_coco(images, annotations, options),
            TruthFiles::Beside => of_shards(images),
        }
    }

    /// Checksum of the names and sizes of all files; of the annotations, too.
    ///
    /// # Errors
    /// - a file cannot be looked at.
    pub fn checksum(&self) -> Result<String> {
        let mut checksum = Checksum::new();
        for Pair { name, image, truth, .. } in &self.pairs {
            let truth = match truth {
                Truth::Mask(file) | Truth::Json(file) => file.len()?.to_string(),
                Truth::Coco(coco) => format!("{coco:?}"),
            };
            checksum.add(name, &image.len()?.to_le_bytes());
            checksum.add("truth", truth.as_bytes());
        }
        self.faults.iter().for_each(|fault| checksum.add("fault", fault.to_string().as_bytes()));
        Ok(checksum.to_string())
    }
}

fn of_coco(images: &[PathBuf], annotations: &Path, options: &DatasetOptions) -> Result<Listing> {
    if let Some(tar) = images.iter().find(|place| place.is_file()) {
        let message =
            "is a file: COCO's annotations take folders; a TAR holds its truth beside its images";
        return Err(Error::file(tar, message));
    }
    let coco::Annotations { images: found, mut faults, left_out } = coco::read(annotations)?;
    let mut by_last_part = Named::default();
    let (mut all, mut names) = (vec![], BTreeMap::new());
    for coco in found {
        let places: Vec<_> = images.iter().map(|folder| on_disk(folder, &coco.file_name)).collect();
        let mut there = places.iter().filter(|(path, _)| path.exists());
        let first = there.next();
        if let (Some((first, _)), Some((second, _))) = (first, there.next()) {
            let message = format!("is in two folders, also as {}", second.display());
            faults.push(Error::file(first, message));
        }
        let Some((image, moved)) = first.or(places.first()).cloned() else { continue };
        if moved {
            by_last_part.add(&coco.file_name);
        }
        let name = Path::new(&coco.file_name)
            .with_extension("")
            .to_string_lossy()
            .replace(['/', '\\', ':'], "_");
        if let Some(other) = names.insert(name.clone(), coco.file_name.clone()) {
            let message = format!("two images are called {name}: {other} and {}", coco.file_name);
            faults.push(Error::file(annotations, message));
        }
        all.push(Pair::new(name, Stored::file(image), Truth::Coco(coco)));
    }
    let mut notes = left_out;
    if options.strict {
        faults.extend(
            notes.iter().map(|(what, named)| {
                Error::file(annotations, format!("{what}: {}", named.count()))
            }),
        );
    }
    if by_last_part.count() > 0 {
        let what = "found under another path, case or ending than their file_name says, images";
        notes.push((what.into(), by_last_part));
    }
    Ok(Listing { pairs: all, faults, truth: annotations.into(), notes, shards: None })
}

fn of_shards(tars: &[PathBuf]) -> Result<Listing> {
    if let Some(folder) = tars.iter().find(|place| place.is_dir()) {
        let message =
            "is a folder: say where its masks are; TARs alone hold them beside their images";
        return Err(Error::file(folder, message));
    }
    let Shards { samples, mut faults, left_alone } = shards::samples(tars)?;
    let truth = tars.first().cloned().unwrap_or_default();
    if samples.is_empty() && faults.is_empty() {
        return Err(Error::file(
            truth,
            "has no sample: an image KEY.jpg with KEY.png, KEY.mask.png or KEY.json",
        ));
    }
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    let shards = format!(
        "{} sample{} in {} shard{}",
        samples.len(),
        plural(samples.len()),
        tars.len(),
        plural(tars.len())
    );
    let (mut pairs, mut names) = (vec![], BTreeMap::new());
    for ShardSample { name, image, truth } in samples {
        if let Some(other) = names.insert(name.clone(), image.path.clone()) {
            faults.push(Error::file(&image.path, format!("has the name of {}", other.display())));
        }
        let truth = match truth {
            ShardTruth::Mask(mask) => Truth::Mask(mask),
            ShardTruth::Json(json) => Truth::Json(json),
        };
        pairs.push(Pair::new(name, image, truth));
    }
    let mut notes = vec![];
    if left_alone.count() > 0 {
        notes.push(("left alone, entries that are no image and no truth".to_string(), left_alone));
    }
    Ok(Listing { pairs, faults, truth, notes, shards: Some(shards) })
}
