//! Attention with relative positions: the kernels for every GPU, and Hopper's.

pub(in crate::launch) mod portable;
pub mod sm90;
pub mod tiles;

pub use portable::*;
