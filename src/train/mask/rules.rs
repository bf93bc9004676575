//! From a mask's values to labels.

use super::meaning::{Mask, Meaning};
use super::parts::{parts, Part};
use super::soft;
use super::values::{Source, Values, STEPS};
use super::MaskOptions;
use crate::train::labels::{LabelImage, IGNORED};
use std::collections::{BTreeMap, BTreeSet};

/// 255 is ignored beside labels up to here.
const SMALL_LABEL: i64 = 100;
/// The colour of the contours in PASCAL VOC's masks.
const VOC_CONTOUR: i64 = 0xE0_E0C0;
/// Parts of fewer pixels do not count where a value is said to have several.
const NOTED_AREA: usize = 20;

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
    let (values, meaning) = levels(found, width as usize, options)?;
    let mut counts = counted(&values);
    let ignored = ignored(&counts, found, meaning, options);
    let outside = |value: &i64| ignored.contains(value);
    counts.retain(|value, _| !outside(value));
    let (numbers, pieces) = parts(&values, width as usize, true, |value| !outside(&value));
    let total: usize = counts.values().sum();
    let background = background(&counts, &pieces, found, options)?;
    counts.remove(&background);
    let is_object = |value: i64| value != background && !ignored.contains(&value);
    let objects: Vec<&Part> = pieces.iter().filter(|part| is_object(part.value)).collect();
    let binary = counts.len() == 1;
    if binary && options.background.is_none() {
        refuse_dark_objects(&objects, total, found)?;
    }
    let by_parts = binary || options.parts || meaning == Meaning::Opacity;
    refuse_whole_image(&counts, &objects, total, (by_parts, found))?;
    let mut remarks = remarks(&objects, total, found);
    if found.no_number > 0 {
        remarks.push(format!("{} pixels are no number and taken for background", found.no_number));
    }
    let pixels = Pixels { values: &values, numbers: &numbers, counts: &counts, by_parts };
    let labels = pixels.labels(&ignored, is_object);
    let labels = LabelImage::from_vec(width, height, labels)
        .ok_or("the mask has fewer pixels than its size says")?;
    Ok(Mask {
        labels,
        meaning: match (meaning, counts.len()) {
            (_, 0) => Meaning::Empty,
            (Meaning::Soft | Meaning::Opacity, _) => meaning,
            (_, 1) => Meaning::Binary,
            _ if options.parts => Meaning::Parts,
            _ => meaning,
        },
        ignored: ignored.into_iter().collect(),
        background: (background != 0).then_some(background),
        scattered: if by_parts { 0 } else { scattered(&objects) },
        remarks,
    })
}

/// The values that count, and how they are read: soft levels are cut at half.
///
/// # Errors
/// - the values are those of a photograph.
fn levels(
    found: &Values,
    columns: usize,
    options: &MaskOptions,
) -> Result<(Vec<i64>, Meaning), String> {
    let values = &found.values;
    let meaning = match found.source {
        Source::Grey => Meaning::Labels,
        Source::Palette => Meaning::Palette,
        Source::Colour => Meaning::Colours,
        Source::Opacity => Meaning::Opacity,
    };
    let counts = counted(values);
    let noise =
        counts.len() > 2 && soft::is_noise(values, columns, options.background.unwrap_or(0));
    // Probabilities seldom have an exact 0.
    let probabilities =
        found.fractions.is_some() && !counts.contains_key(&0) && options.background.is_none();
    if !noise && !probabilities {
        return Ok((values.clone(), meaning));
    }
    let levels = match found.source {
        Source::Grey | Source::Opacity => Some(values.clone()),
        Source::Colour => brightness(values),
        Source::Palette => None,
    };
    let threshold = levels.as_ref().and_then(|levels| soft::threshold(levels));
    match (levels, threshold) {
        (Some(levels), Some(threshold)) => {
            let cut = levels.iter().map(|level| i64::from(*level >= threshold)).collect();
            Ok((cut, Meaning::Soft))
        }
        _ if noise => Err(format!(
            "it is no mask: its {} values lie in tiny areas, as in a photograph, and not in two levels",
            counts.len()
        )),
        _ => Ok((values.clone(), meaning)),
    }
}

/// A white ground with dark objects would be the one object.
fn refuse_dark_objects(objects: &[&Part], total: usize, found: &Values) -> Result<(), String> {
    match objects.iter().find(|part| surrounds(part, total) && part.area < total) {
        None => Ok(()),
        Some(part) => {
            let (value, share) = (written(part.value, found), percent(part.area, total));
            let stored = stored(part.value, found);
            Err(format!(
                "the one value beside 0, {stored}, surrounds everything and covers {share} of the image: if objects \
                 are 0, say --background {value}, if not, --background 0"
            ))
        }
    }
}

fn refuse_whole_image(
    counts: &BTreeMap<i64, usize>,
    objects: &[&Part],
    total: usize,
    (by_parts, found): (bool, &Values),
) -> Result<(), String> {
    let largest = if by_parts {
        objects.iter().map(|part| (part.value, part.area)).max_by_key(|(_, area)| *area)
    } else {
        counts.iter().map(|(value, area)| (*value, *area)).max_by_key(|(_, area)| *area)
    };
    let whole = |area: usize| area * 1000 >= total * 999 && total > 0;
    match largest.filter(|(_, area)| whole(*area)) {
        None => Ok(()),
        Some((value, area)) => Err(format!(
            "one object, of the value {}, is the whole image ({area} of {total} pixels)",
            stored(value, found)
        )),
    }
}

/// Objects that may be none.
fn remarks(objects: &[&Part], total: usize, found: &Values) -> Vec<String> {
    let odd = objects.iter().filter(|part| part.borders() == 4 || part.area * 10 > total * 9);
    odd.map(|part| {
        let share = percent(part.area, total);
        format!(
            "an object of the value {} touches {} borders of the image and covers {share}",
            stored(part.value, found),
            part.borders()
        )
    })
    .take(3)
    .collect()
}

/// How many values have several large parts.
fn scattered(objects: &[&Part]) -> usize {
    let mut large: BTreeMap<i64, usize> = BTreeMap::new();
    objects
        .iter()
        .filter(|part| part.area >= NOTED_AREA)
        .for_each(|part| *large.entry(part.value).or_default() += 1);
    large.values().filter(|count| **count > 1).count()
}

/// The pixels of a mask, about to become labels.
struct Pixels<'a> {
    values: &'a [i64],
    /// The part of each pixel.
    numbers: &'a [u32],
    /// How many pixels each object's value has.
    counts: &'a BTreeMap<i64, usize>,
    by_parts: bool,
}

impl Pixels<'_> {
    fn labels(&self, ignored: &BTreeSet<i64>, is_object: impl Fn(i64) -> bool) -> Vec<u32> {
        // Labels keep their values where these are such numbers, so that an object's prompts depend on it alone.
        let keeps = self.counts.keys().all(|value| (1..i64::from(IGNORED)).contains(value));
        let ranks: BTreeMap<i64, u32> = self.counts.keys().copied().zip(1..).collect();
        let mut new_numbers = BTreeMap::new();
        let label = |(value, number): (&i64, &u32)| {
            if ignored.contains(value) {
                return IGNORED;
            }
            if !is_object(*value) {
                return 0;
            }
            if self.by_parts {
                let next = new_numbers.len() as u32 + 1;
                return *new_numbers.entry(*number).or_insert(next);
            }
            if keeps {
                *value as u32
            } else {
                ranks.get(value).copied().unwrap_or(0)
            }
        };
        self.values.iter().zip(self.numbers).map(label).collect()
    }
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
        Some(part) => {
            let (value, share) = (written(part.value, found), percent(part.area, total));
            let stored = stored(part.value, found);
            Err(format!(
                "no pixel is 0, the background; the value {stored} surrounds everything and covers {share}: say \
                 --background {value} if it is the background, --background 0 if it is an object"
            ))
        }
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

/// A value as [`MaskOptions::parse_value`] takes it; a colour of 8 bits a channel as `#rrggbb`.
fn written(value: i64, found: &Values) -> String {
    match found.source {
        Source::Colour if (0..1 << 24).contains(&value) => format!("#{value:06x}"),
        _ => value.to_string(),
    }
}

/// A value as it is in the file.
fn stored(value: i64, found: &Values) -> String {
    match found.fractions {
        Some((low, high)) => {
            let rounded = format!("{:.4}", low + value as f64 / STEPS * (high - low));
            rounded.trim_end_matches('0').trim_end_matches('.').into()
        }
        None => written(value, found),
    }
}

fn percent(part: usize, whole: usize) -> String {
    format!("{} %", (part * 100).checked_div(whole).unwrap_or(0))
}
