//! The small model of `tests/fixtures/lora`, and what PEFT wrote for it.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use candle_sam_lora::nn::{named_parameters, LayerNorm, Linear, Mode, ModuleTree, Node, NodeMut};
use candle_sam_lora::{files, module_tree, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Every adapter folder PEFT wrote.
/// f32 against f64 over five layers in a row, the adapters' scaling of 8 within: thirty roundings of 6e-8.
pub const F32_BOUND: f32 = 2e-6;

pub const KINDS: [&str; 12] = [
    "plain",
    "rslora",
    "dora",
    "lora_bias",
    "bias_lora_only",
    "bias_all",
    "bias_all_save",
    "save",
    "pattern",
    "regex",
    "exclude",
    "all_linear",
];

#[derive(Clone)]
pub struct Mlp {
    pub lin1: Linear,
    pub lin2: Linear,
}
module_tree!(Mlp { lin1, lin2 });

#[derive(Clone)]
pub struct Net {
    pub q: Linear,
    pub v: Linear,
    pub norm: LayerNorm,
    pub mlp: Mlp,
    pub head: Linear,
}
module_tree!(Net { q, v, norm, mlp, head });

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora").join(name)
}

pub fn read(name: &str) -> BTreeMap<String, Tensor> {
    files::read_tensors(&fixture(name), &Device::Cpu).unwrap()
}

impl Net {
    pub fn zeros(dtype: DType) -> Self {
        let linear =
            |i: usize, o: usize, bias| Linear::zeros(i, o, bias, dtype, &Device::Cpu).unwrap();
        Self {
            q: linear(8, 8, true),
            v: linear(8, 6, true),
            norm: LayerNorm::new(6, 1e-5, dtype, &Device::Cpu).unwrap(),
            mlp: Mlp { lin1: linear(6, 10, true), lin2: linear(10, 6, false) },
            head: linear(6, 4, true),
        }
    }

    /// The model the fixtures belong to.
    pub fn base() -> Self {
        Self::base_in(DType::F32)
    }

    pub fn base_in(dtype: DType) -> Self {
        let mut net = Self::zeros(dtype);
        let mut tensors = read("base.safetensors");
        net.visit_mut("", &mut |name, node| {
            if let NodeMut::Parameter(tensor) = node {
                *tensor = tensors.remove(name).unwrap().to_dtype(dtype)?;
            }
            Ok(())
        })
        .unwrap();
        assert!(tensors.is_empty());
        net
    }

    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let x = self.v.forward(&self.q.forward(x, mode)?.tanh()?, mode)?;
        let x = self.norm.forward(&x)?;
        let hidden = self.mlp.lin1.forward(&x, mode)?.gelu_erf()?;
        let x = (&x + self.mlp.lin2.forward(&hidden, mode)?)?;
        Ok(self.head.forward(&x, mode)?)
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
