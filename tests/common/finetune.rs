//! The command `finetune`, called as the program calls it.

use candle_sam_lora::cli::finetune::{run, Options, Outcome};
use clap::Parser;
use std::path::Path;

/// The recipe of Hugging Face's guide, adapters alone: the quickest, where a test names no other.
const PLAIN: [[&str; 2]; 4] = [
    ["--loss", "bce=1,dice=1"],
    ["--corrections", "0"],
    ["--lr-schedule", "constant"],
    ["--train", "adapters"],
];

/// Few prompts of one image a step.
#[allow(dead_code)] // not of every test
pub const SHORT: [&str; 4] = ["--batch", "1", "--prompts", "4"];

/// Runs it with these arguments, by the plain recipe where they leave it open.
pub fn finetune(output: &Path, arguments: &[&str]) -> anyhow::Result<Outcome> {
    let output = output.to_str().expect("a path in Unicode");
    let open = PLAIN.iter().filter(|[flag, _]| !arguments.contains(flag)).flatten().copied();
    let all = ["finetune", "--output", output].into_iter().chain(open);
    run(&Options::try_parse_from(all.chain(arguments.iter().copied()))?)
}
