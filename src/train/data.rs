//! Images and their objects, visited in an order that is a function of (seed, step). A folder of images has a folder of
//! masks, paired by name, or COCO's annotations.

use super::distributed::{check_agreement, together, Alone, Communicator};
use super::finding::Finding;
use super::listing::{DataFiles, Listing, TruthFiles};
use super::sample::{DatasetOptions, Loaded, Pair, Sample, Truth};
use super::summary::Summary;
use super::StepRng;
use crate::files::Checksum;
use crate::{Error, Result};
use serde_json::{json, Map};
use std::path::Path;

/// So many faults are listed.
const MOST_FAULTS: usize = 20;

/// Image files, each with a mask file or with objects.
///
/// ```
/// use candle_sam_lora::train::{sample_indices, DataFiles, Dataset, DatasetOptions, TruthFiles};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let folders = |kind| ["coins", "nuclei"].map(|set| format!("assets/photos/{set}/train/{kind}").into()).to_vec();
/// let files = DataFiles { images: folders("images"), truth: TruthFiles::Masks(folders("masks")) };
/// let dataset = Dataset::open_files(&files, &DatasetOptions::min_area(20))?; // smaller objects are left out
/// for line in dataset.summary().lines() {
///     println!("{line}");
/// }
/// let (training, held_out) = dataset.split(0.25, 0)?;
/// assert_eq!(training.len() + held_out.len(), dataset.len());
/// for index in sample_indices(training.len(), 2, 42, 0) {
///     let sample = training.load(index)?; // of step 0
///     assert!(sample.object(&sample.instances[0])?.area() >= 20);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Dataset {
    pairs: Vec<Pair>,
    options: DatasetOptions,
    summary: Summary,
}

impl Dataset {
    /// The images of a folder or TAR, with the masks of another or the same: see [`open_files`](Self::open_files).
    ///
    /// # Errors
    /// - as [`open_files`](Self::open_files).
    pub fn open(
        images: impl AsRef<Path>,
        masks: impl AsRef<Path>,
        options: &DatasetOptions,
    ) -> Result<Self> {
        let truth = TruthFiles::Masks(vec![masks.as_ref().into()]);
        Self::open_files(&DataFiles { images: vec![images.as_ref().into()], truth }, options)
    }

    /// The images of a folder that have objects in a file of COCO's: see [`open_files`](Self::open_files).
    ///
    /// # Errors
    /// - as [`open_files`](Self::open_files).
    pub fn open_coco(
        images: impl AsRef<Path>,
        annotations: impl AsRef<Path>,
        options: &DatasetOptions,
    ) -> Result<Self> {
        let truth = TruthFiles::Coco(annotations.as_ref().into());
        Self::open_files(&DataFiles { images: vec![images.as_ref().into()], truth }, options)
    }

    /// Pairs images with their truth, and reads each once. So all faults of the data are told before hours of training.
    /// Images without an instance are left out; [`Self::summary`] tells what was understood.
    ///
    /// # Errors
    /// - a folder, TAR or file of annotations is unreadable, damaged or has no image;
    /// - an image has no mask, a mask no image, or two files share a name;
    /// - a file is unreadable, is no mask, or sizes differ;
    /// - no image has an instance; or something is left out, and the options are strict.
    pub fn open_files(files: &DataFiles, options: &DatasetOptions) -> Result<Self> {
        Self::open_together(files, options, &Alone)
    }

    /// As [`open_files`](Self::open_files), by several processes, each of which reads its share of the files.
    ///
    /// All must list the same names and sizes. Contents are compared when a sample is loaded, with what the process
    /// found that read it first.
    ///
    /// # Errors
    /// - as [`open_files`](Self::open_files), on every rank;
    /// - a rank has other files, or reads them with other options.
    pub fn open_together(
        files: &DataFiles,
        options: &DatasetOptions,
        communicator: &dyn Communicator,
    ) -> Result<Self> {
        let (listing, _) = together(communicator, Listing::of(files, options), |_| vec![])?;
        if communicator.size() > 1 {
            let (names, _) = together(communicator, listing.checksum(), |_| vec![])?;
            let images = listing.pairs.len();
            let data = json!({ "images": images, "names and sizes": names, "reading": options });
            check_agreement(communicator, &Map::from_iter([("data".to_string(), data)]))?;
        }
        let Listing { pairs, faults, truth, notes, shards } = listing;
        let mut summary = Summary::new(options.min_area);
        (summary.notes, summary.shards) = (notes, shards);
        let dataset = Self { pairs, options: options.clone(), summary };
        let findings = dataset.findings(communicator)?;
        Ok(together(communicator, dataset.checked(findings, &truth, faults), |_| vec![])?.0)
    }

    /// The findings in each pair, of which every process reads its share.
    fn findings(&self, communicator: &dyn Communicator) -> Result<Vec<Finding>> {
        let (rank, size) = (communicator.rank(), communicator.size());
        let find = |index: usize| Finding::of(&self.pairs[index], self.read(index));
        let own: Vec<Finding> = (rank..self.len()).step_by(size).map(find).collect();
        if size == 1 {
            return Ok(own);
        }
        let told = |own: &Vec<Finding>| json!(own).to_string().into_bytes();
        let (_, told) = together(communicator, Ok::<_, Error>(own), told)?;
        let share = |(rank, told): (usize, &Vec<u8>)| {
            let found = serde_json::from_slice::<Vec<Finding>>(told);
            let found = found.map_err(|e| Error::Rank { rank, message: e.to_string() })?;
            Ok(found.into_iter())
        };
        let mut shares = told.iter().enumerate().map(share).collect::<Result<Vec<_>>>()?;
        let next = |index: usize| {
            let rank = index % size;
            let found = shares[rank].next();
            found.ok_or_else(|| Error::Rank { rank, message: "did not read all it had to".into() })
        };
        (0..self.len()).map(next).collect()
    }

    /// Takes what was found; leaves out what has no instance.
    fn checked(
        mut self,
        findings: Vec<Finding>,
        truth: &Path,
        mut faults: Vec<Error>,
    ) -> Result<Self> {
        let mut kept = vec![];
        for (found, pair) in findings.into_iter().zip(&mut self.pairs) {
            kept.push(found.faults.is_empty() && !found.areas.is_empty());
            if !found.faults.is_empty() {
                faults.extend(found.faults);
                continue;
            }
            let file = pair.truth_file();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            self.summary.add_left_out(&name, &found.left_out);
            if self.options.strict && !found.left_out.is_empty() {
                let told = found.left_out.iter().map(|(what, count)| format!("{what}: {count}"));
                faults.push(Error::file(file, told.collect::<Vec<_>>().join("; ")));
            }
            if found.areas.is_empty() {
                if self.options.strict {
                    faults.push(pair.without_instance(self.options.min_area, found.small));
                }
                match found.small {
                    0 => self.summary.add_empty(&name),
                    small => self.summary.add_too_small(&name, small),
                }
                continue;
            }
            (pair.transparent, pair.size) = (found.transparent, found.size);
            (pair.content, pair.runs) = (found.content, found.runs);
            self.summary.add_objects(found.areas.into_iter(), found.small);
            self.summary.add_picture(&name, &found.picture);
            if let Some(mask) = &found.mask {
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
        self.pairs.iter().map(|pair| (pair.image.path.as_path(), pair.size))
    }

    /// The number of images with transparent pixels, which are laid on white.
    pub fn transparent(&self) -> usize {
        self.pairs.iter().filter(|pair| pair.transparent).count()
    }

    /// Whether objects may overlap: annotations allow it, masks do not.
    pub fn may_overlap(&self) -> bool {
        self.pairs.iter().any(|pair| !matches!(pair.truth, Truth::Mask(_)))
    }

    /// Never, of a dataset that was opened.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The number of images and a checksum of all files as they were when it was opened, for the settings of a run.
    pub fn fingerprint(&self) -> String {
        let mut checksum = Checksum::new();
        for Pair { name, content, runs, .. } in &self.pairs {
            let content = [content.image, content.truth, *runs].map(u32::to_le_bytes);
            checksum.add(name, content.as_flattened());
        }
        format!("{} images, checksum {checksum}", self.len())
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
    /// - a file became unreadable, or another one than when the data set was opened.
    pub fn load(&self, index: usize) -> Result<Sample> {
        let Loaded { sample, small, content, .. } = self.read(index)?;
        let pair = &self.pairs[index];
        if content != pair.content {
            let file = match content.image == pair.content.image {
                true => pair.truth_file(),
                false => &pair.image.path,
            };
            return Err(Error::file(file, "is not the file that was read when the run began"));
        }
        match sample.instances.is_empty() {
            true => Err(pair.without_instance(self.options.min_area, small)),
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
