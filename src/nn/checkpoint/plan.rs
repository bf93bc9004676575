//! Which tensor of a file gives each tensor of a model, by headers alone.

use super::names::{matches, Names, Part};
use super::place::{Place, Spellings};
use super::source::{is_shard, Source};
use crate::nn::{check_settable, is_adapter_tensor, refuse_int8, refuse_twins, ModuleTree, Node};
use crate::{Error, Result, TensorMismatch};
use candle_core::{DType, Device};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};

/// A tensor the model wants.
#[derive(Clone)]
pub(super) struct Target {
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub device: Device,
}

/// Where the value of one tensor of the model comes from, by names of the file.
pub(super) enum Origin {
    /// A tensor of the file.
    Whole(String),
    /// A block of rows of a fused tensor, by its index.
    Part(String, usize),
    /// Tensors to be fused.
    Fused(Vec<String>),
}

/// The tensors of the model, adapters left out.
pub(super) fn targets(model: &dyn ModuleTree, root: &str) -> Result<BTreeMap<String, Target>> {
    refuse_int8(model, "loaded anew")?;
    refuse_twins(model)?;
    let mut targets = BTreeMap::new();
    let (mut merged, mut settable) = (None, Ok(()));
    model.visit(root, &mut |name, node| match node {
        Node::Parameter(tensor) | Node::Buffer(tensor) if !is_adapter_tensor(name) => {
            let (shape, dtype) = (tensor.dims().to_vec(), tensor.dtype());
            let target = Target { shape, dtype, device: tensor.device().clone() };
            targets.insert(name.to_string(), target);
            if settable.is_ok() {
                settable = check_settable(name, tensor);
            }
        }
        Node::Layer(layer) if layer.adapters.unmerged.is_some() => merged = Some(name.to_string()),
        _ => {}
    });
    match merged {
        Some(name) => Err(Error::config(format!(
            "{name} has a merged adapter; unmerge it before loading other weights"
        ))),
        None => settable.map(|()| targets),
    }
}

/// The wanted tensors as spellings.
pub(super) fn spellings(names: &Names, targets: &BTreeMap<String, Target>) -> Spellings {
    Spellings::new(names, targets.keys().map(String::as_str))
}

/// A file's tensors that belong to a model, by their names in its tree.
pub(super) struct Available {
    /// Name in the tree and name in the file, without that of a tied parameter.
    pub tensors: BTreeMap<String, String>,
    /// The file's name of the shared tensor, see [`Names::tied`].
    pub shared: Option<String>,
    /// The file's name of the tied parameter; none where the file holds the shared tensor alone.
    pub own: Option<String>,
}

/// Brings the names of a file at `place` to the tree's. Where the model is a `part`, only this part's tensors are
/// available.
pub(super) fn available(
    source: &Source,
    names: &Names,
    part: Option<&str>,
    targets: &BTreeMap<String, Target>,
    (place, places): (&Place, &[Place]),
) -> Result<Available> {
    let (in_file, inside) = place.inside(source, names, places);
    let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
    let (shared_name, own_name) = names.tied.unzip();
    let mut tensors: BTreeMap<String, String> = BTreeMap::new();
    let (mut shared, mut own) = (None, None);
    for (name, in_file) in names.to_tree(&inside).into_iter().zip(in_file) {
        match Some(name.as_str()) {
            known if known == shared_name => shared = Some(in_file.to_string()),
            known if known == own_name => own = Some(in_file.to_string()),
            _ => {}
        }
        let foreign = names.is_ignored(&name) && !targets.contains_key(&name);
        if foreign || part.is_some_and(|part| name.split('.').next() != Some(part)) {
            continue;
        }
        if let Some(twin) = tensors.insert(name.clone(), in_file.to_string()) {
            let message = format!("{twin} and {in_file} are both {name}");
            return Err(Error::file(&source.path, message));
        }
    }
    if let Some((shared_name, own_name)) = names.tied {
        tensors.remove(own_name);
        if shared.is_none() {
            shared = own.take();
            let value = shared.clone().filter(|_| part.is_none());
            tensors.extend(value.map(|value| (shared_name.to_string(), value)));
        }
        if targets.contains_key(own_name) {
            let value = own.as_ref().or(shared.as_ref());
            tensors.extend(value.map(|value| (own_name.to_string(), value.clone())));
        }
    }
    Ok(Available { tensors, shared, own })
}

/// Matches what the model wants with what the file has, by headers alone.
pub(super) fn plan(
    source: &Source,
    names: &Names,
    targets: &BTreeMap<String, Target>,
    available: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Origin>> {
    let mut plan = BTreeMap::new();
    let mut used = BTreeSet::new();
    let mut misshaped = BTreeSet::new();
    let mut missing = Vec::new();
    let mut check = |name: &str, in_file: &str, expected: Vec<usize>| -> Result<()> {
        let found = &source.info(in_file)?.shape;
        used.insert(name.to_string());
        if *found != expected {
            misshaped.insert((name.to_string(), expected, found.clone()));
        }
        Ok(())
    };
    for (name, target) in targets {
        let fused = names.fused_name(name).and_then(|(fused, index, count)| {
            available.get(&fused).map(|in_file| (fused, in_file, index, count))
        });
        let split =
            names.split_names(name).filter(|parts| parts.iter().any(|n| available.contains_key(n)));
        let rows = target.shape.first().copied().unwrap_or(0);
        let with_rows = |rows: usize| {
            let rest = target.shape.iter().skip(1).copied();
            std::iter::once(rows).chain(rest).collect::<Vec<_>>()
        };
        if let Some(in_file) = available.get(name) {
            check(name, in_file, target.shape.clone())?;
            plan.insert(name.clone(), Origin::Whole(in_file.clone()));
        } else if let Some((fused, in_file, index, count)) = fused {
            check(&fused, in_file, with_rows(count * rows))?;
            plan.insert(name.clone(), Origin::Part(in_file.clone(), index));
        } else if let Some(parts) = split {
            let mut origins = Vec::new();
            let part_rows = rows / parts.len();
            for part in parts {
                match available.get(&part) {
                    Some(in_file) => {
                        check(&part, in_file, with_rows(part_rows))?;
                        origins.push(in_file.clone());
                    }
                    None => missing.push(part),
                }
            }
            plan.insert(name.clone(), Origin::Fused(origins));
        } else {
            missing.push(name.clone());
        }
    }
    // A dict without any tensor of the model is another thing: the state of an optimizer, a loss.
    let containers: BTreeSet<u32> = (available.iter())
        .filter(|(name, _)| used.contains(*name))
        .map(|(_, in_file)| source.container(in_file))
        .collect();
    let surplus = available.iter().filter(|(name, in_file)| {
        !used.contains(*name) && containers.contains(&source.container(in_file))
    });
    let surplus: Vec<String> = surplus.map(|(_, in_file)| in_file.clone()).collect();
    let mismatch = TensorMismatch {
        source: source.path.display().to_string(),
        note: note(source, names, targets, (&missing, &surplus)),
        missing,
        surplus,
        misshaped: misshaped.into_iter().collect(),
    };
    if !mismatch.is_empty() {
        return Err(Error::Mismatch(mismatch.into()));
    }
    let wanted = available.iter().filter(|(name, _)| used.contains(*name));
    let wrong = wanted.filter_map(|(_, in_file)| match source.info(in_file).ok()?.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => None,
        dtype => Some(format!("{in_file} ({dtype:?})")),
    });
    match wrong.collect::<Vec<_>>() {
        wrong if wrong.is_empty() => Ok(plan),
        wrong => Err(Error::file(
            &source.path,
            format!("expected f32, f16, bf16 or f64, found {}", wrong.join(", ")),
        )),
    }
}

/// The first of the tensors that are not read, each with its kind.
pub(super) fn shown_unread(unread: &BTreeMap<String, String>) -> String {
    const SHOWN: usize = 3;
    let first = unread.iter().take(SHOWN).map(|(name, kind)| format!("{name} ({kind})"));
    let more = if unread.len() > SHOWN { ", .." } else { "" };
    format!("{}{more}", first.collect::<Vec<_>>().join(", "))
}

/// Which related model has tensors of these names, if one has.
pub(super) fn relative(names: &Names, in_file: &[impl AsRef<str>]) -> Option<String> {
    let has = |pattern: &str| in_file.iter().any(|name| matches(name.as_ref(), pattern));
    let (_, what) = names.relatives.iter().find(|(pattern, _)| has(pattern))?;
    Some(format!("it is a checkpoint of {what}"))
}

/// Why a file differs in this way, if that can be told.
fn note(
    source: &Source,
    names: &Names,
    targets: &BTreeMap<String, Target>,
    (missing, surplus): (&[String], &[String]),
) -> Option<String> {
    if !missing.is_empty() && !source.unread.is_empty() {
        let unread = shown_unread(&source.unread);
        return Some(format!("it holds tensors of kinds that are not read: {unread}"));
    }
    let name = source.path.file_name().map(|name| name.to_string_lossy());
    if source.files.len() == 1 && name.is_some_and(|name| is_shard(&name)) {
        return Some("it is one part of a checkpoint: name the folder, or the index".into());
    }
    let relative = relative(names, surplus);
    if relative.is_some() {
        return relative;
    }
    let in_part = |name: &str, part: &Part| name.split('.').next() == Some(part.path);
    let is_missing = |part: &&Part| {
        let mut wanted = targets.keys().filter(|name| in_part(name, part)).peekable();
        let found = missing.iter().filter(|name| in_part(name, part)).count();
        wanted.peek().is_some() && found > 0 && 2 * found >= wanted.count()
    };
    let lacking: Vec<&str> = names.parts.iter().filter(is_missing).map(|part| part.path).collect();
    match lacking.len() {
        0 => None,
        all if all == names.parts.len() => Some("it holds no part of this model".into()),
        _ => Some(format!("it holds a part of the model, without {}", lacking.join(" and "))),
    }
}
