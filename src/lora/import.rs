//! LoRA for SAM that was not trained with PEFT: SAMed's files and micro-sam's, of safetensors or of `torch.save`.
//!
//! ```text
//! SAMed       w_a_000, w_b_000 ..                  block by block: even numbers are q's, odd ones v's
//!             <..>.blocks.N.attn.qkv.linear_a_q.weight            in a state dict of the whole model
//! micro-sam   <..>.blocks.N.attn.qkv.w_a_linear_q.weight          q, k, v
//!             <..>.blocks.N.mlp.w_a_linear_1.weight               1 is lin1, 2 is lin2
//! ```
//! Both add `B A x` without a scaling, so alpha is the rank here.
//!
//! Sources: github.com/hitachinsk/SAMed, `sam_lora_image_encoder.py`;
//! github.com/computational-cell-analytics/micro-sam, `micro_sam/models/peft_sam.py`.

use super::adapter::check_value;
use super::describe::{describe, layer_paths, Layers};
use super::qkv::attentions;
use super::state::PREFIX;
use super::LoraConfig;
use crate::nn::checkpoint::TensorReader;
use crate::nn::ModuleTree;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// The layers of a block, by the ends of the names of their matrices.
const ATTENTION: [(&str, &str); 3] = [("q", "attn.q"), ("k", "attn.k"), ("v", "attn.v")];
const MLP: [(&str, &str); 2] = [("1", "mlp.lin1"), ("2", "mlp.lin2")];

/// Which block a matrix belongs to.
#[derive(Clone, Copy)]
enum Block {
    /// That with this number.
    Numbered(usize),
    /// The so-manieth of those that are adapted.
    Nth(usize),
}

/// A matrix of an adapter in a file.
struct Matrix {
    block: Block,
    layer: &'static str,
    is_a: bool,
}

/// The matrix that a tensor's name denotes; none for a tensor of the base model.
///
/// # Errors
/// On a tensor of an adapter of a kind that is not known.
fn parse(name: &str) -> Result<Option<Matrix>> {
    let unknown = || Error::config(format!("{name} belongs to no kind of adapter known here"));
    let parts: Vec<&str> = name.split('.').collect();
    let (block, leaf, layers) = match parts.as_slice() {
        [.., "blocks", _, "attn", "qkv", "weight" | "bias"]
        | [.., "blocks", _, "attn", "qkv", "qkv_proj" | "qkv", _]
        | [.., "blocks", _, "mlp", "lin1" | "lin2", _]
        | [.., "blocks", _, "mlp", "mlp_layer", _, _] => return Ok(None),
        [.., "blocks", number, "attn", "qkv", leaf, "weight"] => (number, *leaf, &ATTENTION[..]),
        [.., "blocks", number, "mlp", leaf, "weight"] => (number, *leaf, &MLP[..]),
        [single] if single.rsplit('_').next().is_some_and(|end| end.parse::<usize>().is_ok()) => {
            let numbered =
                [("w_a_", true), ("w_b_", false)].into_iter().find_map(|(start, is_a)| {
                    Some((single.strip_prefix(start)?.parse::<usize>().ok()?, is_a))
                });
            let (number, is_a) = numbered.ok_or_else(unknown)?;
            let layer = if number % 2 == 0 { "attn.q" } else { "attn.v" };
            return Ok(Some(Matrix { block: Block::Nth(number / 2), layer, is_a }));
        }
        parts => {
            let adapts = |four: &[&str]| {
                matches!(four, ["blocks", _, "attn", "qkv"] | ["blocks", _, "mlp", _])
            };
            return if parts.windows(4).any(adapts) { Err(unknown()) } else { Ok(None) };
        }
    };
    let number = block.parse().map_err(|_| unknown())?;
    for (end, layer) in layers {
        for (matrix, is_a) in [("a", true), ("b", false)] {
            let spellings = [format!("w_{matrix}_linear_{end}"), format!("linear_{matrix}_{end}")];
            if spellings.iter().any(|spelling| spelling == leaf) {
                return Ok(Some(Matrix { block: Block::Numbered(number), layer, is_a }));
            }
        }
    }
    Err(unknown())
}

/// The blocks of the model by their numbers: what holds an `attn` with q, k and v.
fn model_blocks(model: &dyn ModuleTree) -> Result<BTreeMap<usize, String>> {
    let mut blocks = BTreeMap::new();
    for path in attentions(model).into_keys() {
        let Some(block) = path.strip_suffix(".attn") else { continue };
        let number = block.rsplit('.').next().and_then(|number| number.parse().ok());
        if let Some(number) = number {
            if blocks.insert(number, block.to_string()).is_some() {
                return Err(Error::config(format!(
                    "the model has several blocks with the number {number}"
                )));
            }
        }
    }
    if blocks.is_empty() {
        return Err(Error::config("the model has no blocks whose attention has q, k and v apart"));
    }
    Ok(blocks)
}

/// Reads the adapter in a file of SAMed or micro-sam, for `model`, whose attentions have q, k and v apart. Returns its
/// configuration and tensors, for [`load_adapter_tensors`](super::load_adapter_tensors) or
/// [`write_adapter`](super::write_adapter). SAMed's files do not say which blocks are adapted: without `blocks` all
/// are. Tensors of the base in the same file are left to `sam::checkpoint::load`, which reads such files too.
///
/// [Example](crate::guide::peft)
///
/// # Errors
/// When the file cannot be read or holds no such adapter, or tensors of another kind; when `blocks` or the model do not
/// fit it.
pub fn read_samed_adapter(
    model: &dyn ModuleTree,
    path: impl AsRef<Path>,
    blocks: Option<&[usize]>,
) -> Result<(LoraConfig, BTreeMap<String, Tensor>)> {
    let path = path.as_ref();
    let file = TensorReader::open(path)?;
    let wrong = |message: String| Error::file(path, message);
    let in_model = model_blocks(model)?;
    let mut matrices = Vec::new();
    for name in file.tensors().keys() {
        let matrix = parse(name).map_err(|e| wrong(e.to_string()))?;
        matrices.extend(matrix.map(|matrix| (name, matrix)));
    }
    let counted = matrices.iter().filter_map(|(_, matrix)| match matrix.block {
        Block::Nth(n) => Some(n + 1),
        Block::Numbered(_) => None,
    });
    let adapted = counted.max().unwrap_or(0);
    let all: Vec<usize> = in_model.keys().copied().collect();
    let order = blocks.unwrap_or(&all);
    if adapted > 0 && adapted != order.len() {
        return Err(wrong(format!(
            "adapts {adapted} blocks and does not say which; {} given, of {} in the model",
            order.len(),
            all.len()
        )));
    }
    let (mut layers, mut tensors) = (Layers::new(), BTreeMap::new());
    for (name, Matrix { block, layer, is_a }) in matrices {
        let number = match block {
            Block::Numbered(number) => Some(number),
            Block::Nth(n) => order.get(n).copied(),
        };
        let block = number.and_then(|number| in_model.get(&number)).ok_or_else(|| {
            wrong(format!("{name} is for a block that the model has not: it has {all:?}"))
        })?;
        let shape = file.tensors().get(name).map_or(&[][..], |info| &info.shape);
        let &[rows, columns] = shape else {
            return Err(wrong(format!("{name}: expected a matrix, got {shape:?}")));
        };
        let tensor = file.read(name, &Device::Cpu)?;
        check_value(path, name, &tensor)?;
        layers.insert(format!("{block}.{layer}"), (if is_a { rows } else { columns }, 1.0));
        let leaf = if is_a { "lora_A" } else { "lora_B" };
        if tensors.insert(format!("{PREFIX}{block}.{layer}.{leaf}.weight"), tensor).is_some() {
            return Err(wrong(format!("holds {name} under two names")));
        }
    }
    if layers.is_empty() {
        return Err(wrong("holds no LoRA as SAMed or micro-sam write it".to_string()));
    }
    Ok((describe(&LoraConfig::new(1), &layers, &layer_paths(model))?, tensors))
}
