//! `params`: how many parameters of a SAM a LoRA configuration trains.

use super::console::Console;
use super::lora_arguments::LoraArguments;
use crate::lora::{count_parameters, inject};
use crate::nn::ModuleTree;
use crate::sam::{model_type, SamConfig, SamModel, SamVisionConfig, SamVisionModel};
use crate::Result;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde_json::json;
use std::path::Path;

/// Prints how many parameters of a SAM a LoRA configuration trains; needs no weights
#[derive(clap::Args)]
pub struct Options {
    /// The model: vit_b, vit_l, vit_h, or a config.json
    #[arg(long, default_value = "vit_b", value_name = "NAME|FILE")]
    config: String,
    #[command(flatten)]
    lora: LoraArguments,
    #[command(flatten)]
    console: Console,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let mut model = model(options)?;
    inject(model.as_mut(), &options.lora.config(), 0)?;
    let count = count_parameters(model.as_ref());
    options.console.result(count, json!({ "trainable": count.trainable, "all": count.all }));
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
