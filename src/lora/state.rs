//! The tensors that belong to an adapter, by the keys PEFT gives them.
//!
//! ```text
//! base_model.model.<module>.lora_A.weight            [rank, in]
//! base_model.model.<module>.lora_B.weight            [out, rank]
//! base_model.model.<module>.lora_B.bias              [out]        lora_bias
//! base_model.model.<module>.lora_magnitude_vector    [out]        use_dora
//! base_model.model.<module>.base_layer.bias          [out]        bias = lora_only or all, adapted layers
//! base_model.model.<name>                                         bias = all, other biases; modules_to_save
//! ```
//!
//! Source: PEFT 0.21, `get_peft_model_state_dict` in `utils/save_and_load.py`.

use super::target::Matcher;
use super::{BiasTraining, LoraConfig};
use crate::nn::{
    adapter_tensor_name, check_settable, is_adapter_tensor, refuse_merged, set_values, Adapter,
    ModuleTree, Node, NodeMut, DEFAULT_ADAPTER,
};
use crate::{Error, Result, TensorMismatch};
use candle_core::Tensor;
use safetensors::tensor::TensorInfo;
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};

/// PEFT's prefix of tensor names.
pub(super) const PREFIX: &str = "base_model.model.";

/// How many layers an error lists.
const SHOWN: usize = 3;

/// A tensor of the model that is saved with the adapter.
pub(super) struct Slot {
    /// Its name in the model.
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

/// The part of `path` above its last component, and that component.
pub(super) fn split_last(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

/// Every module that holds the tensor called `name`, outermost first.
pub(super) fn ancestors(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(|(end, _)| &name[..end])
}

/// The key of a tensor of the base model; none if it is not saved with the adapter.
pub(super) fn base_key(
    name: &str,
    is_buffer: bool,
    config: &LoraConfig,
    matcher: &Matcher<'_>,
    is_adapted: impl Fn(&str) -> bool,
) -> Option<String> {
    let (module, leaf) = split_last(name);
    let is_bias = leaf == "bias" && !is_buffer;
    if is_adapted(module) {
        return (is_bias && config.bias != BiasTraining::None)
            .then(|| format!("{PREFIX}{module}.base_layer.bias"));
    }
    let is_saved = ancestors(name).any(|module| matcher.is_saved(module));
    (is_saved || (is_bias && config.bias == BiasTraining::All)).then(|| format!("{PREFIX}{name}"))
}

/// Key, name in the model and tensor of everything that is saved with the adapter called `adapter`.
pub(super) fn saved_tensors(
    model: &dyn ModuleTree,
    adapter: &str,
    config: &LoraConfig,
) -> Result<Vec<(String, String, Tensor)>> {
    let matcher = Matcher::new(config)?;
    let mut adapted = BTreeSet::new();
    let (mut saved, mut differences) = (Vec::new(), Ok(Vec::new()));
    model.visit("", &mut |path, node| {
        let (tensor, is_buffer) = match node {
            Node::Layer(layer) => {
                let own = layer.adapters.get(adapter);
                if let Ok(found) = &mut differences {
                    match difference(&matcher, config, path, (layer.weight, own)) {
                        Ok(difference) => found.extend(difference),
                        Err(error) => differences = Err(error),
                    }
                }
                if let Some(own) = own {
                    adapted.insert(path.to_string());
                    saved.extend(own.tensors().map(|(leaf, tensor)| {
                        let name = adapter_tensor_name(path, adapter, leaf);
                        (format!("{PREFIX}{path}.{leaf}"), name, tensor.clone())
                    }));
                }
                return;
            }
            Node::Parameter(_) if is_adapter_tensor(path) => return,
            Node::Parameter(tensor) => (tensor, false),
            Node::Buffer(tensor) => (tensor, true),
            Node::Fixed | Node::Tied(_) => return,
        };
        let is_adapted = |module: &str| adapted.contains(module);
        if let Some(key) = base_key(path, is_buffer, config, &matcher, is_adapted) {
            saved.push((key, path.to_string(), tensor.clone()));
        }
    });
    if adapted.is_empty() {
        return Err(match adapter {
            DEFAULT_ADAPTER => {
                Error::config("the model carries no adapter: inject or load one first")
            }
            _ => Error::config(format!("the model carries no adapter called {adapter:?}")),
        });
    }
    let differences = differences?;
    if !differences.is_empty() {
        let shown: Vec<_> = differences.iter().take(SHOWN).map(String::as_str).collect();
        return Err(Error::config(format!(
            "the configuration is not that of the adapter {adapter:?}, {} layers differ: {}",
            differences.len(),
            shown.join("; ")
        )));
    }
    Ok(saved)
}

/// How a layer's adapter differs from the one that `config` describes. With other tensors, a saved adapter does not
/// load; with another scaling it computes something else.
fn difference(
    matcher: &Matcher<'_>,
    config: &LoraConfig,
    path: &str,
    (weight, adapter): (&Tensor, Option<&Adapter>),
) -> Result<Option<String>> {
    let is_target = matcher.is_target(path, weight.rank() == 2)?;
    let Some(adapter) = adapter else {
        return Ok(is_target.then(|| format!("{path} is a target without this adapter")));
    };
    if !is_target {
        return Ok(Some(format!("{path} has this adapter and is no target")));
    }
    let (rank, scaling) = matcher.rank_and_scaling(path)?;
    let described = (rank, scaling, config.use_dora, config.lora_bias);
    let (has_dora, has_bias) = (adapter.magnitude.is_some(), adapter.b_bias.is_some());
    let found = (adapter.rank(), adapter.scaling, has_dora, has_bias);
    let said = |(rank, scaling, dora, bias): (usize, f64, bool, bool)| {
        format!("rank {rank}, scaling {scaling}, use_dora {dora}, lora_bias {bias}")
    };
    Ok((described != found)
        .then(|| format!("{path} has {}, the configuration {}", said(found), said(described))))
}

/// A copy of every tensor that belongs to the adapter of `model`, under PEFT's keys. `config` is the one it was
/// injected with.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::lora::{adapter_state, convert_to_lora, inject, set_adapter_state, LoraConfig};
/// use candle_sam_lora::{module_tree, nn::Linear};
///
/// struct Head {
///     project: Linear,
/// }
/// module_tree!(Head { project });
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let project = Linear::new(Tensor::randn(0f32, 1f32, (6, 8), &Device::Cpu)?, None);
/// let mut head = Head { project };
/// let config = LoraConfig::new(2).target_modules(["project"]).init("pissa"); // wants the feature `decompositions`
/// # if !cfg!(feature = "decompositions") {
/// #     return Ok(());
/// # }
/// inject(&mut head, &config, 0)?;
/// let initial = adapter_state(&head, &config)?;
/// let [a, b] = ["A", "B"].map(|matrix| format!("base_model.model.project.lora_{matrix}.weight"));
/// assert!(initial.keys().eq([&a, &b]));
/// // ... training ...
/// let trained = adapter_state(&head, &config)?;
/// let (plain, tensors) = convert_to_lora(&config, &initial, &trained)?; // PiSSA took its start out of the base
/// assert_eq!((plain.rank, tensors[&a].dims()), (4, &[4, 8][..]));
/// set_adapter_state(&mut head, &config, &initial)?; // back to the start
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - the model carries no adapter, or a merged one;
/// - `config` describes another adapter than the model's.
pub fn adapter_state(
    model: &dyn ModuleTree,
    config: &LoraConfig,
) -> Result<BTreeMap<String, Tensor>> {
    named_adapter_state(model, DEFAULT_ADAPTER, config)
}

/// As [`adapter_state`], of the adapter called `name`.
///
/// [Example](crate::lora::adapter_state)
///
/// # Errors
/// As [`adapter_state`], of the adapter called `name`.
pub fn named_adapter_state(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
) -> Result<BTreeMap<String, Tensor>> {
    refuse_merged(model)?;
    saved_tensors(model, name, config)?
        .into_iter()
        .map(|(key, _, tensor)| Ok((key, tensor.copy()?.detach())))
        .collect()
}

/// Puts `tensors`, as [`adapter_state`] gave them, into a model injected with the same configuration. Variables
/// are overwritten in place, so an optimizer that holds them goes on with the new values.
///
/// [Example](crate::lora::adapter_state)
///
/// # Errors
/// - as [`adapter_state`];
/// - [`Error::Mismatch`] with every missing, surplus and mis-shaped tensor.
///
/// The model is unchanged then.
pub fn set_adapter_state(
    model: &mut dyn ModuleTree,
    config: &LoraConfig,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<()> {
    refuse_merged(model)?;
    let saved = saved_tensors(model, DEFAULT_ADAPTER, config)?;
    let wanted = saved
        .iter()
        .map(|(key, name, tensor)| {
            (key.clone(), Slot { name: name.clone(), shape: tensor.dims().to_vec() })
        })
        .collect();
    check("the adapter state", &wanted, described(tensors))?;
    let values = saved.into_iter().filter_map(|(key, name, _)| Some((name, tensors.get(&key)?)));
    overwrite(model, values.collect())
}

/// Gives tensors of the model new values, in device and dtype of the old ones; variables, and those behind views, in
/// place.
pub(super) fn overwrite(
    model: &mut dyn ModuleTree,
    values: BTreeMap<String, &Tensor>,
) -> Result<()> {
    let mut converted = BTreeMap::new();
    model.visit("", &mut |name, node| {
        let (Node::Parameter(old) | Node::Buffer(old)) = node else { return };
        if let Some(value) = values.get(name) {
            let convert = || Ok(value.to_device(old.device())?.to_dtype(old.dtype())?);
            converted.insert(name.to_string(), check_settable(name, old).and_then(|()| convert()));
        }
    });
    let mut converted = converted
        .into_iter()
        .map(|(name, value)| Ok((name, value?)))
        .collect::<Result<BTreeMap<String, Tensor>>>()?;
    model.visit_mut("", &mut |name, node| {
        let (NodeMut::Parameter(tensor) | NodeMut::Buffer(tensor)) = node else { return Ok(()) };
        converted.remove(name).map_or(Ok(()), |value| set_values(name, tensor, &value))
    })
}

/// Name, shape and dtype of a file's tensors, by its header.
pub(super) fn headers(
    tensors: &BTreeMap<String, TensorInfo>,
) -> impl Iterator<Item = (&str, &[usize], Dtype)> {
    tensors.iter().map(|(key, info)| (key.as_str(), &info.shape[..], info.dtype))
}

/// Name, shape and dtype of tensors in memory.
pub(super) fn described(
    tensors: &BTreeMap<String, Tensor>,
) -> impl Iterator<Item = (&str, &[usize], Dtype)> {
    tensors.iter().map(|(key, tensor)| (key.as_str(), tensor.dims(), tensor.dtype().into()))
}

/// Compares what a model wants with what `source` has, tensors of some name, shape and dtype.
pub(super) fn check<'a>(
    source: &str,
    wanted: &BTreeMap<String, Slot>,
    found: impl Iterator<Item = (&'a str, &'a [usize], Dtype)>,
) -> Result<()> {
    let found: BTreeMap<&str, _> = found.map(|(key, shape, dtype)| (key, (shape, dtype))).collect();
    let mut mismatch = TensorMismatch { source: source.to_string(), ..Default::default() };
    for (key, slot) in wanted {
        match found.get(key.as_str()) {
            None => mismatch.missing.push(key.clone()),
            Some((shape, _)) if *shape != slot.shape => {
                mismatch.misshaped.push((key.clone(), slot.shape.clone(), shape.to_vec()))
            }
            Some(_) => {}
        }
    }
    let surplus = found.keys().filter(|key| !wanted.contains_key(**key));
    mismatch.surplus.extend(surplus.map(|key| key.to_string()));
    if !mismatch.is_empty() {
        return Err(Error::Mismatch(mismatch.into()));
    }
    for (key, (_, dtype)) in found {
        if !matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) {
            return Err(Error::file(
                source,
                format!("tensor {key}: expected floating point, got {dtype:?}"),
            ));
        }
    }
    Ok(())
}
