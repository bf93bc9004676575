//! Choosing among the adapters of a model: which are active, none for now, one gone for good.
//!
//! Adapters are active for the model as a whole; a layer that lacks one of them computes without it. As in PEFT the
//! active ones are trainable and the others frozen.
//!
//! Source: PEFT 0.21, `set_adapter`, `enable_adapters`, `delete_adapter` in `tuners/tuners_utils.py`.

use super::unmerge;
use crate::nn::{ModuleTree, Node, NodeMut, Training};
use crate::{Error, Result};
use candle_core::{Tensor, Var};
use std::collections::BTreeSet;

/// The name that stands for no adapter, in [`forward_mixed_batch`](super::forward_mixed_batch).
///
/// [Example](crate::lora::forward_mixed_batch)
pub const NO_ADAPTER: &str = "__base__";

/// The names of the model's adapters, sorted.
///
/// [Example](crate::lora::add_adapter)
pub fn adapter_names(model: &dyn ModuleTree) -> Vec<String> {
    let mut names = BTreeSet::new();
    model.visit("", &mut |_, node| {
        if let Node::Layer(layer) = node {
            names.extend(layer.adapters.iter().map(|(name, _)| name.to_string()));
        }
    });
    names.into_iter().collect()
}

/// The names of the active adapters, in the order they are applied; disabling and merging do not change them.
///
/// [Example](crate::lora::add_adapter)
pub fn active_adapters(model: &dyn ModuleTree) -> Vec<String> {
    let mut active = None;
    model.visit("", &mut |_, node| {
        if let Node::Layer(layer) = node {
            if !layer.adapters.is_empty() {
                active.get_or_insert_with(|| layer.adapters.active.clone());
            }
        }
    });
    active.unwrap_or_default()
}

/// Refuses names that no layer knows.
pub(super) fn check_known(model: &dyn ModuleTree, names: &[impl AsRef<str>]) -> Result<()> {
    let known = adapter_names(model);
    for name in names.iter().map(AsRef::as_ref) {
        if !known.iter().any(|own| own == name) {
            return Err(Error::config(format!(
                "the model has no adapter called {name:?}; it has {known:?}"
            )));
        }
    }
    Ok(())
}

/// Makes these the active adapters, without a change of what is trainable.
pub(super) fn activate(model: &mut dyn ModuleTree, names: &[String]) -> Result<()> {
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Layer(layer) = node {
            if !layer.adapters.is_empty() {
                layer.adapters.active = names.to_vec();
            }
        }
        Ok(())
    })
}

/// Makes these the active adapters, which the model sums, and them alone trainable. Merged ones are taken out of the
/// weights first.
///
/// An adapter that is frozen and made trainable again has new variables: an optimizer made before holds the old ones.
///
/// [Example](crate::lora::add_adapter)
///
/// # Errors
/// On a name that no adapter has, or one given twice. The model is unchanged then.
pub fn set_adapter(model: &mut dyn ModuleTree, names: &[&str]) -> Result<()> {
    check_known(model, names)?;
    if let Some(twice) = (1..names.len()).find(|&i| names[..i].contains(&names[i])) {
        return Err(Error::config(format!("the adapter {:?} is named twice", names[twice])));
    }
    unmerge(model)?;
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    activate(model, &names)?;
    model.visit_mut("", &mut |_, node| {
        let NodeMut::Layer(layer) = node else { return Ok(()) };
        for (name, adapter) in layer.adapters.iter_mut() {
            let active = names.iter().any(|active| active == name);
            for (_, tensor) in adapter.tensors_mut() {
                set_variable(tensor, active)?;
            }
        }
        Ok(())
    })
}

/// Makes a tensor trainable or frozen; a variable, or a view of one, that stays trainable is left as it is.
fn set_variable(tensor: &mut Tensor, wanted: bool) -> Result<()> {
    match (wanted, Training::of(tensor)?) {
        (true, Training::Trained(_)) => {}
        (true, _) => *tensor = Var::from_tensor(&tensor.detach())?.into_inner(),
        (false, _) => *tensor = tensor.detach(),
    }
    Ok(())
}

fn set_disabled(model: &mut dyn ModuleTree, disabled: bool) -> Result<()> {
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Layer(layer) = node {
            layer.adapters.disabled = disabled;
        }
        Ok(())
    })
}

/// Has the model compute without adapters until [`enable_adapters`]; merged ones are taken out of the weights. Base
/// biases and modules that were trained along keep their trained values.
///
/// [Example](crate::lora::add_adapter)
///
/// # Errors
/// None of its own.
pub fn disable_adapters(model: &mut dyn ModuleTree) -> Result<()> {
    unmerge(model)?;
    set_disabled(model, true)
}

/// Undoes [`disable_adapters`].
///
/// [Example](crate::lora::add_adapter)
///
/// # Errors
/// None of its own.
pub fn enable_adapters(model: &mut dyn ModuleTree) -> Result<()> {
    set_disabled(model, false)
}

/// Removes an adapter. If it was the last active one, the first of those that remain becomes active.
///
/// [Example](crate::lora::add_adapter)
///
/// # Errors
/// When there is no such adapter, or it is merged. The model is unchanged then.
pub fn delete_adapter(model: &mut dyn ModuleTree, name: &str) -> Result<()> {
    check_known(model, &[name])?;
    let mut merged = false;
    model.visit("", &mut |_, node| {
        if let Node::Layer(layer) = node {
            let unmerged = layer.adapters.unmerged.as_ref();
            merged |= unmerged.is_some_and(|old| old.names.iter().any(|own| own == name));
        }
    });
    if merged {
        return Err(Error::config(format!(
            "the adapter {name:?} is merged: unmerge the model first"
        )));
    }
    let mut active = active_adapters(model);
    let was_active = active.iter().any(|own| own == name);
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Layer(layer) = node {
            layer.adapters.remove(name);
        }
        Ok(())
    })?;
    active.retain(|own| own != name);
    match adapter_names(model).first() {
        Some(first) if was_active && active.is_empty() => set_adapter(model, &[first]),
        _ => activate(model, &active),
    }
}
