//! `finetune`: LoRA adapters of SAM's image encoder, and its decoder, trained on images with masks.

mod curve;
mod options;
mod output;
mod parts;
mod progress;
mod report;
mod run;
mod training;

pub use options::Options;
pub use parts::{Part, Parts};
pub use report::Outcome;
pub use run::run;
