//! Folding an adapter into the weights it adapts, and taking it out again.
//!
//! ```text
//! LoRA   W' = W + scaling B A           b' = b + scaling lora_bias
//! DoRA   W' = g (W + scaling B A)       g = magnitude / || W + scaling B A ||_row
//! ```
//! Computed in f32 and rounded once to the dtype of W. The adapter keeps W and b as they were, so unmerging is exact.
//! A half-precision W' loses small deltas that the unmerged layer keeps.
//!
//! Source: PEFT 0.21, `merge` in `tuners/lora/layer.py` and `variants.py`.

use crate::nn::{Adapter, Linear, ModuleTree, Node, NodeMut};
use crate::{ops, Error, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;

/// Weight and bias of `linear` with its adapter folded in.
fn merged(path: &str, linear: &Linear, adapter: &Adapter) -> Result<(Tensor, Option<Tensor>)> {
    let weight = (linear.weight.detach().to_dtype(DType::F32)? + adapter.delta()?.detach())?;
    let weight = match &adapter.magnitude {
        None => weight,
        Some(magnitude) => {
            let norm =
                ops::dora_weight_norm(&linear.weight, &adapter.a, &adapter.b, adapter.scaling)?;
            let g = (magnitude.detach().to_dtype(DType::F32)? / norm)?;
            weight.broadcast_mul(&g.unsqueeze(1)?)?
        }
    };
    let bias = match (&linear.bias, &adapter.b_bias) {
        (Some(bias), Some(lora)) => {
            let lora = (lora.detach().to_dtype(DType::F32)? * adapter.scaling)?;
            Some((bias.detach().to_dtype(DType::F32)? + lora)?.to_dtype(bias.dtype())?)
        }
        (None, Some(_)) => {
            return Err(Error::config(format!(
                "{path}: a LoRA bias cannot be merged into a layer that has no bias"
            )))
        }
        (bias, None) => bias.clone(),
    };
    Ok((weight.to_dtype(linear.weight.dtype())?, bias))
}

/// True when every element is finite: anything else times zero is NaN, and stays so in the sum.
fn is_finite(tensor: &Tensor) -> Result<bool> {
    let zero = (tensor.detach().to_dtype(DType::F32)? * 0.0)?.sum_all()?.to_scalar::<f32>()?;
    Ok(zero == 0.0)
}

fn merge_checked(model: &mut dyn ModuleTree, refuse_non_finite: bool) -> Result<()> {
    let mut results = Vec::new();
    let mut has_adapter = false;
    model.visit("", &mut |path, node| {
        let Node::Linear(linear) = node else { return };
        let Some(adapter) = &linear.adapter else { return };
        has_adapter = true;
        if adapter.unmerged.is_none() {
            results.push((path.to_string(), merged(path, linear, adapter)));
        }
    });
    if !has_adapter {
        return Err(Error::config("the model carries no adapter to merge"));
    }
    let mut new = BTreeMap::new();
    for (path, result) in results {
        let (weight, bias) = result?;
        if refuse_non_finite {
            for tensor in std::iter::once(&weight).chain(&bias) {
                if !is_finite(tensor)? {
                    return Err(Error::config(format!(
                        "{path}: merging gives values that are not finite; the adapter seems broken"
                    )));
                }
            }
        }
        new.insert(path, (weight, bias));
    }
    model.visit_mut("", &mut |path, node| {
        if let NodeMut::Linear(Linear { weight, bias, adapter: Some(adapter) }) = node {
            if let Some((new_weight, new_bias)) = new.remove(path) {
                let old_weight = std::mem::replace(weight, new_weight);
                let old_bias = std::mem::replace(bias, new_bias);
                adapter.unmerged = Some((old_weight, old_bias));
            }
        }
        Ok(())
    })
}

/// Folds every adapter into its layer's weight and bias; layers already merged stay as they are.
///
/// # Errors
/// When the model carries no adapter, or a LoRA bias meets a layer without bias, as in PEFT. The model is unchanged
/// then.
pub fn merge(model: &mut dyn ModuleTree) -> Result<()> {
    merge_checked(model, false)
}

/// As [`merge`], but refuses a result that is not finite throughout.
///
/// # Errors
/// As [`merge`], and on NaN or infinity in a merged weight or bias. The model is unchanged then.
pub fn safe_merge(model: &mut dyn ModuleTree) -> Result<()> {
    merge_checked(model, true)
}

/// Takes merged adapters out again: weights and biases are, bit for bit, those from before [`merge`].
///
/// # Errors
/// None of its own.
pub fn unmerge(model: &mut dyn ModuleTree) -> Result<()> {
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Linear(Linear { weight, bias, adapter: Some(adapter) }) = node {
            if let Some((old_weight, old_bias)) = adapter.unmerged.take() {
                (*weight, *bias) = (old_weight, old_bias);
            }
        }
        Ok(())
    })
}

/// Merges and then forgets the adapters: a plain model with adapted weights remains.
///
/// # Errors
/// As [`merge`].
pub fn merge_and_unload(model: &mut dyn ModuleTree) -> Result<()> {
    merge(model)?;
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Linear(linear) = node {
            linear.adapter = None;
        }
        Ok(())
    })
}
