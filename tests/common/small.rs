//! A model of two layers, for files of weights.

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_sam_lora::nn;
use std::collections::BTreeMap;

/// `layers.0.attn.q` [2, 4] and `neck.layer_norm1` [3].
pub struct Small {
    pub attn: nn::Linear,
    norm: nn::LayerNorm,
}
candle_sam_lora::module_tree!(Small { attn => "layers.0.attn.q", norm => "neck.layer_norm1" });

impl Small {
    /// Zeros, and ones for the norm's scale.
    pub fn new() -> Self {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let attn = nn::Linear::load(4, 2, vb.pp("attn")).unwrap();
        Self { attn, norm: nn::LayerNorm::load(3, 1e-6, vb.pp("norm")).unwrap() }
    }

    pub fn values(&self) -> BTreeMap<String, Vec<f32>> {
        let parameters = nn::named_parameters(self).into_iter();
        parameters.map(|(name, t)| (name, t.flatten_all().unwrap().to_vec1().unwrap())).collect()
    }
}
