//! Putting adapters into a model, and taking them out again.
//!
//! ```text
//! A ~ U(-1/sqrt(in), 1/sqrt(in))   Kaiming-uniform with a = sqrt(5), from the seed and the layer's name
//! B = 0, lora_bias = 0             so that the model computes what it did before
//! magnitude = || W ||_row          DoRA
//! ```
//!
//! Everything that can fail is made before anything in the model is changed.
//!
//! Source: PEFT 0.21, `reset_lora_parameters` in `tuners/lora/layer.py`.

use super::state::{ancestors, base_key, split_last, Slot, PREFIX};
use super::target::Matcher;
use super::{InitLoraWeights, LoraConfig};
use crate::nn::{Adapter, ModuleTree, Node, NodeMut};
use crate::{philox, Error, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use std::collections::{BTreeMap, BTreeSet};

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
    targets: BTreeMap<String, Target>,
    /// Base tensors saved with the adapter, by their name in the model; the parameters among them are trained.
    base: BTreeMap<String, (String, Tensor)>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(model: &dyn ModuleTree, config: &'a LoraConfig) -> Result<Self> {
        config.validate()?;
        let matcher = Matcher::new(config)?;
        let targets = find_targets(model, &matcher)?;
        let mut base = BTreeMap::new();
        let mut modules = BTreeSet::new();
        for (name, tensor, is_buffer) in tensors(model) {
            modules.extend(ancestors(&name).map(str::to_string));
            let is_adapted = |module: &str| targets.contains_key(module);
            if let Some(key) = base_key(&name, is_buffer, config, &matcher, is_adapted) {
                base.insert(name, (key, tensor));
            }
        }
        for wanted in config.modules_to_save.iter().flatten() {
            if !modules.iter().any(|path| path.ends_with(wanted.as_str())) {
                return Err(Error::config(format!(
                    "modules_to_save: no module is called {wanted:?}"
                )));
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
        Ok(Self { config, targets, base })
    }

    /// Names and shapes of the tensors of one adapter.
    fn adapter_shapes(&self, path: &str, target: &Target) -> Vec<(String, Vec<usize>)> {
        let (out_dim, in_dim) = (target.weight.dims()[0], target.weight.dims()[1]);
        let mut shapes = vec![
            (format!("{path}.lora_A.weight"), vec![target.rank, in_dim]),
            (format!("{path}.lora_B.weight"), vec![out_dim, target.rank]),
        ];
        if self.config.lora_bias {
            shapes.push((format!("{path}.lora_B.bias"), vec![out_dim]));
        }
        if self.config.use_dora {
            shapes.push((format!("{path}.lora_magnitude_vector"), vec![out_dim]));
        }
        shapes
    }

    /// Every tensor an adapter file for this model holds, by its key there.
    pub(super) fn slots(&self) -> BTreeMap<String, Slot> {
        let adapters = self
            .targets
            .iter()
            .flat_map(|(path, target)| self.adapter_shapes(path, target))
            .map(|(name, shape)| (format!("{PREFIX}{name}"), Slot { name, shape }));
        let base = self.base.iter().map(|(name, (key, tensor))| {
            (key.clone(), Slot { name: name.clone(), shape: tensor.dims().to_vec() })
        });
        adapters.chain(base).collect()
    }

    /// The adapter tensors that training starts from, by their name in the model.
    fn initial_values(&self, seed: u64) -> Result<BTreeMap<String, Tensor>> {
        let mut values = BTreeMap::new();
        for (path, target) in &self.targets {
            let device = target.weight.device();
            for (name, shape) in self.adapter_shapes(path, target) {
                let value = if name.ends_with("lora_A.weight") {
                    kaiming_uniform(&name, shape[0], shape[1], seed, device)?
                } else if name.ends_with("lora_magnitude_vector") {
                    let weight = target.weight.detach().to_dtype(DType::F32)?;
                    weight.sqr()?.sum(D::Minus1)?.sqrt()?
                } else {
                    Tensor::zeros(shape, DType::F32, device)?
                };
                values.insert(name, value);
            }
        }
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
                let name = format!("{path}.{leaf}");
                let value = values
                    .remove(&name)
                    .ok_or_else(|| Error::config(format!("no value for the tensor {name}")))?;
                let value = value.to_device(target.weight.device())?.to_dtype(DType::F32)?;
                Ok(Var::from_tensor(&value)?.into_inner())
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
                stream: philox::stream_of(path),
                unmerged: None,
            };
            adapters.insert(path.clone(), adapter);
        }
        let mut replaced = self.replaced_base(model, values)?;
        model.visit_mut("", &mut |path, node| {
            match node {
                NodeMut::Linear(linear) => {
                    if let Some(adapter) = adapters.remove(path) {
                        linear.set_adapter(path, adapter);
                    }
                }
                NodeMut::Parameter(tensor) | NodeMut::Buffer(tensor) => {
                    if let Some(new) = replaced.remove(path) {
                        *tensor = new;
                    }
                }
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
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut replaced = BTreeMap::new();
        for (name, current, is_buffer) in tensors(model) {
            let trained = !is_buffer && self.base.contains_key(&name);
            let new = match values.remove(&name) {
                Some(value) => value.to_device(current.device())?.to_dtype(current.dtype())?,
                None if trained == current.is_variable() => continue,
                None => current.detach(),
            };
            let new = if trained { Var::from_tensor(&new)?.into_inner() } else { new };
            replaced.insert(name, new);
        }
        Ok(replaced)
    }
}

/// Name and tensor of everything in `model`, and whether it is a buffer.
fn tensors(model: &dyn ModuleTree) -> Vec<(String, Tensor, bool)> {
    let mut tensors = Vec::new();
    model.visit("", &mut |name, node| match node {
        Node::Parameter(tensor) => tensors.push((name.to_string(), tensor.clone(), false)),
        Node::Buffer(tensor) => tensors.push((name.to_string(), tensor.clone(), true)),
        Node::Linear(_) => {}
    });
    tensors
}

fn find_targets(model: &dyn ModuleTree, matcher: &Matcher<'_>) -> Result<BTreeMap<String, Target>> {
    let mut linears = BTreeMap::new();
    let mut others = BTreeSet::new();
    let mut adapted = None;
    model.visit("", &mut |path, node| match node {
        Node::Linear(linear) => {
            if linear.adapter.is_some() {
                adapted.get_or_insert_with(|| path.to_string());
            }
            linears.insert(path.to_string(), linear.weight.clone());
        }
        Node::Parameter(_) | Node::Buffer(_) => {
            others.extend(ancestors(path).map(str::to_string));
        }
    });
    if let Some(path) = adapted {
        return Err(Error::config(format!(
            "{path} already carries an adapter: eject it or merge and unload it first"
        )));
    }
    for path in others.iter().filter(|path| !linears.contains_key(*path)) {
        if matcher.is_target(path, false)? {
            return Err(Error::config(format!(
                "target_modules: {path} is no linear layer, and only linear layers can be adapted"
            )));
        }
    }
    let mut targets = BTreeMap::new();
    for (path, weight) in &linears {
        if matcher.is_target(path, true)? {
            if weight.rank() != 2 || weight.elem_count() == 0 {
                return Err(Error::config(format!(
                    "{path}: expected a weight [out, in], got {:?}",
                    weight.dims()
                )));
            }
            let (rank, scaling) = matcher.rank_and_scaling(path)?;
            targets.insert(path.clone(), Target { weight: weight.clone(), rank, scaling });
        }
    }
    if targets.is_empty() {
        let names: BTreeSet<_> = linears.keys().map(|path| split_last(path).1).collect();
        let shown: Vec<_> = names.into_iter().take(SHOWN).collect();
        return Err(Error::config(format!(
            "target_modules matches no linear layer; linear layers here are called, for example: {}",
            shown.join(", ")
        )));
    }
    Ok(targets)
}

/// `[rows, cols]` in f32, uniform in `(-1/sqrt(cols), 1/sqrt(cols))`; a function of seed and name alone.
fn kaiming_uniform(
    name: &str,
    rows: usize,
    cols: usize,
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    let bound = 1.0 / (cols as f64).sqrt();
    let key = [seed as u32, (seed >> 32) as u32];
    let stream = philox::stream_of(name);
    let count = rows * cols;
    let values: Vec<f32> = (0..count.div_ceil(4) as u64)
        .flat_map(|block| philox::philox4x32([block as u32, (block >> 32) as u32, 0, stream], key))
        .take(count)
        .map(|word| {
            let unit = (f64::from(word) + 0.5) / 2f64.powi(32);
            ((2.0 * unit - 1.0) * bound) as f32
        })
        .collect();
    Ok(Tensor::from_vec(values, (rows, cols), device)?)
}

/// Freezes `model` and gives every targeted linear layer a fresh, trainable adapter in f32; makes trainable what
/// the configuration names besides (biases, modules to save). Returns the paths of the adapted layers. The same
/// seed gives the same adapter.
///
/// # Errors
/// When the configuration is invalid, a regular expression does not compile, nothing is targeted, something that is
/// no linear layer is targeted, a layer is both targeted and to be saved, no module has a name to be saved (PEFT
/// passes over that one in silence), or the model already carries an adapter.
/// The model is unchanged then.
pub fn inject(model: &mut dyn ModuleTree, config: &LoraConfig, seed: u64) -> Result<Vec<String>> {
    let plan = Plan::new(model, config)?;
    if config.init_lora_weights != InitLoraWeights::Default(true) {
        return Err(Error::config("a new adapter needs init_lora_weights = true"));
    }
    let values = plan.initial_values(seed)?;
    plan.apply(model, values)
}

/// Removes every adapter and, where one was merged, restores the weights from before. Base biases and modules that
/// were trained along keep their trained values.
pub fn eject(model: &mut dyn ModuleTree) -> Result<()> {
    model.visit_mut("", &mut |_, node| {
        if let NodeMut::Linear(linear) = node {
            if let Some(Adapter { unmerged: Some((weight, bias)), .. }) = linear.adapter.take() {
                (linear.weight, linear.bias) = (weight, bias);
            }
        }
        Ok(())
    })
}
