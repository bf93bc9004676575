//! Writing a model as a checkpoint other tools read.

use super::{fused_name, root, split_names, to_original, Naming};
use crate::nn::{is_adapter_tensor, ModuleTree, Node};
use crate::sam::SamConfig;
use crate::{files, Error, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Writes every parameter and buffer of `model` to one safetensors file, q, k and v fused into `qkv`, in the model's
/// dtype or in `dtype`.
///
/// Adapters are left out: what is written is the base model, or, where adapters are merged, the merged one. A file
/// that is already there is replaced only by a complete one.
///
/// # Errors
/// - the file cannot be written;
/// - the prompts have position features of their own, and the original naming has one name for theirs and the image's.
pub fn save(
    model: &dyn ModuleTree,
    path: impl AsRef<Path>,
    naming: Naming,
    dtype: Option<DType>,
) -> Result<()> {
    let mut split = BTreeMap::new();
    model.visit(root(model), &mut |name, node| {
        if let Node::Parameter(tensor) | Node::Buffer(tensor) = node {
            if !is_adapter_tensor(name) {
                split.insert(name.to_string(), tensor.clone());
            }
        }
    });
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &split {
        let fused = fused_name(name).map(|(fused, _)| fused);
        if fused.as_ref().is_some_and(|fused| tensors.contains_key(fused)) {
            continue;
        }
        let whole = fused.as_ref().map_or(Ok(None), |fused| fuse(&split, fused))?;
        let (name, tensor) = match (fused, whole) {
            (Some(fused), Some(whole)) => (fused, whole),
            _ => (name.clone(), tensor.clone()),
        };
        tensors.insert(name, tensor.to_dtype(dtype.unwrap_or(tensor.dtype()))?);
    }
    if naming == Naming::Original {
        let names: Vec<&str> = tensors.keys().map(String::as_str).collect();
        let mut named: BTreeMap<String, (&str, Tensor)> = BTreeMap::new();
        for ((original, name), tensor) in
            to_original(&names).into_iter().zip(names).zip(tensors.values())
        {
            if let Some((twin, value)) = named.get(&original) {
                if !equal(value, tensor)? {
                    return Err(Error::config(format!(
                        "the original naming has one name, {original}, for {twin} and {name}, which differ here"
                    )));
                }
            }
            named.insert(original, (name, tensor.clone()));
        }
        tensors = named.into_iter().map(|(original, (_, tensor))| (original, tensor)).collect();
    }
    files::write_tensors(path.as_ref(), &tensors)
}

/// Whether two tensors of one shape hold the same values.
fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
    Ok(values(a)? == values(b)?)
}

/// q, k and v as one tensor, if all three are there and of one shape.
fn fuse(split: &BTreeMap<String, Tensor>, fused: &str) -> Result<Option<Tensor>> {
    let parts: Option<Vec<&Tensor>> =
        split_names(fused).and_then(|names| names.iter().map(|name| split.get(name)).collect());
    match parts {
        Some(parts) if parts.iter().all(|part| part.dims() == parts[0].dims()) => {
            Ok(Some(Tensor::cat(&parts, 0)?))
        }
        _ => Ok(None),
    }
}

/// Writes `model.safetensors` and `config.json` into a folder, as Hugging Face's `save_pretrained` does; the folder
/// is made where there is none.
pub fn save_pretrained(
    model: &dyn ModuleTree,
    config: &SamConfig,
    folder: impl AsRef<Path>,
) -> Result<()> {
    let folder = folder.as_ref();
    let json = config.to_json()?;
    files::create_dir(folder)?;
    save(model, folder.join("model.safetensors"), Naming::HuggingFace, None)?;
    files::write_atomic(folder.join("config.json"), |file| file.write_all(json.as_bytes()))
}
