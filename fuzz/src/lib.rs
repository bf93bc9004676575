//! Shared by the fuzz targets: files with given bytes, and a model small enough to load thousands of times a second.

use candle_core::{DType, Device};
use candle_sam_lora::{module_tree, nn};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

/// A model of four tensors, under names that every loader knows.
pub struct Small {
    attn: nn::Linear,
    norm: nn::LayerNorm,
}
module_tree!(Small { attn => "layers.0.attn.q", norm => "neck.layer_norm1" });

impl Small {
    /// All zero.
    pub fn new() -> Self {
        let attn = nn::Linear::load(4, 2, candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
        Self { attn, norm: nn::LayerNorm::load(3, 1e-6, candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap() }
    }
}

impl Default for Small {
    fn default() -> Self {
        Self::new()
    }
}

/// Every parameter's bits, by which a model that a failed load has changed is told.
pub fn bits(model: &dyn nn::ModuleTree) -> Vec<u32> {
    let parameters = nn::named_parameters(model).into_iter();
    parameters
        .flat_map(|(_, t)| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        .map(f32::to_bits)
        .collect()
}

/// The folder of this process, gone when it ends.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| TempDir::new().unwrap()).path()
}

/// A file of this name and content in the folder of this process.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}
