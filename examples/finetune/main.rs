//! Trains LoRA adapters of SAM's image encoder on images with masks:
//!
//! ```text
//! cargo run --release --example finetune
//! cargo run --release --example finetune -- --model DIR --images DIR --masks DIR
//! ```

#[path = "../shared/console.rs"]
mod console;
mod curve;
#[path = "../shared/draw.rs"]
mod draw;
#[path = "../shared/draw_prompts.rs"]
mod draw_prompts;
#[path = "../shared/model.rs"]
mod model;
mod options;
mod output;
#[path = "../shared/processor.rs"]
mod processor;
mod progress;
mod report;
mod run;
mod training;

use clap::Parser;
use std::process::ExitCode;

pub fn main() -> ExitCode {
    console::exit_code(run::run(&options::Options::parse()).map(drop))
}
