//! Checkpoints in safetensors and in PyTorch's format, for any [`ModuleTree`](crate::nn::ModuleTree).
//!
//! [`load`] fills a tree from a file, a sharded checkpoint or a folder; [`save`] writes one. A [`Names`] says what is
//! peculiar to a model: renamed, fused and ignored tensors. A tree whose files use its own names takes
//! [`Names::PLAIN`].

mod load;
mod loaded;
mod names;
mod pickle;
mod place;
mod plan;
mod reader;
mod save;
mod source;
mod torch;

pub use load::load;
pub use loaded::Loaded;
pub(crate) use names::root_of;
pub use names::{Fused, Names, Part};
pub(crate) use reader::TensorReader;
pub use save::save;
pub(crate) use source::{shape_of, shapes};
