//! The command `finetune`, called as the program calls it.

use candle_sam_lora::cli::finetune::{run, Options, Outcome};
use clap::Parser;
use std::path::Path;

/// Few prompts of one image a step.
#[allow(dead_code)] // not of every test
pub const SHORT: [&str; 4] = ["--batch", "1", "--prompts", "4"];

/// Runs it with these arguments.
pub fn finetune(output: &Path, arguments: &[&str]) -> anyhow::Result<Outcome> {
    let output = output.to_str().expect("a path in Unicode");
    run(&Options::try_parse_from([&["finetune", "--output", output], arguments].concat())?)
}
