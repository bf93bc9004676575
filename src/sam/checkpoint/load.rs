//! Loading a checkpoint into a model.
//!
//! First only headers are read: names are brought to one naming, every tensor the model wants is matched with the
//! tensor of the file that gives it, and all that does not fit is reported at once. Then each tensor is read, cast
//! and looked through; the model changes only after the last one, and not at all if anything fails.

use super::names::{PROMPT_EMBEDDING, SHARED_EMBEDDING};
use super::source::Source;
use super::{fused_name, root, split_names, to_hugging_face};
use crate::nn::{check_settable, is_adapter_tensor, set_values, Fixed, ModuleTree, Node, NodeMut};
use crate::{Error, Result, TensorMismatch};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// A tensor the model wants.
#[derive(Clone)]
struct Target {
    shape: Vec<usize>,
    dtype: DType,
    device: Device,
}

/// Where the value of one tensor of the model comes from, by names of the file.
enum Origin {
    /// A tensor of the file.
    Whole(String),
    /// One third of the rows of a fused tensor: 0 is q, 1 is k, 2 is v.
    Third(String, usize),
    /// q, k and v, to be fused.
    Fused(Vec<String>),
}

/// What files of SAM hold besides a SAM: constants of the image processor, and DeepSeek-OCR's compressor, which only a
/// [`DeepSeekOcrEncoder`](crate::sam::DeepSeekOcrEncoder) wants.
const FOREIGN: [&str; 4] =
    ["pixel_mean", "pixel_std", "vision_encoder.net_2.weight", "vision_encoder.net_3.weight"];

/// Fills `model` from a checkpoint: a `.safetensors` file, an index of several, or a folder with either.
///
/// Reads Hugging Face's and the original naming, also below a prefix such as `model.`; f32, f16, bf16 and f64, cast to
/// the model's dtype; `qkv` fused or split, whichever way the model has it. An image encoder, prompt encoder or mask
/// decoder alone, bare or in a [`SamVisionModel`](crate::sam::SamVisionModel), takes its part of a whole SAM. From SAMed's
/// and micro-sam's files it takes all but the adapters. Parameters that are variables, or views of one, stay so with new
/// values in place; adapters stay as they are, and must not be merged.
///
/// # Errors
/// [`Error::Mismatch`] lists every missing, surplus and mis-shaped tensor. Other errors: a file that is unreadable
/// or inconsistent, a tensor that is not floating point or holds NaN or infinity, a parameter that is computed from a
/// variable. The model is then unchanged.
pub fn load(model: &mut dyn ModuleTree, path: impl AsRef<Path>) -> Result<()> {
    let source = Source::open(path.as_ref())?;
    let root = root(model);
    let mut targets = targets(model, root)?;
    let part = only_part(&targets).map(str::to_string);
    let (mut available, features) = hugging_face_names(&source, part.as_deref())?;
    if targets.contains_key(PROMPT_EMBEDDING) {
        let prompts = features.prompts.as_ref().or(features.image.as_ref());
        available.extend(prompts.map(|prompts| (PROMPT_EMBEDDING.to_string(), prompts.clone())));
    }
    available.retain(|name, _| targets.contains_key(name) || !FOREIGN.contains(&name.as_str()));
    let mut origins = plan(&source, &targets, &available)?;
    if let Features { image: Some(image), prompts: Some(prompts) } = features {
        let tied = has_tie(model, root);
        let wanted = (part.is_none() || tied) && !targets.contains_key(PROMPT_EMBEDDING);
        if wanted && !equal(&source, &image, &prompts)? {
            // As in transformers, the prompts get features of their own.
            let target = targets.get(SHARED_EMBEDDING).filter(|_| tied).cloned();
            let target = target.ok_or_else(|| {
                let message =
                    format!("{image} and {prompts} are one tensor in this model, but differ here");
                Error::file(&source.path, message)
            })?;
            targets.insert(PROMPT_EMBEDDING.to_string(), target);
            available.insert(PROMPT_EMBEDDING.to_string(), prompts);
            origins = plan(&source, &targets, &available)?;
        }
    }
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
    })
}

/// The shape of the tensor with this name, or this name below a prefix, by a checkpoint's headers alone.
pub(in crate::sam) fn shape_of(path: &Path, name: &str) -> Result<Vec<usize>> {
    let source = Source::open(path)?;
    let below = format!(".{name}");
    let found: Vec<&str> =
        source.names().into_iter().filter(|n| *n == name || n.ends_with(&below)).collect();
    match found[..] {
        [found] => Ok(source.info(found)?.shape.clone()),
        [] => Err(Error::file(path, format!("has no tensor {name}"))),
        _ => Err(Error::file(path, format!("has several tensors {name}: {}", found.join(", ")))),
    }
}

/// The tensors of the model, adapters left out.
fn targets(model: &dyn ModuleTree, root: &str) -> Result<BTreeMap<String, Target>> {
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

/// Whether the prompts have the image's position features and could have their own.
fn has_tie(model: &dyn ModuleTree, root: &str) -> bool {
    let mut found = false;
    model.visit(root, &mut |name, node| {
        found |= matches!(node, Node::Tied(_)) && name == PROMPT_EMBEDDING;
    });
    found
}

/// How the names of a file begin.
struct Layout<'a> {
    /// Comes before every name of the model; what lacks it belongs to something else.
    prefix: &'a str,
    /// To be put before every name, where the file holds an image encoder alone.
    part: &'a str,
}

/// The patch embedding, which every SAM has, tells how the names of a file begin.
fn layout<'a>(names: &[&'a str]) -> Layout<'a> {
    const PATCHES: [(&str, &str); 2] = [
        ("patch_embed.projection.weight", "vision_encoder."),
        ("patch_embed.proj.weight", "image_encoder."),
    ];
    for name in names {
        for (end, part) in PATCHES {
            match name.strip_suffix(end).map(|before| (before, before.strip_suffix(part))) {
                Some((_, Some(prefix))) => return Layout { prefix, part: "" },
                Some((prefix, None)) => return Layout { prefix, part },
                None => {}
            }
        }
    }
    Layout { prefix: "", part: "" }
}

/// Whether a tensor is one of the low-rank matrices that SAMed and micro-sam save among those of the model.
fn is_low_rank(name: &str) -> bool {
    let Some((_, layer)) = name.strip_suffix(".weight").and_then(|name| name.rsplit_once('.'))
    else {
        return false;
    };
    ["w_a_linear_", "w_b_linear_", "linear_a_", "linear_b_"]
        .iter()
        .any(|start| layer.starts_with(start))
}

/// The name of a tensor without those of the modules that SAMed and micro-sam wrap around layers they adapt.
fn unwrapped(name: &str) -> String {
    const WRAPPED: [(&str, &str); 3] = [
        (".attn.qkv.qkv_proj.", ".attn.qkv."),
        (".attn.qkv.qkv.", ".attn.qkv."),
        (".mlp.mlp_layer.", ".mlp."),
    ];
    WRAPPED.iter().fold(name.to_string(), |name, (wrapped, plain)| name.replace(wrapped, plain))
}

/// The part of a SAM, as `vision_encoder`, that all names of a model begin with, if there is one.
fn only_part(targets: &BTreeMap<String, Target>) -> Option<&str> {
    let mut parts = targets.keys().filter_map(|name| Some(name.split_once('.')?.0));
    let first = parts.next()?;
    parts.all(|part| part == first).then_some(first)
}

/// The position features in a file, which may come under either name or both.
struct Features {
    image: Option<String>,
    /// None where they are the image's.
    prompts: Option<String>,
}

/// The file's tensors by Hugging Face name, without the position features of prompts; of a model that is one `part` of a
/// SAM, those of this part.
fn hugging_face_names(
    source: &Source,
    part_of_sam: Option<&str>,
) -> Result<(BTreeMap<String, String>, Features)> {
    let all = source.names();
    let Layout { prefix, part } = layout(&all);
    let (in_file, inside): (Vec<&str>, Vec<String>) = all
        .iter()
        .filter(|name| !is_low_rank(name))
        .filter_map(|name| {
            Some((*name, format!("{part}{}", unwrapped(name.strip_prefix(prefix)?))))
        })
        .unzip();
    let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let mut features = Features { image: None, prompts: None };
    for (name, in_file) in to_hugging_face(&inside).into_iter().zip(in_file) {
        match name.as_str() {
            SHARED_EMBEDDING => features.image = Some(in_file.to_string()),
            PROMPT_EMBEDDING => features.prompts = Some(in_file.to_string()),
            _ => {}
        }
        if part_of_sam.is_some_and(|part| name.split('.').next() != Some(part)) {
            continue;
        }
        if let Some(twin) = names.insert(name.clone(), in_file.to_string()) {
            let message = format!("{twin} and {in_file} are both {name}");
            return Err(Error::file(&source.path, message));
        }
    }
    names.remove(PROMPT_EMBEDDING);
    if features.image.is_none() {
        features.image = features.prompts.take();
        let image = features.image.clone().filter(|_| part_of_sam.is_none());
        names.extend(image.map(|image| (SHARED_EMBEDDING.to_string(), image)));
    }
    Ok((names, features))
}

/// Whether two tensors of the file have the same shape and hold the same values.
fn equal(source: &Source, a: &str, b: &str) -> Result<bool> {
    let values = |name: &str| -> Result<Vec<f32>> {
        let tensor = source.read(name, &Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    };
    Ok(source.info(a)?.shape == source.info(b)?.shape && values(a)? == values(b)?)
}

/// Matches what the model wants with what the file has, by headers alone.
fn plan(
    source: &Source,
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
        let fused = fused_name(name).and_then(|(fused, third)| {
            available.get(&fused).map(|in_file| (fused, in_file, third))
        });
        let split =
            split_names(name).filter(|names| names.iter().any(|n| available.contains_key(n)));
        let rows = target.shape.first().copied().unwrap_or(0);
        let with_rows = |rows: usize| {
            let rest = target.shape.iter().skip(1).copied();
            std::iter::once(rows).chain(rest).collect::<Vec<_>>()
        };
        if let Some(in_file) = available.get(name) {
            check(name, in_file, target.shape.clone())?;
            plan.insert(name.clone(), Origin::Whole(in_file.clone()));
        } else if let Some((fused, in_file, third)) = fused {
            check(&fused, in_file, with_rows(3 * rows))?;
            plan.insert(name.clone(), Origin::Third(in_file.clone(), third));
        } else if let Some(names) = split {
            let mut parts = Vec::new();
            for part in names {
                match available.get(&part) {
                    Some(in_file) => {
                        check(&part, in_file, with_rows(rows / 3))?;
                        parts.push(in_file.clone());
                    }
                    None => missing.push(part),
                }
            }
            plan.insert(name.clone(), Origin::Fused(parts));
        } else {
            missing.push(name.clone());
        }
    }
    let surplus = available.iter().filter(|(name, _)| !used.contains(*name));
    let mismatch = TensorMismatch {
        source: source.path.display().to_string(),
        missing,
        surplus: surplus.map(|(_, in_file)| in_file.clone()).collect(),
        misshaped: misshaped.into_iter().collect(),
    };
    if !mismatch.is_empty() {
        return Err(Error::Mismatch(mismatch));
    }
    let wrong = available.values().filter_map(|in_file| match source.info(in_file).ok()?.dtype {
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
    // q, k and v are views of the same fused tensor, which is read once.
    let mut fused: HashMap<&String, Tensor> = HashMap::new();
    for (name, origin) in plan {
        let Some(target) = targets.get(name) else { continue };
        let tensor = match origin {
            Origin::Whole(in_file) => get(in_file, target)?,
            Origin::Third(in_file, third) => {
                if !fused.contains_key(in_file) {
                    fused.insert(in_file, get(in_file, target)?);
                }
                let Some(whole) = fused.get(in_file) else { continue };
                let rows = target.shape.first().copied().unwrap_or(0);
                let view = whole.narrow(0, third * rows, rows)?;
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
fn all_finite(tensor: &Tensor) -> bool {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => values.iter().all(|v| v.is_finite()),
        Storage::Cpu(CpuStorage::F64(values)) => values.iter().all(|v| v.is_finite()),
        Storage::Cpu(CpuStorage::F16(values)) => values.iter().all(|v| v.is_finite()),
        Storage::Cpu(CpuStorage::BF16(values)) => values.iter().all(|v| v.is_finite()),
        _ => true,
    }
}
