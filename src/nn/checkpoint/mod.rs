//! Checkpoints in safetensors, for any [`ModuleTree`](crate::nn::ModuleTree).
//!
//! [`load`] fills a tree from a file, a sharded checkpoint or a folder; [`save`] writes one. A [`Names`] says what is
//! peculiar to a model: renamed, fused and ignored tensors. A tree whose files use its own names takes
//! [`Names::PLAIN`].

mod load;
mod names;
mod plan;
mod save;
mod source;

pub use load::load;
pub use names::{Fused, Names, Part};
pub use save::save;
pub(crate) use source::shape_of;
