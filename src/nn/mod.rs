//! Layers on top of [`crate::ops`], and the named tree they form.
//!
//! A struct of layers becomes a [`ModuleTree`] by naming its fields with [`module_tree!`](crate::module_tree).
//! Adapters, checkpoints, optimizers and reports work on any such tree.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use candle_sam_lora::module_tree;
//! use candle_sam_lora::nn::{named_parameters, set_trainable, trainable_variables, LayerNorm, Linear};
//!
//! struct Head {
//!     norm: LayerNorm,
//!     project: Linear,
//! }
//! module_tree!(Head { norm, project });
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! let map = VarMap::new();
//! let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
//! let norm = LayerNorm::load(8, 1e-5, vb.pp("norm"))?;
//! let mut head = Head { norm, project: Linear::load(8, 3, vb.pp("project"))? };
//! let names: Vec<String> = named_parameters(&head).into_iter().map(|(name, _)| name).collect();
//! assert_eq!(names, ["norm.weight", "norm.bias", "project.weight", "project.bias"]);
//!
//! set_trainable(&mut head, |name| name.starts_with("project"))?;
//! assert_eq!(trainable_variables(&head)?.len(), 2);
//! let x = Tensor::ones((1, 8), DType::F32, &Device::Cpu)?;
//! assert_eq!(x.apply(&head.norm)?.apply(&head.project)?.dims(), [1, 3]);
//! # Ok(())
//! # }
//! ```

mod adapter;
mod adapters;
mod candle;
pub mod checkpoint;
mod conv;
mod embedding;
mod fixed;
mod gradient_checkpoint;
mod init;
mod int8;
mod layer_norm;
mod linear;
mod load;
mod low_rank;
mod mlp;
mod mode;
mod tree;
mod variables;

pub use adapter::Adapter;
pub use adapters::{adapter_tensor_name, is_adapter_tensor, Adapters, Unmerged, DEFAULT_ADAPTER};
pub(crate) use candle::module_in_evaluation;
pub use conv::{Conv2d, ConvTranspose2d};
pub use embedding::Embedding;
pub use fixed::Tied;
pub use gradient_checkpoint::gradient_checkpoint;
pub use init::randomize;
pub(crate) use int8::refuse_int8;
pub use int8::{quantize_int8, Quantized};
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use load::load;
pub use low_rank::LowRank;
pub use mlp::MlpBlock;
pub use mode::Mode;
pub use tree::{
    child, join, named_parameters, set_trainable, trainable_variables, without_gradients, Buffer,
    Fixed, Layer, LayerMut, ModuleTree, Node, NodeMut,
};
pub(crate) use tree::{refuse_merged, refuse_twins};
pub(crate) use variables::{check_settable, set_values, Training, ENDS_THE_GRAPH};
