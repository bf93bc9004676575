//! Other people's models: encoders of SAM's kind, candle's own, and the examples.

mod any_model;
mod candle_interop;
mod candle_transformers;
mod cellpose;
#[path = "../common/mod.rs"]
mod common;
mod deepseek_ocr;
mod examples;
mod got_ocr2;
mod towers;
