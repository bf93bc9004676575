//! A small tensor under a large one: applied to all of it, and the sums that are its gradient.
//!
//! ```text
//! large [s_0, s_1, ..]    small: along each stretch s_i as long, or constant      [B, h, w, C] under [C]: R = B h w, C
//! ```
//! Neighbouring dimensions of one kind make one stretch. Sums are taken in blocks of fixed size, in a fixed order.

use super::math::{add, dot};
use rayon::prelude::*;

/// Rows that are summed one after the other; the sums of blocks are added in order.
const ROWS: usize = 256;
/// Elements that are worth a task.
const TASK: usize = 1 << 14;

/// How a small tensor lies under a large one.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    /// Lengths of the stretches, and whether the small tensor varies along each.
    stretches: Vec<(usize, bool)>,
}

impl Spread {
    /// None if `small` does not broadcast to `large`.
    pub fn new(large: &[usize], small: &[usize]) -> Option<Self> {
        let missing = large.len().checked_sub(small.len())?;
        let mut stretches: Vec<(usize, bool)> = Vec::new();
        for (axis, &length) in large.iter().enumerate() {
            let own = axis.checked_sub(missing).map_or(1, |axis| small[axis]);
            let varies = own == length;
            if !varies && own != 1 {
                return None;
            }
            match stretches.last_mut() {
                _ if length == 1 => {}
                Some((total, kind)) if *kind == varies => *total *= length,
                _ => stretches.push((length, varies)),
            }
        }
        if stretches.is_empty() {
            stretches.push((1, true));
        }
        Some(Self { stretches })
    }

    /// Where row `row` of the large tensor, of `last` elements, begins in the small one.
    fn offset(&self, mut row: usize, last: (usize, bool)) -> usize {
        let mut stride = if last.1 { last.0 } else { 1 };
        let mut offset = 0;
        for &(length, varies) in self.stretches.iter().rev().skip(1) {
            if varies {
                offset += row % length * stride;
                stride *= length;
            }
            row /= length;
        }
        offset
    }
}

/// `f(y, small)` on every element of `y`.
pub fn apply(y: &mut [f32], small: &[f32], spread: &Spread, f: impl Fn(&mut f32, f32) + Sync) {
    let Some(&last) = spread.stretches.last() else { return };
    let (length, varies) = last;
    let rows = TASK.div_ceil(length.max(1));
    y.par_chunks_mut((rows * length).max(1)).enumerate().for_each(|(task, y)| {
        for (row, y) in y.chunks_mut(length.max(1)).enumerate() {
            let offset = spread.offset(task * rows + row, last);
            match varies {
                true => y.iter_mut().zip(&small[offset..]).for_each(|(y, &s)| f(y, s)),
                false => y.iter_mut().for_each(|y| f(y, small[offset])),
            }
        }
    });
}

/// The sums of `values`, or of `values * factors`, over the stretches along which the small tensor is constant.
pub fn sums(values: &[f32], factors: Option<&[f32]>, spread: &Spread) -> Vec<f32> {
    let mut stretches = spread.stretches.clone();
    let mut sum: Option<Vec<f32>> = None;
    while let Some(constant) = stretches.iter().rposition(|(_, varies)| !varies) {
        let inner = stretches[constant + 1..].iter().map(|(length, _)| length).product();
        let (length, _) = stretches.remove(constant);
        sum = Some(match sum {
            None => sum_stretch(values, factors, length, inner),
            Some(sum) => sum_stretch(&sum, None, length, inner),
        });
    }
    sum.unwrap_or_else(|| match factors {
        Some(factors) => values.iter().zip(factors).map(|(value, factor)| value * factor).collect(),
        None => values.to_vec(),
    })
}

/// `[outer, length, inner] -> [outer, inner]`
fn sum_stretch(values: &[f32], factors: Option<&[f32]>, length: usize, inner: usize) -> Vec<f32> {
    let size = (length * inner).max(1);
    let outer = values.len() / size;
    let block = ROWS * inner;
    let blocks = length.div_ceil(ROWS);
    let part = |start: usize, end: usize, sum: &mut [f32]| {
        let factors = factors.map(|factors| &factors[start..end]);
        sum_rows(&values[start..end], factors, sum);
    };
    let mut total = vec![0f32; outer * inner];
    if outer == 1 {
        let partial = (0..blocks).into_par_iter().map(|index| {
            let mut sum = vec![0f32; inner];
            part(index * block, ((index + 1) * block).min(size), &mut sum);
            sum
        });
        for sum in partial.collect::<Vec<_>>() {
            add(&mut total, &sum);
        }
        return total;
    }
    let each = TASK.div_ceil(size);
    total.par_chunks_mut((each * inner).max(1)).enumerate().for_each(|(task, total)| {
        let mut sum = vec![0f32; inner];
        for (index, total) in total.chunks_mut(inner.max(1)).enumerate() {
            let first = (task * each + index) * size;
            for index in 0..blocks {
                sum.fill(0.0);
                part(first + index * block, first + ((index + 1) * block).min(size), &mut sum);
                add(total, &sum);
            }
        }
    });
    total
}

/// Adds rows as long as `sum` to it.
fn sum_rows(values: &[f32], factors: Option<&[f32]>, sum: &mut [f32]) {
    if let [sum] = sum {
        *sum += match factors {
            Some(factors) => dot(values, factors),
            None => dot(values, &[1.0; ROWS][..values.len()]),
        };
        return;
    }
    let width = sum.len().max(1);
    match factors {
        None => values.chunks_exact(width).for_each(|row| add(sum, row)),
        Some(factors) => {
            for (row, factors) in values.chunks_exact(width).zip(factors.chunks_exact(width)) {
                for (sum, (value, factor)) in sum.iter_mut().zip(row.iter().zip(factors)) {
                    *sum += value * factor;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The index into the small tensor for each element of the large one.
    fn indices(large: &[usize], small: &[usize]) -> Vec<usize> {
        let missing = large.len() - small.len();
        let index = |element: usize| {
            let (mut rest, mut stride, mut index) = (element, 1, 0);
            for axis in (0..large.len()).rev() {
                let position = rest % large[axis];
                rest /= large[axis];
                if axis >= missing && small[axis - missing] > 1 {
                    index += position * stride;
                    stride *= small[axis - missing];
                }
            }
            index
        };
        (0..large.iter().product()).map(index).collect()
    }

    #[test]
    fn every_way_to_broadcast_is_that_of_an_index() {
        let cases: [(&[usize], &[usize]); 9] = [
            (&[3, 5, 7], &[7]),
            (&[3, 5, 7], &[5, 7]),
            (&[3, 5, 7], &[3, 1, 7]),
            (&[3, 5, 7], &[3, 5, 1]),
            (&[3, 5, 7], &[1, 5, 1]),
            (&[3, 5, 7, 2], &[3, 1, 7, 1]),
            (&[3, 5, 7], &[]),
            (&[1, 1], &[1]),
            (&[1000, 3], &[3]),
        ];
        for (large, small) in cases {
            let indices = indices(large, small);
            let count: usize = small.iter().product();
            let spread = Spread::new(large, small).unwrap();
            let own: Vec<f32> = (0..count).map(|i| i as f32).collect();
            let mut y = vec![0f32; indices.len()];
            apply(&mut y, &own, &spread, |y, small| *y += small);
            assert_eq!(
                y,
                indices.iter().map(|&i| i as f32).collect::<Vec<_>>(),
                "{large:?} {small:?}"
            );
            // Whole numbers: sums are exact in any order.
            let factors: Vec<f32> = (0..y.len()).map(|i| (i % 5) as f32 - 2.0).collect();
            let values: Vec<f32> = (0..y.len()).map(|i| (i % 7) as f32).collect();
            let mut expected = [vec![0f32; count], vec![0f32; count]];
            for (element, &index) in indices.iter().enumerate() {
                expected[0][index] += values[element];
                expected[1][index] += values[element] * factors[element];
            }
            assert_eq!(sums(&values, None, &spread), expected[0], "{large:?} {small:?}");
            assert_eq!(sums(&values, Some(&factors), &spread), expected[1], "{large:?} {small:?}");
        }
        assert_eq!(Spread::new(&[3, 5], &[3]), None);
        assert_eq!(Spread::new(&[5], &[3, 5]), None);
    }
}
