//! Summary of a data set: its reading and the parts left out, a line each.

use super::facts::{MaskFacts, PictureFacts, DARK};
use super::mask::Meaning;
use std::collections::BTreeMap;

/// How many names stand for all.
const NAMES: usize = 3;

/// A count and the first names.
#[derive(Clone, Debug, Default)]
pub(super) struct Named {
    count: usize,
    first: Vec<String>,
}

impl Named {
    /// One more.
    pub fn add(&mut self, name: impl Into<String>) {
        self.count += 1;
        if self.first.len() < NAMES {
            self.first.push(name.into());
        }
    }

    /// A count without names.
    pub fn counted(count: usize) -> Self {
        Self { count, first: vec![] }
    }

    /// Some more.
    pub fn extend(&mut self, names: impl IntoIterator<Item = String>) {
        names.into_iter().for_each(|name| self.add(name));
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The first names.
    pub fn names(&self) -> String {
        let more = if self.count > self.first.len() { ", .." } else { "" };
        format!("{}{more}", self.first.join(", "))
    }
}

/// Summary of how a data set was read.
///
/// [Example](crate::train::Dataset)
#[derive(Clone, Debug, Default)]
pub struct Summary {
    areas: Vec<usize>,
    files: usize,
    small: usize,
    min_area: usize,
    meanings: BTreeMap<Meaning, usize>,
    ignored: BTreeMap<i64, Named>,
    backgrounds: BTreeMap<i64, Named>,
    scattered: Named,
    scaled: Named,
    ranges: Vec<(f64, f64)>,
    turned: Named,
    dark: Named,
    not_numbers: Named,
    unnamed_channels: Named,
    empty: Named,
    too_small: Named,
    remarks: Vec<(String, String)>,
    remarked: usize,
    /// Notes about annotations.
    pub(super) notes: Vec<(String, Named)>,
    /// The line of shards.
    pub(super) shards: Option<String>,
}

impl Summary {
    pub(super) fn new(min_area: usize) -> Self {
        Self { min_area, ..Default::default() }
    }

    /// The objects of an image that are trained on, and how many are too small.
    pub(super) fn add_objects(&mut self, areas: impl Iterator<Item = usize>, small: usize) {
        self.areas.extend(areas);
        self.small += small;
        self.files += 1;
    }

    /// An image whose file has no object.
    pub(super) fn add_empty(&mut self, name: &str) {
        self.empty.add(name);
    }

    /// An image whose objects are all too small.
    pub(super) fn add_too_small(&mut self, name: &str, small: usize) {
        self.too_small.add(name);
        self.small += small;
    }

    /// How a mask was read.
    pub(super) fn add_mask(&mut self, name: &str, mask: &MaskFacts) {
        if mask.meaning != Meaning::Empty {
            *self.meanings.entry(mask.meaning).or_default() += 1;
        }
        for value in &mask.ignored {
            self.ignored.entry(*value).or_default().add(name);
        }
        if let Some(value) = mask.background {
            self.backgrounds.entry(value).or_default().add(name);
        }
        if mask.is_scattered {
            self.scattered.add(name);
        }
        for remark in &mask.remarks {
            self.remarked += 1;
            if self.remarks.len() < NAMES {
                self.remarks.push((name.to_string(), remark.clone()));
            }
        }
    }

    /// How an image was read.
    pub(super) fn add_picture(&mut self, name: &str, picture: &PictureFacts) {
        if let Some([low, high]) = picture.range.map(|range| range.map(f64::from_bits)) {
            self.scaled.add(format!("{name}, {}, {low} to {high}", picture.sample_type));
            self.ranges.push((low, high));
        }
        if picture.is_turned {
            self.turned.add(name);
        }
        if picture.has_not_numbers {
            self.not_numbers.add(name);
        }
        if picture.has_unnamed_channel {
            self.unnamed_channels.add(name);
        }
        if picture.is_dark {
            self.dark.add(name);
        }
    }

    /// Annotations of an image that were left out, by reason.
    pub(super) fn add_left_out(&mut self, name: &str, left_out: &[(String, usize)]) {
        for (what, count) in left_out {
            let place = self.notes.iter().position(|(other, _)| other == what);
            let place = place.unwrap_or_else(|| {
                self.notes.push((what.clone(), Named::default()));
                self.notes.len() - 1
            });
            self.notes[place].1.extend((0..*count).map(|_| name.to_string()));
        }
    }

    /// The number of objects that are trained on.
    pub fn objects(&self) -> usize {
        self.areas.len()
    }

    /// The lines that tell all of it.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![self.objects_line()];
        lines.extend(self.shards.clone());
        for (value, named) in &self.backgrounds {
            lines.push(format!(
                "the value {value} is the background in {}: {}",
                files(named.count, "mask"),
                named.names()
            ));
        }
        for (value, named) in &self.ignored {
            lines.push(format!(
                "the value {value} is ignored, neither object nor background, in {}: {} (--ignore none makes it an object)",
                files(named.count, "mask"),
                named.names()
            ));
        }
        if self.scattered.count > 0 {
            lines.push(format!(
                "a value has several separate parts and is one object in {}: {}; if values are classes, say --parts",
                files(self.scattered.count, "mask"),
                self.scattered.names()
            ));
        }
        if self.scaled.count > 0 {
            let low = self.ranges.iter().map(|range| range.0).fold(f64::INFINITY, f64::min);
            let high = self.ranges.iter().map(|range| range.1).fold(f64::NEG_INFINITY, f64::max);
            let first = self.scaled.first.first().cloned().unwrap_or_default();
            lines.push(format!(
                "values scaled to black and white in {}, each by its own range, within {low} to {high} (first: {first}; \
                 see --range)",
                files(self.scaled.count, "image")
            ));
        }
        if self.turned.count > 0 {
            lines.push(format!(
                "{} turned as EXIF says, masks taken to be of the turned image: {}",
                files(self.turned.count, "image"),
                self.turned.names()
            ));
        }
        if self.not_numbers.count > 0 {
            lines.push(format!(
                "samples that are no numbers (NaN) are black in {}: {}",
                files(self.not_numbers.count, "image"),
                self.not_numbers.names()
            ));
        }
        if self.unnamed_channels.count > 0 {
            lines.push(format!(
                "a fourth channel without a meaning is left out of {}: {}",
                files(self.unnamed_channels.count, "image"),
                self.unnamed_channels.names()
            ));
        }
        if self.dark.count > 0 {
            lines.push(format!(
                "nearly black, no value of 8 bits above {DARK}: {}: {} (--range percentile makes them brighter)",
                files(self.dark.count, "image"),
                self.dark.names()
            ));
        }
        if self.empty.count > 0 {
            lines.push(format!(
                "left out, without an object: {}: {}",
                files(self.empty.count, "image"),
                self.empty.names()
            ));
        }
        if self.too_small.count > 0 {
            lines.push(format!(
                "left out, every object smaller than {} pixels: {}: {}",
                self.min_area,
                files(self.too_small.count, "image"),
                self.too_small.names()
            ));
        }
        if self.small > 0 {
            lines.push(format!(
                "left out, smaller than {} pixels: {}",
                self.min_area,
                files(self.small, "object")
            ));
        }
        for (what, named) in &self.notes {
            let names =
                if named.first.is_empty() { String::new() } else { format!(": {}", named.names()) };
            lines.push(format!("{what}: {}{names}", named.count));
        }
        for (name, remark) in &self.remarks {
            lines.push(format!("{name}: {remark}"));
        }
        if self.remarked > self.remarks.len() {
            lines.push(format!("and {} more such remarks", self.remarked - self.remarks.len()));
        }
        lines
    }

    fn objects_line(&self) -> String {
        let mut areas = self.areas.clone();
        areas.sort_unstable();
        let (least, most) = (areas.first().unwrap_or(&0), areas.last().unwrap_or(&0));
        let middle = areas.get(areas.len() / 2).unwrap_or(&0);
        let meanings: Vec<String> = match self.meanings.len() {
            0 => vec!["outlines".into()],
            1 => self.meanings.keys().map(Meaning::to_string).collect(),
            _ => {
                self.meanings.iter().map(|(meaning, count)| format!("{count}: {meaning}")).collect()
            }
        };
        let kind = if self.meanings.is_empty() { "image" } else { "mask" };
        format!(
            "{} in {} ({}), area {least} / {middle} / {most} pixels",
            files(areas.len(), "object"),
            files(self.files, kind),
            meanings.join("; ")
        )
    }
}

fn files(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sam::{Picture, SampleType};

    #[test]
    fn the_first_line_tells_objects_masks_rule_and_areas() {
        let mut summary = Summary::new(20);
        let mask = |meaning| MaskFacts {
            meaning,
            ignored: vec![255],
            background: None,
            is_scattered: false,
            remarks: vec![],
        };
        for areas in [vec![31, 80, 90], vec![210, 70, 75]] {
            summary.add_objects(areas.into_iter(), 0);
            summary.add_mask("a.png", &mask(Meaning::Binary));
        }
        let line =
            "6 objects in 2 masks (binary, parts taken as objects), area 31 / 80 / 210 pixels";
        assert_eq!(summary.lines()[0], line);
        assert!(
            summary.lines()[1].contains("255 is ignored") && summary.lines()[1].contains("2 masks")
        );
        summary.add_mask("b.png", &mask(Meaning::Labels));
        assert!(
            summary.lines()[0].contains("2: binary") && summary.lines()[0].contains("1: labels")
        );
        for (name, value) in [("dark.png", 20), ("bright.png", 200)] {
            let image = image::GrayImage::from_pixel(2, 2, image::Luma([value])).into();
            let sample_type = SampleType::Unsigned(8);
            let orientation = image::metadata::Orientation::NoTransforms;
            let picture = Picture {
                image,
                range: None,
                sample_type,
                not_numbers: usize::from(name == "bright.png"),
                unnamed_channel: name == "dark.png",
                stored: None,
                orientation,
            };
            summary.add_picture(name, &PictureFacts::of(&picture));
        }
        let black = "samples that are no numbers (NaN) are black in 1 image: bright.png";
        assert!(summary.lines().iter().any(|line| line == black));
        let fourth = "a fourth channel without a meaning is left out of 1 image: dark.png";
        assert!(summary.lines().iter().any(|line| line == fourth));
        let dark = "nearly black, no value of 8 bits above 31: 1 image: dark.png";
        assert!(summary.lines().iter().any(|line| line.starts_with(dark)));
        (0..9).for_each(|n| summary.add_empty(&format!("{n}.png")));
        let last = "left out, without an object: 9 images: 0.png, 1.png, 2.png, ..";
        assert_eq!(summary.lines().last().map(String::as_str), Some(last));
    }
}
