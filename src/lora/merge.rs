//! Folding the active adapters into the weights they adapt, and taking them out again.
//!
//! ```text
//! LoRA   W' = W + scaling B A           b' = b + scaling lora_bias
//! DoRA   W' = g (W + scaling B A)       g = magnitude / || W + scaling B A ||_row
//! ```
//! Several are folded in one after the other; DoRA's norm is that of the original W with the one adapter, as in PEFT.
//! Computed in f32 and rounded once to the dtype of W. The layer keeps W and b as they were, so unmerging is exact.
//! A half-precision W' loses small deltas that the unmerged layer keeps.
//!
//! Source: PEFT 0.21, `merge` in `tuners/lora/layer.py` and `variants.py`.

use crate::nn::{refuse_int8, Adapters, Layer, LayerMut, ModuleTree, Node, NodeMut, Unmerged};
use crate::{Error, Result};
use candle_core::{DType, Tensor, D};
use std::collections::BTreeMap;

/// Weight and bias of `layer` with its active adapters folded in, and the names of these.
fn merged(path: &str, layer: Layer<'_>) -> Result<(Tensor, Option<Tensor>, Vec<String>)> {
    let to_f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
    let base = to_f32(layer.weight)?;
    let mut weight = base.clone();
    let mut bias = layer.bias.map(to_f32).transpose()?;
    let mut names = Vec::new();
    for (name, adapter) in layer.adapters.activated() {
        let delta = adapter.delta()?.detach();
        weight = (weight + &delta)?;
        if let Some(magnitude) = &adapter.magnitude {
            let norm = (&base + &delta)?.flatten_from(1)?.sqr()?.sum(D::Minus1)?.sqrt()?;
            let g = (to_f32(magnitude)?.flatten_all()? / norm)?;
            let mut dims = vec![1; weight.rank()];
            dims[0] = g.elem_count();
            weight = weight.broadcast_mul(&g.reshape(dims)?)?;
        }
        if let Some(lora) = &adapter.b_bias {
            let Some(sum) = bias else {
                return Err(Error::config(format!(
                    "{path}: a LoRA bias cannot be merged into a layer that has no bias"
                )));
            };
            bias = Some((sum + (to_f32(lora)? * adapter.scaling)?)?);
        }
        names.push(name.to_string());
    }
    let changed = layer.adapters.activated().any(|(_, adapter)| adapter.b_bias.is_some());
    let bias = match (bias, layer.bias) {
        (Some(sum), Some(old)) if changed => Some(sum.to_dtype(old.dtype())?),
        (_, old) => old.cloned(),
    };
    Ok((weight.to_dtype(layer.weight.dtype())?, bias, names))
}

/// True when every element is finite: anything else times zero is NaN, and stays so in the sum.
fn is_finite(tensor: &Tensor) -> Result<bool> {
    let zero = (tensor.detach().to_dtype(DType::F32)? * 0.0)?.sum_all()?.to_scalar::<f32>()?;
    Ok(zero == 0.0)
}

fn merge_checked(model: &mut dyn ModuleTree, refuse_non_finite: bool) -> Result<()> {
    refuse_int8(model, "merged with an adapter")?;
    let mut results = Vec::new();
    let (mut has_adapter, mut disabled) = (false, None);
    model.visit("", &mut |path, node| {
        let Node::Layer(layer) = node else { return };
        has_adapter |= layer.adapters.activated().next().is_some();
        if layer.adapters.disabled && !layer.adapters.is_empty() {
            disabled.get_or_insert_with(|| path.to_string());
        }
        if layer.adapters.unmerged.is_none() && layer.adapters.activated().next().is_some() {
            results.push((path.to_string(), merged(path, layer)));
        }
    });
    if let Some(path) = disabled {
        let message = format!("the adapters of {path} are disabled: enable them first");
        return Err(Error::config(message));
    }
    if !has_adapter {
        return Err(Error::config("the model has no adapter in use to merge"));
    }
    let mut new = BTreeMap::new();
    for (path, result) in results {
        let (weight, bias, names) = result?;
        if refuse_non_finite {
            for tensor in std::iter::once(&weight).chain(&bias) {
                if !is_finite(tensor)? {
                    return Err(Error::config(format!(
                        "{path}: merging gives values that are not finite; an adapter of {names:?} seems broken"
                    )));
                }
            }
        }
        new.insert(path, (weight, bias, names));
    }
    model.visit_mut("", &mut |path, node| {
        if let NodeMut::Layer(LayerMut { weight, bias, adapters, .. }) = node {
            if let Some((new_weight, new_bias, names)) = new.remove(path) {
                let weight = std::mem::replace(weight, new_weight);
                let bias = std::mem::replace(bias, new_bias);
                adapters.unmerged = Some(Unmerged { names, weight, bias });
            }
        }
        Ok(())
    })
}

/// Folds the active adapters into their layers' weights and biases; layers already merged stay as they are.
///
/// Merged weights are new tensors: a `VarMap` keeps the base, which [`unmerge`] puts back.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::lora::{inject, merge, unmerge, LoraConfig};
/// use candle_sam_lora::{module_tree, nn::{randomize, Linear, Mode}};
///
/// struct Head {
///     project: Linear,
/// }
/// module_tree!(Head { project });
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let project = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
/// let mut head = Head { project };
/// inject(&mut head, &LoraConfig::new(2).target_modules(["project"]), 0)?;
/// randomize(&mut head, 0, 0.1)?; // stands for training
/// let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
/// let adapted = head.project.forward(&x, Mode::Eval)?;
/// let weight = head.project.weight.to_vec2::<f32>()?;
///
/// merge(&mut head)?; // safe_merge refuses a result that is not finite
/// assert!((head.project.forward(&x, Mode::Eval)? - adapted)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
/// unmerge(&mut head)?;
/// assert_eq!(head.project.weight.to_vec2::<f32>()?, weight);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - the model carries no active adapter, or its adapters are disabled;
/// - a LoRA bias meets a layer without bias, as in PEFT;
/// - a weight is in int8.
///
/// The model is unchanged then.
pub fn merge(model: &mut dyn ModuleTree) -> Result<()> {
    merge_checked(model, false)
}

/// As [`merge`], but refuses a result that is not finite throughout.
///
/// [Example](crate::lora::merge())
///
/// # Errors
/// As [`merge`], and on NaN or infinity in a merged weight or bias. The model is unchanged then.
pub fn safe_merge(model: &mut dyn ModuleTree) -> Result<()> {
    merge_checked(model, true)
}

/// Takes merged adapters out again: weights and biases are, bit for bit, those from before [`merge`].
///
/// [Example](crate::lora::merge())
///
/// # Errors
/// None of its own.
pub fn unmerge(model: &mut dyn ModuleTree) -> Result<()> {
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Layer(layer) = node {
            if let Some(old) = layer.adapters.unmerged.take() {
                (*layer.weight, *layer.bias) = (old.weight, old.bias);
            }
        }
        Ok(())
    })
}

/// Merges and then forgets the adapters, inactive ones too: a plain model with adapted weights remains.
///
/// [Example](crate::lora::save_adapter)
///
/// # Errors
/// As [`merge`].
pub fn merge_and_unload(model: &mut dyn ModuleTree) -> Result<()> {
    merge(model)?;
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Layer(layer) = node {
            *layer.adapters = Adapters::default();
        }
        Ok(())
    })
}
