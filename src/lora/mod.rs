//! PEFT-compatible LoRA on any [`ModuleTree`](crate::nn::ModuleTree): configuration, injection by dotted name,
//! adapter folders that `peft` reads and writes, merging, reports.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_nn::VarBuilder;
//! use candle_sam_lora::lora::{inject, count_parameters, LoraConfig};
//! use candle_sam_lora::{module_tree, nn::Linear};
//!
//! struct Attention {
//!     q: Linear,
//!     v: Linear,
//! }
//! module_tree!(Attention { q, v });
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! let linear = || Linear::load(768, 768, VarBuilder::zeros(DType::F32, &Device::Cpu));
//! let mut model = Attention { q: linear()?, v: linear()? };
//! let config = LoraConfig::new(16).alpha(32.0).dropout(0.1).target_modules(["q", "v"]);
//! inject(&mut model, &config, 0)?;
//! assert_eq!(count_parameters(&model).trainable, 2 * 16 * (768 + 768));
//! # Ok(())
//! # }
//! ```

mod adapter;
mod base;
mod config;
mod config_file;
mod convert;
mod describe;
mod hotswap;
mod import;
mod init;
mod inject;
mod keys;
#[cfg(feature = "decompositions")]
mod linalg;
mod linear;
mod merge;
mod mixed;
mod model_card;
mod qkv;
mod report;
mod state;
mod switch;
mod target;
mod task_arithmetic;
mod weighted;

pub use adapter::{
    adapter_keys, load_adapter, load_adapter_as, load_adapter_tensors, load_named_adapter,
    read_adapter, save_adapter, save_named_adapter, write_adapter, LoadedAdapter, CONFIG_FILE,
    PICKLED_TENSORS_FILE, TENSORS_FILE,
};
pub use config::{BiasTraining, InitLoraWeights, LoraConfig, ModuleNames, ValueOrList};
pub use convert::convert_to_lora;
pub use hotswap::hotswap_adapter;
pub use import::read_samed_adapter;
pub use inject::{add_adapter, inject, unload};
pub use linear::LoraLinear;
pub use merge::{merge, merge_and_unload, safe_merge, unmerge};
pub use mixed::forward_mixed_batch;
pub use model_card::{model_card, save_pretrained, CARD_FILE};
pub use qkv::{fuse_qkv, split_qkv};
pub use report::{count_parameters, count_parameters_as_peft, ParameterCount};
pub use state::{adapter_state, named_adapter_state, set_adapter_state};
pub use switch::{
    active_adapters, adapter_names, delete_adapter, disable_adapters, enable_adapters, set_adapter,
    NO_ADAPTER,
};
pub use task_arithmetic::{MajoritySign, Prune, TaskArithmetic};
pub use weighted::{add_weighted_adapter, Combination};
