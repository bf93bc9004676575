//! How many parameters of a SAM a LoRA configuration trains, without any weights:
//!
//! ```text
//! cargo run --release --example params -- --config vit_b --r 16 --target-modules q,v
//! ```

#[path = "shared/console.rs"]
mod console;
#[path = "shared/lora_args.rs"]
mod lora_args;

use candle_core::{DType, Device};
use candle_sam_lora::lora::{inject, trainable_parameters};
use candle_sam_lora::sam::{SamConfig, SamModel};
use clap::Parser;
use std::process::ExitCode;

/// Prints how many parameters of a SAM a LoRA configuration trains; needs no weights
#[derive(Parser)]
struct Options {
    /// The model: vit_b, vit_l, vit_h, or a config.json
    #[arg(long, default_value = "vit_b", value_name = "NAME|FILE")]
    config: String,
    #[command(flatten)]
    lora: lora_args::LoraArgs,
}

fn run(options: &Options) -> anyhow::Result<()> {
    let config = if std::path::Path::new(&options.config).is_file() {
        SamConfig::from_file(&options.config)?
    } else {
        SamConfig::by_name(&options.config)?
    };
    let mut model = SamModel::new(&config, options.lora.attention(), DType::F32, &Device::Cpu)?;
    inject(&mut model, &options.lora.config(), 0)?;
    console::say(trainable_parameters(&model));
    Ok(())
}

pub fn main() -> ExitCode {
    console::exit_code(run(&Options::parse()))
}
