//! Refuses a new adapter with a bad name, and one that cannot stand beside the model's adapters.

use crate::lora::switch::NO_ADAPTER;
use crate::lora::LoraConfig;
use crate::nn::{ModuleTree, Node};
use crate::{Error, Result};

/// Refuses names that PEFT refuses, and those that are no name of a folder.
pub(super) fn check_name(name: &str) -> Result<()> {
    let is_plain = |c: char| c.is_alphanumeric() || "_- ".contains(c);
    if name.trim().is_empty() || name.contains("lora_") || !name.chars().all(is_plain) {
        return Err(Error::config(format!(
            "an adapter's name must be of letters, digits, '_', '-' and spaces, without \"lora_\", got {name:?}"
        )));
    }
    if name == NO_ADAPTER {
        return Err(Error::config(format!(
            "{NO_ADAPTER:?} means no adapter and is no adapter's name"
        )));
    }
    Ok(())
}

/// The adapters in use, if the model has any; refuses a new one that does not go with them.
pub(super) fn check_others(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
) -> Result<Option<Vec<String>>> {
    let (mut active, mut problem) = (None, None);
    model.visit("", &mut |path, node| {
        let Node::Layer(layer) = node else { return };
        if layer.adapters.is_empty() {
            return;
        }
        active.get_or_insert_with(|| layer.adapters.active.clone());
        let changes_base = layer.adapters.iter().find(|(_, adapter)| adapter.changes_base);
        if layer.adapters.get(name).is_some() {
            problem = Some(format!(
                "{path} already carries an adapter called {name:?}: unload or merge it, or take another name"
            ));
        } else if layer.adapters.unmerged.is_some() {
            problem = Some(format!("the adapters of {path} are merged: unmerge the model first"));
        } else if let Some((other, _)) = changes_base {
            problem = Some(format!(
                "the adapter {other:?} changes its base, by bias, modules_to_save or init_lora_weights, and must be \
                 alone on its model"
            ));
        }
    });
    if active.is_some() && config.changes_base() {
        problem.get_or_insert_with(|| {
            "an adapter that changes its base, by bias, modules_to_save or init_lora_weights, must be alone on its \
             model"
                .to_string()
        });
    }
    problem.map_or(Ok(active), |problem| Err(Error::config(problem)))
}
