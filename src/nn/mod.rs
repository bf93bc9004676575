//! Layers on top of [`crate::ops`], and the named tree they form.

mod conv;
mod embedding;
mod gradient_checkpoint;
mod init;
mod layer_norm;
mod linear;
mod mlp;
mod mode;
mod tree;

pub use conv::{Conv2d, ConvTranspose2d};
pub use embedding::Embedding;
pub use gradient_checkpoint::gradient_checkpoint;
pub use init::randomize;
pub use layer_norm::LayerNorm;
pub use linear::{Adapter, Linear};
pub use mlp::MlpBlock;
pub use mode::Mode;
pub use tree::{
    child, join, named_parameters, set_trainable, trainable, Buffer, ModuleTree, Node, NodeMut,
};
