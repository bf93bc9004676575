//! Another adapter's weights in the place of a loaded one's, without injecting anew.
//!
//! ```text
//! layers of both        A, B (and bias, magnitude), scaling and dropout are the new ones
//! layers of the old     A = B = 0: they compute what the base does
//! layers of the new     refused
//! ```
//! Where shapes agree, variables keep their identity and only their values change.
//!
//! Source: PEFT 0.21, `hotswap_adapter` in `utils/hotswap.py`.

use super::adapter::{open_adapter, values_of};
use super::state::{check, headers, Slot, PREFIX};
use super::switch::check_known;
use super::target::Matcher;
use super::{LoraConfig, CONFIG_FILE};
use crate::nn::checkpoint::TensorReader;
use crate::nn::{
    adapter_tensor_name, check_settable, refuse_merged, set_values, Adapter, ModuleTree, Node,
    NodeMut,
};
use crate::{Error, Result};
use candle_core::{DType, Var};
use std::collections::BTreeMap;
use std::path::Path;

/// Replaces the adapter called `name` by the one in the folder `dir`, whose configuration is returned. The name, what
/// is active and what is trainable stay. A clone shares variables, so it gets trainable values too, one after the other
/// while other threads compute with it. Frozen adapters ([`set_trainable`](crate::nn::set_trainable)) are replaced, and
/// a clone keeps the old ones: serve those. Save the result with that configuration only if both have the same layers.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::lora::{hotswap_adapter, inject, save_adapter, LoraConfig};
/// use candle_sam_lora::{module_tree, nn::{Linear, Mode, DEFAULT_ADAPTER}};
///
/// struct Head {
///     project: Linear,
/// }
/// module_tree!(Head { project });
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let config = LoraConfig::new(2).target_modules(["project"]);
/// let adapted = |seed| -> candle_sam_lora::Result<Head> {
///     let project = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
///     let mut head = Head { project };
///     inject(&mut head, &config, seed)?;
///     Ok(head)
/// };
/// let (mut served, mut other) = (adapted(0)?, adapted(1)?);
/// let b = &mut other.project.adapters.get_mut(DEFAULT_ADAPTER).unwrap().b;
/// *b = b.ones_like()?; // stands for training
/// let folder = std::env::temp_dir().join("candle-sam-lora-hotswap-adapter");
/// save_adapter(&other, &config, &folder)?;
///
/// hotswap_adapter(&mut served, DEFAULT_ADAPTER, &folder)?;
/// let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
/// let [served, other] = [served, other].map(|head| head.project.forward(&x, Mode::Eval));
/// assert_eq!(served?.to_vec2::<f32>()?, other?.to_vec2::<f32>()?);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - there is no such adapter, or it is merged;
/// - one of the two has DoRA or a LoRA bias and the other has not;
/// - either changes the base;
/// - the folder's adapter is on a layer that the loaded one is not on;
/// - the folder is damaged.
///
/// The model is unchanged then.
pub fn hotswap_adapter(
    model: &mut dyn ModuleTree,
    name: &str,
    dir: impl AsRef<Path>,
) -> Result<LoraConfig> {
    let dir = dir.as_ref();
    check_known(model, &[name])?;
    refuse_merged(model)?;
    let (config, file) = open_adapter(dir)?;
    let mut new = plan(model, name, &config, &file).map_err(|e| match e {
        Error::Config(message) => Error::file(dir.join(CONFIG_FILE), message),
        other => other,
    })?;
    model.visit_mut("", &mut |path, node| {
        let NodeMut::Layer(layer) = node else { return Ok(()) };
        if let (Some(adapter), Some(new)) = (layer.adapters.get_mut(name), new.remove(path)) {
            swap(adapter, new)?;
        }
        Ok(())
    })?;
    Ok(config)
}

/// The new adapter of every layer that has the old one.
fn plan(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
    file: &TensorReader,
) -> Result<BTreeMap<String, Adapter>> {
    if config.changes_base() {
        return Err(Error::config("an adapter that changes its base cannot be swapped in"));
    }
    let mut old = BTreeMap::new();
    model.visit("", &mut |path, node| {
        if let Node::Layer(layer) = node {
            if let Some(adapter) = layer.adapters.get(name) {
                old.insert(path.to_string(), adapter.clone());
            }
        }
    });
    let key = |path: &str, leaf: &str| format!("{PREFIX}{path}.{leaf}");
    let matcher = Matcher::new(config)?;
    let mut new = BTreeMap::new();
    let mut slots = BTreeMap::new();
    for (path, old) in old {
        if old.changes_base {
            return Err(Error::config("an adapter that changes its base cannot be swapped out"));
        }
        let alike = [
            ("use_dora", old.magnitude.is_some(), config.use_dora),
            ("lora_bias", old.b_bias.is_some(), config.lora_bias),
        ];
        if let Some((what, was, is)) = alike.into_iter().find(|(_, was, is)| was != is) {
            return Err(Error::config(format!("{what} is {is}, and {was} in the loaded adapter")));
        }
        for (leaf, tensor) in old.tensors() {
            check_settable(&adapter_tensor_name(&path, name, leaf), tensor)?;
        }
        let mut adapter = old.clone();
        if !file.tensors().contains_key(&key(&path, "lora_A.weight")) {
            for tensor in [&mut adapter.a, &mut adapter.b].into_iter().chain(&mut adapter.b_bias) {
                *tensor = tensor.zeros_like()?;
            }
            new.insert(path, adapter);
            continue;
        }
        let (rank, scaling) = matcher.rank_and_scaling(&path)?;
        (adapter.scaling, adapter.dropout) = (scaling, config.dropout);
        for (leaf, tensor) in adapter.tensors_mut() {
            let mut shape = tensor.dims().to_vec();
            match leaf {
                "lora_A.weight" => shape[0] = rank,
                "lora_B.weight" => shape[1] = rank,
                _ => {}
            }
            slots.insert(key(&path, leaf), Slot { name: leaf.to_string(), shape });
        }
        new.insert(path, adapter);
    }
    check(&file.path().display().to_string(), &slots, headers(file.tensors()))?;
    let mut tensors = values_of(file)?;
    for (path, adapter) in &mut new {
        for (leaf, tensor) in adapter.tensors_mut() {
            if let Some(value) = tensors.remove(&key(path, leaf)) {
                *tensor = value.to_device(tensor.device())?.to_dtype(DType::F32)?;
            }
        }
    }
    Ok(new)
}

/// Puts the values of `new` into `adapter`.
fn swap(adapter: &mut Adapter, new: Adapter) -> Result<()> {
    (adapter.scaling, adapter.dropout) = (new.scaling, new.dropout);
    for ((leaf, tensor), (_, value)) in adapter.tensors_mut().zip(new.tensors()) {
        let value = value.detach();
        match (tensor.track_op(), tensor.dims() == value.dims()) {
            (true, true) => set_values(leaf, tensor, &value)?,
            (true, false) => *tensor = Var::from_tensor(&value)?.into_inner(),
            (false, _) => *tensor = value,
        }
    }
    Ok(())
}
