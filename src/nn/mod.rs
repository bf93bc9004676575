//! Layers on top of [`crate::ops`], and the named tree they form.

mod layer_norm;
mod linear;
mod mode;
mod tree;

pub use layer_norm::LayerNorm;
pub use linear::{Adapter, Linear};
pub use mode::Mode;
pub use tree::{
    child, join, named_parameters, set_trainable, trainable, Buffer, ModuleTree, Node, NodeMut,
};
