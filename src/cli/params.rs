//! `params`: how many parameters of a SAM a LoRA configuration trains.

use super::console::Console;
use super::lora_arguments::LoraArguments;
use crate::lora::{count_parameters, inject};
use crate::nn::ModuleTree;
use crate::sam::{checkpoint, model_type, SamConfig, SamModel, SamVisionConfig, SamVisionModel};
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde_json::json;
use std::path::Path;

/// Prints how many parameters of a SAM a LoRA configuration trains; needs no weights
#[derive(clap::Args)]
pub struct Options {
    /// The model: vit_b, vit_l, vit_h, a config.json, or weights in a file or folder
    #[arg(long, default_value = "vit_b", value_name = "NAME|PATH")]
    config: String,
    #[command(flatten)]
    lora: LoraArguments,
    #[command(flatten)]
    console: Console,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let mut model = model(options)?;
    let adapted = inject(model.as_mut(), &options.lora.config(), 0)?;
    options.lora.check_targets(&adapted)?;
    let count = count_parameters(model.as_ref());
    options.console.result(count, json!({ "trainable": count.trainable, "all": count.all }));
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
