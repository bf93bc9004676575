//! One image with its truth, and how both are read.

use super::coco::{self, CocoImage};
use super::exif;
use super::folder::Suffixes;
use super::labels::{layered, layers_of, Instance, LabelImage};
use super::mask::{read_mask_bytes, Mask, MaskOptions};
use super::stored::Stored;
use crate::sam::rle::{self, Rle};
use crate::sam::{convert_to_rgb, is_transparent, Picture, ReadOptions};
use crate::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::path::Path;

/// An image, its labels, and those of its instances that are large enough.
///
/// [Example](crate::train::Dataset)
#[derive(Clone, Debug)]
pub struct Sample {
    /// The stem of both files; of COCO's, the file's name within its folder without its ending.
    pub name: String,
    /// The image; transparent pixels are laid on white.
    pub image: RgbImage,
    /// Whether the file has transparent pixels.
    pub transparent: bool,
    /// The masks, of the image's size: one, or several where objects overlap.
    pub layers: Vec<LabelImage>,
    /// At least one.
    pub instances: Vec<Instance>,
}

impl Sample {
    /// Fails unless the image, its layers and its instances fit each other. The fields are public.
    ///
    /// # Errors
    /// - a layer has another size than the image;
    /// - an instance is of no layer, or leaves it.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::config(format!("{}: {message}", self.name)));
        let (width, height) = self.image.dimensions();
        if let Some(layer) = self.layers.iter().find(|layer| layer.dimensions() != (width, height))
        {
            let (w, h) = layer.dimensions();
            return refuse(format!("a mask of {w} x {h} pixels, the image has {width} x {height}"));
        }
        for Instance { label, layer, bounds: [x0, y0, x1, y1], .. } in &self.instances {
            let layers = self.layers.len();
            if *layer >= layers {
                return refuse(format!(
                    "object {label} is of mask {layer}, and there are {layers}"
                ));
            }
            if x0 > x1 || y0 > y1 || *x1 >= width || *y1 >= height {
                let bounds = [x0, y0, x1, y1];
                return refuse(format!(
                    "object {label} in {bounds:?} of {width} x {height} pixels"
                ));
            }
        }
        Ok(())
    }

    /// The mask that has one of the instances.
    ///
    /// # Errors
    /// - the instance is of no layer of this sample.
    pub fn labels(&self, instance: &Instance) -> Result<&LabelImage> {
        let Instance { label, layer, .. } = instance;
        self.layers.get(*layer).ok_or_else(|| {
            let (name, layers) = (&self.name, self.layers.len());
            Error::config(format!("{name}: object {label} is of mask {layer}, of {layers}"))
        })
    }

    /// The mask of one of the instances.
    ///
    /// # Errors
    /// - the instance is of no layer of this sample;
    /// - the image has more than 2^32 pixels.
    pub fn object(&self, instance: &Instance) -> Result<Rle> {
        let labels = self.labels(instance)?;
        let inside: Vec<bool> = labels.iter().map(|label| *label == instance.label).collect();
        Rle::from_mask(&inside, (labels.height(), labels.width()))
    }
}

/// How a data set is read.
///
/// [Example](crate::train::Dataset)
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DatasetOptions {
    /// Instances of fewer pixels are left out.
    pub min_area: usize,
    /// Whether images without an instance are errors, and not left out.
    pub strict: bool,
    /// Suffixes of file names.
    pub suffixes: Suffixes,
    /// How images are read.
    pub images: ReadOptions,
    /// How masks are read.
    pub masks: MaskOptions,
}

impl DatasetOptions {
    /// The default, without instances of fewer than `min_area` pixels.
    pub fn min_area(min_area: usize) -> Self {
        Self { min_area, ..Default::default() }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub name: String,
    pub image: Stored,
    pub truth: Truth,
    /// The rest is known once it was read.
    pub transparent: bool,
    /// Width and height.
    pub size: (u32, u32),
    pub content: Content,
    /// Checksum of the runs of annotations.
    pub runs: u32,
}

#[derive(Clone, Debug)]
pub(super) enum Truth {
    Mask(Stored),
    Coco(CocoImage),
    /// Annotations of this image alone.
    Json(Stored),
}

/// Checksums of the files of a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Content {
    pub image: u32,
    /// 0 of annotations that stand in a file of all images.
    pub truth: u32,
}

/// A sample and how it was read.
pub(super) struct Loaded {
    pub sample: Sample,
    pub picture: Picture,
    pub mask: Option<Mask>,
    /// Instances that are too small.
    pub small: usize,
    /// The annotations, if the truth is some.
    pub objects: Option<CocoImage>,
    /// Annotations that were left out, by reason.
    pub left_out: Vec<(String, usize)>,
    pub content: Content,
}

impl Pair {
    /// One that was not read yet.
    pub fn new(name: String, image: Stored, truth: Truth) -> Self {
        let (transparent, size, content, runs) = (false, (0, 0), Content::default(), 0);
        Self { name, image, truth, transparent, size, content, runs }
    }

    /// The file of the mask, or the image where the truth is annotations of several.
    pub fn truth_file(&self) -> &Path {
        match &self.truth {
            Truth::Mask(file) | Truth::Json(file) => &file.path,
            Truth::Coco(_) => &self.image.path,
        }
    }

    /// Everything that is wrong with the pair, of which `first` was met first.
    pub fn faults(&self, first: Error) -> Vec<Error> {
        let Truth::Coco(coco) = &self.truth else { return vec![first] };
        let of_annotations = matches!(&first, Error::File { path, .. } if *path != self.image.path);
        let size = coco.size.filter(|_| of_annotations);
        let all: Vec<Error> = size
            .map(|size| coco.objects(size).filter_map(Result::err).collect())
            .unwrap_or_default();
        if all.is_empty() {
            vec![first]
        } else {
            all
        }
    }

    /// The error of a truth without an instance of `min_area` pixels, but `small` smaller ones.
    pub fn without_instance(&self, min_area: usize, small: usize) -> Error {
        let message = match small {
            0 => "the mask is empty: every pixel is the background".to_string(),
            small => format!(
                "the mask has no instance of {min_area} pixels or more, but {small} smaller ones"
            ),
        };
        Error::file(self.truth_file(), message)
    }

    /// Reads the image and its truth, which may have no instance.
    ///
    /// # Errors
    /// - a file is unreadable, is no mask, or sizes differ.
    pub fn read(&self, options: &DatasetOptions) -> Result<Loaded> {
        let path = &self.image.path;
        let bytes = self.image.read()?;
        let (length, mut content) = (bytes.len(), Content::default());
        content.image = crc32c::crc32c(&bytes);
        let picture = options.images.read_bytes(path, bytes)?;
        let transparent = is_transparent(&picture.image);
        let image = convert_to_rgb(&picture.image).map_err(|e| Error::file(path, e.to_string()))?;
        let (width, height) = image.dimensions();
        let small = Small { min_area: options.min_area, count: Cell::new(0) };
        let (mut objects, mut left_out) = (None, vec![]);
        let (layers, mask) = match &self.truth {
            Truth::Mask(file) => {
                let bytes = file.read()?;
                content.truth = crc32c::crc32c(&bytes);
                let is_alike = content.truth == content.image && bytes.len() == length;
                let mut mask = read_mask_bytes(&file.path, bytes, &options.masks)?;
                if mask.labels.dimensions() != (width, height) {
                    let message = format!(
                        "the mask is {:?} pixels, but {} is {:?}{}",
                        mask.labels.dimensions(),
                        path.display(),
                        image.dimensions(),
                        turned(&picture, mask.labels.dimensions())
                    );
                    return Err(Error::file(&file.path, message));
                }
                if is_alike && self.image.read()? == file.read()? {
                    let message = format!("is the image itself, {}, and no mask", path.display());
                    return Err(Error::file(&file.path, message));
                }
                mask.remarks.extend(exif::remark(&image, picture.orientation, &mask.labels));
                (vec![std::mem::take(&mut mask.labels)], Some(mask))
            }
            Truth::Coco(coco) => {
                objects = Some(coco.clone());
                (self.outlines(coco, (height, width), &picture, &small)?, None)
            }
            Truth::Json(file) => {
                let bytes = file.read()?;
                content.truth = crc32c::crc32c(&bytes);
                let (coco, counts) = coco::of_image(&file.path, &bytes)?;
                left_out = counts;
                let layers = self.outlines(&coco, (height, width), &picture, &small)?;
                objects = Some(coco);
                (layers, None)
            }
        };
        let mut instances = layered(&layers, 1);
        let all = instances.len();
        instances.retain(|instance| instance.area >= options.min_area);
        let small = small.count.get() + all - instances.len();
        let name = self.name.clone();
        let sample = Sample { name, image, transparent, layers, instances };
        Ok(Loaded { sample, picture, mask, small, objects, left_out, content })
    }

    /// The objects of annotations as label images; `small` gets the number of those that are too small.
    fn outlines(
        &self,
        coco: &CocoImage,
        (height, width): rle::Size,
        picture: &Picture,
        small: &Small,
    ) -> Result<Vec<LabelImage>> {
        let path = &self.image.path;
        if let Some((rows, cols)) = coco.size.filter(|size| *size != (height, width)) {
            let message = format!(
                "is {width} x {height} pixels, but {cols} x {rows} in its annotations{}",
                turned(picture, (cols, rows))
            );
            return Err(Error::file(path, message));
        }
        let layers = layers_of(drawn(coco, (height, width), small), width, height);
        layers.map_err(|e| match e {
            Error::Config(message) => Error::file(path, message),
            other => other,
        })
    }
}

/// Objects of fewer than `min_area` pixels, which are counted.
struct Small {
    min_area: usize,
    count: Cell<usize>,
}

/// The pixels of the objects, drawn one after another, without those that are too `small`, which are counted.
fn drawn<'a>(
    coco: &'a CocoImage,
    size: rle::Size,
    small: &'a Small,
) -> impl Iterator<Item = Result<Vec<usize>>> + 'a {
    let drawn = coco.objects(size).map(move |runs| Ok(rle::pixels(&runs?, size)));
    drawn.filter(move |pixels| {
        let is_small = |pixels: &Vec<usize>| pixels.len() < small.min_area.max(1);
        let is_small = pixels.as_ref().is_ok_and(is_small);
        small.count.set(small.count.get() + usize::from(is_small));
        !is_small
    })
}

/// A remark for a truth that has the size the image had before it was turned.
fn turned(picture: &Picture, size: (u32, u32)) -> String {
    match picture.stored {
        Some((width, height)) if (width, height) == size => format!(
            "; the image is stored as {width} x {height} pixels and its EXIF data turn it: turn the truth too, or store \
             the image turned and without them"
        ),
        _ => String::new(),
    }
}
