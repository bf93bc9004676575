//! Writing a model as a checkpoint other tools read.

use super::names::Names;
use crate::nn::{is_adapter_tensor, refuse_int8, refuse_twins, ModuleTree, Node};
use crate::{files, Error, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Writes every parameter and buffer of `model` to one safetensors file, in the model's dtype or in `dtype`, fused and
/// renamed as `names` says.
///
/// Adapters are left out: the file holds the base model, or, where adapters are merged, the merged one. An existing
/// file is replaced only by a complete one.
///
/// [Example](crate::nn::checkpoint)
///
/// # Errors
/// - a weight is in int8;
/// - the file cannot be written;
/// - two tensors have one name in the model, or one in the file and differ.
pub fn save(
    model: &dyn ModuleTree,
    path: impl AsRef<Path>,
    names: &Names,
    dtype: Option<DType>,
) -> Result<()> {
    refuse_int8(model, "saved as a checkpoint")?;
    refuse_twins(model)?;
    let mut split = BTreeMap::new();
    model.visit(names.root(model), &mut |name, node| {
        if let Node::Parameter(tensor) | Node::Buffer(tensor) = node {
            if !is_adapter_tensor(name) {
                split.insert(name.to_string(), tensor.clone());
            }
        }
    });
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &split {
        let fused = names.fused_name(name).map(|(fused, ..)| fused);
        if fused.as_ref().is_some_and(|fused| tensors.contains_key(fused)) {
            continue;
        }
        let whole = fused.as_ref().map_or(Ok(None), |fused| fuse(names, &split, fused))?;
        let (name, tensor) = match (fused, whole) {
            (Some(fused), Some(whole)) => (fused, whole),
            _ => (name.clone(), tensor.clone()),
        };
        tensors.insert(name, tensor.to_dtype(dtype.unwrap_or(tensor.dtype()))?);
    }
    if names.save_renamed {
        let in_tree: Vec<&str> = tensors.keys().map(String::as_str).collect();
        let mut named: BTreeMap<String, (&str, Tensor)> = BTreeMap::new();
        for ((original, name), tensor) in
            names.to_file(&in_tree).into_iter().zip(in_tree).zip(tensors.values())
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

/// The parts of a fused tensor as one, if all are there and of one shape.
fn fuse(names: &Names, split: &BTreeMap<String, Tensor>, fused: &str) -> Result<Option<Tensor>> {
    let parts: Option<Vec<&Tensor>> = names
        .split_names(fused)
        .and_then(|parts| parts.iter().map(|name| split.get(name)).collect());
    match parts {
        Some(parts) if parts.iter().all(|part| part.dims() == parts[0].dims()) => {
            Ok(Some(Tensor::cat(&parts, 0)?))
        }
        _ => Ok(None),
    }
}
