#![warn(missing_docs)]
//! Segment Anything with LoRA, fast and small in memory, for the candle ML framework.

mod cpu;
mod device;
mod error;
pub mod files;
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

pub use device::device;
pub use error::{Error, Result, TensorMismatch};
