//! `merge`: an adapter folded into its model.

use super::arguments::ModelArguments;
use super::console::Console;
use super::model::{Placement, Source};
use super::model_folder::{self, Destination, StorageArgument};
use crate::lora;
use crate::sam::SamModel;
use anyhow::bail;
use serde_json::json;

/// Folds an adapter into its model: a folder that transformers and this program read, without any LoRA
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    destination: Destination,
    #[command(flatten)]
    storage: StorageArgument,
    #[command(flatten)]
    console: Console,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let (console, output) = (options.console, &options.destination.output);
    options.destination.check(&model_folder::FILES)?;
    if !options.model.is_adapted() {
        bail!("name the adapter to merge with --adapter")
    }
    let source = options.model.find(console)?;
    options.destination.spare(&model_folder::FILES, &source)?;
    let model = merged(&source, console)?;
    let processor = source.processor(model.config(), console)?;
    model_folder::write(&model, &processor, output, options.storage.dtype())?;
    let text = format!("{}: the merged model", output.display());
    console.result(text, json!({ "output": output }));
    Ok(())
}

/// The model of `source` on the CPU, in f32, with its adapter merged if it has one.
pub fn merged(source: &Source, console: Console) -> crate::Result<SamModel> {
    let place = Placement::exact();
    let mut model = source.load(&place, console)?;
    if source.adapter.is_some() {
        lora::safe_merge(&mut model)?;
        lora::merge_and_unload(&mut model)?;
    }
    Ok(model)
}
