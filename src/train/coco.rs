//! Objects of images in COCO's JSON ("instances"): polygons, run lengths, compressed run lengths.
//!
//! ```text
//! images       [{ id, file_name, width, height }]
//! annotations  [{ id, image_id, segmentation: [[x, y, ..], ..] | { size: [height, width], counts: [..] | ".." },
//!                 iscrowd }]
//! ```
//! Annotations marked as crowds are no single object and are left out. So are annotations without an outline,
//! annotations of images that are not listed, and parts of fewer than three points, as in pycocotools. Categories do
//! not matter here.

use super::coco_json::{
    found_instead, proper, text_format, Annotation, Id, Instances, OneImage, Segmentation,
};
use super::summary::Named;
use crate::file_kind::stand_in;
use crate::sam::rle::{self, Runs, Size};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Component, Path};
use std::sync::Arc;

/// No image may be larger a side; see [`read_image`](crate::sam::read_image).
const MAX_SIDE: u32 = 1 << 15;

/// An image and its objects, with outlines not yet drawn. They are drawn once the image is seen to have the size that
/// the file says.
#[derive(Clone, Debug)]
pub(super) struct CocoImage {
    /// Within the folder of images.
    pub file_name: String,
    /// Size of the image, if the file says it.
    pub size: Option<Size>,
    annotations: Arc<Path>,
    objects: Vec<Object>,
}

#[derive(Clone, Debug)]
struct Object {
    id: Id,
    segmentation: Segmentation,
}

impl CocoImage {
    /// The objects in an image of this size, each the union of some runs.
    ///
    /// # Errors
    /// - an outline or runs do not fit the image; the annotation is named.
    pub fn objects(&self, size: Size) -> impl Iterator<Item = Result<Vec<Runs>>> + '_ {
        self.objects.iter().map(move |Object { id, segmentation }| {
            let invalid =
                |message| Error::file(&self.annotations, format!("annotation {id}: {message}"));
            segmentation.runs(size).map_err(invalid)
        })
    }
}

impl Segmentation {
    fn runs(&self, image: Size) -> std::result::Result<Vec<Runs>, String> {
        if let Self::Runs { size, .. } | Self::Compressed { size, .. } = self {
            if [size[0].0, size[1].0] != [image.0, image.1] {
                let (height, width) = image;
                let size = [size[0].0, size[1].0];
                return Err(format!("its size is {size:?}, its image's [{height}, {width}]"));
            }
        }
        match self {
            Self::Polygons(polygons) => polygons
                .iter()
                .map(|polygon| polygon.iter().map(|c| c.0).collect::<Vec<f64>>())
                .map(|polygon| rle::polygon(&polygon, image))
                .collect(),
            Self::Runs { counts, .. } => {
                Ok(vec![rle::checked(counts.iter().map(|count| count.0).collect(), image)?])
            }
            Self::Compressed { counts, .. } => Ok(vec![rle::decompressed(counts, image)?]),
            Self::Other(_) => Err(self.fault().unwrap_or_default()),
        }
    }

    /// Without the parts that are no outline; how many there were.
    fn without_broken_parts(&mut self) -> usize {
        let Self::Polygons(polygons) = self else { return 0 };
        let before = polygons.len();
        polygons.retain(|polygon| {
            polygon.len() >= 6
                && polygon.len().is_multiple_of(2)
                && polygon.iter().all(|c| !c.0.is_nan())
        });
        before - polygons.len()
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Polygons(polygons) if polygons.is_empty())
    }
}

/// Content of a file of annotations.
#[derive(Default)]
pub(super) struct Annotations {
    /// The images that have an object, in the file's order.
    pub images: Vec<CocoImage>,
    /// All faults of the file.
    pub faults: Vec<Error>,
    /// Annotations and images that were left out, by reason.
    pub left_out: Vec<(String, Named)>,
}

const CROWDS: &str = "left out, annotations marked as crowds";
const WITHOUT: &str = "left out, annotations without an outline";
const BROKEN: &str =
    "left out, parts of outlines with fewer than three points, half a point or a coordinate that is no number";

/// Annotations that are no single object.
#[derive(Default)]
struct LeftOut {
    crowds: Named,
    without: Named,
    broken: Named,
}

impl LeftOut {
    /// The object of an annotation; none if it is left out.
    fn object(&mut self, annotation: Annotation) -> Option<Object> {
        let is_crowd = annotation.is_crowd();
        let Annotation { id, segmentation, .. } = annotation;
        let name = format!("annotation {id}");
        if is_crowd {
            self.crowds.add(name);
            return None;
        }
        let Some(mut segmentation) = segmentation.filter(|outline| !outline.is_empty()) else {
            self.without.add(name);
            return None;
        };
        if segmentation.without_broken_parts() > 0 {
            self.broken.add(name.clone());
        }
        if segmentation.is_empty() {
            self.without.add(name);
            return None;
        }
        Some(Object { id, segmentation })
    }
}

/// Reads the annotations of one image, as SA-1B has them: also how many were left out, by reason.
///
/// # Errors
/// - the bytes are no such JSON, or the image's sides are impossible.
pub(super) fn of_image(path: &Path, bytes: &[u8]) -> Result<(CocoImage, Vec<(String, usize)>)> {
    let invalid = |why: String| Error::file(path, format!("no annotations of an image: {why}"));
    let text = std::str::from_utf8(bytes).map_err(|_| invalid("it is no text in UTF-8".into()))?;
    let OneImage { image, annotations } =
        serde_json::from_str(&proper(text)).map_err(|e| invalid(e.to_string()))?;
    let size = image.map_or(Ok(None), |image| image.size(MAX_SIDE)).map_err(invalid)?;
    let mut left_out = LeftOut::default();
    let objects = annotations.into_iter().filter_map(|found| left_out.object(found)).collect();
    let LeftOut { crowds, without, broken } = left_out;
    let counts = [(CROWDS, crowds), (WITHOUT, without), (BROKEN, broken)];
    let counts = counts.into_iter().filter(|(_, named)| named.count() > 0);
    let counts = counts.map(|(what, named)| (what.to_string(), named.count())).collect();
    Ok((CocoImage { file_name: String::new(), size, annotations: path.into(), objects }, counts))
}

/// Reads a file of annotations.
///
/// # Errors
/// - the file is unreadable or no such JSON;
/// - no image has an object.
pub(super) fn read(path: &Path) -> Result<Annotations> {
    let not_coco = |why: &str| Error::file(path, format!("not COCO's instances: {why}"));
    if path.is_dir() {
        return Err(not_coco("it is a folder; expected one file of JSON for all images"));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    if let Some(named) = text_format(&bytes).or_else(|| stand_in(&bytes)) {
        return Err(not_coco(&named));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| not_coco("it is no text in UTF-8"))?;
    let text = proper(text);
    let Instances { images, annotations } = serde_json::from_str(&text)
        .map_err(|e| not_coco(&found_instead(&text).unwrap_or(e.to_string())))?;
    let file: Arc<Path> = path.into();
    let mut read = Annotations::default();
    let (mut places, mut nameless) = (BTreeMap::new(), vec![]);
    for entry in images {
        let id = entry.id.clone();
        let error = |message: &str| Error::file(path, format!("image {id}: {message}"));
        // An absolute path is looked for by its end, as one of Windows is.
        let name = entry.file_name().unwrap_or_default();
        let mut name = name.trim_start_matches('/').to_string();
        let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
        if name.is_empty() || !Path::new(&name.replace('\\', "/")).components().all(inside) {
            let message = match name.is_empty() {
                true => "it has no file_name".to_string(),
                false => format!("file_name {name:?} leads out of the folder"),
            };
            nameless.push((read.images.len(), error(&message)));
            name.clear();
        }
        let size = entry.size(MAX_SIDE).unwrap_or_else(|message| {
            read.faults.push(error(&message));
            None
        });
        if places.insert(id.clone(), read.images.len()).is_some() {
            read.faults.push(error("there are two of this id"));
        }
        let (file_name, annotations) = (name, file.clone());
        read.images.push(CocoImage { file_name, size, annotations, objects: vec![] });
    }
    let total = annotations.len();
    let (mut left_out, mut strange) = (LeftOut::default(), Named::default());
    let (mut known, mut twice) = (BTreeMap::new(), Named::default());
    for annotation in annotations {
        let Annotation { id, image_id, .. } = &annotation;
        let Some((place, image)) =
            places.get(image_id).and_then(|place| Some((*place, read.images.get_mut(*place)?)))
        else {
            strange.add(format!("annotation {id}: there is no image {image_id}"));
            continue;
        };
        let outline = annotation.segmentation.as_ref().filter(|_| !annotation.is_crowd());
        if let Some(fault) = outline.and_then(Segmentation::fault) {
            read.faults.push(Error::file(path, format!("annotation {id}: {fault}")));
            continue;
        }
        let Some(object) = left_out.object(annotation) else { continue };
        // Files that were joined may hold an annotation twice; other tools give many annotations one id.
        let first = known.get(&object.id).filter(|(other, _)| *other == place);
        let first: Option<&Object> = first.and_then(|(_, index)| image.objects.get(*index));
        if first.is_some_and(|first| first.segmentation == object.segmentation) {
            twice.add(format!("annotation {}", object.id));
            continue;
        }
        known.insert(object.id.clone(), (place, image.objects.len()));
        image.objects.push(object);
    }
    let LeftOut { crowds, without, broken } = left_out;
    // An image without an object needs no name.
    let has_object = |place: usize| !read.images[place].objects.is_empty();
    let faults = nameless.into_iter().filter(|(place, _)| has_object(*place)).map(|(_, e)| e);
    read.faults.extend(faults.collect::<Vec<_>>());
    let images = read.images.len();
    read.images.retain(|image| !image.objects.is_empty());
    if read.images.is_empty() && read.faults.is_empty() {
        let why = match total {
            0 => "it has no annotation".to_string(),
            _ if crowds.count() == total => {
                format!("all {total} annotations are marked as crowds (iscrowd)")
            }
            _ => format!(
                "of {total} annotations {} are marked as crowds (iscrowd), {} have no outline (segmentation), and {} are of \
                 images that are not listed{}",
                crowds.count(),
                without.count(),
                strange.count(),
                if strange.count() > 0 { format!(" ({})", strange.names()) } else { String::new() }
            ),
        };
        return Err(Error::file(path, format!("no image has an object: {why}")));
    }
    let unlabelled = images - read.images.len();
    // Images without a name were told above.
    read.images.retain(|image| !image.file_name.is_empty());
    read.left_out = [
        (CROWDS, crowds),
        (WITHOUT, without),
        ("left out, annotations that are there twice", twice),
        ("left out, annotations of images that are not listed", strange),
        (BROKEN, broken),
        ("left out, images without an object", Named::counted(unlabelled)),
    ]
    .into_iter()
    .filter(|(_, named)| named.count() > 0)
    .map(|(what, named)| (what.to_string(), named))
    .collect();
    Ok(read)
}
