//! Checkpoints in safetensors and in PyTorch's format, for any [`ModuleTree`](crate::nn::ModuleTree).
//!
//! [`load`] fills a tree from a file, a sharded checkpoint or a folder; [`save`] writes one. A [`Names`] says what is
//! peculiar to a model: renamed, fused and ignored tensors. A tree whose files use its own names takes
//! [`Names::PLAIN`].
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_nn::VarBuilder;
//! use candle_sam_lora::nn::{checkpoint, checkpoint::Names, randomize, Linear};
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! let linear = || Linear::load(4, 4, VarBuilder::zeros(DType::F32, &Device::Cpu));
//! let (mut saved, mut loaded) = (linear()?, linear()?);
//! randomize(&mut saved, 0, 0.02)?;
//! let path = std::env::temp_dir().join("candle-sam-lora-linear.safetensors");
//! checkpoint::save(&saved, &path, &Names::PLAIN, None)?;
//! checkpoint::load(&mut loaded, &path, &Names::PLAIN)?;
//! assert_eq!(loaded.weight.to_vec2::<f32>()?, saved.weight.to_vec2::<f32>()?);
//! # Ok(())
//! # }
//! ```

mod load;
mod loaded;
mod names;
mod pickle;
mod place;
mod plan;
mod reader;
mod save;
mod shapes;
mod source;
mod torch;

pub use crate::weights_file::split_prefix;
pub use load::load;
pub(crate) use load::{all_finite, with_prefix};
pub use loaded::Loaded;
pub(crate) use names::root_of;
pub use names::{Fused, Names, Part};
pub(crate) use reader::TensorReader;
pub use save::save;
pub(crate) use shapes::{related, shapes};
pub(crate) use source::shape_of;
