//! The neighbourhoods of a grid's positions as rows, and their gradient.
//!
//! ```text
//! columns[i, j, (a, b)] = x[s i + a - half, s j + b - half], zero outside       a, b = 0 .. k
//! ```
//! A position's gradients are summed in f32, tap by tap.

use super::buffer::Elements;
use super::element::Element;
use crate::problem::ConvColumns;
use rayon::prelude::*;

/// `[batch, h, w, channels]` -> `[batch, rows, cols, kernel kernel channels]`; no size is zero.
pub fn gather<T: Element>(p: &ConvColumns, x: &[T]) -> Elements<T> {
    let (rows, cols) = (p.rows(), p.cols());
    // The position that a tap of an output reads, if it is inside.
    let read = |output: usize, tap: usize, length: usize| {
        (p.stride * output + tap).checked_sub(p.kernel / 2).filter(|&at| at < length)
    };
    let mut columns = Elements::any(p.batch * rows * cols * p.width());
    columns.par_chunks_mut(cols * p.width()).enumerate().for_each(|(row, out)| {
        let (image, i) = (row / rows, row % rows);
        for (j, out) in out.chunks_exact_mut(p.width()).enumerate() {
            for (tap, out) in out.chunks_exact_mut(p.channels).enumerate() {
                let y = read(i, tap / p.kernel, p.h);
                match y.zip(read(j, tap % p.kernel, p.w)) {
                    Some((y, x_at)) => {
                        let place = (image * p.h + y) * p.w + x_at;
                        out.copy_from_slice(&x[place * p.channels..][..p.channels]);
                    }
                    None => out.fill(T::default()),
                }
            }
        }
    });
    columns
}

/// The gradient of [`gather`]'s input for that of its output.
pub fn scatter<T: Element>(p: &ConvColumns, grad: &[T]) -> Elements<T> {
    let (rows, cols) = (p.rows(), p.cols());
    // The output that read a position by a tap, if there is one.
    let reader = |at: usize, tap: usize, outputs: usize| {
        let moved = (at + p.kernel / 2).checked_sub(tap)?;
        let output = moved.is_multiple_of(p.stride).then_some(moved / p.stride);
        output.filter(|&output| output < outputs)
    };
    let mut dx = Elements::any(p.batch * p.h * p.w * p.channels);
    dx.par_chunks_mut(p.w * p.channels).enumerate().for_each(|(row, out)| {
        let (image, y) = (row / p.h, row % p.h);
        let mut sum = vec![0f32; p.channels];
        for (x, out) in out.chunks_exact_mut(p.channels).enumerate() {
            sum.fill(0.0);
            for tap in 0..p.kernel * p.kernel {
                let i = reader(y, tap / p.kernel, rows);
                let Some((i, j)) = i.zip(reader(x, tap % p.kernel, cols)) else { continue };
                let place = ((image * rows + i) * cols + j) * p.width() + tap * p.channels;
                let part = &grad[place..][..p.channels];
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part.widened());
            }
            out.iter_mut().zip(&sum).for_each(|(out, &sum)| *out = T::nearest(sum));
        }
    });
    dx
}
