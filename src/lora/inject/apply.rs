//! A plan carried out: the adapters on their layers, and the base's tensors that change with them.

use super::Plan;
use crate::lora::base::{base_tensors, BaseTensor};
use crate::nn::{
    adapter_tensor_name, set_values, Adapter, Fixed, ModuleTree, NodeMut, Training, DEFAULT_ADAPTER,
};
use crate::{philox, Error, Result};
use candle_core::{DType, Tensor, Var};
use std::collections::{BTreeMap, HashSet};

impl Plan<'_> {
    /// Changes the model: freezes it and adds the adapters with the tensors in `values`. Tensors saved with them become
    /// trainable, with the value in `values` where there is one.
    pub(in crate::lora) fn apply(
        self,
        model: &mut dyn ModuleTree,
        mut values: BTreeMap<String, Tensor>,
    ) -> Result<Vec<String>> {
        let mut adapters = BTreeMap::new();
        for (path, target) in &self.targets {
            let mut take = |leaf: &str| -> Result<Tensor> {
                let name = adapter_tensor_name(path, self.name, leaf);
                let value = values
                    .remove(&name)
                    .ok_or_else(|| Error::config(format!("no value for the tensor {name}")))?;
                let value = value.to_device(target.weight.device())?.to_dtype(DType::F32)?;
                // As in PEFT only what is in use is trained.
                let in_use = self.active.iter().any(|name| name == self.name);
                Ok(if in_use { Var::from_tensor(&value)?.into_inner() } else { value.detach() })
            };
            let adapter = Adapter {
                a: take("lora_A.weight")?,
                b: take("lora_B.weight")?,
                b_bias: self.config.lora_bias.then(|| take("lora_B.bias")).transpose()?,
                magnitude: self
                    .config
                    .use_dora
                    .then(|| take("lora_magnitude_vector"))
                    .transpose()?,
                scaling: target.scaling,
                dropout: self.config.dropout,
                stream: stream(path, self.name),
                changes_base: self.config.changes_base(),
            };
            adapters.insert(path.clone(), adapter);
        }
        let mut replaced = self.replaced_base(model, values)?;
        model.visit_mut("", &mut |path, node| {
            match node {
                NodeMut::Layer(layer) => {
                    if let Some(adapter) = adapters.remove(path) {
                        layer.adapters.insert(self.name, adapter);
                        layer.adapters.active.clone_from(&self.active);
                    }
                }
                NodeMut::Parameter(tensor) | NodeMut::Buffer(tensor) => {
                    match replaced.remove(path) {
                        Some(Replacement::Values(values)) => set_values(path, tensor, &values)?,
                        Some(Replacement::Tensor(new)) => *tensor = new,
                        None => {}
                    }
                }
                NodeMut::Tied(own) => match replaced.remove(path) {
                    Some(Replacement::Values(new) | Replacement::Tensor(new)) => {
                        *own = Some(Fixed(new));
                    }
                    None => {}
                },
            }
            Ok(())
        })?;
        Ok(self.targets.into_keys().collect())
    }

    /// The base tensors that change: new values, newly trained, newly frozen.
    fn replaced_base(
        &self,
        model: &dyn ModuleTree,
        mut values: BTreeMap<String, Tensor>,
    ) -> Result<BTreeMap<String, Replacement>> {
        // As PEFT's copy does, a module to save parts from what it shares its weights with.
        let mut frozen = HashSet::new();
        for BaseTensor { name, value, is_parameter, tied_to } in base_tensors(model) {
            let trained = is_parameter && self.base.contains_key(&name);
            if let (false, None, Training::Trained(variable)) =
                (trained, tied_to, Training::of(&value)?)
            {
                frozen.insert(variable.id());
            }
        }
        let mut replaced = BTreeMap::new();
        for BaseTensor { name, value: current, is_parameter, tied_to } in base_tensors(model) {
            let saved = self.base.contains_key(&name);
            let trained = is_parameter && saved;
            // A tied tensor gets its own value once either of the two is saved.
            let unties = tied_to.map(|source| saved || self.base.contains_key(&source));
            let value = values
                .remove(&name)
                .map(|value| value.to_device(current.device())?.to_dtype(current.dtype()))
                .transpose()?;
            let is_tied = unties.is_some();
            let own =
                trained && !is_tied && current.is_variable() && !frozen.contains(&current.id());
            let new = match value {
                Some(value) if own => Replacement::Values(value),
                None if unties == Some(false) => continue,
                None if !is_tied && (own || !(trained || current.track_op())) => continue,
                value => {
                    let new = match value {
                        Some(value) => value,
                        None if is_tied => current.copy()?.detach(),
                        None => current.detach(),
                    };
                    Replacement::Tensor(if trained {
                        Var::from_tensor(&new)?.into_inner()
                    } else {
                        new
                    })
                }
            };
            replaced.insert(name, new);
        }
        Ok(replaced)
    }
}

/// Change of a base tensor.
enum Replacement {
    /// Other values for a variable that stays.
    Values(Tensor),
    /// A constant, or a variable of its own.
    Tensor(Tensor),
}

/// The dropout stream of an adapter on the layer at `path`.
fn stream(path: &str, name: &str) -> u32 {
    match name {
        DEFAULT_ADAPTER => philox::stream_of(path),
        _ => philox::stream_of(&format!("{path}.{name}")),
    }
}
