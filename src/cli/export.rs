//! `export`: models and adapters in the formats of other tools.

use super::arguments::ModelArguments;
use super::console::Console;
use super::merge::merged;
use super::model::{self, Placement, Source};
use super::model_folder::{self, Destination, StorageArgument};
use crate::lora::{fuse_qkv, write_adapter, CONFIG_FILE, TENSORS_FILE};
use crate::nn::DEFAULT_ADAPTER;
use crate::sam::checkpoint::{self, Naming};
use crate::sam::{has_image_ending, AttentionKind};
use anyhow::bail;
use candle_core::DType;
use clap::ValueEnum;
use serde_json::json;
use std::path::Path;

/// Writes a model or an adapter for another tool
///
/// Whatever the model's files are (original names, q, k and v apart, torch.save), they become what the tool reads.
#[derive(clap::Args)]
pub struct Options {
    /// The form that is written
    #[arg(long, value_enum)]
    format: Format,
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    destination: Destination,
    #[command(flatten)]
    storage: StorageArgument,
    #[command(flatten)]
    console: Console,
}

/// Endings of files that PyTorch would read as its own.
const PICKLED: [&str; 4] = ["pth", "pt", "bin", "ckpt"];

/// Formats of other tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Folder that transformers' SamModel.from_pretrained and SamProcessor.from_pretrained take; an adapter is merged
    Transformers,
    /// Safetensors file with the names of segment-anything; an adapter is merged
    Original,
    /// Folder of an adapter on the fused qkv, which PEFT loads onto transformers' unmodified SamModel
    FusedAdapter,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let Options { format, destination, console, .. } = options;
    let (console, output) = (*console, destination.output.as_path());
    let names: &[&str] = match format {
        Format::Transformers => &model_folder::FILES,
        Format::Original => &[""],
        Format::FusedAdapter => &[CONFIG_FILE, TENSORS_FILE],
    };
    destination.check(names)?;
    let ending = output.extension().unwrap_or_default().to_ascii_lowercase();
    let is_other = PICKLED.iter().any(|pickled| ending == *pickled) || has_image_ending(output);
    if *format != Format::Original && (is_other || ending == "safetensors") {
        bail!("{}: is written as a folder; choose a name without this ending", output.display())
    }
    if *format == Format::FusedAdapter && options.storage.dtype() != DType::F32 {
        bail!("--dtype has no effect with --format fused-adapter: adapters are f32")
    }
    if *format == Format::Original && is_other {
        bail!("{}: is written as safetensors; choose a name that ends so", output.display())
    }
    if *format == Format::FusedAdapter && !options.model.is_adapted() {
        bail!("name the adapter to export with --adapter")
    }
    let source = options.model.find(console)?;
    destination.spare(names, &source)?;
    let dtype = options.storage.dtype();
    match format {
        Format::Transformers => {
            let model = merged(&source, console)?;
            let processor = source.processor(model.config(), console)?;
            model_folder::write(&model, &processor, output, dtype)?;
        }
        Format::Original => {
            let model = merged(&source, console)?;
            checkpoint::save(&model, output, Naming::Original, Some(dtype))?;
        }
        Format::FusedAdapter => fused_adapter(&source, output, console)?,
    }
    let name = format.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string());
    let text = format!("{}: written for {name}", output.display());
    console.result(text, json!({ "output": output, "format": name }));
    Ok(())
}

/// Writes the source's adapter of q, k and v as one of `qkv`.
fn fused_adapter(source: &Source, output: &Path, console: Console) -> anyhow::Result<()> {
    if source.kind()? == AttentionKind::Fused {
        bail!("the adapter is on the fused qkv already")
    }
    let place = Placement::exact();
    let mut model = model::load(&source.weights, AttentionKind::Split, &place, console)?;
    let Some(config) = source.adapt(&mut model, console)? else {
        bail!("there is no adapter to export")
    };
    let (config, tensors) = fuse_qkv(&model, DEFAULT_ADAPTER, &config)?;
    Ok(write_adapter(&config, &tensors, output)?)
}
