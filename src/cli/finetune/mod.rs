//! `finetune`: LoRA adapters of SAM's image encoder, trained on images with masks.

mod curve;
mod options;
mod output;
mod progress;
mod report;
mod run;
mod training;

pub use options::Options;
pub use report::Outcome;
pub use run::run;
