//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes and reads them.
//!
//! The two files belong together: tensors under another configuration would load and be silently wrong. So both are
//! written beside their destination first. Where the configuration stays the same, replacing the tensors is one step.
//! Where it changes, the old one is removed first and the new one comes last. So a folder caught half-way has no
//! configuration and does not load. Writers and readers of one folder take turns, by a lock of the folder.

use super::config_file::warn;
use super::inject::Plan;
use super::keys::{spelling, Spelling};
use super::state::{check, described, headers, named_adapter_state, Slot};
use super::{BiasTraining, LoraConfig};
use crate::nn::checkpoint::{all_finite, Names, TensorReader};
use crate::nn::{ModuleTree, DEFAULT_ADAPTER};
use crate::{files, Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Name of the configuration in an adapter folder.
///
/// [Example](crate::lora::save_adapter)
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensors in an adapter folder.
///
/// [Example](crate::lora::save_adapter)
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// Name of the tensors in a folder of an older PEFT, a file of `torch.save`.
///
/// [Example](crate::lora::save_adapter)
pub const PICKLED_TENSORS_FILE: &str = "adapter_model.bin";

/// Writes the adapter of `model`, injected with `config`, to the folder `dir`, which is created if need be.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::lora::{inject, load_adapter, merge_and_unload, save_adapter, LoraConfig};
/// use candle_sam_lora::sam::{AttentionKind, SamModel};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let sam = || SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Split, DType::F32, &Device::Cpu);
/// let (mut trained, config) = (sam()?, LoraConfig::new(4).target_modules(["q", "v"]));
/// inject(&mut trained, &config, 0)?;
/// let folder = std::env::temp_dir().join("save-adapter"); // PeftModel.from_pretrained(sam, folder)
/// save_adapter(&trained, &config, &folder)?;
///
/// let mut loaded = sam()?;
/// load_adapter(&mut loaded, &folder)?;
/// merge_and_unload(&mut loaded)?; // a plain SAM again, its weights with the adapter's part
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - the model carries no adapter or a merged one;
/// - `config` describes another adapter than the model's: other layers, ranks, scalings or kinds;
/// - the folder cannot be written.
///
/// An adapter that was there before is then still there, unless the last step failed, the exchange of complete files.
/// The folder then has no configuration and does not load.
pub fn save_adapter(
    model: &dyn ModuleTree,
    config: &LoraConfig,
    dir: impl AsRef<Path>,
) -> Result<()> {
    save_named_adapter(model, DEFAULT_ADAPTER, config, dir)
}

/// As [`save_adapter`], of the adapter called `name`. The name is not in the files; PEFT's `save_pretrained` gives
/// every adapter but "default" a folder of its name.
///
/// [Example](crate::lora::add_adapter)
///
/// # Errors
/// As [`save_adapter`].
pub fn save_named_adapter(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
    dir: impl AsRef<Path>,
) -> Result<()> {
    write_adapter(config, &named_adapter_state(model, name, config)?, dir)
}

/// Makes an adapter folder of a configuration and tensors under PEFT's keys.
///
/// [Example](crate::lora::LoraLinear)
///
/// # Errors
/// As [`save_adapter`], for the folder.
pub fn write_adapter(
    config: &LoraConfig,
    tensors: &BTreeMap<String, Tensor>,
    dir: impl AsRef<Path>,
) -> Result<()> {
    let dir = dir.as_ref();
    let json = config.to_json()?;
    files::create_dir(dir)?;
    let config_path = dir.join(CONFIG_FILE);
    config.refused_task_type().iter().for_each(|line| warn(&config_path.display(), line));
    let staged_tensors = files::stage_tensors(dir.join(TENSORS_FILE), tensors)?;
    let staged_config = files::stage(&config_path, |file| file.write_all(json.as_bytes()))?;
    let _alone = files::locked(dir, File::lock);
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
/// [Example](crate::lora::save_adapter)
///
/// # Errors
/// - a file cannot be read or is damaged;
/// - the configuration is not supported or does not fit this model;
/// - [`Error::Mismatch`]: tensors are missing, surplus or mis-shaped, all of them listed.
///
/// The model is unchanged then.
pub fn load_adapter(model: &mut dyn ModuleTree, dir: impl AsRef<Path>) -> Result<LoraConfig> {
    load_named_adapter(model, DEFAULT_ADAPTER, dir)
}

/// As [`load_adapter`], under a name, beside other adapters; as after [`add_adapter`](super::add_adapter) those stay
/// in use and the loaded one waits, frozen.
///
/// PEFT passes over names in `modules_to_save` that no module has: a line on standard error tells of each.
///
/// [Example](crate::lora::add_adapter)
///
/// # Errors
/// As [`load_adapter`] and [`add_adapter`](super::add_adapter).
pub fn load_named_adapter(
    model: &mut dyn ModuleTree,
    name: &str,
    dir: impl AsRef<Path>,
) -> Result<LoraConfig> {
    let loaded = load_adapter_as(model, name, dir, &Names::PLAIN)?;
    if let Some(reading) = loaded.reading() {
        warn(&loaded.path.display(), &reading);
    }
    Ok(loaded.config)
}

/// The finds of [`load_adapter_as`] in an adapter. Its `Display` is one line for a user.
///
/// [Example](crate::lora::save_adapter)
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LoadedAdapter {
    /// The file of tensors.
    pub path: PathBuf,
    /// `safetensors` or `PyTorch`.
    pub format: &'static str,
    /// Tensors in the file.
    pub tensors: usize,
    /// The configuration, its module names those of the model.
    pub config: LoraConfig,
    /// A key of the file and PEFT's key for it, where the file has keys of another spelling.
    pub respelled: Option<(String, String)>,
}

impl LoadedAdapter {
    /// How the keys were read, where they are not PEFT's.
    fn reading(&self) -> Option<String> {
        let (in_file, key) = self.respelled.as_ref()?;
        Some(format!("keys in another spelling, {in_file} read as {key}"))
    }
}

impl std::fmt::Display for LoadedAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (path, config) = (self.path.display(), &self.config);
        write!(
            f,
            "{path}: {} adapter of rank {}, {} tensors",
            self.format, config.rank, self.tensors
        )?;
        self.reading().map_or(Ok(()), |reading| write!(f, "; {reading}"))
    }
}

/// As [`load_named_adapter`], and reads adapters whose keys are spelled in other ways. Keys may be wrapped in `module.`
/// or `_orig_mod.`, hold the adapter's name, or lie below another prefix than PEFT's. They may also be of a part of the
/// model alone, or in the naming of the model's files that `names` holds. Such a spelling is taken if it is the only
/// one that fits.
///
/// `dir` is a folder, or the file of tensors in it.
///
/// [Example](crate::lora::save_adapter)
///
/// # Errors
/// As [`load_named_adapter`]; when several spellings fit.
pub fn load_adapter_as(
    model: &mut dyn ModuleTree,
    name: &str,
    dir: impl AsRef<Path>,
    names: &Names,
) -> Result<LoadedAdapter> {
    let (config, file) = open_adapter(dir.as_ref())?;
    let config_path = file.path().with_file_name(CONFIG_FILE);
    let (path, format, tensors) = (file.path().to_path_buf(), file.format(), file.tensors().len());
    let straight = Plan::new(model, name, &config)
        .map_err(|e| Error::file(&config_path, format!("does not fit this model: {e}")))
        .and_then(|plan| {
            check(&path.display().to_string(), &plan.slots(), headers(file.tensors()))
        });
    let of_file = |error| match error {
        Error::Config(message) => Error::file(&config_path, message),
        other => other,
    };
    let mut respelled = None;
    let (config, mut keys) = match straight {
        Ok(()) => (config, None),
        Err(error) => match spelling(model, name, &config, &file, names).map_err(of_file)? {
            Some(Spelling { config, keys, example }) => {
                respelled = Some(example);
                (config, Some(keys))
            }
            None => return Err(error),
        },
    };
    let plan = Plan::new(model, name, &config)?;
    let slots = plan.slots();
    if let Some(keys) = &keys {
        let infos =
            keys.iter().map(|(key, in_file)| Ok((key.clone(), file.info(in_file)?.clone())));
        check(&path.display().to_string(), &slots, headers(&infos.collect::<Result<_>>()?))?;
    }
    let mut values = values_of(&file)?;
    if let Some(keys) = keys.take() {
        let renamed =
            keys.into_iter().filter_map(|(key, in_file)| Some((key, values.remove(&in_file)?)));
        values = renamed.collect();
    }
    fill(model, plan, slots, values, &config_path.display())?;
    Ok(LoadedAdapter { path, format, tensors, config, respelled })
}

/// As [`load_named_adapter`], from a configuration and tensors under PEFT's keys.
///
/// [Example](crate::guide::peft)
///
/// # Errors
/// As [`load_named_adapter`], but for files.
pub fn load_adapter_tensors(
    model: &mut dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
    tensors: BTreeMap<String, Tensor>,
) -> Result<()> {
    let plan = Plan::new(model, name, config)?;
    let slots = plan.slots();
    check("the adapter", &slots, described(&tensors))?;
    fill(model, plan, slots, tensors, &"the adapter")
}

/// Carries out a plan with the values of a file, which were found to be those of the slots.
fn fill(
    model: &mut dyn ModuleTree,
    plan: Plan<'_>,
    slots: BTreeMap<String, Slot>,
    mut tensors: BTreeMap<String, Tensor>,
    source: &dyn std::fmt::Display,
) -> Result<()> {
    plan.idle.iter().for_each(|line| warn(source, line));
    let mut values = plan.base_values()?;
    values.extend(
        slots.into_iter().filter_map(|(key, slot)| Some((slot.name, tensors.remove(&key)?))),
    );
    plan.apply(model, values).map(drop)
}

/// The configuration in the adapter folder `dir`, and its tensors by their keys.
///
/// [Example](crate::lora::LoraLinear)
///
/// # Errors
/// When a file cannot be read or is not what it should be.
pub fn read_adapter(dir: impl AsRef<Path>) -> Result<(LoraConfig, BTreeMap<String, Tensor>)> {
    let dir = dir.as_ref();
    let (config, file) = open_adapter(dir)?;
    Ok((config, values_of(&file)?))
}

/// All tensors of an adapter's file.
///
/// # Errors
/// - a tensor cannot be read;
/// - a value is no number or infinite, or becomes so in f32.
pub(super) fn values_of(file: &TensorReader) -> Result<BTreeMap<String, Tensor>> {
    let values = file.read_all(&Device::Cpu)?;
    values.iter().try_for_each(|(key, tensor)| check_value(file.path(), key, tensor))?;
    Ok(values)
}

/// Fails where a tensor of an adapter's file has a value that is not finite in f32.
pub(super) fn check_value(path: &Path, key: &str, tensor: &Tensor) -> Result<()> {
    if tensor.dtype().is_float() && !all_finite(&tensor.to_dtype(DType::F32)?) {
        let message = format!("{key} has values that are NaN, infinite or too large for f32");
        return Err(Error::file(path, message));
    }
    Ok(())
}

/// The keys of the tensors in an adapter's file, as they are there.
///
/// [Example](crate::lora::LoraLinear)
///
/// # Errors
/// When a file cannot be read or is not what it should be.
pub fn adapter_keys(dir: impl AsRef<Path>) -> Result<Vec<String>> {
    let (_, tensors) = adapter_files(dir.as_ref())?;
    Ok(TensorReader::open(tensors)?.tensors().keys().cloned().collect())
}

/// The configuration and the tensors of an adapter, by its folder or its file of tensors.
fn adapter_files(path: &Path) -> Result<(PathBuf, PathBuf)> {
    files::check_folder_name(path)?;
    let is_dir = path.is_dir();
    let config = if is_dir { path.join(CONFIG_FILE) } else { path.with_file_name(CONFIG_FILE) };
    if !is_dir {
        path.metadata().map_err(|e| Error::io(path, e))?;
        if !config.exists() {
            let message =
                format!("an adapter needs {CONFIG_FILE} beside its tensors, and there is none");
            return Err(Error::file(path, message));
        }
        return Ok((config, path.to_path_buf()));
    }
    let tensors = [TENSORS_FILE, PICKLED_TENSORS_FILE].map(|name| path.join(name));
    if let Some(found) = tensors.iter().find(|tensors| tensors.exists()) {
        return Ok((config, found.clone()));
    }
    if config.exists() {
        let message = format!("not there, and no {PICKLED_TENSORS_FILE} either");
        let missing = std::io::Error::new(std::io::ErrorKind::NotFound, message);
        return Err(Error::io(path.join(TENSORS_FILE), missing));
    }
    let below = adapters_below(path, 2);
    Err(Error::file(
        path,
        match below.len() {
            0 => format!(
                "expected an adapter, {CONFIG_FILE} and {TENSORS_FILE}; the folder has neither"
            ),
            _ => format!(
                "expected an adapter, and there are such in its folders: {}",
                below.join(", ")
            ),
        },
    ))
}

/// The folders of adapters below a folder, sorted, ten at most.
fn adapters_below(path: &Path, depth: usize) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else { return vec![] };
    let mut folders: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect();
    folders.sort_unstable();
    let mut found = Vec::new();
    for folder in folders {
        if folder.join(CONFIG_FILE).exists() {
            found.push(folder.display().to_string());
        } else if depth > 1 {
            found.extend(adapters_below(&folder, depth - 1));
        }
    }
    found.truncate(10);
    found
}

/// As [`read_adapter`], of the tensors the header alone: what does not fit a model is refused by it.
pub(super) fn open_adapter(dir: &Path) -> Result<(LoraConfig, TensorReader)> {
    let (config, tensors) = adapter_files(dir)?;
    let pair = config.parent().and_then(|folder| files::locked(folder, File::lock_shared));
    let config = LoraConfig::load(config)?;
    let mut file = TensorReader::open(tensors)?;
    drop(pair);
    if config.bias == BiasTraining::All && config.modules_to_save.is_some() {
        let shapes: BTreeMap<_, _> =
            file.tensors().iter().map(|(key, info)| (key.clone(), info.shape.clone())).collect();
        file.retain(|key| {
            let shape = shapes.get(key);
            !unwrapped(key).iter().any(|plain| shapes.get(plain) == shape)
        });
    }
    Ok((config, file))
}

/// The plain keys that a bias below one of PEFT's wrappers may have; none for other tensors.
///
/// With `bias = all` PEFT writes each bias of a module to save three times. It reads the plain one alone into the
/// module. `original_module` holds the module as it was before, and `modules_to_save` a copy of the plain one:
///
/// ```text
/// neck.conv1.bias
/// neck.original_module.conv1.bias
/// neck.modules_to_save.default.conv1.bias          head.modules_to_save.bias, where the module has the bias itself
/// ```
fn unwrapped(key: &str) -> Vec<String> {
    let parts: Vec<&str> = key.split('.').collect();
    let is_wrapper = |part: &str| matches!(part, "original_module" | "modules_to_save");
    if parts.last() != Some(&"bias") || !parts.iter().any(|part| is_wrapper(part)) {
        return Vec::new();
    }
    // The adapter's name follows `modules_to_save`, but not before the leaf; older versions leave it out everywhere.
    let plain = |with_name: bool| {
        let is_name = |index: usize| {
            with_name
                && (1..parts.len() - 1).contains(&index)
                && parts[index - 1] == "modules_to_save"
        };
        let kept =
            parts.iter().enumerate().filter(|(index, part)| !is_wrapper(part) && !is_name(*index));
        kept.map(|(_, part)| *part).collect::<Vec<_>>().join(".")
    };
    vec![plain(true), plain(false)]
}
