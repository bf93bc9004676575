//! The CPU path: blocked, parallel over rayon's threads, O(N) in memory, in f32 whatever the storage is.
//!
//! Plain slices and shapes; no tensors. Results do not depend on the number of threads: every sum is taken in a
//! fixed order.

pub mod activation;
pub mod attention;
mod blocked;
pub mod buffer;
mod head;
pub mod layer_norm;
mod math;
mod panel;
pub mod projection;
mod simd;
mod softmax;
