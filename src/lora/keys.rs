//! Adapters whose keys are not spelled as PEFT spells them.
//!
//! ```text
//! module. _orig_mod. _fsdp_wrapped_module.     wrappers of a module, anywhere in a key
//! lora_A.default.weight                        an adapter's name, as in PeftModel.state_dict()
//! modules_to_save.default.                     the same for modules saved whole
//! model.sam.<module>.                          any text before all keys, or none in place of base_model.model.
//! image_encoder.blocks.0.attn.qkv.             names of the model's files in place of the tree's
//! blocks.0.attn.qkv.                           an adapter of one part of the model
//! ```
//! An adapter is read in another spelling only if exactly one makes every key a tensor of the model and every tensor a
//! key. The module names of its configuration are then taken in the adapter's own spelling.

use super::describe::{describe, layer_paths, Layers};
use super::inject::Plan;
use super::state::{Slot, PREFIX};
use super::target::Matcher;
use super::LoraConfig;
use crate::nn::checkpoint::{root_of, Names, TensorReader};
use crate::nn::ModuleTree;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// Components that wrappers add to the path of a module.
const WRAPPERS: [&str; 4] =
    ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// How the keys of an adapter's file are read.
pub(super) struct Spelling {
    /// The configuration, its module names in the tree's spelling.
    pub config: LoraConfig,
    /// PEFT's key and the key in the file.
    pub keys: BTreeMap<String, String>,
    /// One key as it is in the file and as it is read.
    pub example: (String, String),
}

/// The names of modules that an adapter may use.
#[derive(Clone, Copy)]
struct Naming {
    /// Those of the model's files in place of the tree's.
    of_files: bool,
    /// Without the first component.
    of_part: bool,
}

const NAMINGS: [Naming; 4] = [
    Naming { of_files: false, of_part: false },
    Naming { of_files: true, of_part: false },
    Naming { of_files: false, of_part: true },
    Naming { of_files: true, of_part: true },
];

/// The one spelling in which the file is an adapter of `model`; none where there is none.
///
/// # Errors
/// - several spellings fit;
/// - the file holds several adapters.
pub(super) fn spelling(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
    file: &TensorReader,
    names: &Names,
) -> Result<Option<Spelling>> {
    let Some(plain) = plain_keys(file)? else { return Ok(None) };
    let mut found: Vec<Spelling> = Vec::new();
    for naming in NAMINGS {
        let Some(spelling) = fit(model, name, config, &plain, (names, naming))? else { continue };
        if found.iter().all(|other| other.keys != spelling.keys) {
            found.push(spelling);
        }
    }
    if let [a, b, ..] = &found[..] {
        let message = format!(
            "its keys can be read in several ways: {} is {} or {}",
            a.example.0, a.example.1, b.example.1
        );
        return Err(Error::file(file.path(), message));
    }
    Ok(found.pop())
}

/// The keys of a file without wrappers and names of adapters, and the keys as they are; none where two become one.
fn plain_keys(file: &TensorReader) -> Result<Option<BTreeMap<String, String>>> {
    let mut plain = BTreeMap::new();
    let mut adapters = BTreeSet::new();
    let has = |parts: &[&str]| {
        parts.iter().all(|part| file.tensors().keys().any(|key| key.contains(part)))
    };
    // PEFT's own files hold copies of biases below both; a state dict holds the module as it was and as it is trained.
    let is_state_dict = !has(&[".lora_A.weight", ".original_module."]);
    for key in file.tensors().keys() {
        let mut parts: Vec<&str> = key.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
        if is_state_dict && parts.contains(&"original_module") {
            continue;
        }
        let saved = parts.iter().position(|part| *part == "modules_to_save");
        if let Some(at) = saved.filter(|_| is_state_dict) {
            let after = parts.len() - at - 1;
            adapters.extend((after > 1).then(|| parts[at + 1]));
            parts.drain(at..at + 1 + usize::from(after > 1));
        }
        let is_matrix = |part: &&str| ["lora_A", "lora_B", "lora_magnitude_vector"].contains(part);
        if let Some(at) = parts.iter().position(is_matrix) {
            let magnitude = parts[at] == "lora_magnitude_vector";
            let leaf = parts.last().filter(|leaf| !magnitude && ["weight", "bias"].contains(leaf));
            let leaf = leaf.copied();
            let named = parts.get(at + 1).filter(|part| !["weight", "bias"].contains(part));
            adapters.extend(named.copied());
            parts.truncate(at + 1);
            parts.extend(leaf);
        }
        if plain.insert(parts.join("."), key.clone()).is_some() {
            if adapters.len() < 2 {
                return Ok(None);
            }
            let adapters: Vec<&str> = adapters.into_iter().collect();
            let message = format!(
                "holds several adapters, {}: save one of them alone",
                adapters.join(" and ")
            );
            return Err(Error::file(file.path(), message));
        }
    }
    Ok(Some(plain))
}

/// The spelling with names of this kind, if there is one.
fn fit(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
    plain: &BTreeMap<String, String>,
    (names, naming): (&Names, Naming),
) -> Result<Option<Spelling>> {
    let root = root_of(names, model);
    let own = |path: &str| own_name(path, root, names, naming);
    let config = match naming {
        Naming { of_files: false, of_part: false } => Some(config.clone()),
        _ => translated(model, config, &own)?,
    };
    let Some(config) = config else { return Ok(None) };
    let Ok(plan) = Plan::new(model, name, &config) else { return Ok(None) };
    let slots: BTreeMap<String, Slot> = plan.slots();
    let wanted: BTreeMap<String, &String> =
        slots.keys().filter_map(|key| Some((own(key.strip_prefix(PREFIX)?)?, key))).collect();
    // Every prefix is the one of some key that ends in the first wanted name.
    let Some(first) = wanted.keys().next() else { return Ok(None) };
    let mut found: Option<Spelling> = None;
    for prefix in plain.keys().filter_map(|key| key.strip_suffix(first.as_str())) {
        if !(prefix.is_empty() || prefix.ends_with('.')) || plain.len() != slots.len() {
            continue;
        }
        let pairs = plain.iter().map(|(key, in_file)| {
            let slot = wanted.get(key.strip_prefix(prefix)?)?;
            Some((slot.to_string(), in_file.clone()))
        });
        let Some(keys) = pairs.collect::<Option<BTreeMap<_, _>>>() else { continue };
        // Keys as they are were refused already.
        let other = keys.iter().find(|(key, in_file)| key != in_file);
        let example = other.map(|(key, in_file)| (in_file.clone(), key.clone()));
        if let Some(example) = example.filter(|_| keys.len() == slots.len()) {
            found = Some(Spelling { config: config.clone(), keys, example });
        }
    }
    Ok(found)
}

/// The name of a tensor of the tree, `<module>.<leaf>`, in a naming; none where it has none.
fn own_name(path: &str, root: &str, names: &Names, naming: Naming) -> Option<String> {
    let full = match root {
        "" => path.to_string(),
        root => format!("{root}.{path}"),
    };
    // The tables know weights and biases; an adapter's tensor has the name of its layer.
    let leaf = full.find(".lora_").or_else(|| full.find(".base_layer.")).unwrap_or(full.len());
    let (layer, leaf) = full.split_at(leaf);
    let named = match (naming.of_files, leaf.is_empty()) {
        (false, _) => layer.to_string(),
        (true, true) => names.to_file(&[layer]).pop()?,
        (true, false) => {
            let weight = names.to_file(&[&format!("{layer}.weight")]).pop()?;
            weight.strip_suffix(".weight")?.to_string()
        }
    };
    let named = format!("{named}{leaf}");
    match naming.of_part {
        false => Some(named),
        true => named.split_once('.').map(|(_, rest)| rest.to_string()),
    }
}

/// A configuration with the targets that `config` has in names that `own` gives; none where it has no target.
fn translated(
    model: &dyn ModuleTree,
    config: &LoraConfig,
    own: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<LoraConfig>> {
    let matcher = Matcher::new(config)?;
    let paths = layer_paths(model);
    let mut layers = Layers::new();
    for (path, is_linear) in &paths {
        let own = own(&format!("{path}.weight"));
        let Some(own) = own.as_deref().and_then(|own| own.strip_suffix(".weight")) else {
            continue;
        };
        if matcher.is_target(own, *is_linear)? {
            layers.insert(path.clone(), matcher.rank_and_scaling(own)?);
        }
    }
    if layers.is_empty() {
        return Ok(None);
    }
    describe(config, &layers, &paths).map(Some)
}
