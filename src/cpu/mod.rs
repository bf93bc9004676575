//! The CPU path: blocked, parallel over rayon's threads, O(N) in memory, in f32 whatever the storage is.
//!
//! Plain slices and shapes; no tensors. Results do not depend on the number of threads: every sum is taken in a
//! fixed order.

use rayon::prelude::*;

pub mod activation;
pub mod attention;
mod bf16;
mod blocked;
pub mod broadcast;
pub mod buffer;
mod columns;
mod head;
pub mod image_side;
pub mod layer_norm;
mod math;
pub mod multi_head;
mod panel;
pub mod projection;
pub mod simd;
mod softmax;
pub mod upscale;

/// `sum += part`, by all threads.
pub fn add_in_parallel(sum: &mut [f32], part: &[f32]) {
    const CHUNK: usize = 1 << 16;
    sum.par_chunks_mut(CHUNK)
        .zip(part.par_chunks(CHUNK))
        .for_each(|(sum, part)| math::add(sum, part));
}
