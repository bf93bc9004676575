//! Putting adapters into a model, and taking them out again.
//!
//! The values that a new adapter has are those of `init.rs`. Everything that can fail is made before anything in the
//! model is changed.
//!
//! Source: PEFT 0.21, `inject_adapter` in `tuners/tuners_utils.py`.

mod apply;
mod checks;
mod plan;

use super::base::check_modules_to_save;
use super::{unmerge, LoraConfig};
use crate::nn::{Adapters, ModuleTree, NodeMut, DEFAULT_ADAPTER};
use crate::Result;
pub(super) use plan::Plan;

/// Freezes `model` and gives every targeted linear layer a fresh, trainable adapter in f32; makes trainable what
/// the configuration names besides (biases, modules to save). Returns the paths of the adapted layers. The same
/// seed gives the same adapter.
///
/// Frozen tensors keep their memory, so a `VarMap` that holds the base still saves it. A tensor that is trained besides
/// keeps its variable. A view, or one that a frozen tensor shares, becomes a variable of its own.
///
/// [Example](crate::lora)
///
/// # Errors
/// - the configuration is invalid, or a regular expression does not compile;
/// - nothing is targeted, or something that is no linear layer;
/// - a layer is both targeted and to be saved;
/// - no module has a name to be saved (PEFT passes over that one in silence);
/// - a module to be saved is a list or lies in another;
/// - two tensors of the model have one name;
/// - the model already carries an adapter of the name "default".
///
/// The model is unchanged then.
pub fn inject(model: &mut dyn ModuleTree, config: &LoraConfig, seed: u64) -> Result<Vec<String>> {
    add_adapter(model, DEFAULT_ADAPTER, config, seed)
}

/// As [`inject`], under a name, beside other adapters. Where there are any, they stay in use and the new one waits,
/// frozen, for [`set_adapter`](super::set_adapter).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::lora::{self, add_adapter, LoraConfig};
/// use candle_sam_lora::{module_tree, nn::Linear};
///
/// struct Head {
///     project: Linear,
/// }
/// module_tree!(Head { project });
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let project = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
/// let mut head = Head { project };
/// let config = LoraConfig::new(2).target_modules(["project"]);
/// add_adapter(&mut head, "cells", &config, 0)?;
/// add_adapter(&mut head, "nuclei", &config, 1)?;
/// assert_eq!(lora::adapter_names(&head), ["cells", "nuclei"]);
/// assert_eq!(lora::active_adapters(&head), ["cells"]);
///
/// lora::set_adapter(&mut head, &["nuclei"])?;
/// lora::disable_adapters(&mut head)?; // the base alone
/// lora::enable_adapters(&mut head)?;
/// lora::delete_adapter(&mut head, "cells")?;
/// assert_eq!(lora::adapter_names(&head), ["nuclei"]);
/// let folder = std::env::temp_dir().join("candle-sam-lora-nuclei");
/// lora::save_named_adapter(&head, "nuclei", &config, &folder)?;
/// lora::load_named_adapter(&mut head, "again", &folder)?;
/// assert_eq!(lora::adapter_names(&head), ["again", "nuclei"]); // by name
/// lora::unload(&mut head)?;
/// assert!(head.project.adapters.is_empty());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`inject`]; besides,
/// - the name is refused, or the model's adapters are merged;
/// - one of them or the new one changes the base (`bias`, `modules_to_save`, `init_lora_weights`), which only the one
///   adapter of a model may.
pub fn add_adapter(
    model: &mut dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
    seed: u64,
) -> Result<Vec<String>> {
    let plan = Plan::new(model, name, config)?;
    check_modules_to_save(model, config)?;
    let values = plan.initial_values(seed)?;
    plan.apply(model, values)
}

/// Removes every adapter and, where any was merged, restores the weights from before. Base biases and modules that
/// were trained along keep their trained values, and weights that an initialisation took a part from stay without it.
///
/// [Example](crate::lora::add_adapter)
///
/// # Errors
/// None of its own.
pub fn unload(model: &mut dyn ModuleTree) -> Result<()> {
    unmerge(model)?;
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Layer(layer) = node {
            *layer.adapters = Adapters::default();
        }
        Ok(())
    })
}
