//! A model for inference, with or without an adapter.

use super::console;
use super::model::{folder, load_model};
use anyhow::{anyhow, Context};
use candle_core::{DType, Device};
use candle_sam_lora::hub;
use candle_sam_lora::lora::{
    adapter_keys, load_adapter_as, load_adapter_tensors, read_samed_adapter, LoraConfig,
    CONFIG_FILE,
};
use candle_sam_lora::nn::{set_trainable, ModuleTree, DEFAULT_ADAPTER};
use candle_sam_lora::sam::checkpoint::SAM;
use candle_sam_lora::sam::{AttentionKind, SamConfig, SamModel};
use candle_sam_lora::Result;
use std::path::{Path, PathBuf};

/// The file or folder of the model called `name`; where none is named, of the model that `adapter` was trained on, or
/// without an adapter of the small one that comes with the project.
pub fn base(name: Option<&Path>, adapter: Option<&Path>) -> anyhow::Result<PathBuf> {
    let Some(adapter) = adapter.filter(|_| name.is_none()) else { return Ok(folder(name)?) };
    if is_foreign(adapter) {
        return Err(anyhow!(
            "{}: does not name its base model; name it with --model",
            adapter.display()
        ));
    }
    let config = match adapter.is_dir() {
        true => adapter.join(CONFIG_FILE),
        false => adapter.with_file_name(CONFIG_FILE),
    };
    let config = LoraConfig::load(&config)?;
    let named = config.base_model_name_or_path.filter(|name| !name.trim().is_empty());
    let named = named.with_context(|| {
        format!("{}: does not name its base model; name it with --model", adapter.display())
    })?;
    let found = hub::folder(&named).map_err(|e| {
        anyhow!(
            "{}: was trained on {named:?}, which is not to be had here ({e}); name the model with --model",
            adapter.display()
        )
    })?;
    console::say(format!("{}: base model {named:?}", adapter.display()));
    Ok(found)
}

/// The model at `path`, frozen, in f32, with an adapter.
pub fn load_adapted(
    path: &Path,
    adapter: Option<&Path>,
    device: &Device,
) -> Result<(SamConfig, SamModel)> {
    let Some(adapter) = adapter else {
        return load_model(path, AttentionKind::Fused, DType::F32, device);
    };
    let (config, mut model) = load_model(path, kind_of(adapter)?, DType::F32, device)?;
    adapt(&mut model, adapter)?;
    Ok((config, model))
}

/// The attention whose names the adapter means.
pub fn kind_of(adapter: &Path) -> Result<AttentionKind> {
    // SAMed's and micro-sam's are on q, k and v apart, whatever their names.
    let fused = !is_foreign(adapter)
        && adapter_keys(adapter)?
            .iter()
            .any(|name| name.contains(".attn.qkv.") || name.starts_with("attn.qkv."));
    Ok(if fused { AttentionKind::Fused } else { AttentionKind::Split })
}

/// Puts an adapter into a model and freezes it all. Says what was found.
pub fn adapt(model: &mut dyn ModuleTree, adapter: &Path) -> Result<()> {
    if is_foreign(adapter) {
        let (config, tensors) = read_samed_adapter(model, adapter, None)?;
        load_adapter_tensors(model, DEFAULT_ADAPTER, &config, tensors)?;
        let path = adapter.display();
        console::say(format!(
            "adapter: {path}: LoRA of SAMed or micro-sam, of rank {}",
            config.rank
        ));
    } else {
        let loaded = load_adapter_as(model, DEFAULT_ADAPTER, adapter, &SAM)?;
        console::say(format!("adapter: {loaded}"));
    }
    set_trainable(model, |_| false)
}

/// Whether this is one file without a configuration, as SAMed and micro-sam save LoRA.
fn is_foreign(adapter: &Path) -> bool {
    adapter.is_file() && !adapter.with_file_name(CONFIG_FILE).exists()
}
