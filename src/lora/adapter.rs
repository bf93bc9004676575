//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes and reads them.
//!
//! The two files belong together: tensors under another configuration would load and be silently wrong. So both are
//! written beside their destination first. Where the configuration stays what it was, replacing the tensors is one
//! step; where it changes, the old one is removed first and the new one comes last, so that a folder caught
//! half-way has no configuration and does not load.

use super::inject::Plan;
use super::state::{adapter_state, check};
use super::{BiasTraining, LoraConfig};
use crate::nn::ModuleTree;
use crate::{files, Error, Result};
use candle_core::Device;
use std::path::Path;

/// Name of the configuration in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensors in an adapter folder.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Writes the adapter of `model`, injected with `config`, to the folder `dir`, which is created if need be.
///
/// # Errors
/// When the model carries no adapter or a merged one, or the folder cannot be written: an adapter that was there
/// before is then still there, unless the very last step failed, the exchange of complete files; then the folder has
/// no configuration and does not load.
pub fn save_adapter(model: &dyn ModuleTree, config: &LoraConfig, dir: &Path) -> Result<()> {
    let tensors = adapter_state(model, config)?;
    let json = config.to_json()?;
    files::create_dir(dir)?;
    let config_path = dir.join(CONFIG_FILE);
    let staged_tensors = files::stage_tensors(&dir.join(TENSORS_FILE), &tensors)?;
    let staged_config = files::stage(&config_path, |file| file.write_all(json.as_bytes()))?;
    match std::fs::read(&config_path) {
        Ok(old) if old == json.as_bytes() => return staged_tensors.commit(),
        Ok(_) => std::fs::remove_file(&config_path).map_err(|e| Error::io(&config_path, e))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(&config_path, e)),
    }
    staged_tensors.commit()?;
    staged_config.commit()
}

/// Loads the adapter in the folder `dir` into a model that carries none. As after [`inject`](super::inject) the
/// adapter is trainable and in f32, the rest frozen; for inference alone freeze all with
/// [`set_trainable`](crate::nn::set_trainable).
///
/// # Errors
/// When a file cannot be read or is not what it should be, the configuration is not supported or does not fit this
/// model, and [`Error::Mismatch`] with every missing, surplus and mis-shaped tensor. The model is unchanged then.
pub fn load_adapter(model: &mut dyn ModuleTree, dir: &Path) -> Result<LoraConfig> {
    let config_path = dir.join(CONFIG_FILE);
    let config = LoraConfig::read(&config_path)?;
    let path = dir.join(TENSORS_FILE);
    let mut tensors = files::read_tensors(&path, &Device::Cpu)?;
    if config.bias == BiasTraining::All && config.modules_to_save.is_some() {
        // PEFT stores the biases of modules to save three times over: plain, and under its two wrappers.
        tensors.retain(|key, _| {
            !key.ends_with(".original_module.bias") && !key.ends_with(".modules_to_save.bias")
        });
    }
    let plan = Plan::new(model, &config)
        .map_err(|e| Error::file(&config_path, format!("does not fit this model: {e}")))?;
    let slots = plan.slots();
    check(&path.display().to_string(), &slots, &tensors)?;
    let values = slots
        .into_iter()
        .filter_map(|(key, slot)| Some((slot.name, tensors.remove(&key)?)))
        .collect();
    plan.apply(model, values)?;
    Ok(config)
}
