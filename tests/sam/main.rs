//! SAM, its parts and its variants.

mod adapters;
mod calibration;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod decoder;
mod embeddings;
mod encoder;
mod everything;
mod exchange;
mod hq;
mod model;
mod outlines;
mod parameter_counts;
mod processor;
mod prompts;
mod tiles;
mod variants;
