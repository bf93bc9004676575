//! A model for inference, with or without an adapter.

use super::model::load_model;
use candle_core::{DType, Device};
use candle_sam_lora::lora::{load_adapter, TENSORS_FILE};
use candle_sam_lora::nn::{set_trainable, ModuleTree};
use candle_sam_lora::sam::{AttentionKind, SamConfig, SamModel};
use candle_sam_lora::{Result, TensorFile};
use std::path::Path;

/// The model in `folder`, frozen, in f32, with the adapter in the folder `adapter`.
pub fn load_adapted(
    folder: &Path,
    adapter: Option<&Path>,
    device: &Device,
) -> Result<(SamConfig, SamModel)> {
    let Some(adapter) = adapter else {
        return load_model(folder, AttentionKind::Fused, DType::F32, device);
    };
    let (config, mut model) = load_model(folder, kind_of(adapter)?, DType::F32, device)?;
    adapt(&mut model, adapter)?;
    Ok((config, model))
}

/// The attention whose names the adapter in a folder means.
pub fn kind_of(adapter: &Path) -> Result<AttentionKind> {
    let tensors = TensorFile::open(adapter.join(TENSORS_FILE))?;
    let fused = tensors.tensors().keys().any(|name| name.contains(".attn.qkv."));
    Ok(if fused { AttentionKind::Fused } else { AttentionKind::Split })
}

/// Puts an adapter into a model and freezes it all.
pub fn adapt(model: &mut dyn ModuleTree, adapter: &Path) -> Result<()> {
    load_adapter(model, adapter)?;
    set_trainable(model, |_| false)
}
