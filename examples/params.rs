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
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{count_parameters, inject};
use candle_sam_lora::nn::ModuleTree;
use candle_sam_lora::sam::{
    checkpoint, model_type, SamConfig, SamModel, SamVisionConfig, SamVisionModel,
};
use candle_sam_lora::Result;
use clap::Parser;
use std::path::Path;
use std::process::ExitCode;

/// Prints how many parameters of a SAM a LoRA configuration trains; needs no weights
#[derive(Parser)]
struct Options {
    /// The model: vit_b, vit_l, vit_h, a config.json, or weights in a file or folder
    #[arg(long, default_value = "vit_b", value_name = "NAME|PATH")]
    config: String,
    #[command(flatten)]
    lora: lora_args::LoraArgs,
}

fn run(options: &Options) -> anyhow::Result<()> {
    let mut model = model(options)?;
    inject(model.as_mut(), &options.lora.config(), 0)?;
    console::say(count_parameters(model.as_ref()));
    Ok(())
}

/// A whole SAM, or an image encoder alone.
fn model(options: &Options) -> Result<Box<dyn ModuleTree>> {
    let (kind, dtype, device) = (options.lora.attention(), DType::F32, Device::Cpu);
    let vb = VarBuilder::zeros(dtype, &device);
    let path = Path::new(&options.config);
    let whole = match path.extension().is_some_and(|ending| ending == "json") {
        _ if !checkpoint::split_prefix(path).0.exists() => SamConfig::by_name(&options.config),
        true => SamConfig::load(path),
        false => checkpoint::sizes(path).map(|sizes| sizes.config),
    };
    // An image encoder alone is no whole SAM.
    let encoder = match (&whole, path.is_file()) {
        (Err(_), true) if model_type(path).is_ok() => SamVisionConfig::load(path),
        (Err(_), _) => checkpoint::vision_sizes(path),
        (Ok(config), _) => return Ok(Box::new(SamModel::new(config, kind, vb)?)),
    };
    match (encoder, whole) {
        (Ok(config), _) => Ok(Box::new(SamVisionModel::new(&config, kind, vb)?)),
        (Err(_), Err(e)) => Err(e),
        (Err(e), Ok(_)) => Err(e),
    }
}

pub fn main() -> ExitCode {
    console::exit_code(run(&Options::parse()))
}
