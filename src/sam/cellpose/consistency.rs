//! How well cells agree with the flow field that they were found in.
//!
//! ```text
//! heat  <- mean over the 3 x 3 neighbours of the same cell; each step, 1 is added at the centre
//! flow   = (heat(y + 1) - heat(y - 1), heat(x + 1) - heat(x - 1)), normalized
//! error  = mean over the cell of |flow - field / 5|^2
//! ```
//! Source: `masks_to_flows_gpu`, `flow_error` in `dynamics.py` of Cellpose 4.2. Cellpose computes the heat of images of
//! more than 40 megapixels in f32, this module always in f64.

use super::flows::CellFlows;
use super::regions::{self, Region};
use rayon::prelude::*;

/// The offsets of neighbours, in Cellpose's order, which the sums have too.
const NEIGHBOURS: [(isize, isize); 9] =
    [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)];

/// The error of each cell, in the order of their labels, which are numbered from 1 without a gap.
pub(super) fn errors(labels: &[u32], flows: &CellFlows) -> Vec<f64> {
    let (height, width) = flows.size;
    let cells = regions::regions(labels, width);
    let iterations =
        2 * cells.iter().map(|cell| cell.height() + cell.width() + 2).max().unwrap_or(0);
    let warmed: Vec<Vec<f64>> =
        cells.par_iter().map(|cell| diffused(cell, labels, width, iterations)).collect();
    let mut heat = vec![0f64; labels.len()];
    for (cell, values) in cells.iter().zip(warmed) {
        cell.pixels.iter().zip(values).for_each(|(pixel, value)| heat[*pixel] = value);
    }
    // The heat of another cell counts, that outside the image is 0.
    let at = |y: Option<usize>, x: Option<usize>| match (y, x) {
        (Some(y), Some(x)) if y < height && x < width => heat[y * width + x],
        _ => 0.0,
    };
    let error = |pixel: &usize| {
        let (y, x) = (pixel / width, pixel % width);
        let down = at(Some(y + 1), Some(x)) - at(y.checked_sub(1), Some(x));
        let right = at(Some(y), Some(x + 1)) - at(Some(y), x.checked_sub(1));
        let length = 1e-60 + (down * down + right * right).sqrt();
        let down = down / length - f64::from(flows.down[*pixel] / 5.0);
        let right = right / length - f64::from(flows.right[*pixel] / 5.0);
        down * down + right * right
    };
    let mean =
        |cell: &Region| cell.pixels.iter().map(error).sum::<f64>() / cell.pixels.len() as f64;
    cells.par_iter().map(mean).collect()
}

/// The heat of a cell's pixels.
fn diffused(cell: &Region, labels: &[u32], width: usize, iterations: usize) -> Vec<f64> {
    let count = cell.pixels.len();
    let place = |pixel: usize, (down, right): (isize, isize)| {
        let (y, x) = (pixel / width, pixel % width);
        let (y, x) = (y.checked_add_signed(down)?, x.checked_add_signed(right)?);
        let other = (x < width).then_some(y * width + x)?;
        let is_own = labels.get(other) == Some(&labels[pixel]);
        is_own.then(|| cell.pixels.binary_search(&other).ok()).flatten()
    };
    // The place behind the last pixel stays cold.
    let neighbours: Vec<[usize; 9]> = (cell.pixels.iter())
        .map(|pixel| NEIGHBOURS.map(|offset| place(*pixel, offset).unwrap_or(count)))
        .collect();
    let (mut heat, mut next) = (vec![0f64; count + 1], vec![0f64; count + 1]);
    let centre = centre(cell, width);
    for _ in 0..iterations {
        heat[centre] += 1.0;
        for (value, places) in next.iter_mut().zip(&neighbours) {
            *value = places.iter().fold(0.0, |sum, place| sum + heat[*place]) / 9.0;
        }
        std::mem::swap(&mut heat, &mut next);
    }
    heat.truncate(count);
    heat
}

/// Which pixel of the cell is its centre of mass, or else the nearest to it.
fn centre(cell: &Region, width: usize) -> usize {
    let count = cell.pixels.len() as f64;
    let offsets = || {
        (cell.pixels.iter())
            .map(|pixel| ((pixel / width - cell.top) as i64, (pixel % width - cell.left) as i64))
    };
    let mean = |sum: i64| (sum as f64 / count).round_ties_even() as i64;
    let (y, x) = (
        mean(offsets().map(|offset| offset.0).sum()),
        mean(offsets().map(|offset| offset.1).sum()),
    );
    let distance = |offset: (i64, i64)| (offset.0 - y).pow(2) + (offset.1 - x).pow(2);
    let nearest = offsets().enumerate().min_by_key(|(_, offset)| distance(*offset));
    nearest.map_or(0, |(index, _)| index)
}
