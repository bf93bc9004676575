//! Projections with LoRA: the kernels for every GPU, and Hopper's.

mod portable;
mod portable_backward;
pub mod sm90;
pub mod tiles;

pub use portable::*;
pub use portable_backward::{backward, backward_with, workspace_bytes, BackwardOperands};
