//! An adapter whose start was taken out of the base, as plain LoRA of twice the rank for the untouched base.
//!
//! ```text
//! W + scaling (B A - B_0 A_0) = W + scaling [B | -B_0] [A; A_0]          A_0, B_0 as after initialisation
//! ```
//! alpha is doubled with the rank (times sqrt 2 with rank stabilisation), so that the scaling stays.
//!
//! Source: PEFT 0.21, `subtract_mutated_init` in `tuners/lora/model.py`; `save_pretrained` with
//! `path_initial_model_for_weight_conversion`.

use super::{InitLoraWeights, LoraConfig};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// From the states after initialisation and after training, as [`adapter_state`](super::adapter_state) gives them, the
/// configuration and state of an adapter that [`write_adapter`](super::write_adapter) makes a folder of.
///
/// [Example](crate::lora::adapter_state)
///
/// # Errors
/// When the two states are not of one configuration, with DoRA, or with rank stabilisation together with patterns.
pub fn convert_to_lora(
    config: &LoraConfig,
    initial: &BTreeMap<String, Tensor>,
    trained: &BTreeMap<String, Tensor>,
) -> Result<(LoraConfig, BTreeMap<String, Tensor>)> {
    let patterned = !config.rank_pattern.is_empty() || !config.alpha_pattern.is_empty();
    if config.use_dora || (config.use_rslora && patterned) {
        return Err(Error::config(
            "an adapter with DoRA, or with rank stabilisation and patterns, cannot be converted to plain LoRA",
        ));
    }
    let mut tensors = BTreeMap::new();
    for (key, tensor) in trained {
        let start = || match initial.get(key) {
            Some(start) if start.dims() == tensor.dims() => Ok(start.to_dtype(tensor.dtype())?),
            _ => {
                Err(Error::config(format!("the initial state has no {key} like the trained one's")))
            }
        };
        let tensor = if key.ends_with(".lora_A.weight") {
            Tensor::cat(&[tensor, &start()?], 0)?
        } else if key.ends_with(".lora_B.weight") {
            Tensor::cat(&[tensor, &start()?.neg()?], 1)?
        } else {
            tensor.clone()
        };
        tensors.insert(key.clone(), tensor);
    }
    let more = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    let double = |(name, rank): (&String, &usize)| (name.clone(), 2 * rank);
    let converted = LoraConfig {
        rank: 2 * config.rank,
        alpha: more * config.alpha,
        init_lora_weights: InitLoraWeights::Default(true),
        rank_pattern: config.rank_pattern.iter().map(double).collect(),
        alpha_pattern: config.alpha_pattern.iter().map(|(n, a)| (n.clone(), 2.0 * a)).collect(),
        ..config.clone()
    };
    Ok((converted, tensors))
}
