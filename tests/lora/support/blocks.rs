//! The model of `tests/fixtures/gen/peft_model.py`, with blocks, linears and convolutions, and what PEFT wrote for it.

use super::{fill, fixtures, metadata, read_tensors, Tensors};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::load_named_adapter;
use candle_sam_lora::nn::{Conv2d, ConvTranspose2d, LayerNorm, Linear, Mode};
use candle_sam_lora::{module_tree, Result};
use std::path::PathBuf;

/// f32 against f64 over ten layers in a row with adapters as strong as the weights: a hundred roundings of 6e-8.
pub const F32_BOUND: f32 = 6e-6;

/// Every adapter that PEFT wrote for it.
pub const NAMES: [&str; 10] =
    ["a", "b", "c", "d", "e", "f", "conv", "conv_dropout", "conv_dora", "conv_dora_dropout"];

#[derive(Clone)]
pub struct Block {
    pub q: Linear,
    pub v: Linear,
}
module_tree!(Block { q, v });

#[derive(Clone)]
pub struct Encoder {
    pub layers: Vec<Block>,
}
module_tree!(Encoder { layers });

#[derive(Clone)]
pub struct Neck {
    pub conv1: Conv2d,
    pub conv2: Conv2d,
    pub norm: LayerNorm,
}
module_tree!(Neck { conv1, conv2, norm });

#[derive(Clone)]
pub struct Net {
    pub patch: Conv2d,
    pub encoder: Encoder,
    pub neck: Neck,
    pub head: Linear,
    pub up: ConvTranspose2d,
}
module_tree!(Net { patch, encoder, neck, head, up });

pub fn fixture(name: &str) -> PathBuf {
    fixtures("peft").join(name)
}

pub fn adapter(name: &str) -> PathBuf {
    fixture("adapters").join(name)
}

pub fn read(name: &str) -> Tensors {
    read_tensors(&fixture(name))
}

/// The model with these adapters, the first of them active.
pub fn loaded(names: &[&str]) -> Net {
    let mut model = Net::base();
    for name in names {
        load_named_adapter(&mut model, name, adapter(name)).unwrap();
    }
    model
}

pub fn input() -> Tensor {
    read("inputs.safetensors")["x"].clone()
}

/// Value of `key` in a fixture's metadata.
pub fn facts(name: &str, key: &str) -> serde_json::Value {
    metadata(&fixture(name), key)
}

/// The part of the tensors whose names begin with `prefix`, without it.
pub fn below(tensors: &Tensors, prefix: &str) -> Tensors {
    let inside = |(name, tensor): (&String, &Tensor)| {
        Some((name.strip_prefix(prefix)?.to_string(), tensor.clone()))
    };
    tensors.iter().filter_map(inside).collect()
}

impl Net {
    /// The model the fixtures belong to.
    pub fn base() -> Self {
        let (dtype, device) = (DType::F32, &Device::Cpu);
        let linear =
            |i: usize, o: usize| Linear::load(i, o, VarBuilder::zeros(dtype, device)).unwrap();
        let mut net = Self {
            patch: Conv2d::load(3, 8, 2, 2, VarBuilder::zeros(dtype, device)).unwrap(),
            encoder: Encoder {
                layers: (0..3).map(|_| Block { q: linear(8, 8), v: linear(8, 8) }).collect(),
            },
            neck: Neck {
                conv1: Conv2d::load_no_bias(8, 6, 1, 1, VarBuilder::zeros(dtype, device)).unwrap(),
                conv2: Conv2d::load_no_bias(6, 6, 3, 1, VarBuilder::zeros(dtype, device)).unwrap(),
                norm: LayerNorm::load(6, 1e-5, VarBuilder::zeros(dtype, device)).unwrap(),
            },
            head: linear(6, 4),
            up: ConvTranspose2d::load(4, 2, 2, VarBuilder::zeros(dtype, device)).unwrap(),
        };
        fill(&mut net, &fixture("base.safetensors"));
        net
    }

    /// `[B, 3, 8, 8] -> [B, 4, 4, 4]`
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.patch.forward(&x.permute((0, 2, 3, 1))?, mode)?;
        for Block { q, v } in &self.encoder.layers {
            x = (&x + v.forward(&q.forward(&x, mode)?.tanh()?, mode)?)?;
        }
        let x = self.neck.conv2.forward(&self.neck.conv1.forward(&x, mode)?, mode)?;
        Ok(self.head.forward(&self.neck.norm.forward(&x)?, mode)?)
    }
}
