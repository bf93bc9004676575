//! The changes an injection makes: the layers that get an adapter, the tensors saved with it, and their first values.

use super::checks::{check_name, check_others};
use crate::lora::base::{base_tensors, refuse_nested, unknown_modules, BaseTensor};
use crate::lora::init::{adapter_shapes, initial, magnitude, uniform, Layer};
use crate::lora::state::{ancestors, base_key, split_last, Slot, PREFIX};
use crate::lora::target::Matcher;
use crate::lora::{InitLoraWeights, LoraConfig};
use crate::nn::{adapter_tensor_name, is_adapter_tensor, refuse_twins, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// How many names an error offers as candidates.
const SHOWN: usize = 12;

/// A layer that gets an adapter.
pub(super) struct Target {
    pub(super) weight: Tensor,
    pub(super) rank: usize,
    pub(super) scaling: f64,
}

/// The changes of an injection.
pub(in crate::lora) struct Plan<'a> {
    pub(super) config: &'a LoraConfig,
    /// The adapter's name.
    pub(super) name: &'a str,
    /// The adapters in use on layers that have any; the new one where there are none.
    pub(super) active: Vec<String>,
    pub(super) targets: BTreeMap<String, Target>,
    /// Base tensors saved with the adapter, by their name in the model; the parameters among them are trained.
    pub(super) base: BTreeMap<String, (String, Tensor)>,
    /// Names and patterns of the configuration that mean nothing in the model; PEFT passes over them.
    pub(in crate::lora) idle: Vec<String>,
}

impl<'a> Plan<'a> {
    pub(in crate::lora) fn new(
        model: &dyn ModuleTree,
        name: &'a str,
        config: &'a LoraConfig,
    ) -> Result<Self> {
        config.validate()?;
        check_name(name)?;
        refuse_twins(model)?;
        let active = check_others(model, name, config)?.unwrap_or_else(|| vec![name.to_string()]);
        let matcher = Matcher::new(config)?;
        let targets = find_targets(model, &matcher)?;
        let mut base = BTreeMap::new();
        let tensors = base_tensors(model);
        let unknown = unknown_modules(&tensors, config).into_iter();
        let mut idle: Vec<String> = unknown
            .map(|name| {
                format!("modules_to_save: no module is called {name:?}; PEFT passes over it")
            })
            .collect();
        idle.extend(matcher.idle_patterns(targets.keys())?);
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
        refuse_int8(config, &targets, &base)?;
        Ok(Self { config, name, active, targets, base, idle })
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
    pub(in crate::lora) fn slots(&self) -> BTreeMap<String, Slot> {
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
    pub(in crate::lora) fn initial_values(&self, seed: u64) -> Result<BTreeMap<String, Tensor>> {
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
        // On a GPU every thread has a stream of its own, which knows nothing of the others' work: this thread does it
        // all.
        let on_the_cpu = self.targets.values().all(|target| target.weight.device().is_cpu());
        let starts = match on_the_cpu {
            true => self.targets.par_iter().map(values_of).collect::<Result<Vec<_>>>()?,
            false => self.targets.iter().map(values_of).collect::<Result<Vec<_>>>()?,
        };
        Ok(starts.into_iter().flatten().collect())
    }

    /// The weights that a loaded adapter wants in the base's place, by their name in the model.
    pub(in crate::lora) fn base_values(&self) -> Result<BTreeMap<String, Tensor>> {
        if !self.config.init_lora_weights.changes_base() {
            return Ok(BTreeMap::new());
        }
        let mut values = self.initial_values(0)?;
        values.retain(|name, _| !is_adapter_tensor(name));
        Ok(values)
    }
}

/// Refuses what reads or replaces a weight in int8.
fn refuse_int8(
    config: &LoraConfig,
    targets: &BTreeMap<String, Target>,
    base: &BTreeMap<String, (String, Tensor)>,
) -> Result<()> {
    let is_int8 = |tensor: &Tensor| tensor.dtype() == DType::U8;
    if let Some((name, _)) = base.iter().find(|(_, (_, tensor))| is_int8(tensor)) {
        return Err(Error::config(format!("{name} is in int8 and cannot be trained")));
    }
    let reads = config.use_dora || config.init_lora_weights.changes_base();
    let target = targets.iter().find(|(_, target)| is_int8(&target.weight));
    match target.filter(|_| reads) {
        Some((path, _)) => Err(Error::config(format!(
            "{path}: its weight is in int8; DoRA, PiSSA and OLoRA need one in floating point"
        ))),
        None => Ok(()),
    }
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
        let shown: Vec<_> = names.into_iter().filter(|name| !name.is_empty()).take(SHOWN).collect();
        let layers = match shown.is_empty() {
            true => "the model has no linear layer or convolution in a field of a name".to_string(),
            false => format!("layers here are called, for example: {}", shown.join(", ")),
        };
        let narrowed = matcher.narrowed_by();
        return Err(Error::config(format!("target_modules matches no layer; {layers}{narrowed}")));
    }
    Ok(targets)
}
