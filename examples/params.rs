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
use candle_sam_lora::sam::{model_type, SamConfig, SamModel, SamVisionConfig, SamVisionModel};
use candle_sam_lora::Result;
use clap::Parser;
use std::path::Path;
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
    let mut model = model(options)?;
    inject(model.as_mut(), &options.lora.config(), 0)?;
    console::say(count_parameters(model.as_ref()));
    Ok(())
}

/// A whole SAM, or an image encoder alone.
fn model(options: &Options) -> Result<Box<dyn ModuleTree>> {
    let (kind, dtype, device) = (options.lora.attention(), DType::F32, Device::Cpu);
    let path = Path::new(&options.config);
    if !path.is_file() {
        let config = SamConfig::by_name(&options.config)?;
        return Ok(Box::new(SamModel::new(&config, kind, VarBuilder::zeros(dtype, &device))?));
    }
    if model_type(path)? == SamVisionConfig::MODEL_TYPE {
        let config = SamVisionConfig::load(path)?;
        return Ok(Box::new(SamVisionModel::new(
            &config,
            kind,
            VarBuilder::zeros(dtype, &device),
        )?));
    }
    Ok(Box::new(SamModel::new(&SamConfig::load(path)?, kind, VarBuilder::zeros(dtype, &device))?))
}

pub fn main() -> ExitCode {
    console::exit_code(run(&Options::parse()))
}
