//! An adapter made of others: their weighted sum, `c_i = weight_i scaling_i`.
//!
//! ```text
//! factors   A = sum sign(c_i) sqrt|c_i| A_i     B = sum sqrt|c_i| B_i      equal ranks; B A has cross terms too
//! cat       A = [c_1 A_1; c_2 A_2; ..]          B = [B_1, B_2, ..]         the sum itself; ranks add up
//! svd       B A = the nearest of its rank to sum weight_i delta_i          any ranks
//! ```
//! The first and the last sum may be any of `task_arithmetic.rs`. The new one's scaling is 1. A layer that only some of
//! the adapters are on gets their part, and zeros up to the rank.
//!
//! Source: PEFT 0.21, `add_weighted_adapter` in `tuners/lora/model.py`.

use super::describe::{describe, layer_paths};
use super::inject::Plan;
#[cfg(feature = "decompositions")]
use super::linalg;
use super::switch::check_known;
use super::{LoraConfig, TaskArithmetic};
use crate::nn::{adapter_tensor_name, Adapter, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
#[cfg(feature = "decompositions")]
use nalgebra::DMatrix;
use std::collections::BTreeMap;

/// How [`add_weighted_adapter`] adds.
///
/// [Example](crate::lora::add_weighted_adapter)
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combination {
    /// A's and B's by themselves; the adapters must have one rank. PEFT's "linear", and, with the arithmetic of that
    /// name, "ties", "dare_linear", "dare_ties" and "magnitude_prune".
    Factors(TaskArithmetic),
    /// Side by side: exact, and as large as all together.
    Cat,
    /// The nearest of this rank; without one, of the largest rank among them. PEFT's "svd", "ties_svd" and so on.
    Svd {
        /// How the products are added.
        arithmetic: TaskArithmetic,
        /// At least 1.
        rank: Option<usize>,
    },
}

impl Combination {
    /// PEFT's "linear".
    pub const LINEAR: Self = Self::Factors(TaskArithmetic::SUM);

    /// PEFT's "svd".
    pub fn svd(rank: Option<usize>) -> Self {
        Self::Svd { arithmetic: TaskArithmetic::SUM, rank }
    }
}

/// An adapter that is on a layer.
struct Part {
    /// Its place in the list.
    index: usize,
    /// Where its tensors are in the tree.
    path: String,
    name: String,
    weight: f64,
    adapter: Adapter,
}

/// Adds to the model the adapter `name`, the weighted sum of others that it carries. As after
/// [`add_adapter`](super::add_adapter) the adapters in use stay so and the new one waits, frozen. Returns the
/// configuration to save it with; its dropout is that of the first.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::lora::{add_adapter, add_weighted_adapter, adapter_names, set_adapter};
/// use candle_sam_lora::lora::{Combination, LoraConfig, TaskArithmetic};
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
/// let both = [("cells", 0.7), ("nuclei", 0.3)];
/// add_weighted_adapter(&mut head, "sum", &both, Combination::LINEAR)?;
/// add_weighted_adapter(&mut head, "ties", &both, Combination::Factors(TaskArithmetic::ties(0.5)))?;
/// let config = add_weighted_adapter(&mut head, "cat", &both, Combination::Cat)?;
/// assert_eq!(config.rank, 2 + 2);
/// set_adapter(&mut head, &["sum"])?;
/// assert_eq!(adapter_names(&head).len(), 5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`add_adapter`](super::add_adapter); besides,
/// - there is nothing to add;
/// - an adapter is unknown, uses DoRA or `lora_bias`, or changes its base;
/// - a weight is not finite, or a density is out of range;
/// - ranks differ in a sum of factors.
///
/// The model is unchanged then.
pub fn add_weighted_adapter(
    model: &mut dyn ModuleTree,
    name: &str,
    adapters: &[(&str, f64)],
    combination: Combination,
) -> Result<LoraConfig> {
    let layers = layers(model, adapters)?;
    let mut ranks = vec![0; adapters.len()];
    let mut dropout = None;
    for Part { index, adapter, .. } in layers.values().flatten() {
        ranks[*index] = adapter.rank().max(ranks[*index]);
        if *index == 0 {
            dropout.get_or_insert(adapter.dropout);
        }
    }
    if let Combination::Factors(arithmetic) | Combination::Svd { arithmetic, .. } = combination {
        arithmetic.validate()?;
    }
    // As in PEFT one alone is only weighted.
    let combination = match (adapters, combination) {
        (_, Combination::Factors(_)) | ([_, _, ..], _) => combination,
        _ => Combination::LINEAR,
    };
    let largest = ranks.iter().copied().max().unwrap_or(0);
    let rank = match combination {
        Combination::Factors(_) if ranks.iter().any(|rank| *rank != largest) => {
            return Err(Error::config(format!(
                "a sum of factors needs adapters of one rank, got {ranks:?}"
            )))
        }
        Combination::Factors(_) => largest,
        Combination::Cat => ranks.iter().sum(),
        Combination::Svd { rank, .. } => rank.unwrap_or(largest),
    };
    let config = LoraConfig::new(rank).dropout(dropout.unwrap_or(0.0));
    let described = layers.keys().map(|path| (path.clone(), (rank, 1.0))).collect();
    let config = describe(&config, &described, &layer_paths(model))?;
    let plan = Plan::new(model, name, &config)?;
    let mut values = BTreeMap::new();
    for (path, parts) in &layers {
        let (a, b) = match combination {
            Combination::Factors(arithmetic) => factors(parts, &arithmetic)?,
            Combination::Cat => cat(parts)?,
            Combination::Svd { arithmetic, .. } => svd(parts, &arithmetic, rank)?,
        };
        let a = a.pad_with_zeros(0, 0, rank.saturating_sub(a.dims()[0]))?;
        let b = b.pad_with_zeros(1, 0, rank.saturating_sub(b.dims()[1]))?;
        values.insert(adapter_tensor_name(path, name, "lora_A.weight"), a);
        values.insert(adapter_tensor_name(path, name, "lora_B.weight"), b);
    }
    plan.apply(model, values)?;
    Ok(config)
}

/// The parts to add, by layer.
fn layers(model: &dyn ModuleTree, adapters: &[(&str, f64)]) -> Result<BTreeMap<String, Vec<Part>>> {
    let names: Vec<&str> = adapters.iter().map(|(name, _)| *name).collect();
    check_known(model, &names)?;
    if names.is_empty() {
        return Err(Error::config("a weighted adapter needs an adapter at least"));
    }
    if let Some((name, weight)) = adapters.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(Error::config(format!("the weight of {name:?} must be finite, got {weight}")));
    }
    let (mut layers, mut problem) = (BTreeMap::<String, Vec<Part>>::new(), None);
    model.visit("", &mut |path, node| {
        let Node::Layer(layer) = node else { return };
        for (index, (name, weight)) in adapters.iter().enumerate() {
            let Some(adapter) = layer.adapters.get(name) else { continue };
            if adapter.magnitude.is_some() || adapter.b_bias.is_some() || adapter.changes_base {
                problem = Some(format!(
                    "{name:?} uses DoRA or lora_bias or changes its base, and cannot be part of a weighted adapter"
                ));
            }
            let (path, name) = (path.to_string(), name.to_string());
            let parts = layers.entry(path.clone()).or_default();
            parts.push(Part { index, path, name, weight: *weight, adapter: adapter.clone() });
        }
    });
    problem.map_or(Ok(layers), |problem| Err(Error::config(problem)))
}

/// `factor` times a tensor, in f32.
fn scaled(tensor: &Tensor, factor: f64) -> candle_core::Result<Tensor> {
    tensor.detach().to_dtype(DType::F32)? * factor
}

impl Part {
    fn coefficient(&self) -> f64 {
        self.weight * self.adapter.scaling
    }

    /// A term of a sum; its name is the address of its random numbers.
    fn term(&self, leaf: &str, weight: f64, tensor: &Tensor) -> (String, f64, Tensor) {
        (adapter_tensor_name(&self.path, &self.name, leaf), weight, tensor.clone())
    }
}

fn factors(parts: &[Part], arithmetic: &TaskArithmetic) -> Result<(Tensor, Tensor)> {
    let a = parts.iter().map(|part| {
        let c = part.coefficient();
        part.term("lora_A.weight", c.abs().sqrt().copysign(c), &part.adapter.a)
    });
    let b = parts
        .iter()
        .map(|part| part.term("lora_B.weight", part.coefficient().abs().sqrt(), &part.adapter.b));
    Ok((arithmetic.sum(&a.collect::<Vec<_>>())?, arithmetic.sum(&b.collect::<Vec<_>>())?))
}

fn cat(parts: &[Part]) -> Result<(Tensor, Tensor)> {
    let a = parts.iter().map(|part| scaled(&part.adapter.a, part.coefficient()));
    let b = parts.iter().map(|part| scaled(&part.adapter.b, 1.0));
    let a = Tensor::cat(&a.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
    Ok((a, Tensor::cat(&b.collect::<candle_core::Result<Vec<_>>>()?, 1)?))
}

#[cfg(not(feature = "decompositions"))]
fn svd(_: &[Part], _: &TaskArithmetic, _: usize) -> Result<(Tensor, Tensor)> {
    Err(Error::config("Combination::Svd needs the feature `decompositions` of candle-sam-lora"))
}

#[cfg(feature = "decompositions")]
fn svd(parts: &[Part], arithmetic: &TaskArithmetic, rank: usize) -> Result<(Tensor, Tensor)> {
    let deltas = parts
        .iter()
        .map(|part| Ok(part.term("delta", part.weight, &part.adapter.delta()?)))
        .collect::<Result<Vec<_>>>()?;
    let delta = arithmetic.sum(&deltas)?;
    let Part { path, adapter, .. } = &parts[0];
    let linalg::Svd { u, s, vt } = linalg::svd(&linalg::matrix(path, &delta)?, rank);
    let b = u * DMatrix::from_diagonal(&s.into());
    // In the shapes that the layer's own have.
    let shaped = |matrix: &DMatrix<f64>, like: &Tensor, at: usize| -> Result<Tensor> {
        let mut dims = like.dims().to_vec();
        dims[at] = vt.nrows();
        Ok(linalg::tensor(matrix, delta.device())?.reshape(dims)?)
    };
    Ok((shaped(&vt, &adapter.a, 0)?, shaped(&b, &adapter.b, 1)?))
}
