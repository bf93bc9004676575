//! The record of a run, by which a killed one loses its last image at most.
//!
//! ```text
//! masks.jsonl   {"settings": ..}               a line that says what the results depend on
//!               {"image": .., "annotations": ..}   a line an image, appended when its files are written
//! masks.json    all of them as COCO's JSON     at the end, and on the way as often as its writing costs little
//! ```
//! A line that a kill cut off is dropped. Lines are in the order in which images were done, at the end in that of the
//! images of the run. Numbers of images and annotations are those of their places.

use super::super::settings;
use crate::sam::{CocoAnnotations, GeneratedMask};
use crate::{write_atomic, Error, Result};
use serde_json::{json, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The record's files in the output folder: the journal and COCO's JSON.
pub const FILES: [&str; 2] = ["masks.jsonl", "masks.json"];

/// The share of a run's time that may go into writing COCO's JSON again is one over this.
const WRITING_SHARE: u32 = 20;

/// The images that are done.
pub struct Journal {
    path: PathBuf,
    json: PathBuf,
    settings: Value,
    /// None before the first image of this run: a run that fails at once leaves what was there.
    file: Option<File>,
    entries: Vec<Value>,
    written: Instant,
    pause: Duration,
}

impl Journal {
    /// A new one; with its first image it takes the place of what was there.
    pub fn begin(folder: &Path, settings: Value) -> Self {
        Self::with(folder, settings, vec![])
    }

    /// The one in `folder`, or a new one.
    ///
    /// # Errors
    /// - the one that is there has other settings;
    /// - a file cannot be read or written.
    pub fn resume(folder: &Path, run: Value) -> anyhow::Result<Self> {
        let path = folder.join(FILES[0]);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io(&path, e).into()),
        };
        let mut lines = text.lines().map_while(|line| serde_json::from_str::<Value>(line).ok());
        let earlier = lines.next().map(|mut first| first["settings"].take());
        if let Some(earlier) = earlier {
            settings::check(&path, &earlier, &run)?;
        }
        // The later of two lines counts: its image was made again.
        let mut entries: Vec<Value> = lines.collect();
        let mut names = BTreeSet::new();
        entries.reverse();
        entries.retain(|entry| names.insert(name_of(entry).map(str::to_string)));
        entries.reverse();
        Ok(Self::with(folder, run, entries))
    }

    fn with(folder: &Path, settings: Value, entries: Vec<Value>) -> Self {
        let [path, json] = FILES.map(|name| folder.join(name));
        let pause = Duration::ZERO;
        Self { path, json, settings, file: None, entries, written: Instant::now(), pause }
    }

    /// Writes the lines anew, without one that was cut off; returns the file to append to.
    fn open(&self) -> Result<File> {
        let first = json!({ "settings": self.settings });
        write_atomic(&self.path, |file| {
            let mut lines = [&first].into_iter().chain(&self.entries);
            lines.try_for_each(|line| writeln!(file, "{line}"))
        })?;
        let file = OpenOptions::new().append(true).open(&self.path);
        file.map_err(|e| Error::io(&self.path, e))
    }

    /// Height and width of each image that is done, and how many masks it has, by its name.
    pub fn done(&self) -> BTreeMap<String, ((u32, u32), usize)> {
        let found = |entry: &Value| {
            let side = |name: &str| u32::try_from(entry["image"][name].as_u64()?).ok();
            let masks = entry["annotations"].as_array()?.len();
            Some((name_of(entry)?.to_string(), ((side("height")?, side("width")?), masks)))
        };
        self.entries.iter().filter_map(found).collect()
    }

    /// The masks of all images.
    pub fn masks(&self) -> usize {
        self.entries.iter().filter_map(|entry| entry["annotations"].as_array()).map(Vec::len).sum()
    }

    /// Adds an image from its [`coco_text`], in place of an earlier one of its name.
    pub fn push(&mut self, text: &str) -> Result<()> {
        let value = serde_json::from_str::<Value>(text);
        let mut value = value.map_err(|e| Error::file(&self.path, e.to_string()))?;
        let entry = json!({
            "image": value["images"][0].take(),
            "annotations": value["annotations"].take(),
        });
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.open()?,
        };
        let written = writeln!(file, "{entry}").and_then(|()| file.sync_data());
        written.map_err(|e| Error::io(&self.path, e))?;
        self.file = Some(file);
        self.entries.retain(|other| name_of(other) != name_of(&entry));
        self.entries.push(entry);
        if self.written.elapsed() >= self.pause {
            self.write_json()?;
        }
        Ok(())
    }

    /// Writes COCO's JSON, and brings images into the order of `names`, those of other names first; returns its path.
    pub fn finish(mut self, names: &[String]) -> Result<PathBuf> {
        let places: BTreeMap<&str, usize> =
            names.iter().enumerate().map(|(place, name)| (name.as_str(), place)).collect();
        let place = |entry: &Value| name_of(entry).and_then(|name| places.get(name));
        if !self.entries.is_sorted_by_key(place) {
            self.entries.sort_by_key(|entry| place(entry).copied());
            self.file = None;
            self.open()?;
        }
        self.write_json()?;
        Ok(self.json)
    }

    fn write_json(&mut self) -> Result<()> {
        let started = Instant::now();
        let (mut images, mut annotations) = (vec![], vec![]);
        for entry in &self.entries {
            let mut image = entry["image"].clone();
            let id = images.len() + 1;
            image["id"] = id.into();
            images.push(image);
            for annotation in entry["annotations"].as_array().into_iter().flatten() {
                let mut annotation = annotation.clone();
                annotation["id"] = (annotations.len() + 1).into();
                annotation["image_id"] = id.into();
                annotations.push(annotation);
            }
        }
        let categories = json!([{ "id": 1, "name": "object" }]);
        let coco =
            json!({ "images": images, "annotations": annotations, "categories": categories });
        let text = coco.to_string();
        write_atomic(&self.json, |file| file.write_all(text.as_bytes()))?;
        self.written = Instant::now();
        self.pause = WRITING_SHARE * started.elapsed();
        Ok(())
    }
}

/// An image of a height and width with its masks, as COCO's JSON. It is text, where an f32 has its own digits; as a
/// value it would have those of an f64.
///
/// # Errors
/// - the JSON cannot be written.
pub fn coco_text(name: &str, size: (u32, u32), masks: &[GeneratedMask]) -> anyhow::Result<String> {
    let mut single = CocoAnnotations::default();
    single.push(name, size, masks)?;
    Ok(serde_json::to_string(&single)?)
}

/// The name of an entry's image.
fn name_of(entry: &Value) -> Option<&str> {
    entry["image"]["file_name"].as_str()
}
