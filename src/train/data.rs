//! Images and their objects, visited in an order that is a function of (seed, step): a folder of images with a folder
//! of masks, paired by file stem, or with COCO's annotations.

use super::checksum::Checksum;
use super::coco::{self, CocoImage};
use super::labels::{layered, layers_of, read_labels, Instance, LabelImage};
use super::StepRng;
use crate::sam::rle;
use crate::sam::{convert_to_rgb, is_transparent, read_image};
use crate::{Error, Result};
use image::{imageops, RgbImage};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// File name endings taken for images; other files in the folders are left alone.
const ENDINGS: [&str; 11] =
    ["png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "gif", "pgm", "ppm", "pnm"];

/// An image, its labels, and those of its instances that are large enough.
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
    /// The mask that has one of the instances.
    pub fn labels(&self, instance: &Instance) -> &LabelImage {
        &self.layers[instance.layer]
    }
}

/// Image files, each with a mask file or with objects.
#[derive(Clone, Debug)]
pub struct Dataset {
    pairs: Vec<Pair>,
    min_area: usize,
}

#[derive(Clone, Debug)]
struct Pair {
    name: String,
    image: PathBuf,
    transparent: bool,
    truth: Truth,
}

#[derive(Clone, Debug)]
enum Truth {
    Mask(PathBuf),
    Coco(CocoImage),
}

impl Dataset {
    /// Pairs the files of two folders by stem, and reads each once, so that what is wrong with the data is told
    /// before hours of training. Instances of fewer than `min_area` pixels are left out.
    ///
    /// # Errors
    /// When a folder is unreadable or has no image, an image has no mask or a mask no image, two files share a
    /// stem, a file is unreadable, sizes differ, or a mask has no instance large enough; the file is named.
    pub fn open(
        images: impl AsRef<Path>,
        masks: impl AsRef<Path>,
        min_area: usize,
    ) -> Result<Self> {
        let (images, masks) = (images.as_ref(), masks.as_ref());
        let (image_files, mut mask_files) = (by_stem(images)?, by_stem(masks)?);
        let mut pairs = Vec::new();
        for (name, image) in image_files {
            let mask = mask_files.remove(&name).ok_or_else(|| {
                Error::file(
                    &image,
                    format!("has no mask: {} has no file of this stem", masks.display()),
                )
            })?;
            pairs.push(Pair { name, image, transparent: false, truth: Truth::Mask(mask) });
        }
        if let Some(mask) = mask_files.values().next() {
            let message = format!("has no image: {} has no file of this stem", images.display());
            return Err(Error::file(mask, message));
        }
        let mut dataset = Self { pairs, min_area };
        for index in 0..dataset.len() {
            dataset.pairs[index].transparent = dataset.load(index)?.transparent;
        }
        Ok(dataset)
    }

    /// The images of a folder that have objects in a file of COCO's, and reads each once. Instances of fewer than
    /// `min_area` pixels are left out, images without a larger one too.
    ///
    /// # Errors
    /// When the annotations are unreadable or damaged, an image is missing, unreadable or of another size, two images
    /// have one name, or no image has an instance large enough; file and annotation are named.
    pub fn open_coco(
        images: impl AsRef<Path>,
        annotations: impl AsRef<Path>,
        min_area: usize,
    ) -> Result<Self> {
        let (images, annotations) = (images.as_ref(), annotations.as_ref());
        let mut dataset = Self { pairs: vec![], min_area };
        let mut names = BTreeMap::new();
        for coco in coco::read(annotations)? {
            let image = images.join(&coco.file_name);
            let name = Path::new(&coco.file_name)
                .with_extension("")
                .to_string_lossy()
                .replace(['/', '\\'], "_");
            if let Some(other) = names.insert(name.clone(), coco.file_name.clone()) {
                let message =
                    format!("two images are called {name}: {other} and {}", coco.file_name);
                return Err(Error::file(annotations, message));
            }
            dataset.pairs.push(Pair { name, image, transparent: false, truth: Truth::Coco(coco) });
        }
        let mut large = vec![];
        for index in 0..dataset.len() {
            let sample = dataset.read(index)?;
            dataset.pairs[index].transparent = sample.transparent;
            large.push(!sample.instances.is_empty());
        }
        let mut large = large.into_iter();
        dataset.pairs.retain(|_| large.next().unwrap_or(false));
        if dataset.pairs.is_empty() {
            let message = format!("no image has an instance of {min_area} pixels or more");
            return Err(Error::file(annotations, message));
        }
        Ok(dataset)
    }

    /// How many pairs there are, at least one.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The number of images with transparent pixels, which are laid on white.
    pub fn transparent(&self) -> usize {
        self.pairs.iter().filter(|pair| pair.transparent).count()
    }

    /// Never, of a dataset that was opened.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The number of images and a checksum of all files, for the settings of a run.
    pub fn fingerprint(&self) -> Result<String> {
        let mut checksum = Checksum::new();
        for pair in &self.pairs {
            let mut add = |path: &Path| -> Result<()> {
                let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
                checksum.add(&pair.name, &bytes);
                Ok(())
            };
            add(&pair.image)?;
            match &pair.truth {
                Truth::Mask(mask) => add(mask)?,
                Truth::Coco(coco) => {
                    for (object, runs) in coco.objects().enumerate() {
                        let bytes = runs?.into_iter().flatten().flat_map(u32::to_le_bytes);
                        checksum.add(&format!("{object}"), &bytes.collect::<Vec<u8>>());
                    }
                }
            }
        }
        Ok(format!("{} images, checksum {checksum}", self.len()))
    }

    /// Sets aside about `fraction` of the pairs, at least one, chosen by `seed`: (the rest, those set aside).
    ///
    /// # Errors
    /// When fewer than two pairs are there to be divided, or the fraction is not between 0 and 1.
    pub fn split(&self, fraction: f64, seed: u64) -> Result<(Self, Self)> {
        if !(fraction > 0.0 && fraction < 1.0) || self.len() < 2 {
            let message = format!(
                "cannot hold out a fraction of {fraction} of {} images: it takes a fraction between 0 and 1 \
                 and two images",
                self.len()
            );
            return Err(Error::config(message));
        }
        let count = ((self.len() as f64 * fraction).round() as usize).clamp(1, self.len() - 1);
        let mut held_out = StepRng::new(seed, "split", 0).permutation(self.len());
        held_out.truncate(count);
        let part = |wanted: bool| Self {
            pairs: (self.pairs.iter().enumerate())
                .filter(|(index, _)| held_out.contains(index) == wanted)
                .map(|(_, pair)| pair.clone())
                .collect(),
            min_area: self.min_area,
        };
        Ok((part(false), part(true)))
    }

    /// Reads the pair at `index`.
    pub fn load(&self, index: usize) -> Result<Sample> {
        let sample = self.read(index)?;
        if sample.instances.is_empty() {
            let pair = &self.pairs[index];
            let at = if let Truth::Mask(mask) = &pair.truth { mask } else { &pair.image };
            let message = format!("the mask has no instance of {} pixels or more", self.min_area);
            return Err(Error::file(at, message));
        }
        Ok(sample)
    }

    /// As `load`, but there may be no instance.
    fn read(&self, index: usize) -> Result<Sample> {
        let pair = self.pairs.get(index).ok_or_else(|| {
            Error::config(format!("there are {} images, and none at {index}", self.len()))
        })?;
        let image = read_image(&pair.image)?;
        let transparent = is_transparent(&image);
        let image = convert_to_rgb(&image).map_err(|e| Error::file(&pair.image, e.to_string()))?;
        let (width, height) = image.dimensions();
        let layers = match &pair.truth {
            Truth::Mask(mask) => {
                let labels = read_labels(mask)?;
                if labels.dimensions() != (width, height) {
                    let message = format!(
                        "the mask is {:?} pixels, but {} is {:?}",
                        labels.dimensions(),
                        pair.image.display(),
                        image.dimensions()
                    );
                    return Err(Error::file(mask, message));
                }
                vec![labels]
            }
            Truth::Coco(coco) if coco.size != (height, width) => {
                let (rows, cols) = coco.size;
                let message =
                    format!("is {width} x {height} pixels, but {cols} x {rows} in its annotations");
                return Err(Error::file(&pair.image, message));
            }
            Truth::Coco(coco) => {
                layers_of(self.masks(coco), width, height).map_err(|e| match e {
                    Error::Config(message) => Error::file(&pair.image, message),
                    other => other,
                })?
            }
        };
        let instances = layered(&layers, self.min_area);
        Ok(Sample { name: pair.name.clone(), image, transparent, layers, instances })
    }

    /// The objects that are large enough, as masks of rows, drawn one after another.
    fn masks<'a>(&'a self, coco: &'a CocoImage) -> impl Iterator<Item = Result<Vec<bool>>> + 'a {
        let pixels = coco.size.0 as usize * coco.size.1 as usize;
        let drawn = coco.objects().map(move |runs| {
            let mut mask = vec![false; pixels];
            runs?.iter().for_each(|runs| rle::paint(runs, &mut mask, coco.size));
            Ok(mask)
        });
        let area = |mask: &[bool]| mask.iter().filter(|inside| **inside).count();
        let least = self.min_area.max(1);
        drawn.filter(move |mask| mask.as_ref().map_or(true, |mask| area(mask) >= least))
    }
}

/// The image files of a folder by stem.
fn by_stem(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let ending = path.extension().and_then(|e| e.to_str()).map(str::to_lowercase);
        if !ending.is_some_and(|e| ENDINGS.contains(&e.as_str())) || !path.is_file() {
            continue;
        }
        let Some(stem) = path.file_stem().and_then(|s| s.to_str()).map(str::to_string) else {
            return Err(Error::file(&path, "the file name is not valid Unicode"));
        };
        if let Some(other) = files.insert(stem, path.clone()) {
            let message = format!("has the same stem as {}", other.display());
            return Err(Error::file(&path, message));
        }
    }
    if files.is_empty() {
        return Err(Error::file(
            folder,
            format!("the folder has no image ({})", ENDINGS.join(", ")),
        ));
    }
    Ok(files)
}

/// Which of `len` images make up the batch of `step`: every image once, in an order of its own, per epoch.
pub fn sample_indices(len: usize, batch: usize, seed: u64, step: u64) -> Vec<usize> {
    if len == 0 {
        return Vec::new();
    }
    let first = step * batch as u64;
    (first..first + batch as u64)
        .map(|place| {
            let (epoch, place) = (place / len as u64, (place % len as u64) as usize);
            StepRng::new(seed, "order", epoch).permutation(len)[place]
        })
        .collect()
}

/// One of the eight ways to turn and mirror a square: the augmentation that changes no pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlipRotate {
    quarter_turns: u8,
    mirrored: bool,
}

impl FlipRotate {
    /// One of the eight, at random.
    pub fn draw(draws: &mut StepRng) -> Self {
        Self { quarter_turns: draws.below(4) as u8, mirrored: draws.below(2) == 1 }
    }

    /// Mirrors and turns image and labels alike, and finds the instances' new bounds.
    pub fn apply(self, sample: Sample) -> Sample {
        let image = self.turn(sample.image);
        let layers: Vec<LabelImage> =
            sample.layers.into_iter().map(|labels| self.turn(labels)).collect();
        // Turning keeps the areas, so the smallest kept one admits exactly those kept before.
        let min_area = sample.instances.iter().map(|i| i.area).min().unwrap_or(1);
        let instances = layered(&layers, min_area);
        Sample { image, layers, instances, ..sample }
    }

    fn turn<P: image::Pixel + 'static>(
        self,
        image: image::ImageBuffer<P, Vec<P::Subpixel>>,
    ) -> image::ImageBuffer<P, Vec<P::Subpixel>> {
        let image = if self.mirrored { imageops::flip_horizontal(&image) } else { image };
        match self.quarter_turns {
            1 => imageops::rotate90(&image),
            2 => imageops::rotate180(&image),
            3 => imageops::rotate270(&image),
            _ => image,
        }
    }
}
