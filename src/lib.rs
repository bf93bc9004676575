#![warn(missing_docs)]
// The front page is the README. Its links are labels, of which the first definition counts: pages here, files there.
#![doc = include_str!("guide_links.md")]
#![doc = include_str!("../README.md")]

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
pub mod guide;
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
