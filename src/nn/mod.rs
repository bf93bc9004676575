//! Layers on top of [`crate::ops`], and the named tree they form.

mod adapter;
mod adapters;
mod candle;
pub mod checkpoint;
mod conv;
mod embedding;
mod fixed;
mod gradient_checkpoint;
mod init;
mod layer_norm;
mod linear;
mod low_rank;
mod mlp;
mod mode;
mod tree;
mod variables;

pub use adapter::Adapter;
pub use adapters::{adapter_tensor_name, is_adapter_tensor, Adapters, Unmerged, DEFAULT_ADAPTER};
pub use candle::load;
pub use conv::{Conv2d, ConvTranspose2d};
pub use embedding::Embedding;
pub use fixed::Tied;
pub use gradient_checkpoint::gradient_checkpoint;
pub use init::randomize;
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use low_rank::LowRank;
pub use mlp::MlpBlock;
pub use mode::Mode;
pub use tree::{
    child, join, named_parameters, set_trainable, trainable_variables, Buffer, Fixed, Layer,
    LayerMut, ModuleTree, Node, NodeMut,
};
pub(crate) use variables::{check_settable, set_values, Training, ENDS_THE_GRAPH};
