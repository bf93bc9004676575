//! Shared by the tests of adapters: two small models that PEFT's fixtures belong to, and how results are compared.
#![allow(dead_code)]

pub mod blocks;
pub mod folders;
pub mod linears;

use candle_core::{DType, Device, Tensor};
use candle_sam_lora::files;
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{named_parameters, trainable_variables, ModuleTree, Node, NodeMut};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub type Tensors = BTreeMap<String, Tensor>;

/// A folder of fixtures.
fn fixtures(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read_tensors(path: &Path) -> Tensors {
    files::read_tensors(path, &Device::Cpu).unwrap()
}

/// Value of `key` in the metadata of a file.
pub fn metadata(path: &Path, key: &str) -> serde_json::Value {
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    serde_json::from_str(&metadata.metadata().as_ref().unwrap()[key]).unwrap()
}

/// Gives every parameter its value of the file, which has no other.
fn fill(model: &mut dyn ModuleTree, path: &Path) {
    let mut tensors = read_tensors(path);
    model
        .visit_mut("", &mut |name, node| {
            if let NodeMut::Parameter(tensor) = node {
                *tensor = tensors.remove(name).unwrap().to_dtype(tensor.dtype())?;
            }
            Ok(())
        })
        .unwrap();
    assert!(tensors.is_empty());
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

/// The names of the variables.
pub fn trained(model: &dyn ModuleTree) -> Vec<String> {
    trainable_variables(model).unwrap().into_iter().map(|(name, _)| name).collect()
}

/// Each configuration is refused with these words, and the model stays as it is.
pub fn assert_refused<T: ModuleTree>(
    base: impl Fn() -> T,
    cases: impl IntoIterator<Item = (LoraConfig, &'static str)>,
) {
    let before = snapshot(&base());
    for (config, expected) in cases {
        let mut model = base();
        let error = inject(&mut model, &config, 0).unwrap_err();
        assert!(matches!(error, candle_sam_lora::Error::Config(_)), "{expected}: {error}");
        assert!(error.to_string().contains(expected), "expected {expected:?}, got {error}");
        assert_eq!(snapshot(&model), before, "{expected}");
    }
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
