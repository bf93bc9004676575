//! Kernels on the GPU: [`run`] takes an operation's inputs, makes its outputs, and launches what
//! [`crate::launch`] planned, on the stream of candle's device.
//!
//! Nothing here waits for the GPU, so an operation can be captured in a CUDA graph (once its kernels have been loaded
//! by a first run). All unsafe code of the GPU path is in this folder.

mod modules;
mod pool;
mod run;
mod stream;
mod tensor_map;

pub(crate) use pool::keep_freed_memory;
pub(crate) use run::{operand, run, with_tensors, Job};
pub(crate) use stream::{hopper_multiprocessors, is_hopper, shared_memory, supported};
