//! From a flow field to cells: pixels follow the flow, and those that end in one place are one cell.
//!
//! ```text
//! p <- clamp(p + flow(p) / 5)          every cell pixel, `iterations` times, the flow interpolated
//! count(p)                             pixels that end at each pixel
//! seeds = maxima of 5 x 5, above 10    each grows 5 times by a pixel where count > 2
//! label = seed that the end lies on    of several the fullest
//! ```
//! Every step is computed in the order and precision of Cellpose's own, so that labels are equal pixel for pixel.
//! Cellpose sorts equally full seeds in any order, this module in reading order.
//!
//! Source: `dynamics.py` of Cellpose 4.2.

use super::flows::CellFlows;
use super::{consistency, regions};
use crate::Result;
use rayon::prelude::*;

/// Pixels around the histogram of ends.
const BORDER: usize = 20;
/// A seed is a maximum within so many pixels.
const REACH: usize = 2;
/// Pixels that must end at a seed, at least one more.
const SEED_COUNT: u32 = 10;
/// Pixels that must end where a seed grows, at least one more.
const GROWN_COUNT: u32 = 2;
/// How often a seed grows.
const GROWTH: usize = 5;
/// Flows are this many times a step.
const FLOW_SCALE: f32 = 5.0;

/// How cells are found in a flow field. The default is Cellpose's.
///
/// [Example](crate::sam::CellposeSam)
#[derive(Clone, Debug, PartialEq)]
pub struct CellDynamics {
    /// Pixels with a higher logit are cell.
    pub cell_threshold: f32,
    /// Cells go whose own flows differ more from the field, as mean squared error; 0 keeps all.
    pub flow_threshold: f64,
    /// Cells of fewer pixels go; 0 keeps all.
    pub min_size: usize,
    /// Cells that are a larger share of the image go.
    pub max_size_fraction: f64,
    /// Steps that a pixel takes.
    pub iterations: usize,
}

impl Default for CellDynamics {
    fn default() -> Self {
        Self {
            cell_threshold: 0.0,
            flow_threshold: 0.4,
            min_size: 15,
            max_size_fraction: 0.4,
            iterations: 200,
        }
    }
}

impl CellDynamics {
    /// The number of the cell that each pixel belongs to, row by row, 0 for none. Holes are filled.
    ///
    /// # Errors
    /// - a side is shorter than 2 pixels;
    /// - there are not `height * width` values.
    pub fn labels(&self, flows: &CellFlows) -> Result<Vec<u32>> {
        flows.validate()?;
        let pixels = flows.probability.len();
        let is_cell = |pixel: &usize| flows.probability[*pixel] > self.cell_threshold;
        let cells: Vec<usize> = (0..pixels).filter(is_cell).collect();
        let mut labels = vec![0; pixels];
        let ends = basins(&self.follow(flows, &cells), flows.size);
        cells.iter().zip(ends).for_each(|(cell, label)| labels[*cell] = label);
        let largest = pixels as f64 * self.max_size_fraction;
        regions::retain(&mut labels, |_, size| size as f64 <= largest);
        if self.flow_threshold > 0.0 {
            let errors = consistency::errors(&labels, flows);
            regions::retain(&mut labels, |label, _| {
                !errors.get(label - 1).is_some_and(|error| *error > self.flow_threshold)
            });
        }
        regions::retain(&mut labels, |_, size| size >= self.min_size);
        regions::fill_holes(&mut labels, flows.size.1);
        regions::retain(&mut labels, |_, size| size >= self.min_size);
        Ok(labels)
    }

    /// Where pixels end, `[row, column]`.
    pub(super) fn follow(&self, flows: &CellFlows, cells: &[usize]) -> Vec<[i32; 2]> {
        let (height, width) = flows.size;
        // Places and steps are in f32, from -1 to 1 over the image, as PyTorch's `grid_sample` has them.
        let spans = [height, width].map(|side| (side - 1) as f32);
        let steps = [height, width].map(|side| (2.0 / (side - 1) as f64) as f32);
        let mut field = vec![[0f32; 2]; height * width];
        for cell in cells {
            let flow = [flows.down[*cell], flows.right[*cell]];
            field[*cell] = [0, 1].map(|axis| flow[axis] / FLOW_SCALE * steps[axis]);
        }
        let end = |cell: &usize| {
            let start = [(cell / width) as f32, (cell % width) as f32];
            let mut place = [0, 1].map(|axis| start[axis] / spans[axis] * 2.0 - 1.0);
            for _ in 0..self.iterations {
                let step = sample(&field, flows.size, place);
                place = [0, 1].map(|axis| (place[axis] + step[axis]).clamp(-1.0, 1.0));
            }
            [0, 1].map(|axis| ((place[axis] + 1.0) * 0.5 * spans[axis]) as i32)
        };
        cells.par_iter().map(end).collect()
    }
}

/// The field between pixels, bilinearly; it is zero outside.
fn sample(
    field: &[[f32; 2]],
    (height, width): (usize, usize),
    [row, column]: [f32; 2],
) -> [f32; 2] {
    let pixel = |place: f32, side: usize| (place + 1.0) * (side as f32 / 2.0) - 0.5;
    let (y, x) = (pixel(row, height), pixel(column, width));
    let (top, left) = (y.floor(), x.floor());
    let (north, west) = (y - top, x - left);
    let (south, east) = (1.0 - north, 1.0 - west);
    let (top, left) = (top as i64, left as i64);
    let at = |y: i64, x: i64| {
        let inside = (0..height as i64).contains(&y) && (0..width as i64).contains(&x);
        if inside {
            field[y as usize * width + x as usize]
        } else {
            [0.0; 2]
        }
    };
    let corners = [at(top, left), at(top, left + 1), at(top + 1, left), at(top + 1, left + 1)];
    let weights = [east * south, west * south, east * north, west * north];
    [0, 1].map(|axis| {
        corners[0][axis] * weights[0]
            + corners[1][axis] * weights[1]
            + corners[2][axis] * weights[2]
            + corners[3][axis] * weights[3]
    })
}

/// The seed that each end lies on, numbered from 1, 0 for none.
fn basins(ends: &[[i32; 2]], (height, width): (usize, usize)) -> Vec<u32> {
    let (rows, columns) = (height + 2 * BORDER, width + 2 * BORDER);
    let inside = |place: i32, side: usize| (place.max(0) as usize).min(side - 1) + BORDER;
    let places: Vec<usize> =
        ends.iter().map(|[y, x]| inside(*y, height) * columns + inside(*x, width)).collect();
    let mut count = vec![0u32; rows * columns];
    places.iter().for_each(|place| count[*place] += 1);
    let is_maximum = |place: usize| {
        neighbourhood(place, columns, REACH).all(|other| count[other] <= count[place])
    };
    let mut seeds: Vec<usize> =
        (0..count.len()).filter(|place| count[*place] > SEED_COUNT && is_maximum(*place)).collect();
    seeds.sort_by_key(|seed| count[*seed]);
    let mut owner = vec![0; count.len()];
    for (label, seed) in (1..).zip(&seeds) {
        grown(*seed, &count, columns).into_iter().for_each(|place| owner[place] = label);
    }
    places.into_iter().map(|place| owner[place]).collect()
}

/// The pixels within `reach` of one that is no nearer to the border.
fn neighbourhood(place: usize, columns: usize, reach: usize) -> impl Iterator<Item = usize> {
    let first = place - reach * columns - reach;
    (0..=2 * reach).flat_map(move |y| (0..=2 * reach).map(move |x| first + y * columns + x))
}

/// The pixels that a seed grows to.
fn grown(seed: usize, count: &[u32], columns: usize) -> Vec<usize> {
    let mut places = vec![seed];
    let mut edge = 0;
    for _ in 0..GROWTH {
        let reached = places.len();
        for index in edge..reached {
            for other in neighbourhood(places[index], columns, 1) {
                if count[other] > GROWN_COUNT && !places.contains(&other) {
                    places.push(other);
                }
            }
        }
        edge = reached;
    }
    places
}
