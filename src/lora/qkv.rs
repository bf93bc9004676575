//! Adapters of q, k and v as one adapter of a fused `qkv`, and back, for models and tools that have only the one.
//!
//! ```text
//! fuse    A = [A_q; A_k; A_v]      B = | B_q          |      ranks add up; an unadapted part has no column, and rows
//!                                      |     B_k      |      of zeros; its magnitude is || W ||_row
//!                                      |         B_v  |
//! split   A_q = A_k = A_v = A      B = [B_q; B_k; B_v]       ranks stay
//! ```
//! The scaling stays where the parts have one; where they differ it is multiplied into B. Both ways give the same
//! outputs. Trained further, a fused adapter has one dropout mask where q, k and v have three, and fills the zeros.

use super::describe::{describe, layer_paths, Layers};
use super::state::{split_last, PREFIX};
use super::target::Matcher;
use super::{named_adapter_state, LoraConfig};
use crate::nn::{join, Adapter, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{DType, Tensor, D};
use std::collections::BTreeMap;

const PARTS: [&str; 3] = ["q", "k", "v"];

/// q, k or v.
#[derive(Clone)]
pub(super) struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Projection {
    fn rows(&self) -> usize {
        self.weight.dims()[0]
    }
}

/// The modules that hold linear layers q, k and v, by their paths.
pub(super) fn attentions(model: &dyn ModuleTree) -> BTreeMap<String, [Projection; 3]> {
    let mut found = BTreeMap::<String, [Option<Projection>; 3]>::new();
    model.visit("", &mut |path, node| {
        let (parent, name) = split_last(path);
        let part = PARTS.iter().position(|part| *part == name);
        if let (Node::Layer(layer), Some(part)) = (node, part) {
            if layer.weight.rank() == 2 {
                let projection =
                    Projection { weight: layer.weight.clone(), bias: layer.bias.cloned() };
                found.entry(parent.to_string()).or_default()[part] = Some(projection);
            }
        }
    });
    let whole = found.into_iter().filter_map(|(path, parts)| match parts {
        [Some(q), Some(k), Some(v)] => Some((path, [q, k, v])),
        _ => None,
    });
    whole.collect()
}

fn refuse(config: &LoraConfig) -> Result<()> {
    if config.init_lora_weights.changes_base() {
        return Err(Error::config(
            "an adapter that took its start out of the base's weights: convert it to plain LoRA first",
        ));
    }
    Ok(())
}

fn whole(key: &str) -> Error {
    Error::config(format!("{key} is saved whole, by modules_to_save, and is no part of an adapter"))
}

/// The adapter called `name` of a model with q, k and v as an adapter of the same model with `qkv`. Returns
/// configuration and state, from which [`write_adapter`](super::write_adapter) makes a folder. `config` is the one it
/// was made with. Adapters of other layers stay what they are.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::lora::{fuse_qkv, inject, split_qkv, LoraConfig};
/// use candle_sam_lora::sam::{AttentionKind, SamModel};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let mut sam = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Split, DType::F32, &Device::Cpu)?;
/// let config = LoraConfig::new(4).target_modules(["q", "v"]);
/// inject(&mut sam, &config, 0)?;
///
/// // For tools whose SAM has the fused qkv of its checkpoint, and back.
/// let (config, fused) = fuse_qkv(&sam, "default", &config)?;
/// assert!(fused.keys().all(|key| key.contains(".attn.qkv.lora_")));
/// let (_, split) = split_qkv(&sam, &config, &fused)?;
/// assert!(split.keys().any(|key| key.contains(".attn.q.lora_A")));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - there is no such adapter, or it is merged;
/// - it is on no q, k or v that stand together, or took its start out of the base;
/// - q, k or v are trained whole.
pub fn fuse_qkv(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
) -> Result<(LoraConfig, BTreeMap<String, Tensor>)> {
    refuse(config)?;
    let mut tensors = named_adapter_state(model, name, config)?;
    let mut adapters = BTreeMap::new();
    model.visit("", &mut |path, node| {
        if let Node::Layer(layer) = node {
            adapters.extend(layer.adapters.get(name).map(|own| (path.to_string(), own.clone())));
        }
    });
    let attentions = attentions(model);
    let mut layers = Layers::new();
    let mut among = layer_paths(model);
    for (parent, projections) in &attentions {
        let fused = join(parent, "qkv");
        among.push((fused.clone(), true));
        let paths = PARTS.map(|part| join(parent, part));
        among.retain(|(path, _)| !paths.contains(path));
        let parts = paths.clone().map(|path| adapters.remove(&path));
        let is_adapted = parts.iter().any(Option::is_some);
        if is_adapted {
            let adapter = block(projections, &parts)?;
            layers.insert(fused.clone(), (adapter.rank(), adapter.scaling));
            for (leaf, tensor) in adapter.tensors() {
                tensors.insert(format!("{PREFIX}{fused}.{leaf}"), tensor.clone());
            }
        }
        let mut keeps_bias = false;
        for below in paths.map(|path| format!("{PREFIX}{path}.")) {
            let keys: Vec<_> =
                tensors.keys().filter(|key| key.starts_with(&below)).cloned().collect();
            for key in keys {
                match &key[below.len()..] {
                    "bias" | "base_layer.bias" => keeps_bias = true,
                    leaf if leaf.starts_with("lora_") => {}
                    _ => return Err(whole(&key)),
                }
                tensors.remove(&key);
            }
        }
        let biases: Option<Vec<_>> = projections.iter().map(|part| part.bias.clone()).collect();
        if let (true, Some(biases)) = (keeps_bias, biases) {
            let leaf = if is_adapted { "base_layer.bias" } else { "bias" };
            tensors.insert(format!("{PREFIX}{fused}.{leaf}"), Tensor::cat(&biases, 0)?.detach());
        }
    }
    if layers.is_empty() {
        return Err(Error::config(format!(
            "the adapter {name:?} is on no q, k or v of a module that has all three"
        )));
    }
    layers.extend(adapters.into_iter().map(|(path, own)| (path, (own.rank(), own.scaling))));
    Ok((describe(config, &layers, &among)?, tensors))
}

/// The adapters of q, k and v, of which at least one is there, as one of `qkv`.
fn block(projections: &[Projection; 3], parts: &[Option<Adapter>; 3]) -> Result<Adapter> {
    let present = || parts.iter().flatten();
    let Some(first) = present().next() else { return Err(Error::config("nothing to fuse")) };
    let rank = present().map(Adapter::rank).sum();
    let alike = present().all(|part| part.scaling == first.scaling);
    let scaling = if alike { first.scaling } else { 1.0 };
    let device = first.a.device();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device);
    let (mut b, mut b_bias, mut magnitude, mut before) = (vec![], vec![], vec![], 0);
    for (projection, part) in projections.iter().zip(parts) {
        let rows = projection.rows();
        let Some(part) = part else {
            b.push(zeros(&[rows, rank])?);
            b_bias.push(zeros(&[rows])?);
            let weight = projection.weight.to_dtype(DType::F32)?;
            magnitude.push(weight.sqr()?.sum(D::Minus1)?.sqrt()?);
            continue;
        };
        let scaled = |tensor: &Tensor| match alike {
            true => Ok(tensor.clone()),
            false => tensor * part.scaling,
        };
        let after = rank - before - part.rank();
        b.push(scaled(&part.b)?.pad_with_zeros(1, before, after)?);
        b_bias.extend(part.b_bias.as_ref().map(scaled).transpose()?);
        magnitude.extend(part.magnitude.clone());
        before += part.rank();
    }
    let a: Vec<&Tensor> = present().map(|part| &part.a).collect();
    let rows = |tensors: &[Tensor]| Ok::<_, Error>(Tensor::cat(tensors, 0)?.detach());
    Ok(Adapter {
        a: Tensor::cat(&a, 0)?.detach(),
        b: rows(&b)?,
        b_bias: first.b_bias.is_some().then(|| rows(&b_bias)).transpose()?,
        magnitude: first.magnitude.is_some().then(|| rows(&magnitude)).transpose()?,
        scaling,
        ..first.clone()
    })
}

/// An adapter of a model with `qkv`, as [`read_adapter`](super::read_adapter) gives it, as one for `model` with q, k
/// and v in its place. Returns configuration and tensors for [`load_adapter_tensors`](super::load_adapter_tensors) or
/// [`write_adapter`](super::write_adapter).
///
/// [Example](crate::lora::fuse_qkv)
///
/// # Errors
/// - the adapter is on no `qkv` of this model, or took its start out of the base;
/// - a tensor has other rows than q, k and v together;
/// - `qkv` is trained whole.
pub fn split_qkv(
    model: &dyn ModuleTree,
    config: &LoraConfig,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(LoraConfig, BTreeMap<String, Tensor>)> {
    refuse(config)?;
    let matcher = Matcher::new(config)?;
    let attentions = attentions(model);
    let among = layer_paths(model);
    let mut layers = Layers::new();
    let mut split = tensors.clone();
    for (path, is_linear) in &among {
        let is_part =
            attentions.contains_key(split_last(path).0) && PARTS.contains(&split_last(path).1);
        if !is_part && matcher.is_target(path, *is_linear)? {
            layers.insert(path.clone(), matcher.rank_and_scaling(path)?);
        }
    }
    let mut is_on_any = false;
    for (parent, projections) in &attentions {
        let fused = join(parent, "qkv");
        if matcher.is_target(&fused, true)? {
            is_on_any = true;
            let facts = matcher.rank_and_scaling(&fused)?;
            layers.extend(PARTS.map(|part| (join(parent, part), facts)));
        }
        let below = format!("{PREFIX}{fused}.");
        for (key, tensor) in tensors {
            let Some(leaf) = key.strip_prefix(&below) else { continue };
            if leaf == "weight" {
                return Err(whole(key));
            }
            split.remove(key);
            let rows: usize = projections.iter().map(Projection::rows).sum();
            let found = tensor.dims().first().copied().unwrap_or(0);
            if leaf != "lora_A.weight" && found != rows {
                return Err(Error::config(format!(
                    "{key} has {found} rows, and q, k and v have {rows} together"
                )));
            }
            let mut start = 0;
            for (part, projection) in PARTS.iter().zip(projections) {
                let own = match leaf {
                    "lora_A.weight" => tensor.clone(),
                    _ => tensor.narrow(0, start, projection.rows())?.copy()?,
                };
                split.insert(format!("{PREFIX}{}.{leaf}", join(parent, part)), own);
                start += projection.rows();
            }
        }
    }
    if !is_on_any {
        return Err(Error::config("the adapter is on no qkv that is q, k and v in this model"));
    }
    Ok((describe(config, &layers, &among)?, split))
}
