//! From a mask's values to labels.

use super::parts::{parts, Part};
use super::soft;
use super::values::{Source, Values};
use super::MaskOptions;
use crate::train::labels::{LabelImage, IGNORED};
use image::imageops;
use image::metadata::Orientation;
use std::collections::{BTreeMap, BTreeSet};

/// 255 is ignored beside labels up to here.
const SMALL_LABEL: i64 = 100;
/// The colour of the contours in PASCAL VOC's masks.
const VOC_CONTOUR: i64 = 0xE0_E0C0;
/// Parts of fewer pixels do not count where a value is said to have several.
const NOTED_AREA: usize = 20;

/// A mask, read.
#[derive(Clone, Debug)]
pub struct Mask {
    /// A label a pixel: 0 the background, [`IGNORED`] what is neither.
    pub labels: LabelImage,
    /// How it was read.
    pub meaning: Meaning,
    /// Values that were ignored.
    pub ignored: Vec<i64>,
    /// What was taken for the background, if not 0.
    pub background: Option<i64>,
    /// Values that have several separate parts, each value one object.
    pub scattered: usize,
    /// Remarks about this mask alone.
    pub remarks: Vec<String>,
}

/// How a mask's pixels were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Meaning {
    /// One value beside the background; its parts are objects.
    Binary,
    /// Two levels with soft edges, cut at half; its parts are objects.
    Soft,
    /// Opaque parts are objects.
    Opacity,
    /// Each value is an object.
    Labels,
    /// Each index is an object.
    Palette,
    /// Each colour is an object.
    Colours,
    /// Each part of each value is an object.
    Parts,
    /// Every pixel is background, or ignored.
    Empty,
}

impl std::fmt::Display for Meaning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Binary => "binary, parts taken as objects",
            Self::Soft => "two levels with soft edges, cut at half, parts taken as objects",
            Self::Opacity => "by opacity, opaque parts taken as objects",
            Self::Labels => "labels, each value an object",
            Self::Palette => "palette, each index an object",
            Self::Colours => "colours, each an object",
            Self::Parts => "each part of each value an object",
            Self::Empty => "empty",
        })
    }
}

impl Mask {
    /// Turns it as a viewer turns the file.
    pub(super) fn turn(&mut self, orientation: Orientation) {
        use Orientation::*;
        let labels = &self.labels;
        self.labels = match orientation {
            NoTransforms => return,
            Rotate90 => imageops::rotate90(labels),
            Rotate180 => imageops::rotate180(labels),
            Rotate270 => imageops::rotate270(labels),
            FlipHorizontal => imageops::flip_horizontal(labels),
            FlipVertical => imageops::flip_vertical(labels),
            Rotate90FlipH => imageops::flip_horizontal(&imageops::rotate90(labels)),
            Rotate270FlipH => imageops::flip_horizontal(&imageops::rotate270(labels)),
        };
    }
}

/// Reads values by the rules.
///
/// # Errors
/// - the values are no labels;
/// - an object is the whole image;
/// - what surrounds everything is no background, and none was named.
pub(super) fn mask(
    found: &Values,
    width: u32,
    height: u32,
    options: &MaskOptions,
) -> Result<Mask, String> {
    let mut values = found.values.clone();
    let columns = width as usize;
    let mut meaning = match found.source {
        Source::Grey => Meaning::Labels,
        Source::Palette => Meaning::Palette,
        Source::Colour => Meaning::Colours,
        Source::Opacity => Meaning::Opacity,
    };
    let mut counts = counted(&values);
    if counts.len() > 2 && soft::is_noise(&values, columns, options.background.unwrap_or(0)) {
        let levels = match found.source {
            Source::Grey | Source::Opacity => Some(values.clone()),
            Source::Colour => brightness(&values),
            Source::Palette => None,
        };
        let threshold = levels.as_ref().and_then(|levels| soft::threshold(levels));
        let (Some(levels), Some(threshold)) = (levels, threshold) else {
            return Err(format!(
                "it is no mask: its {} values lie in tiny areas, as in a photograph, and not in two levels",
                counts.len()
            ));
        };
        values = levels.iter().map(|level| i64::from(*level >= threshold)).collect();
        meaning = Meaning::Soft;
        counts = counted(&values);
    }
    let ignored = ignored(&counts, found, meaning, options);
    let outside = |value: &i64| ignored.contains(value);
    counts.retain(|value, _| !outside(value));
    let (numbers, pieces) = parts(&values, columns, true, |value| !outside(&value));
    let total: usize = counts.values().sum();
    let background = background(&counts, &pieces, found, options)?;
    counts.remove(&background);
    let is_object = |value: i64| value != background && !ignored.contains(&value);
    let objects = || pieces.iter().filter(|part| is_object(part.value));
    let binary = counts.len() == 1;
    if binary && options.background.is_none() {
        // A white ground with dark objects would be the one object.
        if let Some(part) = objects().find(|part| surrounds(part, total) && part.area < total) {
            return Err(format!(
                "the one value beside 0, {}, surrounds everything and covers {} of the image: if objects are 0, say \
                 --background {}, if not, --background 0",
                part.value,
                percent(part.area, total),
                part.value
            ));
        }
    }
    let by_parts = binary || options.parts || meaning == Meaning::Opacity;
    let whole = |area: usize| area * 1000 >= total * 999 && total > 0;
    let largest = if by_parts {
        objects().map(|part| (part.value, part.area)).max_by_key(|(_, area)| *area)
    } else {
        counts.iter().map(|(value, area)| (*value, *area)).max_by_key(|(_, area)| *area)
    };
    if let Some((value, area)) = largest.filter(|(_, area)| whole(*area)) {
        return Err(format!(
            "one object, of the value {value}, is the whole image ({area} of {total} pixels)"
        ));
    }
    let mut remarks: Vec<String> = objects()
        .filter(|part| part.borders() == 4 || part.area * 10 > total * 9)
        .map(|part| {
            let share = percent(part.area, total);
            format!(
                "an object of the value {} touches {} borders of the image and covers {share}",
                part.value,
                part.borders()
            )
        })
        .take(3)
        .collect();
    if found.no_number > 0 {
        remarks.push(format!("{} pixels are no number and taken for background", found.no_number));
    }
    let mut large: BTreeMap<i64, usize> = BTreeMap::new();
    objects()
        .filter(|p| p.area >= NOTED_AREA)
        .for_each(|p| *large.entry(p.value).or_default() += 1);
    let scattered = large.values().filter(|count| **count > 1).count();
    meaning = match (meaning, counts.len()) {
        (_, 0) => Meaning::Empty,
        (Meaning::Soft | Meaning::Opacity, _) => meaning,
        (_, 1) => Meaning::Binary,
        _ if options.parts => Meaning::Parts,
        _ => meaning,
    };
    // Labels keep their values where these are such numbers, so that an object's prompts depend on it alone.
    let keeps = counts.keys().all(|value| (1..i64::from(IGNORED)).contains(value));
    let ranks: BTreeMap<i64, u32> = counts.keys().copied().zip(1..).collect();
    let mut new_numbers = BTreeMap::new();
    let mut label = |place: usize| -> u32 {
        let value = values[place];
        if ignored.contains(&value) {
            return IGNORED;
        }
        if !is_object(value) {
            return 0;
        }
        if by_parts {
            let next = new_numbers.len() as u32 + 1;
            return *new_numbers.entry(numbers[place]).or_insert(next);
        }
        if keeps {
            value as u32
        } else {
            ranks.get(&value).copied().unwrap_or(0)
        }
    };
    let labels: Vec<u32> = (0..values.len()).map(&mut label).collect();
    let labels = LabelImage::from_vec(width, height, labels)
        .ok_or("the mask has fewer pixels than its size says")?;
    Ok(Mask {
        labels,
        meaning,
        ignored: ignored.into_iter().collect(),
        background: (background != 0).then_some(background),
        scattered: if by_parts { 0 } else { scattered },
        remarks,
    })
}

/// How many pixels each value has.
fn counted(values: &[i64]) -> BTreeMap<i64, usize> {
    let mut counts = BTreeMap::new();
    // Runs of one value are long in masks.
    for run in values.chunk_by(|a, b| a == b) {
        *counts.entry(run[0]).or_default() += run.len();
    }
    counts
}

/// The values that are neither object nor background.
fn ignored(
    counts: &BTreeMap<i64, usize>,
    found: &Values,
    meaning: Meaning,
    options: &MaskOptions,
) -> BTreeSet<i64> {
    let present = |value: &i64| counts.contains_key(value);
    if let Some(named) = &options.ignore {
        return named.iter().copied().filter(present).collect();
    }
    let background = options.background.unwrap_or(0);
    let labels = || counts.keys().copied().filter(move |value| *value != background);
    let mut ignored = BTreeSet::new();
    match meaning {
        Meaning::Labels | Meaning::Palette => {
            // Beside nothing but a background, -1 or the largest value may be the objects, or the ground.
            let special = |value: i64| value < 0 || (Some(value) == found.top && value >= 255);
            let small = |value: i64| match found.top {
                Some(top) if top <= 255 => value <= SMALL_LABEL,
                _ => true,
            };
            let others = labels().filter(|value| !special(*value));
            if counts.contains_key(&background)
                && others.clone().next().is_some()
                && others.clone().all(small)
            {
                ignored.extend(labels().filter(|value| special(*value)));
            }
        }
        Meaning::Colours if counts.contains_key(&VOC_CONTOUR) => {
            let steps = |value: i64| {
                [value >> 16, value >> 8 & 0xff, value & 0xff]
                    .iter()
                    .all(|c| [0, 64, 128, 192].contains(c))
            };
            if labels().filter(|value| *value != VOC_CONTOUR).all(steps) && counts.len() > 2 {
                ignored.insert(VOC_CONTOUR);
            }
        }
        _ => {}
    }
    ignored
}

/// Whether a part lies round everything else.
fn surrounds(part: &Part, total: usize) -> bool {
    part.borders() == 4 && part.corners >= 3 && part.area * 2 > total
}

/// The value of the background.
fn background(
    counts: &BTreeMap<i64, usize>,
    pieces: &[Part],
    found: &Values,
    options: &MaskOptions,
) -> Result<i64, String> {
    if let Some(value) = options.background {
        return Ok(value);
    }
    if counts.contains_key(&0) || counts.len() < 2 {
        return Ok(0);
    }
    if counts.contains_key(&-1) {
        return Ok(-1);
    }
    let total: usize = counts.values().sum();
    // Objects may divide the ground, so white and the largest value count in all their parts.
    let white = matches!(found.source, Source::Colour).then_some(0xff_ffff);
    let usual = white.or(found.top).filter(|value| *value >= 255);
    if let Some((value, area)) = usual.and_then(|value| Some((value, *counts.get(&value)?))) {
        let sides = pieces.iter().filter(|p| p.value == value).fold(0, |sides, p| sides | p.sides);
        if sides == 0b1111 && area * 4 > total {
            return Ok(value);
        }
    }
    match pieces.iter().find(|part| surrounds(part, total)) {
        None => Ok(0),
        Some(part) => Err(format!(
            "no pixel is 0, the background; the value {} surrounds everything and covers {}: say --background {} if it \
             is the background, --background 0 if it is an object",
            part.value,
            percent(part.area, total),
            part.value
        )),
    }
}

/// The brightest channel of colours that differ in brightness alone.
fn brightness(values: &[i64]) -> Option<Vec<i64>> {
    let channels = |value: i64| [value >> 16, value >> 8 & 0xff, value & 0xff];
    let bright: Vec<i64> =
        values.iter().map(|value| channels(*value).into_iter().max().unwrap_or(0)).collect();
    let top = *bright.iter().max()?;
    let brightest: Vec<[i64; 3]> = values
        .iter()
        .zip(&bright)
        .filter(|(_, bright)| **bright * 10 >= top * 9)
        .map(|(value, _)| channels(*value))
        .collect();
    let mean =
        |c: usize| brightest.iter().map(|p| p[c]).sum::<i64>() / brightest.len().max(1) as i64;
    let means = [mean(0), mean(1), mean(2)];
    let near = |pixel: &&[i64; 3]| (0..3).all(|c| (pixel[c] - means[c]).abs() <= 48);
    (brightest.iter().filter(near).count() * 10 >= brightest.len() * 9).then_some(bright)
}

fn percent(part: usize, whole: usize) -> String {
    format!("{} %", (part * 100).checked_div(whole).unwrap_or(0))
}
