//! Samples of TARs in WebDataset's layout: the entries of one key are one sample.
//!
//! ```text
//! key         the entry's path up to the first dot of its last part
//! image       KEY.jpg, KEY.image.png, or KEY.png beside a mask of another name
//! its truth   KEY.mask.png, or KEY.png beside KEY.jpg, or KEY.json with annotations as COCO's or SA-1B's
//! ```
//! Samples are in the order of their keys, in however many TARs. So they are those of a folder with the same files.

use super::stored::Stored;
use super::summary::Named;
use super::tar_file::{self, TarEntry};
use crate::sam::is_image;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// First parts of endings, as in `KEY.mask.png`.
const IMAGE_FIELDS: [&str; 3] = ["image", "img", "input"];
const MASK_FIELDS: [&str; 6] = ["mask", "masks", "seg", "segmentation", "label", "labels"];
/// Endings of images that are stored with loss, and so are no masks.
const LOSSY: [&str; 3] = ["jpg", "jpeg", "webp"];

/// A sample of a TAR.
pub(super) struct ShardSample {
    /// Its key, `/` as `_`.
    pub name: String,
    pub image: Stored,
    pub truth: ShardTruth,
}

/// Its truth.
pub(super) enum ShardTruth {
    Mask(Stored),
    Json(Stored),
}

/// The samples of some TARs.
pub(super) struct Shards {
    pub samples: Vec<ShardSample>,
    /// Everything that is wrong with their entries.
    pub faults: Vec<Error>,
    /// Entries that belong to no sample, or are not needed.
    pub left_alone: Named,
}

/// The entries of a key.
#[derive(Default)]
struct Fields {
    images: Vec<(String, Stored)>,
    masks: Vec<(String, Stored)>,
    json: Vec<(String, Stored)>,
    /// Images that may be masks: neither is said.
    plain: Vec<(String, Stored)>,
    others: Vec<String>,
}

/// Finds the samples of TARs.
///
/// # Errors
/// - a file is no TAR, or damaged.
pub(super) fn samples(tars: &[PathBuf]) -> Result<Shards> {
    let mut shards = Shards { samples: vec![], faults: vec![], left_alone: Named::default() };
    let mut keys: BTreeMap<String, (&Path, Fields)> = BTreeMap::new();
    for (index, tar) in tars.iter().enumerate() {
        if tars[..index].contains(tar) {
            shards.faults.push(Error::file(tar, "is named twice"));
            continue;
        }
        for TarEntry { name, stored } in tar_file::entries(tar, &mut shards.faults)? {
            let (key, ending) = key_and_ending(&name);
            let (home, fields) =
                keys.entry(key.to_string()).or_insert_with(|| (tar, Fields::default()));
            if *home != tar.as_path() {
                let message = format!("the key {key} is in {} too", home.display());
                shards.faults.push(Error::file(&stored.path, message));
                continue;
            }
            fields.add(&ending, name, stored);
        }
    }
    for (key, (tar, fields)) in keys {
        if let Some(sample) = fields.sample(&key, tar, &mut shards) {
            shards.samples.push(sample);
        }
    }
    Ok(shards)
}

/// The path up to the first dot of its last part, and the rest in small letters.
fn key_and_ending(name: &str) -> (&str, String) {
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[last..].find('.') {
        Some(dot) => (&name[..last + dot], name[last + dot + 1..].to_lowercase()),
        None => (name, String::new()),
    }
}

impl Fields {
    fn add(&mut self, ending: &str, name: String, stored: Stored) {
        let (field, kind) = ending.split_once('.').unwrap_or(("", ending));
        let place = match (field, kind) {
            ("", "json") => &mut self.json,
            (_, kind) if !is_image(kind) => return self.others.push(name),
            ("", kind) if LOSSY.contains(&kind) => &mut self.images,
            ("" | "ome", _) => &mut self.plain,
            (field, _) if IMAGE_FIELDS.contains(&field) => &mut self.images,
            (field, _) if MASK_FIELDS.contains(&field) => &mut self.masks,
            _ => return self.others.push(name),
        };
        place.push((name, stored));
    }

    /// The sample of a key, if it is one; says what is wrong with it, and what is left alone.
    fn sample(mut self, key: &str, tar: &Path, shards: &mut Shards) -> Option<ShardSample> {
        let mut fault = |message: String| {
            shards.faults.push(Error::file(tar, format!("the key {key} {message}")));
        };
        // A plain image is the image, or the mask of the image that is there.
        let role = if self.images.is_empty() { &mut self.images } else { &mut self.masks };
        role.append(&mut self.plain);
        for (what, found) in [("images", &self.images), ("masks", &self.masks)] {
            if let [(first, _), (second, _), ..] = found.as_slice() {
                fault(format!(
                    "has two {what}, {first} and {second}; name its mask {key}.mask.png"
                ));
                return None;
            }
        }
        shards.left_alone.extend(self.others);
        let (image, mask, json) = (self.images.pop(), self.masks.pop(), self.json.pop());
        let json_name = json.as_ref().map(|(name, _)| name.clone());
        let (image, truth) = match (image, mask, json) {
            (Some((_, image)), Some((_, mask)), json) => {
                shards.left_alone.extend(json.map(|(name, _)| name));
                (image, ShardTruth::Mask(mask))
            }
            (Some((_, image)), None, Some((_, json))) => (image, ShardTruth::Json(json)),
            (Some((image, _)), None, None) => {
                fault(format!(
                    "has no mask: {image} needs {key}.mask.png, {key}.png beside a {key}.jpg, or {key}.json"
                ));
                return None;
            }
            (None, Some((mask, _)), _) => {
                fault(format!("has no image, but the mask {mask}"));
                return None;
            }
            (None, None, _) => {
                shards.left_alone.extend(json_name);
                return None;
            }
        };
        Some(ShardSample { name: key.replace('/', "_"), image, truth })
    }
}
