#![warn(missing_docs)]
//! Segment Anything with LoRA, fast and small in memory, for the candle ML framework.
//!
//! - [`ops`]: the operations, each a free function with true gradients.
//! - [`nn`]: layers, and the tree of named tensors they form.
//! - [`sam`]: the model, its checkpoints and its image processor.
//! - [`lora`]: PEFT-compatible adapters on any linear layer.
//! - [`hub`]: models and adapters by their names on the Hugging Face hub.
//! - [`train`]: losses, AdamW, data, resumable runs.
//! - [`reference`](mod@reference): the operations as naive f64 loops.
//!
//! The README shows how they go together; `docs/hack-your-own.md` how to put an attention of your own into the model.

mod cpu;
mod device;
#[cfg(feature = "cuda")]
#[path = "cuda/mod.rs"]
mod driver;
mod error;
mod file_kind;
pub mod files;
pub mod hub;
#[doc(hidden)]
pub mod launch;
pub mod lora;
pub mod nn;
pub mod ops;
pub mod philox;
mod problem;
pub mod reference;
pub mod sam;
pub mod train;

/// Operations on an NVIDIA GPU: whose kernels compute them, the kernels' self-test, CUDA graphs.
#[cfg(feature = "cuda")]
pub mod cuda {
    pub use crate::driver::{available_kernels, kernels, self_test, set_kernels, Graphed, Kernels};
    pub use crate::launch::family::Family;
    pub use crate::launch::self_test::{Choice, Comparison, SelfTestReport, SelfTestRow};
    pub use crate::ops::self_test_report;
}

pub use cpu::buffer::release as release_buffers;
pub use device::device;
pub use error::{Error, Result, TensorMismatch};

/// The code of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
