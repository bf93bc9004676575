//! The CPU path: blocked, parallel over rayon's threads, O(N) in memory, with all sums in f32. Elements are stored in
//! f32 or bf16.
//!
//! Plain slices and shapes; no tensors. Results do not depend on the number of threads: every sum is taken in a
//! fixed order.

use element::Element;
use rayon::prelude::*;

pub mod activation;
pub mod adamw;
pub mod attention;
mod bf16;
mod block;
mod blocked;
pub mod broadcast;
pub mod buffer;
mod columns;
pub mod conv_columns;
pub mod element;
mod head;
pub mod image_side;
pub mod int8;
pub mod layer_norm;
pub mod mask_loss;
mod math;
pub mod multi_head;
mod panel;
mod products;
pub mod projection;
pub mod simd;
mod softmax;
pub mod upscale;
pub mod upscale_gradient;
mod weights;

/// The sum of squares, by all threads and in a fixed order: in f32 over rows of 16, in f64 over those.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    const CHUNK: usize = 1 << 14;
    let of_chunk = |chunk: &[f32]| -> f64 {
        chunk.chunks(16).map(|row| f64::from(row.iter().map(|x| x * x).sum::<f32>())).sum()
    };
    let parts: Vec<f64> = values.par_chunks(CHUNK).map(of_chunk).collect();
    parts.iter().sum()
}

/// `sum += part`, by all threads.
pub fn add_in_parallel<T: Element>(sum: &mut [T], part: &[T]) {
    const CHUNK: usize = 1 << 16;
    sum.par_chunks_mut(CHUNK).zip(part.par_chunks(CHUNK)).for_each(|(sum, part)| {
        let (mut wide_sum, mut wide_part) = (Vec::new(), Vec::new());
        let part = T::read(part, &mut wide_part);
        T::update(sum, &mut wide_sum, |sum| math::add(sum, part));
    });
}
