//! `finetune`: LoRA adapters of SAM's image encoder, and its decoder, trained on images with masks.

mod calibration;
mod data;
mod judge;
mod options;
mod output;
mod page;
mod parts;
mod pictures;
mod plots;
mod progress;
mod report;
mod results;
mod run;
mod training;

pub use options::Options;
pub use parts::{Part, Parts};
pub use report::Outcome;
pub use run::run;
