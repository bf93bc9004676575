//! The model of `tests/fixtures/gen/peft_model.py`, with blocks, linears and convolutions, and what PEFT wrote for it.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use candle_sam_lora::nn::{
    named_parameters, Conv2d, ConvTranspose2d, LayerNorm, Linear, Mode, ModuleTree, Node, NodeMut,
};
use candle_sam_lora::{files, module_tree, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// f32 against f64 over ten layers in a row with adapters as strong as the weights: a hundred roundings of 6e-8.
pub const F32_BOUND: f32 = 6e-6;

pub type Tensors = BTreeMap<String, Tensor>;

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
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(name)
}

pub fn adapter(name: &str) -> PathBuf {
    fixture("adapters").join(name)
}

pub fn read(name: &str) -> Tensors {
    files::read_tensors(&fixture(name), &Device::Cpu).unwrap()
}

/// What a fixture's metadata says under `key`.
pub fn facts(name: &str, key: &str) -> serde_json::Value {
    let bytes = std::fs::read(fixture(name)).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    serde_json::from_str(&metadata.metadata().as_ref().unwrap()[key]).unwrap()
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
        let linear = |i: usize, o: usize| Linear::zeros(i, o, true, dtype, device).unwrap();
        let mut net = Self {
            patch: Conv2d::patches(3, 8, 2, true, dtype, device).unwrap(),
            encoder: Encoder {
                layers: (0..3).map(|_| Block { q: linear(8, 8), v: linear(8, 8) }).collect(),
            },
            neck: Neck {
                conv1: Conv2d::patches(8, 6, 1, false, dtype, device).unwrap(),
                conv2: Conv2d::same(6, 6, 3, dtype, device).unwrap(),
                norm: LayerNorm::new(6, 1e-5, dtype, device).unwrap(),
            },
            head: linear(6, 4),
            up: ConvTranspose2d::zeros(4, 2, 2, dtype, device).unwrap(),
        };
        let mut tensors = read("base.safetensors");
        net.visit_mut("", &mut |name, node| {
            if let NodeMut::Parameter(tensor) = node {
                *tensor = tensors.remove(name).unwrap();
            }
            Ok(())
        })
        .unwrap();
        assert!(tensors.is_empty());
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

/// Name, trainable or not, and bits of every parameter: what must not change when something fails.
pub fn snapshot(model: &dyn ModuleTree) -> Vec<(String, bool, Vec<u32>)> {
    named_parameters(model)
        .into_iter()
        .map(|(name, tensor)| (name, tensor.is_variable(), bits(&tensor)))
        .collect()
}

pub fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The paths of the layers that carry an adapter.
pub fn adapted(model: &dyn ModuleTree) -> Vec<String> {
    let mut paths = Vec::new();
    model.visit("", &mut |path, node| match node {
        Node::Layer(layer) if !layer.adapters.is_empty() => paths.push(path.to_string()),
        _ => {}
    });
    paths
}

/// Largest difference relative to the largest expected value.
pub fn relative_error(got: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(got.dims(), expected.dims());
    let (got, expected) = (values(got), values(expected));
    let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    assert!(scale > 0.0);
    let error = got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0f32, |max, e| {
        assert!(!e.is_nan());
        max.max(e)
    });
    error / scale
}
