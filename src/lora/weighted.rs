//! An adapter made of others: their weighted sum, `c_i = weight_i scaling_i`.
//!
//! ```text
//! linear   A = sum sign(c_i) sqrt|c_i| A_i     B = sum sqrt|c_i| B_i      equal ranks; B A has cross terms too
//! cat      A = [c_1 A_1; c_2 A_2; ..]          B = [B_1, B_2, ..]         the sum itself; ranks add up
//! svd      B A = the nearest of its rank to sum weight_i delta_i          any ranks
//! ```
//! The new one's scaling is 1. A layer that only some of the adapters are on gets their part, and zeros up to the rank.
//!
//! Source: PEFT 0.21, `add_weighted_adapter` in `tuners/lora/model.py`.

use super::inject::Plan;
use super::linalg;
use super::switch::check_known;
use super::LoraConfig;
use crate::nn::{adapter_tensor_name, Adapter, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use nalgebra::DMatrix;
use std::collections::BTreeMap;

/// How [`add_weighted_adapter`] adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combination {
    /// A's and B's by themselves; the adapters must have one rank.
    Linear,
    /// Side by side: exact, and as large as all together.
    Cat,
    /// The nearest of this rank; without one, of the largest rank among them.
    Svd {
        /// At least 1.
        rank: Option<usize>,
    },
}

/// A layer's part of each adapter that is on it: its place in the list, the weight, the adapter.
type Parts = Vec<(usize, f64, Adapter)>;

/// Adds to the model the adapter `name`, the weighted sum of others that it carries. As after
/// [`add_adapter`](super::add_adapter) the adapters in use stay so and the new one waits, frozen. Returns the
/// configuration to save it with; its dropout is that of the first.
///
/// # Errors
/// When there is nothing to add, an adapter is unknown, uses DoRA or `lora_bias`, or changes its base, a weight is not
/// finite, ranks differ in a linear sum, or as [`add_adapter`](super::add_adapter). The model is unchanged then.
pub fn add_weighted_adapter(
    model: &mut dyn ModuleTree,
    name: &str,
    adapters: &[(&str, f64)],
    combination: Combination,
) -> Result<LoraConfig> {
    let layers = layers(model, adapters)?;
    let mut ranks = vec![0; adapters.len()];
    let mut dropout = None;
    for (index, _, adapter) in layers.values().flatten() {
        ranks[*index] = adapter.rank().max(ranks[*index]);
        if *index == 0 {
            dropout.get_or_insert(adapter.dropout);
        }
    }
    let combination = if adapters.len() == 1 { Combination::Linear } else { combination };
    let largest = ranks.iter().copied().max().unwrap_or(0);
    let rank = match combination {
        Combination::Linear if ranks.iter().any(|rank| *rank != largest) => {
            return Err(Error::config(format!(
                "a linear sum needs adapters of one rank, got {ranks:?}"
            )))
        }
        Combination::Linear => largest,
        Combination::Cat => ranks.iter().sum(),
        Combination::Svd { rank } => rank.unwrap_or(largest),
    };
    // Whole names: a list's are matched from their end.
    let paths: Vec<_> = layers.keys().map(|path| fancy_regex::escape(path)).collect();
    let config = LoraConfig::new(rank)
        .alpha(rank as f64)
        .dropout(dropout.unwrap_or(0.0))
        .target_regex(paths.join("|"));
    let plan = Plan::new(model, name, &config)?;
    let mut values = BTreeMap::new();
    for (path, parts) in &layers {
        let (a, b) = match combination {
            Combination::Linear => linear(parts)?,
            Combination::Cat => cat(parts)?,
            Combination::Svd { .. } => svd(path, parts, rank)?,
        };
        let a = a.pad_with_zeros(0, 0, rank.saturating_sub(a.dims()[0]))?;
        let b = b.pad_with_zeros(1, 0, rank.saturating_sub(b.dims()[1]))?;
        values.insert(adapter_tensor_name(path, name, "lora_A.weight"), a);
        values.insert(adapter_tensor_name(path, name, "lora_B.weight"), b);
    }
    plan.apply(model, values)?;
    Ok(config)
}

/// What is to be added, by layer.
fn layers(model: &dyn ModuleTree, adapters: &[(&str, f64)]) -> Result<BTreeMap<String, Parts>> {
    let names: Vec<&str> = adapters.iter().map(|(name, _)| *name).collect();
    check_known(model, &names)?;
    if names.is_empty() {
        return Err(Error::config("a weighted adapter needs an adapter at least"));
    }
    if let Some((name, weight)) = adapters.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(Error::config(format!("the weight of {name:?} must be finite, got {weight}")));
    }
    let (mut layers, mut problem) = (BTreeMap::<String, Parts>::new(), None);
    model.visit("", &mut |path, node| {
        let Node::Layer(layer) = node else { return };
        for (index, (name, weight)) in adapters.iter().enumerate() {
            let Some(adapter) = layer.adapters.get(name) else { continue };
            if adapter.magnitude.is_some() || adapter.b_bias.is_some() || adapter.changes_base {
                problem = Some(format!(
                    "{name:?} uses DoRA or lora_bias or changes its base, and cannot be part of a weighted adapter"
                ));
            }
            let parts = layers.entry(path.to_string()).or_default();
            parts.push((index, *weight, adapter.clone()));
        }
    });
    problem.map_or(Ok(layers), |problem| Err(Error::config(problem)))
}

/// `factor` times a tensor, in f32.
fn scaled(tensor: &Tensor, factor: f64) -> candle_core::Result<Tensor> {
    tensor.detach().to_dtype(DType::F32)? * factor
}

fn sum(terms: impl Iterator<Item = candle_core::Result<Tensor>>) -> candle_core::Result<Tensor> {
    let terms = terms.collect::<candle_core::Result<Vec<_>>>()?;
    Tensor::stack(&terms, 0)?.sum(0)
}

fn linear(parts: &Parts) -> Result<(Tensor, Tensor)> {
    let coefficient = |weight: f64, adapter: &Adapter| weight * adapter.scaling;
    let a = sum(parts.iter().map(|(_, weight, adapter)| {
        let c = coefficient(*weight, adapter);
        scaled(&adapter.a, c.abs().sqrt().copysign(c))
    }))?;
    let b = sum(parts.iter().map(|(_, weight, adapter)| {
        scaled(&adapter.b, coefficient(*weight, adapter).abs().sqrt())
    }))?;
    Ok((a, b))
}

fn cat(parts: &Parts) -> Result<(Tensor, Tensor)> {
    let a = parts.iter().map(|(_, weight, adapter)| scaled(&adapter.a, weight * adapter.scaling));
    let b = parts.iter().map(|(_, _, adapter)| scaled(&adapter.b, 1.0));
    let a = Tensor::cat(&a.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
    Ok((a, Tensor::cat(&b.collect::<candle_core::Result<Vec<_>>>()?, 1)?))
}

fn svd(path: &str, parts: &Parts, rank: usize) -> Result<(Tensor, Tensor)> {
    let delta = sum(parts.iter().map(|(_, weight, adapter)| scaled(&adapter.delta()?, *weight)))?;
    let linalg::Svd { u, s, vt } = linalg::svd(&linalg::matrix(path, &delta)?, rank);
    let b = u * DMatrix::from_diagonal(&s.into());
    // In the shapes that the layer's own have.
    let shaped = |matrix: &DMatrix<f64>, like: &Tensor, at: usize| -> Result<Tensor> {
        let mut dims = like.dims().to_vec();
        dims[at] = vt.nrows();
        Ok(linalg::tensor(matrix, delta.device())?.reshape(dims)?)
    };
    let (_, _, adapter) = &parts[0];
    Ok((shaped(&vt, &adapter.a, 0)?, shaped(&b, &adapter.b, 1)?))
}
