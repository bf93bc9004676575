//! Kernels on the GPU: a [`Job`] takes an operation's inputs, makes its outputs, and launches what
//! [`crate::launch`] planned, on the stream of candle's device.
//!
//! No operation waits for the GPU, so [`Graphed`] can capture all in a CUDA graph, once a first run has loaded their
//! kernels. All unsafe code of the GPU path is in this folder.

mod context;
mod graphed;
mod in_place;
mod kernels;
mod modules;
mod pool;
mod replay;
mod run;
mod stream;
mod tensor_map;
mod trust;

pub use graphed::Graphed;
pub use kernels::{available_kernels, kernels, set_kernels, Kernels};
pub use trust::self_test;

pub(crate) use context::{gpu, keep_test, tested};
pub(crate) use in_place::InPlace;
pub(crate) use modules::COMPILER;
pub(crate) use pool::keep_freed_memory;
pub(crate) use replay::{is_recording, prepares_graph, warm_up, Replay};
pub(crate) use run::{operand, tensor, Job};
pub(crate) use stream::is_capturing;
pub(crate) use trust::{self_test_is_on, Key};
