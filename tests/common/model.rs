//! Shared by the tests of the model: the PyTorch fixtures, models and how errors are measured.
#![allow(dead_code)]

use anyhow::{bail, ensure, Context, Result};
use candle_core::{backprop::GradStore, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::files;
use candle_sam_lora::nn::{named_parameters, ModuleTree};
use candle_sam_lora::sam::{checkpoint, AttentionKind, SamConfig, SamModel};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub type Tensors = BTreeMap<String, Tensor>;

/// Where the fixtures lie: beside the sources, or elsewhere if the tests run without these.
pub fn fixtures() -> PathBuf {
    std::env::var_os("CANDLE_SAM_LORA_FIXTURES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
        PathBuf::from,
    )
}

/// The folder of a fixture model.
pub fn folder(name: &str) -> PathBuf {
    fixtures().join("models").join(name)
}

pub fn config(name: &str) -> Result<SamConfig> {
    Ok(SamConfig::load(folder(name).join("config.json"))?)
}

pub fn read(name: &str, file: &str) -> Result<Tensors> {
    Ok(files::read_tensors(folder(name).join(file), &Device::Cpu)?)
}

/// The scalars of each case of a file.
pub fn metadata(path: impl AsRef<Path>) -> Result<BTreeMap<String, serde_json::Value>> {
    let bytes = std::fs::read(path)?;
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes)?;
    let cases = metadata.metadata().clone().unwrap_or_default().into_iter();
    cases.map(|(case, text)| Ok((case, serde_json::from_str(&text)?))).collect()
}

/// The scalars of one case of a model's `io.safetensors`.
pub fn scalars(name: &str, case: &str) -> Result<serde_json::Value> {
    metadata(folder(name).join("io.safetensors"))?.remove(case).context("no such case")
}

/// The part of the tensors whose names begin with `prefix`, without it.
pub fn below(tensors: &Tensors, prefix: &str) -> Tensors {
    let inside = |(name, tensor): (&String, &Tensor)| {
        Some((name.strip_prefix(prefix)?.to_string(), tensor.clone()))
    };
    tensors.iter().filter_map(inside).collect()
}

/// A model without weights.
pub fn zeros(config: &SamConfig, kind: AttentionKind) -> candle_sam_lora::Result<SamModel> {
    SamModel::new(config, kind, VarBuilder::zeros(DType::F32, &Device::Cpu))
}

/// A fixture model with its weights.
pub fn model(name: &str, kind: AttentionKind, dtype: DType) -> Result<SamModel> {
    model_on(&Device::Cpu, name, kind, dtype)
}

/// A fixture model on a device.
pub fn model_on(
    device: &Device,
    name: &str,
    kind: AttentionKind,
    dtype: DType,
) -> Result<SamModel> {
    let mut model = SamModel::new(&config(name)?, kind, VarBuilder::zeros(dtype, device))?;
    checkpoint::load(&mut model, folder(name))?;
    Ok(model)
}

/// The small SAM that is shipped with the crate.
pub fn shipped(kind: AttentionKind) -> Result<SamModel> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-sam");
    Ok(SamModel::from_pretrained(folder, kind, DType::F32, &Device::Cpu)?)
}

/// The bits of a tensor's values as f32.
pub fn bits(tensor: &Tensor) -> candle_core::Result<Vec<u32>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// The tensor of a name, where `attn.q`, `attn.k` and `attn.v` are the row blocks of `attn.qkv`.
pub fn lookup(tensors: &Tensors, name: &str) -> Result<Tensor> {
    if let Some(tensor) = tensors.get(name) {
        return Ok(tensor.clone());
    }
    for (block, part) in [".attn.q.", ".attn.k.", ".attn.v."].into_iter().enumerate() {
        if name.contains(part) {
            let fused = name.replace(part, ".attn.qkv.");
            let tensor = tensors.get(&fused).with_context(|| format!("no {fused}"))?;
            let rows = tensor.dim(0)? / 3;
            return Ok(tensor.narrow(0, block * rows, rows)?);
        }
    }
    bail!("no {name}")
}

/// The parameter whose gradient measures the error of `name`'s. A bias of all keys shifts every score of a row alike,
/// so its gradient is zero but for rounding. The queries' bias measures that.
pub fn measured_by(name: &str) -> String {
    name.replace("k_proj.bias", "q_proj.bias").replace(".k.bias", ".q.bias")
}

/// The error of every gradient of a variable, by name. Where PyTorch has none, or zeros for a part that is sliced away,
/// ours must be zero too.
pub fn gradient_errors(
    model: &dyn ModuleTree,
    gradients: &GradStore,
    expected: &Tensors,
) -> Result<Vec<(String, f64)>> {
    let mut errors = Vec::new();
    let variables = named_parameters(model).into_iter().filter(|(_, t)| t.is_variable());
    for (name, variable) in variables {
        let (got, want) = (gradients.get(&variable), lookup(expected, &name).ok());
        let Some(want) = want.filter(|want| largest(want).is_ok_and(|most| most > 0.0)) else {
            ensure!(got.map_or(Ok(0.0), largest)? == 0.0, "{name} has a gradient");
            continue;
        };
        let scale = lookup(expected, &measured_by(&name)).unwrap_or_else(|_| want.clone());
        let got = got.with_context(|| format!("{name} has no gradient"))?;
        let error = error_relative_to(&scale, got, &want).with_context(|| name.clone())?;
        errors.push((name, error));
    }
    Ok(errors)
}

/// `max |got - want| / max |want|`
pub fn relative_error(got: &Tensor, want: &Tensor) -> Result<f64> {
    error_relative_to(want, got, want)
}

/// `max |got - want| / max |scale|`
pub fn error_relative_to(scale: &Tensor, got: &Tensor, want: &Tensor) -> Result<f64> {
    ensure!(got.dims() == want.dims(), "shape {:?}, expected {:?}", got.dims(), want.dims());
    let got = got.to_device(want.device())?.to_dtype(DType::F64)?;
    let difference = (got - want.to_dtype(DType::F64)?)?;
    let (error, scale) = (largest(&difference)?, largest(scale)?);
    ensure!(error.is_finite(), "not finite");
    Ok(error / scale.max(f64::MIN_POSITIVE))
}

/// `max |x|`
pub fn largest(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

/// The largest error of each kind.
#[derive(Default)]
pub struct Worst(BTreeMap<String, f64>);

impl Worst {
    pub fn compare(&mut self, kind: &str, got: &Tensor, want: &Tensor) -> Result<()> {
        self.add(kind, relative_error(got, want).with_context(|| kind.to_string())?);
        Ok(())
    }

    pub fn add(&mut self, kind: &str, error: f64) {
        let worst = self.0.entry(kind.to_string()).or_default();
        *worst = worst.max(error);
    }

    /// Prints every kind, then asserts that none is beyond `tolerance`.
    pub fn assert_within(&self, tolerance: f64) {
        assert!(!self.0.is_empty());
        for (kind, error) in &self.0 {
            println!("{kind}: largest relative error {error:.2e} (tolerance {tolerance:.1e})");
        }
        for (kind, error) in &self.0 {
            assert!(*error <= tolerance, "{kind}: {error:.3e} > {tolerance:.1e}");
        }
    }
}
