//! The model of `tests/fixtures/gen/peft_linears.py`, with one adapter of each kind that PEFT wrote.

use super::{fill, fixtures, read_tensors, snapshot, Tensors};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, load_adapter, LoraConfig};
use candle_sam_lora::nn::{LayerNorm, Linear, Mode};
use candle_sam_lora::{module_tree, Error, Result};
use std::path::{Path, PathBuf};

/// f32 against f64 over five layers in a row, the adapters' scaling of 8 within: thirty roundings of 6e-8.
pub const F32_BOUND: f32 = 2e-6;

/// Every adapter folder PEFT wrote.
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
    fixtures("peft/linears").join(name)
}

pub fn read(name: &str) -> Tensors {
    read_tensors(&fixture(name))
}

/// The model with the adapter of a kind.
pub fn loaded(kind: &str) -> Net {
    let mut model = Net::base();
    load_adapter(&mut model, fixture(kind)).unwrap();
    model
}

/// The model with a new adapter.
pub fn injected(config: &LoraConfig, seed: u64) -> Net {
    let mut model = Net::base();
    inject(&mut model, config, seed).unwrap();
    model
}

/// The error of loading a folder, which changes nothing.
pub fn refused(folder: &Path) -> Error {
    let mut model = Net::base();
    let error = load_adapter(&mut model, folder).unwrap_err();
    assert_eq!(snapshot(&model), snapshot(&Net::base()), "{error}");
    error
}

impl Net {
    pub fn zeros(dtype: DType) -> Self {
        let vb = VarBuilder::zeros(dtype, &Device::Cpu);
        let linear = |i: usize, o: usize, bias: bool| {
            let load = if bias { Linear::load } else { Linear::load_no_bias };
            load(i, o, vb.clone()).unwrap()
        };
        Self {
            q: linear(8, 8, true),
            v: linear(8, 6, true),
            norm: LayerNorm::load(6, 1e-5, VarBuilder::zeros(dtype, &Device::Cpu)).unwrap(),
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
        fill(&mut net, &fixture("base.safetensors"));
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
