//! Loading a checkpoint into a model.
//!
//! First only headers are read, and names are brought to one naming. Every tensor of the model is matched with a tensor
//! of the file, and all mismatches are reported at once. Then each tensor is read, cast and looked through; the model
//! changes only after the last one, and not at all if anything fails.

use super::loaded::Loaded;
use super::names::Names;
use super::place::{quoted, Place};
use super::plan::{available, plan, spellings, targets, Available, Origin, Target};
use super::source::Source;
use crate::nn::{set_values, Fixed, ModuleTree, Node, NodeMut};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// The most places in a file that are compared with the model.
const MAX_PLACES: usize = 16;

/// Fills `model` from a checkpoint: a file of safetensors or of `torch.save`, an index of several, or a folder with
/// either.
///
/// The model may lie below a prefix or in a dict of the file, as `model` or `state_dict`; the result says where it was
/// found. `FILE#PREFIX` names one of several models in a file. Tensors of f32, f16, bf16 and f64 are cast to the
/// model's dtype. Parameters that are variables, or views of one, stay so with new values in place. Adapters stay as
/// they are, and must not be merged. `names` says which tensors are fused, renamed and ignored.
///
/// [Example](crate::nn::checkpoint)
///
/// # Errors
/// The model is unchanged after an error:
/// - [`Error::Mismatch`] lists every missing, surplus and mis-shaped tensor;
/// - the model fits below several prefixes, as a teacher and a student in one file;
/// - a file is unreadable or inconsistent;
/// - a tensor is not floating point, or holds NaN or infinity;
/// - a parameter is computed from a variable;
/// - an adapter is merged;
/// - a weight is in int8;
/// - two tensors of the model have one name.
pub fn load(model: &mut dyn ModuleTree, path: impl AsRef<Path>, names: &Names) -> Result<Loaded> {
    let source = Source::open(path.as_ref())?;
    let root = names.root(model);
    let mut targets = targets(model, root)?;
    let part = only_part(names, &targets);
    let places = spellings(names, &targets).places(&source, names);
    let Choice { place, others, available, mut origins } =
        choose(&source, names, part, &targets, &places)?;
    let Available { mut tensors, shared, own } = available;
    if let (Some((shared_name, own_name)), Some(shared), Some(own)) = (names.tied, shared, own) {
        let tied = has_tie(model, root, own_name);
        let wanted = (part.is_none() || tied) && !targets.contains_key(own_name);
        if wanted && !equal(&source, &shared, &own)? {
            // As in transformers, the tied parameter gets a value of its own.
            let target = targets.get(shared_name).filter(|_| tied).cloned();
            let target = target.ok_or_else(|| {
                let message =
                    format!("{shared} and {own} are one tensor in this model, but differ here");
                Error::file(&source.path, message)
            })?;
            targets.insert(own_name.to_string(), target);
            tensors.insert(own_name.to_string(), own);
            origins = plan(&source, names, &targets, &tensors)?;
        }
    }
    let loaded = Loaded::new(&source, &place, &others, &origins);
    let mut tensors = read(&source, &targets, &origins)?;
    model.visit_mut(root, &mut |name, node| {
        match node {
            NodeMut::Parameter(tensor) | NodeMut::Buffer(tensor) => {
                if let Some(value) = tensors.remove(name) {
                    set_values(name, tensor, &value)?;
                }
            }
            NodeMut::Tied(own) => *own = tensors.remove(name).map(Fixed),
            NodeMut::Layer(_) => {}
        }
        Ok(())
    })?;
    Ok(loaded)
}

/// The place in a file that a model is read from.
struct Choice {
    place: Place,
    /// Prefixes of other places where the model fits.
    others: Vec<String>,
    available: Available,
    origins: BTreeMap<String, Origin>,
}

/// The one place where the whole model fits; of several, the one without a prefix.
fn choose(
    source: &Source,
    names: &Names,
    part: Option<&str>,
    targets: &BTreeMap<String, Target>,
    places: &[Place],
) -> Result<Choice> {
    let mut fitting: Vec<Choice> = Vec::new();
    let mut error = None;
    for place in Place::meant(source, places)?.into_iter().take(MAX_PLACES) {
        let available = available(source, names, part, targets, (place, places))?;
        match plan(source, names, targets, &available.tensors) {
            Ok(origins) => {
                let place = place.clone();
                fitting.push(Choice { place, others: vec![], available, origins });
            }
            Err(e) => drop(error.get_or_insert(e)),
        }
    }
    let prefixes: Vec<String> = fitting.iter().map(|choice| choice.place.prefix.clone()).collect();
    let bare = prefixes.iter().position(String::is_empty);
    match (bare, fitting.len(), error) {
        (None, 0, Some(error)) => Err(error),
        (None, 2.., _) => Err(Error::file(
            &source.path,
            format!(
                "holds {} models that fit, below {}: name one behind the file, as {}",
                prefixes.len(),
                quoted(prefixes.iter()),
                with_prefix(&source.path, prefixes.first().map_or("", String::as_str))
            ),
        )),
        _ => {
            let choice = fitting.into_iter().nth(bare.unwrap_or(0));
            let mut choice = choice.ok_or_else(|| Error::file(&source.path, "holds no tensor"))?;
            choice.others = prefixes.into_iter().filter(|p| *p != choice.place.prefix).collect();
            Ok(choice)
        }
    }
}

/// The way to name one of the models in a file.
pub(crate) fn with_prefix(path: &Path, prefix: &str) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    format!("{name}#{}", prefix.strip_suffix('.').unwrap_or(prefix))
}

/// The part of the whole model that all names begin with, if there is one.
fn only_part(names: &Names, targets: &BTreeMap<String, Target>) -> Option<&'static str> {
    let first = |name: &String| name.split_once('.').map(|(first, _)| first.to_string());
    let path = first(targets.keys().next()?)?;
    let part = names.parts.iter().find(|part| part.path == path)?;
    targets.keys().all(|name| first(name).as_ref() == Some(&path)).then_some(part.path)
}

/// Whether the parameter called `name` is tied and could have a value of its own.
fn has_tie(model: &dyn ModuleTree, root: &str, name: &str) -> bool {
    let mut found = false;
    model.visit(root, &mut |path, node| {
        found |= matches!(node, Node::Tied(_)) && path == name;
    });
    found
}

/// Whether two tensors of the file have the same shape and hold the same values.
fn equal(source: &Source, a: &str, b: &str) -> Result<bool> {
    let values = |name: &str| -> Result<Vec<f32>> {
        let tensor = source.read(name, &Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    };
    Ok(source.info(a)?.shape == source.info(b)?.shape && values(a)? == values(b)?)
}

/// Reads every tensor of the plan in its target's dtype, on its target's device.
fn read(
    source: &Source,
    targets: &BTreeMap<String, Target>,
    plan: &BTreeMap<String, Origin>,
) -> Result<HashMap<String, Tensor>> {
    let mut bad = BTreeSet::new();
    let mut get = |in_file: &str, target: &Target| -> Result<Tensor> {
        let tensor = source.read(in_file, &Device::Cpu)?;
        let cast = tensor.to_dtype(target.dtype)?;
        if !all_finite(&tensor) {
            bad.insert(format!("{in_file} has NaN or infinite values"));
        } else if !all_finite(&cast) {
            bad.insert(format!("{in_file} has values too large for {:?}", target.dtype));
        }
        Ok(cast.to_device(&target.device)?)
    };
    let mut tensors = HashMap::new();
    // A fused tensor is read once; its parts are views.
    let mut fused: HashMap<&String, Tensor> = HashMap::new();
    for (name, origin) in plan {
        let Some(target) = targets.get(name) else { continue };
        let tensor = match origin {
            Origin::Whole(in_file) => get(in_file, target)?.reshape(target.shape.as_slice())?,
            Origin::Part(in_file, index) => {
                if !fused.contains_key(in_file) {
                    fused.insert(in_file, get(in_file, target)?);
                }
                let Some(whole) = fused.get(in_file) else { continue };
                let rows = target.shape.first().copied().unwrap_or(0);
                let view = whole.narrow(0, index * rows, rows)?;
                view.to_dtype(target.dtype)?.to_device(&target.device)?
            }
            Origin::Fused(parts) => {
                let parts: Vec<Tensor> =
                    parts.iter().map(|part| get(part, target)).collect::<Result<_>>()?;
                Tensor::cat(&parts, 0)?
            }
        };
        tensors.insert(name.clone(), tensor);
    }
    if bad.is_empty() {
        Ok(tensors)
    } else {
        let bad: Vec<String> = bad.into_iter().collect();
        Err(Error::file(&source.path, bad.join("; ")))
    }
}

/// Whether a tensor that fills its storage on the CPU holds neither NaN nor infinity.
pub(crate) fn all_finite(tensor: &Tensor) -> bool {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => values.iter().all(|v| v.is_finite()),
        Storage::Cpu(CpuStorage::F64(values)) => values.iter().all(|v| v.is_finite()),
        Storage::Cpu(CpuStorage::F16(values)) => values.iter().all(|v| v.is_finite()),
        Storage::Cpu(CpuStorage::BF16(values)) => values.iter().all(|v| v.is_finite()),
        _ => true,
    }
}
