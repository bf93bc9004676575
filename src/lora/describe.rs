//! The configuration of an adapter that is given layer by layer: by names where names say just these layers, else by
//! their whole paths.

use super::target::Matcher;
use super::{LoraConfig, ModuleNames};
use crate::nn::{ModuleTree, Node};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// Rank and scaling by the path of the layer.
pub(super) type Layers = BTreeMap<String, (usize, f64)>;

/// The path of every layer that can be adapted, and whether it is linear.
pub(super) fn layer_paths(model: &dyn ModuleTree) -> Vec<(String, bool)> {
    let mut paths = Vec::new();
    model.visit("", &mut |path, node| {
        if let Node::Layer(layer) = node {
            paths.push((path.to_string(), layer.weight.rank() == 2));
        }
    });
    paths
}

/// `config` with the targets, ranks and scalings of `layers`, which are some of the layers `among`.
pub(super) fn describe(
    config: &LoraConfig,
    layers: &Layers,
    among: &[(String, bool)],
) -> Result<LoraConfig> {
    let Some(&(rank, scaling)) = layers.values().next() else {
        return Err(Error::config("there is no layer to adapt"));
    };
    let last = |path: &String| path.rsplit('.').next().unwrap_or(path).to_string();
    let names: BTreeSet<String> = layers.keys().map(last).collect();
    let mut described = LoraConfig {
        rank,
        alpha: scaling * rank as f64,
        use_rslora: false,
        target_modules: Some(ModuleNames::List(names.into_iter().collect())),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: None,
        rank_pattern: BTreeMap::new(),
        alpha_pattern: BTreeMap::new(),
        ..config.clone()
    };
    for (path, &(own_rank, own_scaling)) in layers {
        if (own_rank, own_scaling) != (rank, scaling) {
            let path = format!("^{}", fancy_regex::escape(path));
            described.rank_pattern.insert(path.clone(), own_rank);
            described.alpha_pattern.insert(path, own_scaling * own_rank as f64);
        }
    }
    let matcher = Matcher::new(&described)?;
    let mut exact = true;
    for (path, is_linear) in among {
        exact &= matcher.is_target(path, *is_linear)? == layers.contains_key(path);
    }
    if !exact {
        let paths: Vec<_> = layers.keys().map(|path| fancy_regex::escape(path)).collect();
        described.target_modules = Some(ModuleNames::Regex(paths.join("|")));
    }
    Ok(described)
}
