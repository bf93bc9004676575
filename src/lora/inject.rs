//! Putting adapters into a model, and taking them out again.
//!
//! The values that a new adapter has are those of `init.rs`. Everything that can fail is made before anything in the
//! model is changed.
//!
//! Source: PEFT 0.21, `inject_adapter` in `tuners/tuners_utils.py`.

use super::base::{
    base_tensors, check_modules_to_save, refuse_nested, unknown_modules, BaseTensor,
};
use super::init::{adapter_shapes, initial, magnitude, uniform, Layer};
use super::state::{ancestors, base_key, split_last, Slot, PREFIX};
use super::switch::NO_ADAPTER;
use super::target::Matcher;
use super::{unmerge, InitLoraWeights, LoraConfig};
use crate::nn::{
    adapter_tensor_name, is_adapter_tensor, set_values, Adapter, Adapters, Fixed, ModuleTree, Node,
    NodeMut, Training, DEFAULT_ADAPTER,
};
use crate::{philox, Error, Result};
use candle_core::{DType, Tensor, Var};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// How many names an error offers as candidates.
const SHOWN: usize = 12;

/// A layer that gets an adapter.
struct Target {
    weight: Tensor,
    rank: usize,
    scaling: f64,
}

/// What an injection will change.
pub(super) struct Plan<'a> {
    config: &'a LoraConfig,
    /// What the adapter is called.
    name: &'a str,
    /// The adapters in use on layers that have any; the new one where there are none.
    active: Vec<String>,
    targets: BTreeMap<String, Target>,
    /// Base tensors saved with the adapter, by their name in the model; the parameters among them are trained.
    base: BTreeMap<String, (String, Tensor)>,
    /// Names in `modules_to_save` without a module; PEFT passes over them.
    pub(super) unknown_modules: Vec<String>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(
        model: &dyn ModuleTree,
        name: &'a str,
        config: &'a LoraConfig,
    ) -> Result<Self> {
        config.validate()?;
        check_name(name)?;
        let active = check_others(model, name, config)?.unwrap_or_else(|| vec![name.to_string()]);
        let matcher = Matcher::new(config)?;
        let targets = find_targets(model, &matcher)?;
        let mut base = BTreeMap::new();
        let tensors = base_tensors(model);
        let unknown_modules = unknown_modules(&tensors, config);
        refuse_nested(&tensors, &matcher)?;
        for BaseTensor { name, value, is_parameter, .. } in tensors {
            let is_adapted = |module: &str| targets.contains_key(module);
            if let Some(key) = base_key(&name, !is_parameter, config, &matcher, is_adapted) {
                base.insert(name, (key, value));
            }
        }
        for path in targets.keys() {
            let mut holders = ancestors(path).chain([path.as_str()]);
            if let Some(holder) = holders.find(|holder| matcher.is_saved(holder)) {
                return Err(Error::config(format!(
                    "{path} is in target_modules, and {holder} in modules_to_save: choose one"
                )));
            }
        }
        Ok(Self { config, name, active, targets, base, unknown_modules })
    }

    /// Leaves and shapes of the tensors of one adapter.
    fn adapter_shapes(&self, target: &Target) -> Vec<(&'static str, Vec<usize>)> {
        let (a, b) = adapter_shapes(target.weight.dims(), target.rank);
        let out_dim = b[0];
        let magnitude = if b.len() == 4 { vec![1, out_dim, 1, 1] } else { vec![out_dim] };
        let mut shapes = vec![("lora_A.weight", a), ("lora_B.weight", b)];
        if self.config.lora_bias {
            shapes.push(("lora_B.bias", vec![out_dim]));
        }
        if self.config.use_dora {
            shapes.push(("lora_magnitude_vector", magnitude));
        }
        shapes
    }

    /// Every tensor an adapter file for this model holds, by its key there.
    pub(super) fn slots(&self) -> BTreeMap<String, Slot> {
        let adapters = self.targets.iter().flat_map(|(path, target)| {
            self.adapter_shapes(target).into_iter().map(move |(leaf, shape)| {
                let name = adapter_tensor_name(path, self.name, leaf);
                (format!("{PREFIX}{path}.{leaf}"), Slot { name, shape })
            })
        });
        let base = self.base.iter().map(|(name, (key, tensor))| {
            (key.clone(), Slot { name: name.clone(), shape: tensor.dims().to_vec() })
        });
        adapters.chain(base).collect()
    }

    /// The tensors that training starts from, by their name in the model; base weights that change among them.
    fn initial_values(&self, seed: u64) -> Result<BTreeMap<String, Tensor>> {
        let init = &self.config.init_lora_weights;
        let values_of = |(path, target): (&String, &Target)| {
            let tree_name = |leaf| adapter_tensor_name(path, self.name, leaf);
            let name = tree_name("lora_A.weight");
            let Target { weight, rank, scaling } = target;
            let layer = Layer { path, name: &name, weight, rank: *rank, scaling: *scaling };
            let start = initial(init, &layer, seed)?;
            let mut values = Vec::new();
            for (leaf, shape) in self.adapter_shapes(target) {
                let value = match leaf {
                    "lora_A.weight" => start.a.clone(),
                    "lora_B.weight" => start.b.clone(),
                    "lora_magnitude_vector" => magnitude(&layer, &start, &shape)?,
                    _ if *init == InitLoraWeights::Default(false) => {
                        let (leaf, shape) = (tree_name(leaf), [shape[0], *rank]);
                        let columns = uniform(&leaf, &shape, seed, weight.device())?;
                        columns.narrow(1, 0, 1)?.flatten_all()?
                    }
                    _ => Tensor::zeros(shape, DType::F32, weight.device())?,
                };
                values.push((tree_name(leaf), value));
            }
            values.extend(start.weight.map(|weight| (format!("{path}.weight"), weight)));
            Ok(values)
        };
        // On a GPU every thread has a stream of its own, which knows nothing of the others' work: this thread does it all.
        let on_the_cpu = self.targets.values().all(|target| target.weight.device().is_cpu());
        let starts = match on_the_cpu {
            true => self.targets.par_iter().map(values_of).collect::<Result<Vec<_>>>()?,
            false => self.targets.iter().map(values_of).collect::<Result<Vec<_>>>()?,
        };
        Ok(starts.into_iter().flatten().collect())
    }

    /// The weights that a loaded adapter wants in the base's place, by their name in the model.
    pub(super) fn base_values(&self) -> Result<BTreeMap<String, Tensor>> {
        if !self.config.init_lora_weights.changes_base() {
            return Ok(BTreeMap::new());
        }
        let mut values = self.initial_values(0)?;
        values.retain(|name, _| !is_adapter_tensor(name));
        Ok(values)
    }

    /// Changes the model: freezes it, adds the adapters with the tensors in `values`, and makes trainable what is
    /// saved with them, with the value in `values` where there is one.
    pub(super) fn apply(
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
fn check_others(
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

fn find_targets(model: &dyn ModuleTree, matcher: &Matcher<'_>) -> Result<BTreeMap<String, Target>> {
    let mut layers = BTreeMap::new();
    let mut others = BTreeSet::new();
    model.visit("", &mut |path, node| match node {
        Node::Layer(layer) => {
            layers.insert(path.to_string(), layer.weight.clone());
        }
        Node::Fixed => {}
        Node::Parameter(_) | Node::Buffer(_) | Node::Tied(_) => {
            if !is_adapter_tensor(path) {
                others.extend(ancestors(path).map(str::to_string));
            }
        }
    });
    for path in others.iter().filter(|path| !layers.contains_key(*path)) {
        if matcher.is_target(path, false)? {
            return Err(Error::config(format!(
                "target_modules: {path} is no linear layer or convolution, and only those can be adapted"
            )));
        }
    }
    let mut targets = BTreeMap::new();
    for (path, weight) in &layers {
        if matcher.is_target(path, weight.rank() == 2)? {
            if !matches!(weight.rank(), 2 | 4) || weight.elem_count() == 0 {
                return Err(Error::config(format!(
                    "{path}: expected a weight [out, in] or [out, in, k, k], got {:?}",
                    weight.dims()
                )));
            }
            let (rank, scaling) = matcher.rank_and_scaling(path)?;
            targets.insert(path.clone(), Target { weight: weight.clone(), rank, scaling });
        }
    }
    if targets.is_empty() {
        let names: BTreeSet<_> = layers.keys().map(|path| split_last(path).1).collect();
        let shown: Vec<_> = names.into_iter().take(SHOWN).collect();
        return Err(Error::config(format!(
            "target_modules matches no layer; layers here are called, for example: {}{}",
            shown.join(", "),
            matcher.narrowed_by()
        )));
    }
    Ok(targets)
}

/// Freezes `model` and gives every targeted linear layer a fresh, trainable adapter in f32; makes trainable what
/// the configuration names besides (biases, modules to save). Returns the paths of the adapted layers. The same
/// seed gives the same adapter.
///
/// Frozen tensors keep their memory, so a `VarMap` that holds the base still saves it. What is trained besides keeps its
/// variable, unless a frozen tensor shares it; then, and for a view, it becomes a variable of its own.
///
/// # Errors
/// When the configuration is invalid, a regular expression does not compile, nothing is targeted, something that is
/// no linear layer is targeted, a layer is both targeted and to be saved, no module has a name to be saved (PEFT
/// passes over that one in silence), a module to be saved is a list or lies in another, or the model already carries an
/// adapter of the name "default". The model is unchanged then.
pub fn inject(model: &mut dyn ModuleTree, config: &LoraConfig, seed: u64) -> Result<Vec<String>> {
    add_adapter(model, DEFAULT_ADAPTER, config, seed)
}

/// As [`inject`], under a name, beside other adapters. Where there are any, they stay in use and the new one waits,
/// frozen, for [`set_adapter`](super::set_adapter).
///
/// # Errors
/// As [`inject`]; besides, when the name is no good one, the model's adapters are merged, or one of them or the new
/// one changes the base (`bias`, `modules_to_save`, `init_lora_weights`), which only the one adapter of a model may.
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
