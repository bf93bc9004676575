//! Objects of images in COCO's JSON ("instances"): polygons, run lengths, compressed run lengths.
//!
//! ```text
//! images       [{ id, file_name, width, height }]
//! annotations  [{ id, image_id, segmentation: [[x, y, ..], ..] | { size: [height, width], counts: [..] | ".." },
//!                 iscrowd }]
//! ```
//! What is marked as a crowd is no single object and is left out. Categories do not matter here.

use crate::sam::rle::{self, Runs, Size};
use crate::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Component, Path};
use std::sync::Arc;

/// No image may be larger a side; see [`read_image`](crate::sam::read_image).
const MAX_SIDE: u32 = 1 << 15;

/// An image and its objects, of whose outlines nothing is known yet: they are drawn once the image is seen to have the
/// size that the file says.
#[derive(Clone, Debug)]
pub(super) struct CocoImage {
    /// Within the folder of images.
    pub file_name: String,
    /// Of the image, as the file says.
    pub size: Size,
    annotations: Arc<Path>,
    objects: Vec<Object>,
}

#[derive(Clone, Debug)]
struct Object {
    id: i64,
    segmentation: Segmentation,
}

impl CocoImage {
    /// The objects, each the union of some runs.
    ///
    /// # Errors
    /// When an outline or runs do not fit the image; the annotation is named.
    pub fn objects(&self) -> impl Iterator<Item = Result<Vec<Runs>>> + '_ {
        self.objects.iter().map(|Object { id, segmentation }| {
            let invalid =
                |message| Error::file(&self.annotations, format!("annotation {id}: {message}"));
            segmentation.runs(self.size).map_err(invalid)
        })
    }
}

#[derive(Deserialize)]
struct Instances {
    images: Vec<ImageEntry>,
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct ImageEntry {
    id: i64,
    file_name: String,
    width: u32,
    height: u32,
}

#[derive(Deserialize)]
struct Annotation {
    #[serde(default)]
    id: i64,
    image_id: i64,
    segmentation: Segmentation,
    #[serde(default)]
    iscrowd: u8,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "a segmentation must be polygons, [[x, y, ..], ..], or {size: [height, width], counts}, the counts \
                 whole numbers or a string"
)]
enum Segmentation {
    Polygons(Vec<Vec<f64>>),
    Runs { size: [u32; 2], counts: Vec<u32> },
    Compressed { size: [u32; 2], counts: String },
}

impl Segmentation {
    fn runs(&self, image: Size) -> std::result::Result<Vec<Runs>, String> {
        if let Self::Runs { size, .. } | Self::Compressed { size, .. } = self {
            if *size != [image.0, image.1] {
                let (height, width) = image;
                return Err(format!("its size is {size:?}, its image's [{height}, {width}]"));
            }
        }
        match self {
            Self::Polygons(polygons) if polygons.is_empty() => Err("it has no polygon".into()),
            Self::Polygons(polygons) => {
                polygons.iter().map(|polygon| rle::polygon(polygon, image)).collect()
            }
            Self::Runs { counts, .. } => Ok(vec![rle::checked(counts.clone(), image)?]),
            Self::Compressed { counts, .. } => Ok(vec![rle::decompressed(counts, image)?]),
        }
    }
}

/// The images of a file that have an object, in the file's order.
///
/// # Errors
/// When the file is unreadable or no such JSON, an image's name leads out of its folder, two images share an id, or an
/// annotation has no image; the annotation is named.
pub(super) fn read(path: &Path) -> Result<Vec<CocoImage>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let Instances { images, annotations } = serde_json::from_str(&text)
        .map_err(|e| Error::file(path, format!("not COCO's instances: {e}")))?;
    let file: Arc<Path> = path.into();
    let mut places = BTreeMap::new();
    let mut found: Vec<CocoImage> = Vec::with_capacity(images.len());
    for ImageEntry { id, file_name, width, height } in images {
        let invalid = |message: &str| Error::file(path, format!("image {id}: {message}"));
        let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
        if file_name.is_empty() || !Path::new(&file_name).components().all(inside) {
            return Err(invalid(&format!("file_name {file_name:?} leads out of the folder")));
        }
        if !(1..=MAX_SIDE).contains(&width) || !(1..=MAX_SIDE).contains(&height) {
            return Err(invalid(&format!(
                "its sides must be 1 to {MAX_SIDE}, are {width} x {height}"
            )));
        }
        if places.insert(id, found.len()).is_some() {
            return Err(invalid("there are two of this id"));
        }
        let (size, annotations) = ((height, width), file.clone());
        found.push(CocoImage { file_name, size, annotations, objects: vec![] });
    }
    for Annotation { id, image_id, segmentation, iscrowd } in annotations {
        let place = places.get(&image_id);
        let image = place.and_then(|place| found.get_mut(*place)).ok_or_else(|| {
            Error::file(path, format!("annotation {id}: there is no image {image_id}"))
        })?;
        if iscrowd == 0 {
            image.objects.push(Object { id, segmentation });
        }
    }
    found.retain(|image| !image.objects.is_empty());
    match found.is_empty() {
        true => Err(Error::file(path, "no image has an object")),
        false => Ok(found),
    }
}
