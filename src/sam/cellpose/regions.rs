//! Numbered regions of an image: dropped, numbered anew, holes filled.

use std::collections::HashMap;

/// The pixels of one label.
pub(super) struct Region {
    /// In reading order, at least one.
    pub pixels: Vec<usize>,
    /// The first row and column.
    pub top: usize,
    pub left: usize,
    bottom: usize,
    right: usize,
}

impl Region {
    pub fn height(&self) -> usize {
        self.bottom - self.top + 1
    }

    pub fn width(&self) -> usize {
        self.right - self.left + 1
    }
}

/// The regions of labels that are numbered from 1 without a gap, in order.
pub(super) fn regions(labels: &[u32], width: usize) -> Vec<Region> {
    let mut regions: Vec<Region> = vec![];
    let last = labels.iter().copied().max().unwrap_or(0);
    let empty =
        || Region { pixels: vec![], top: usize::MAX, left: usize::MAX, bottom: 0, right: 0 };
    regions.resize_with(last as usize, empty);
    for (pixel, label) in labels.iter().enumerate().filter(|(_, label)| **label > 0) {
        let (region, y, x) = (&mut regions[*label as usize - 1], pixel / width, pixel % width);
        region.pixels.push(pixel);
        (region.top, region.left) = (region.top.min(y), region.left.min(x));
        (region.bottom, region.right) = (region.bottom.max(y), region.right.max(x));
    }
    regions
}

/// Drops the labels that `keep` does not want, by label and number of pixels. The others are numbered from 1, in the
/// order of their first pixels.
pub(super) fn retain(labels: &mut [u32], keep: impl Fn(usize, usize) -> bool) {
    let mut sizes: HashMap<u32, usize> = HashMap::new();
    labels
        .iter()
        .filter(|label| **label > 0)
        .for_each(|label| *sizes.entry(*label).or_default() += 1);
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    for label in labels.iter_mut().filter(|label| **label > 0) {
        let kept = keep(*label as usize, sizes.get(label).copied().unwrap_or(0));
        let next = numbers.len() as u32 + 1;
        *label = if kept { *numbers.entry(*label).or_insert(next) } else { 0 };
    }
}

/// Gives the pixels that a label surrounds, cut off by its sides from the rim of its box, to that label. Labels are
/// taken in order, and their boxes as they were at first.
pub(super) fn fill_holes(labels: &mut [u32], width: usize) {
    for (label, region) in (1..).zip(regions(labels, width)) {
        let (rows, columns) = (region.height(), region.width());
        let pixel =
            |place: usize| (region.top + place / columns) * width + region.left + place % columns;
        let is_own = |place: usize| labels[pixel(place)] == label;
        let is_rim = |place: usize| {
            let (y, x) = (place / columns, place % columns);
            y == 0 || x == 0 || y + 1 == rows || x + 1 == columns
        };
        let mut outside = vec![false; rows * columns];
        let mut next: Vec<usize> =
            (0..rows * columns).filter(|place| is_rim(*place) && !is_own(*place)).collect();
        next.iter().for_each(|place| outside[*place] = true);
        while let Some(place) = next.pop() {
            let (y, x) = (place / columns, place % columns);
            let beside = [(y.wrapping_sub(1), x), (y + 1, x), (y, x.wrapping_sub(1)), (y, x + 1)];
            for (y, x) in beside.into_iter().filter(|(y, x)| *y < rows && *x < columns) {
                let other = y * columns + x;
                if !is_own(other) && !std::mem::replace(&mut outside[other], true) {
                    next.push(other);
                }
            }
        }
        let filled: Vec<usize> =
            (0..rows * columns).filter(|place| !outside[*place]).map(pixel).collect();
        filled.into_iter().for_each(|pixel| labels[pixel] = label);
    }
}
