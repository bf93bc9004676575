//! Shared by the integration tests: fixtures written by PyTorch, errors measured against them, seeded tensors.
#![allow(dead_code)]

pub mod adapters;
pub mod cases;
pub mod finetune;
pub mod limits;
pub mod model;
pub mod operations;
pub mod property;
pub mod small;
pub mod vit;

use candle_core::{Device, Result, Tensor};
use candle_sam_lora::testing;
pub use model::fixtures;
use std::collections::BTreeMap;

/// One case of a fixture file: its tensors and scalars.
pub struct Case {
    /// Name in the file.
    pub name: String,
    tensors: BTreeMap<String, Tensor>,
    scalars: serde_json::Value,
}

impl Case {
    /// A tensor that must be there.
    pub fn tensor(&self, name: &str) -> Tensor {
        self.get(name).unwrap_or_else(|| panic!("{} has no tensor {name}", self.name))
    }

    /// A tensor that may be absent.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).cloned()
    }

    /// Every tensor.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// A scalar as f64.
    pub fn number(&self, name: &str) -> f64 {
        self.scalars[name].as_f64().unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }

    /// A scalar of a group of them, as f64.
    pub fn of(&self, group: &str, name: &str) -> f64 {
        let found = self.scalars[group][name].as_f64();
        found.unwrap_or_else(|| panic!("{} has no {group} {name}", self.name))
    }

    /// A list of a group of them.
    pub fn list(&self, group: &str, name: &str) -> Vec<f64> {
        let found = self.scalars[group][name].as_array();
        let found = found.unwrap_or_else(|| panic!("{} has no {group} {name}", self.name));
        found.iter().filter_map(serde_json::Value::as_f64).collect()
    }

    /// A scalar as u64.
    pub fn integer(&self, name: &str) -> u64 {
        self.scalars[name].as_u64().unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }

    /// A scalar as text.
    pub fn text(&self, name: &str) -> &str {
        self.scalars[name].as_str().unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }

    /// A scalar as bool.
    pub fn flag(&self, name: &str) -> bool {
        self.scalars[name].as_bool().unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }
}

/// The cases of a fixture file, by name.
pub fn cases(file: &str) -> Vec<Case> {
    let path = fixtures().join(file);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut scalars = model::metadata(&path).unwrap();
    let mut cases: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (name, tensor) in candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap() {
        let (case, tensor_name) = name.split_once('/').unwrap();
        cases.entry(case.to_string()).or_default().insert(tensor_name.to_string(), tensor);
    }
    assert!(!cases.is_empty(), "{file} holds no case");
    let case = |(name, tensors): (String, _)| {
        let scalars = scalars.remove(&name).unwrap_or_default();
        Case { name, scalars, tensors }
    };
    cases.into_iter().map(case).collect()
}

/// All elements as f64.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    testing::values(tensor).unwrap()
}

/// The largest difference, relative to the largest magnitude expected, see [`testing::relative_error`].
pub fn error(got: &[f64], expected: &[f64]) -> f64 {
    testing::relative_error(got, expected).unwrap()
}

/// [`error`] of two tensors of one shape.
pub fn tensor_error(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.dims(), expected.dims(), "shapes differ");
    error(&values(got), &values(expected))
}

/// Results of random shapes may cancel, or hang on large scores; then no computation in f32 is that close. So many
/// times the change is allowed too that inputs make which are one unit in the last place off.
pub const TIMES_ROUNDING: f64 = 8.0;

/// Every element one unit in its last place away, up or down by chance.
pub fn nudged(inputs: &[Tensor]) -> Vec<Tensor> {
    let one = |(i, input): (usize, &Tensor)| {
        let signs = random(90 + i as u64, input.shape()).sign()?;
        (signs * f64::from(f32::EPSILON))? + 1.0
    };
    let factors = inputs.iter().enumerate().map(|pair| one(pair).unwrap());
    factors.zip(inputs).map(|(factor, input)| (factor * input).unwrap()).collect()
}

/// Collects the largest error of each kind, and fails on one above the bound.
#[derive(Default)]
pub struct Worst(BTreeMap<String, (f64, String)>);

impl Worst {
    /// Notes the error of `what` in `case`.
    pub fn note(&mut self, what: &str, case: &str, error: f64) {
        let entry = self.0.entry(what.to_string()).or_default();
        if error >= entry.0 {
            *entry = (error, case.to_string());
        }
    }

    /// Prints the table; fails if anything was above `bound`, or nothing was noted.
    pub fn check(&self, title: &str, bound: f64) {
        println!("{title}: largest relative errors (bound {bound:e})");
        for (what, (error, case)) in &self.0 {
            println!("  {what:<24} {error:9.2e}  in {case}");
        }
        assert!(!self.0.is_empty(), "{title}: nothing was compared");
        for (what, (error, case)) in &self.0 {
            assert!(*error <= bound, "{title}: {what} in {case}: {error:e} > {bound:e}");
        }
    }
}

/// Deterministic values, roughly normal: sums of twelve uniform ones, from Philox.
pub fn random(seed: u64, shape: impl Into<candle_core::Shape>) -> Tensor {
    let shape = shape.into();
    let data: Vec<f32> = (0..shape.elem_count() as u64)
        .map(|i| {
            let words = (0..3).flat_map(|block| {
                let counter = [i as u32, (i >> 32) as u32, block, 99];
                candle_sam_lora::philox::philox4x32(counter, [seed as u32, (seed >> 32) as u32])
            });
            words.map(|w| w as f32 / u32::MAX as f32).sum::<f32>() - 6.0
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// The gradients of `sum(f(vars) * grad_out)` for each of `inputs`, made variables.
pub fn gradients(
    inputs: &[Tensor],
    grad_out: &Tensor,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<(Tensor, Vec<Tensor>)> {
    let vars: Vec<candle_core::Var> =
        inputs.iter().map(candle_core::Var::from_tensor).collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tensors)?;
    let grads = (&out * grad_out)?.sum_all()?.backward()?;
    let grads = tensors
        .iter()
        .enumerate()
        .map(|(i, t)| grads.get(t).cloned().unwrap_or_else(|| panic!("input {i} got no gradient")))
        .collect();
    Ok((out, grads))
}
