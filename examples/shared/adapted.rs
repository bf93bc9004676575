//! A model for inference, with or without an adapter.

use super::model::load_model;
use candle_core::{DType, Device};
use candle_sam_lora::files::TensorFile;
use candle_sam_lora::lora::{load_adapter, TENSORS_FILE};
use candle_sam_lora::nn::set_trainable;
use candle_sam_lora::sam::{AttentionKind, SamConfig, SamModel};
use std::path::Path;

/// The model in `folder`, frozen, in f32, with the adapter in the folder `adapter`.
pub fn load_adapted(
    folder: &Path,
    adapter: Option<&Path>,
    device: &Device,
) -> anyhow::Result<(SamConfig, SamModel)> {
    let Some(adapter) = adapter else {
        return load_model(folder, AttentionKind::Fused, DType::F32, device);
    };
    let adapts_fused = TensorFile::open(adapter.join(TENSORS_FILE))?
        .tensors()
        .keys()
        .any(|name| name.contains(".attn.qkv."));
    let kind = if adapts_fused { AttentionKind::Fused } else { AttentionKind::Split };
    let (config, mut model) = load_model(folder, kind, DType::F32, device)?;
    load_adapter(&mut model, adapter)?;
    set_trainable(&mut model, &mut |_| false)?;
    Ok((config, model))
}
