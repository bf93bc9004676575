//! Masks as COCO writes them: lengths of runs down the columns, background and object in turns, background first.
//!
//! ```text
//! runs        [n0, n1, n2, ..]                 their sum is height * width
//! compressed  each number, or its difference to the one before last, in groups of 5 bits from the lowest: a character
//!             is 48 + group + 32 if more follow; bit 16 of the last group is the sign
//! polygon     its outline, drawn five times as fine; a column's runs change where it crosses the column's middle
//! ```
//! Source: `maskApi.c` of pycocotools, whose masks these are, pixel for pixel.

mod columns;
mod outline;

pub use outline::{Polygon, Ring};

use crate::{Error, Result};

/// A mask as COCO's run lengths.
///
/// [Example](crate::sam::label_image)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rle {
    /// Height and width in pixels.
    pub size: (u32, u32),
    /// Lengths of runs down the columns, background first; their sum is height times width.
    pub counts: Vec<u32>,
}

impl Rle {
    /// A mask `[height, width]` of rows.
    ///
    /// # Errors
    /// - the mask has not `height * width` pixels, or more than 2^32.
    pub fn from_mask(mask: &[bool], size: (u32, u32)) -> Result<Self> {
        let expected = u64::from(size.0) * u64::from(size.1);
        if mask.len() as u64 != expected || expected > u64::from(u32::MAX) {
            let message = format!("a mask of {} pixels, expected {expected}", mask.len());
            return Err(Error::Config(message));
        }
        Ok(Self::within(mask, size, (0, 0), size))
    }

    /// A mask of rows of the size `part`, whose first pixel is at row and column `at` of an image of `size`.
    pub(super) fn within(mask: &[bool], part: Size, at: Size, size: Size) -> Self {
        let mut runs = RunWriter { counts: vec![0], value: false };
        runs.push(false, at.1 * size.0);
        for x in 0..part.1 as usize {
            runs.push(false, at.0);
            let column = mask.iter().skip(x).step_by(part.1 as usize);
            column.for_each(|value| runs.push(*value, 1));
            runs.push(false, size.0 - at.0 - part.0);
        }
        runs.push(false, (size.1 - at.1 - part.1) * size.0);
        Self { size, counts: runs.counts }
    }

    /// The mask as rows, `[height, width]`.
    pub fn to_mask(&self) -> Vec<bool> {
        let mut mask = vec![false; self.size.0 as usize * self.size.1 as usize];
        paint(&self.counts, &mut mask, self.size);
        mask
    }

    /// Height and width in pixels.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// Pixels of the object.
    pub fn area(&self) -> u64 {
        self.counts.iter().skip(1).step_by(2).map(|run| u64::from(*run)).sum()
    }

    /// `[x0, y0, x1, y1]`, the first and the last column and row of the object; none without a pixel.
    pub fn bounds(&self) -> Option<[u32; 4]> {
        let height = u64::from(self.size.0);
        let (mut bounds, mut first) = (None, 0);
        for (end, inside) in ends(&self.counts) {
            if inside && first < end && height > 0 {
                let last = end - 1;
                let (x0, x1) = (first / height, last / height);
                // A run over the end of a column touches the first row and the last.
                let (y0, y1) =
                    if x0 == x1 { (first % height, last % height) } else { (0, height - 1) };
                let [x0, y0, x1, y1] = [x0, y0, x1, y1].map(|side| side as u32);
                let [a0, b0, a1, b1] = bounds.unwrap_or([x0, y0, x1, y1]);
                bounds = Some([a0.min(x0), b0.min(y0), a1.max(x1), b1.max(y1)]);
            }
            first = end;
        }
        bounds
    }

    /// Pixels that both masks have; none if their sizes differ.
    pub fn intersection(&self, other: &Self) -> u64 {
        if self.size != other.size {
            return 0;
        }
        let (mut a, mut b) = (ends(&self.counts), ends(&other.counts));
        let (mut one, mut two) = (a.next(), b.next());
        let (mut place, mut both) = (0, 0);
        while let (Some((end, inside)), Some((other_end, other_inside))) = (one, two) {
            let next = end.min(other_end);
            if inside && other_inside {
                both += next - place;
            }
            place = next;
            if end == next {
                one = a.next();
            }
            if other_end == next {
                two = b.next();
            }
        }
        both
    }

    /// The counts as COCO's files write them.
    pub fn compressed(&self) -> String {
        let mut text = String::new();
        for (index, run) in self.counts.iter().enumerate() {
            let before = if index > 2 { self.counts[index - 2] } else { 0 };
            let mut number = i64::from(*run) - i64::from(before);
            loop {
                let group = (number & 31) as u8;
                number >>= 5;
                let done = number == if group & 16 != 0 { -1 } else { 0 };
                text.push(char::from(48 + group + if done { 0 } else { 32 }));
                if done {
                    break;
                }
            }
        }
        text
    }

    /// From the counts of COCO's files.
    ///
    /// # Errors
    /// - the text is no such counts, or their sum is not the size.
    pub fn from_compressed(text: &str, size: (u32, u32)) -> Result<Self> {
        match decompressed(text, size) {
            Ok(counts) => Ok(Self { size, counts }),
            Err(message) => Err(Error::Config(format!("run lengths: {message}"))),
        }
    }
}

/// Where each run ends, and whether it is the object's.
fn ends(counts: &[u32]) -> impl Iterator<Item = (u64, bool)> + '_ {
    counts.iter().enumerate().scan(0, |end, (index, run)| {
        *end += u64::from(*run);
        Some((*end, index % 2 == 1))
    })
}

/// Joins runs of the same value.
struct RunWriter {
    counts: Vec<u32>,
    value: bool,
}

impl RunWriter {
    fn push(&mut self, value: bool, length: u32) {
        if length == 0 {
            return;
        }
        if value != self.value {
            self.counts.push(0);
            self.value = value;
        }
        if let Some(last) = self.counts.last_mut() {
            *last += length;
        }
    }
}

/// Lengths of runs.
pub(crate) type Runs = Vec<u32>;

/// Height and width.
pub(crate) type Size = (u32, u32);

/// How much finer than pixels outlines are drawn.
const SCALE: f64 = 5.0;

/// Outlines may lie outside of their image by its side and so many pixels.
const MARGIN: f64 = 1000.0;

/// Runs as they are, if they fill the mask.
pub(crate) fn checked(runs: Runs, (height, width): Size) -> std::result::Result<Runs, String> {
    let expected = u64::from(height) * u64::from(width);
    let found: u64 = runs.iter().map(|run| u64::from(*run)).sum();
    match found == expected {
        true => Ok(runs),
        false => Err(format!("its runs hold {found} pixels, the image {expected}")),
    }
}

/// Runs from their compressed form.
pub(crate) fn decompressed(text: &str, size: Size) -> std::result::Result<Runs, String> {
    let mut runs: Runs = Vec::new();
    let mut characters = text.bytes();
    while let Some(mut character) = characters.next() {
        let (mut number, mut shift) = (0i64, 0);
        loop {
            let group = match character {
                48..=111 => i64::from(character - 48),
                other => {
                    return Err(format!("{:?} does not belong into counts", char::from(other)))
                }
            };
            // Seven groups hold 35 bits, more than any run has.
            if shift > 30 {
                return Err("a count has more than 7 characters".into());
            }
            number |= (group & 31) << shift;
            shift += 5;
            if group & 32 == 0 {
                if group & 16 != 0 {
                    number -= 1 << shift;
                }
                break;
            }
            character = characters.next().ok_or("the counts end within a number")?;
        }
        if let (true, Some(before)) = (runs.len() > 2, runs.len().checked_sub(2)) {
            number += i64::from(runs[before]);
        }
        runs.push(u32::try_from(number).map_err(|_| format!("a count is {number}"))?);
    }
    checked(runs, size)
}

/// The runs of a polygon `[x0, y0, x1, y1, ..]`.
pub(crate) fn polygon(xy: &[f64], (height, width): Size) -> std::result::Result<Runs, String> {
    if xy.len() < 6 || !xy.len().is_multiple_of(2) {
        let message = "a polygon needs 6 numbers at least, an even count of them, and has";
        return Err(format!("{message} {}", xy.len()));
    }
    // Far outside nothing is drawn, but outlines there would take time.
    let within = |value: f64, side: u32| {
        let (side, margin) = (f64::from(side), f64::from(side) + MARGIN);
        value >= -margin && value <= side + margin
    };
    for point in xy.chunks_exact(2) {
        if !(within(point[0], width) && within(point[1], height)) {
            return Err(format!(
                "the point {point:?} of a polygon is far outside of its image of {width} x {height} pixels"
            ));
        }
    }
    let pixels = u64::from(height) * u64::from(width);
    let fine = |value: f64| (SCALE * value + 0.5) as i64;
    let mut points = xy.chunks_exact(2).map(|point| (fine(point[0]), fine(point[1])));
    let points: Vec<(i64, i64)> = points.by_ref().collect();
    let edges = || points.iter().zip(points.iter().cycle().skip(1));
    let length: u64 = edges().map(|(a, b)| a.0.abs_diff(b.0).max(a.1.abs_diff(b.1)) + 1).sum();
    // A line in every row of pixels makes five to the pixel.
    if length > 8 * pixels + (1 << 20) {
        return Err(format!("a polygon's outline of {length} fifths of a pixel is no outline"));
    }
    let (mut crossings, mut last) = (Vec::new(), None);
    for (from, to) in edges() {
        outline(*from, *to, |x, y| {
            if let Some((x0, y0)) = last.replace((x, y)).filter(|(x0, _)| *x0 != x) {
                crossings.extend(crossing((x0, y0), (x, y), (height, width)));
            }
        });
    }
    crossings.push(pixels);
    crossings.sort_unstable();
    // Differences; two crossings at one place undo each other.
    let mut lengths = Vec::with_capacity(crossings.len());
    let mut before = 0;
    for place in crossings {
        lengths.push((place - before) as u32);
        before = place;
    }
    let mut runs: Runs = Vec::with_capacity(lengths.len());
    let mut lengths = lengths.into_iter();
    runs.extend(lengths.next());
    while let Some(length) = lengths.next() {
        match (length, runs.last_mut()) {
            (0, Some(run)) => *run += lengths.next().unwrap_or(0),
            _ => runs.push(length),
        }
    }
    Ok(runs)
}

/// The points of a straight line, both ends included, in order.
fn outline(from: (i64, i64), to: (i64, i64), mut point: impl FnMut(i64, i64)) {
    let (dx, dy) = (to.0.abs_diff(from.0) as i64, to.1.abs_diff(from.1) as i64);
    let flip = (dx >= dy && from.0 > to.0) || (dx < dy && from.1 > to.1);
    let ((xs, ys), (xe, ye)) = if flip { (to, from) } else { (from, to) };
    let slope = if dx >= dy { (ye - ys) as f64 / dx as f64 } else { (xe - xs) as f64 / dy as f64 };
    for step in 0..=dx.max(dy) {
        let t = if flip { dx.max(dy) - step } else { step };
        // A line of one point has no slope, and its other coordinate is never looked at.
        if dx >= dy {
            point(t + xs, (ys as f64 + slope * t as f64 + 0.5) as i64);
        } else {
            point((xs as f64 + slope * t as f64 + 0.5) as i64, t + ys);
        }
    }
}

/// Where the outline crosses the middle of a column between two of its points, as a place in the columns.
fn crossing(a: (i64, i64), b: (i64, i64), (height, width): Size) -> Option<u64> {
    let x = (if b.0 < a.0 { b.0 } else { b.0 - 1 }) as f64;
    let x = (x + 0.5) / SCALE - 0.5;
    if x.floor() != x || x < 0.0 || x > f64::from(width) - 1.0 {
        return None;
    }
    let y = (b.1.min(a.1) as f64 + 0.5) / SCALE - 0.5;
    let y = y.clamp(0.0, f64::from(height)).ceil();
    Some(x as u64 * u64::from(height) + y as u64)
}

/// Sets the object's pixels in a mask of rows.
fn paint(runs: &[u32], mask: &mut [bool], size: Size) {
    for place in pixels(std::slice::from_ref(&runs), size) {
        mask[place] = true;
    }
}

/// The places of the pixels of some runs together in rows, in ascending order.
pub(crate) fn pixels<R: AsRef<[u32]>>(objects: &[R], (height, width): Size) -> Vec<usize> {
    let (height, width) = (height as usize, width as usize);
    let mut places = vec![];
    for runs in objects {
        let mut place = 0;
        for (index, run) in runs.as_ref().iter().enumerate() {
            let end = place + *run as usize;
            if index % 2 == 1 {
                let inside =
                    (place..end.min(height * width)).map(|p| p % height * width + p / height);
                places.extend(inside);
            }
            place = end;
        }
    }
    places.sort_unstable();
    places.dedup();
    places
}
