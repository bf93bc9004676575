#![warn(missing_docs)]
//! Segment Anything with LoRA, fast and small in memory, for the candle ML framework.
//!
//! - [`ops`]: the operations, each a free function with true gradients.
//! - [`nn`]: layers, and the tree of named tensors they form.
//! - [`sam`]: the model, its checkpoints and its image processor.
//! - [`lora`]: PEFT-compatible adapters on any linear layer.
//! - [`train`]: losses, AdamW, data, resumable runs.
//! - [`hub`]: models and adapters by their names on the Hugging Face hub.
//! - `cuda` (feature `cuda`): whose kernels run on a GPU, their self-test, CUDA graphs.
//! - `testing` (feature `testing`): numerical tests of operations of your own.
//!
//! `docs/library.md` shows how they go together, `docs/hack-your-own.md` how to put an attention of your own into the model.

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod cpu;
mod device;
#[cfg(feature = "cuda")]
#[path = "cuda/mod.rs"]
mod driver;
mod error;
mod file_kind;
pub mod hub;
pub mod lora;
pub mod nn;
pub mod ops;
mod problem;
pub mod sam;
#[cfg(feature = "testing")]
pub mod testing;
pub mod train;
mod weights_file;

// The inside that this crate's own tests look at. It is no part of the API, with the feature `testing` neither.
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod files;
#[cfg(not(feature = "testing"))]
mod files;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod launch;
// Without `cuda` nothing runs the launches, and parts of them are for the tests alone.
#[cfg(not(feature = "testing"))]
#[allow(dead_code, unused_imports)]
mod launch;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod philox;
#[cfg(not(feature = "testing"))]
mod philox;

/// Operations on an NVIDIA GPU: whose kernels compute them, the kernels' self-test, CUDA graphs.
///
/// ```no_run
/// use candle_sam_lora::{cuda, device};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let gpu = device("cuda")?;
/// println!("{}", cuda::self_test_report(&gpu)?);
/// # Ok(())
/// # }
/// ```
#[cfg(feature = "cuda")]
pub mod cuda {
    pub use crate::driver::{available_kernels, kernels, self_test, set_kernels, Graphed, Kernels};
    pub use crate::launch::family::Family;
    pub use crate::launch::self_test::{Choice, Comparison, SelfTestReport, SelfTestRow};
    pub use crate::ops::self_test_report;
}

pub use cpu::buffer::release as release_buffers;
pub use device::{device, gpus};
pub use error::{Error, Result, TensorMismatch};
pub use files::{read_tensors, write_atomic, write_tensors, TensorFile};

/// The code of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The code of the document, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../docs/library.md")]
struct Library;

/// The code of the document, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../docs/gradients.md")]
struct Gradients;
