//! Layers and parameters: gradients that reach all of them, or an error.

#[path = "../common/mod.rs"]
mod common;
mod gradient_checkpoint;
mod int8;
mod lost_gradients;
mod names;
mod sharing;
mod views;
