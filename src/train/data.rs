//! Images and their objects, visited in an order that is a function of (seed, step). A folder of images has a folder of
//! masks, paired by name, or COCO's annotations.

use super::coco;
use super::folder::{on_disk, pairs, Named};
use super::sample::{DatasetOptions, Loaded, Pair, Sample, Truth};
use super::summary::{self, Summary};
use super::StepRng;
use crate::files::Checksum;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// So many faults are listed.
const MOST_FAULTS: usize = 20;

/// Image files, each with a mask file or with objects.
#[derive(Clone, Debug)]
pub struct Dataset {
    pairs: Vec<Pair>,
    options: DatasetOptions,
    summary: Summary,
}

impl Dataset {
    /// Pairs the files of two folders by name, and reads each once. So all faults of the data are told before hours of
    /// training. Images without an instance are left out; [`Self::summary`] tells what was understood.
    ///
    /// # Errors
    /// - a folder is unreadable or has no image;
    /// - an image has no mask, a mask no image, or two files share a stem;
    /// - a file is unreadable, is no mask, or sizes differ;
    /// - no image has an instance, or one has none and the options are strict.
    pub fn open(
        images: impl AsRef<Path>,
        masks: impl AsRef<Path>,
        options: &DatasetOptions,
    ) -> Result<Self> {
        let (found, faults) = pairs(images.as_ref(), masks.as_ref(), &options.suffixes)?;
        let pair = |Named { name, image, mask }| Pair {
            name,
            image,
            transparent: false,
            size: (0, 0),
            truth: Truth::Mask(mask),
        };
        let (options, summary) = (options.clone(), Summary::new(options.min_area));
        let dataset = Self { pairs: found.into_iter().map(pair).collect(), options, summary };
        dataset.checked(masks.as_ref(), faults)
    }

    /// The images of a folder that have objects in a file of COCO's, and reads each once. Images without an instance
    /// are left out.
    ///
    /// # Errors
    /// - the annotations are unreadable or damaged;
    /// - an image is missing, unreadable or of another size, or two images have one name;
    /// - no image has an instance; or something is left out, and the options are strict.
    pub fn open_coco(
        images: impl AsRef<Path>,
        annotations: impl AsRef<Path>,
        options: &DatasetOptions,
    ) -> Result<Self> {
        let (images, annotations) = (images.as_ref(), annotations.as_ref());
        let coco::Annotations { images: found, mut faults, left_out } = coco::read(annotations)?;
        let mut summary = Summary::new(options.min_area);
        let mut by_last_part = summary::Named::default();
        let (mut all, mut names) = (vec![], BTreeMap::new());
        for coco in found {
            let (image, moved) = on_disk(images, &coco.file_name);
            if moved {
                by_last_part.add(&coco.file_name);
            }
            let name = Path::new(&coco.file_name)
                .with_extension("")
                .to_string_lossy()
                .replace(['/', '\\', ':'], "_");
            if let Some(other) = names.insert(name.clone(), coco.file_name.clone()) {
                let message =
                    format!("two images are called {name}: {other} and {}", coco.file_name);
                faults.push(Error::file(annotations, message));
            }
            let truth = Truth::Coco(coco);
            all.push(Pair { name, image, transparent: false, size: (0, 0), truth });
        }
        summary.notes = left_out;
        if options.strict {
            faults.extend(summary.notes.iter().map(|(what, named)| {
                Error::file(annotations, format!("{what}: {}", named.count()))
            }));
        }
        if by_last_part.count() > 0 {
            let what = "found under another path, case or ending than their file_name says, images";
            summary.notes.push((what.into(), by_last_part));
        }
        let dataset = Self { pairs: all, options: options.clone(), summary };
        dataset.checked(annotations, faults)
    }

    /// Reads all of it once; leaves out what has no instance.
    fn checked(mut self, truth: &Path, mut faults: Vec<Error>) -> Result<Self> {
        let mut kept = vec![];
        for index in 0..self.len() {
            let loaded = match self.read(index) {
                Ok(loaded) => loaded,
                Err(error) => {
                    faults.extend(self.pairs[index].faults(error));
                    kept.push(false);
                    continue;
                }
            };
            let file = self.pairs[index].truth_file();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Loaded { sample, picture, mask, small } = loaded;
            let pair = &mut self.pairs[index];
            (pair.transparent, pair.size) = (sample.transparent, sample.image.dimensions());
            kept.push(!sample.instances.is_empty());
            if sample.instances.is_empty() {
                if self.options.strict {
                    faults.push(self.pairs[index].without_instance(self.options.min_area, small));
                }
                match small {
                    0 => self.summary.add_empty(&name),
                    small => self.summary.add_too_small(&name, small),
                }
                continue;
            }
            self.summary.add_objects(sample.instances.iter().map(|found| found.area), small);
            self.summary.add_picture(&name, &picture);
            if let Some(mask) = &mask {
                self.summary.add_mask(&name, mask);
            }
        }
        if faults.len() > 1 {
            let count = faults.len();
            let mut lines: Vec<String> =
                faults.iter().take(MOST_FAULTS).map(|fault| format!("\n  {fault}")).collect();
            if count > MOST_FAULTS {
                lines.push(format!("\n  and {} more", count - MOST_FAULTS));
            }
            return Err(Error::file(truth, format!("{count} faults:{}", lines.concat())));
        }
        if let Some(fault) = faults.pop() {
            return Err(fault);
        }
        let mut kept = kept.into_iter();
        self.pairs.retain(|_| kept.next().unwrap_or(false));
        if self.pairs.is_empty() {
            let told = self.summary.lines();
            let told = told.iter().skip(1).map(|line| format!("\n  {line}")).collect::<String>();
            let message = format!(
                "no image has an instance of {} pixels or more{told}",
                self.options.min_area.max(1)
            );
            return Err(Error::file(truth, message));
        }
        Ok(self)
    }

    /// How many pairs there are, at least one.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Summary of the whole data set, made when it was opened.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Name, width and height of each image.
    pub fn sizes(&self) -> impl Iterator<Item = (&Path, (u32, u32))> {
        self.pairs.iter().map(|pair| (pair.image.as_path(), pair.size))
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
                    let (width, height) = pair.size;
                    for (object, runs) in coco.objects((height, width)).enumerate() {
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
            options: self.options.clone(),
            summary: self.summary.clone(),
        };
        Ok((part(false), part(true)))
    }

    /// Reads the pair at `index`.
    ///
    /// # Errors
    /// - a file became unreadable, or its mask has no instance any more.
    pub fn load(&self, index: usize) -> Result<Sample> {
        let Loaded { sample, small, .. } = self.read(index)?;
        match sample.instances.is_empty() {
            true => Err(self.pairs[index].without_instance(self.options.min_area, small)),
            false => Ok(sample),
        }
    }

    /// As `load`, but there may be no instance.
    fn read(&self, index: usize) -> Result<Loaded> {
        let pair = self.pairs.get(index).ok_or_else(|| {
            Error::config(format!("there are {} images, and none at {index}", self.len()))
        })?;
        pair.read(&self.options)
    }
}
