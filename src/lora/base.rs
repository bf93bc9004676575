//! The base model's tensors as an adapter sees them, and the modules it may save whole.
//!
//! A parameter that shares another's value gets its own as soon as an adapter saves either of the two. PEFT trains a
//! copy of each module to save and leaves the other as it was.
//!
//! Source: PEFT 0.21, `ModulesToSaveWrapper` and `_set_trainable` in `utils/other.py`.

use super::state::ancestors;
use super::target::Matcher;
use super::LoraConfig;
use crate::nn::{is_adapter_tensor, join, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// A tensor of the base model.
pub(super) struct BaseTensor {
    /// Its name in the model.
    pub(super) name: String,
    /// Its value, or that of the tensor it is tied to.
    pub(super) value: Tensor,
    /// False for a buffer.
    pub(super) is_parameter: bool,
    /// The tensor it is tied to.
    pub(super) tied_to: Option<String>,
}

/// Every tensor of the base model, tied ones among them. Left out are those tied to a tensor outside this tree.
pub(super) fn base_tensors(model: &dyn ModuleTree) -> Vec<BaseTensor> {
    let (mut tensors, mut ties, mut fixed) = (Vec::new(), Vec::new(), String::new());
    model.visit("", &mut |name, node| {
        let (value, is_parameter) = match node {
            Node::Parameter(value) if !is_adapter_tensor(name) => (value.clone(), true),
            Node::Buffer(value) => (value.clone(), name == fixed),
            Node::Fixed => return fixed = name.to_string(),
            Node::Tied(to) => return ties.push((name.to_string(), to)),
            Node::Parameter(_) | Node::Layer(_) => return,
        };
        tensors.push(BaseTensor { name: name.to_string(), value, is_parameter, tied_to: None });
    });
    for (name, to) in ties {
        let around = std::iter::once("").chain(ancestors(&name));
        let candidates: Vec<String> = around.map(|module| join(module, to)).collect();
        let nearest =
            candidates.iter().rev().find_map(|name| tensors.iter().find(|t| t.name == *name));
        if let Some((value, source)) = nearest.map(|t| (t.value.clone(), t.name.clone())) {
            tensors.push(BaseTensor { name, value, is_parameter: true, tied_to: Some(source) });
        }
    }
    tensors
}

/// The names in `modules_to_save` that no module has.
pub(super) fn unknown_modules(tensors: &[BaseTensor], config: &LoraConfig) -> Vec<String> {
    let modules: BTreeSet<&str> = tensors.iter().flat_map(|t| ancestors(&t.name)).collect();
    let is_unknown = |name: &&String| !modules.iter().any(|path| path.ends_with(name.as_str()));
    config.modules_to_save.iter().flatten().filter(is_unknown).cloned().collect()
}

/// The modules to save, and whether every child of one is called by a number.
fn saved_modules<'a>(tensors: &'a [BaseTensor], matcher: &Matcher<'_>) -> BTreeMap<&'a str, bool> {
    let mut saved = BTreeMap::new();
    for tensor in tensors {
        for module in ancestors(&tensor.name).filter(|module| matcher.is_saved(module)) {
            let child = tensor.name[module.len() + 1..].split('.').next().unwrap_or("");
            let is_number = !child.is_empty() && child.bytes().all(|byte| byte.is_ascii_digit());
            *saved.entry(module).or_insert(true) &= is_number;
        }
    }
    saved
}

/// Refuses a module to save inside another: PEFT writes one value for the two copies that it has, and reads none.
pub(super) fn refuse_nested(tensors: &[BaseTensor], matcher: &Matcher<'_>) -> Result<()> {
    let saved = saved_modules(tensors, matcher);
    for module in saved.keys() {
        if let Some(outer) = ancestors(module).find(|outer| saved.contains_key(outer)) {
            return Err(Error::config(format!(
                "modules_to_save: {module} lies in {outer}, which is saved too, and PEFT loads no such adapter: leave \
                 out the name of one"
            )));
        }
    }
    Ok(())
}

/// Refuses modules to save that PEFT refuses, and names that no module has.
pub(super) fn check_modules_to_save(model: &dyn ModuleTree, config: &LoraConfig) -> Result<()> {
    let tensors = base_tensors(model);
    if let Some(name) = unknown_modules(&tensors, config).first() {
        return Err(Error::config(format!("modules_to_save: no module is called {name:?}")));
    }
    for (module, is_list) in saved_modules(&tensors, &Matcher::new(config)?) {
        if is_list {
            return Err(Error::config(format!(
                "modules_to_save: {module} is a list, which PEFT refuses: name its elements, as {module}.0"
            )));
        }
    }
    Ok(())
}
