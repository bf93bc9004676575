//! The fixtures of `gen/attention_limits.py`: the attention with a saturated softmax, and with values that are not
//! finite.

use super::{cases, values, Case};
use candle_core::{Result, Tensor};
use std::fmt;

/// The differentiable inputs, in order; `pad` is there in windows alone.
pub const NAMES: [&str; 4] = ["qkv", "rel_pos_h", "rel_pos_w", "pad"];

/// A case's tensors.
#[derive(Clone)]
pub struct Inputs {
    pub qkv: Tensor,
    pub tables: [Tensor; 2],
    pub pad: Option<Tensor>,
    pub grad_out: Tensor,
}

impl Inputs {
    /// Those of [`NAMES`] that are there.
    pub fn tensors(&self) -> Vec<Tensor> {
        let [h, w] = self.tables.clone();
        [self.qkv.clone(), h, w].into_iter().chain(self.pad.clone()).collect()
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub num_heads: usize,
    pub softmax_scale: f64,
    pub window: Option<usize>,
}

impl Settings {
    fn new(case: &Case) -> Self {
        let window = case.integer("window") as usize;
        Self {
            num_heads: case.integer("num_heads") as usize,
            softmax_scale: case.number("softmax_scale"),
            window: (window > 0).then_some(window),
        }
    }
}

/// Logits of any size, with the truth and PyTorch's own error in f32.
pub struct Saturated {
    pub name: String,
    pub inputs: Inputs,
    pub settings: Settings,
    case: Case,
}

impl Saturated {
    pub fn all() -> Result<Vec<Self>> {
        let all = cases("ops/attention_saturated.safetensors");
        let (inputs, cases): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|case| case.name.starts_with("inputs_"));
        let of_shape = |case: &Case| {
            let name = format!("inputs_{}", case.text("shape"));
            inputs.iter().find(|inputs| inputs.name == name).expect("inputs of the shape")
        };
        let make = |case: Case| {
            let (base, settings) = (of_shape(&case), Settings::new(&case));
            let (q_gain, kv_gain) = (case.number("q_gain"), case.number("kv_gain"));
            let gained = |name| {
                let x: Tensor = base.tensor(name);
                let (last, channels) = (x.rank() - 1, x.dims()[x.rank() - 1] / 3);
                let q = (x.narrow(last, 0, channels)? * q_gain)?;
                let kv = (x.narrow(last, channels, 2 * channels)? * kv_gain)?;
                Tensor::cat(&[q, kv], last)
            };
            let inputs = Inputs {
                qkv: gained("qkv")?,
                tables: ["rel_pos_h", "rel_pos_w"].map(|name| base.tensor(name)),
                pad: settings.window.map(|_| gained("pad")).transpose()?,
                grad_out: base.tensor("grad_out"),
            };
            // A window that fits is not padded: no gradient of pad.
            let pad = inputs.pad.filter(|_| case.get("grad_pad").is_some());
            Ok(Self { name: case.name.clone(), inputs: Inputs { pad, ..inputs }, settings, case })
        };
        cases.into_iter().map(make).collect()
    }

    /// The error of a tensor beside PyTorch's.
    pub fn compare(&self, name: &str, got: &[f64]) -> Comparison {
        let truth = values(&self.case.tensor(name));
        assert_eq!(got.len(), truth.len(), "{} {name}", self.name);
        let error = got.iter().zip(&truth).map(|(a, b)| (a - b).abs());
        Comparison {
            name: name.to_string(),
            largest: truth.iter().fold(0.0, |m, x| x.abs().max(m)),
            pytorch: self.case.number(&format!("eager_{name}")),
            // A maximum would leave out NaN.
            error: error.fold(0.0, |m, x| if x > m || x.is_nan() { x } else { m }),
        }
    }
}

/// One row of a table of errors, all absolute.
pub struct Comparison {
    pub name: String,
    pub largest: f64,
    pub pytorch: f64,
    pub error: f64,
}

impl Comparison {
    /// Whether the error is more than `times` times PyTorch's. Added to the bound are a few roundings of the largest
    /// value, and what f64 itself leaves of terms that cancel.
    pub fn failed(&self, times: f64) -> bool {
        let bound = times * self.pytorch + 5e-7 * self.largest + 1e-12;
        self.error.is_nan() || self.error > bound
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, largest, pytorch, error } = self;
        write!(f, "{name:<15} {largest:9.1e} {pytorch:9.1e} {error:9.1e}")
    }
}

/// Inputs that are not finite, with what PyTorch makes of them in f32, element by element.
pub struct NotFinite {
    pub name: String,
    pub inputs: Inputs,
    pub settings: Settings,
    case: Case,
}

/// 0 a number, 1 NaN, 2 infinity, 3 minus infinity.
fn class(x: f64) -> usize {
    match x {
        x if x.is_nan() => 1,
        f64::INFINITY => 2,
        f64::NEG_INFINITY => 3,
        _ => 0,
    }
}

/// Tensors compared with PyTorch's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Its queries on the grid, each element's kind.
    Exact,
    /// Its queries on the grid, whether an element is finite: terms that are infinite both ways, in another order, are
    /// NaN.
    Finite,
    /// As `Finite`, with the queries of padded tokens.
    FiniteWithPadding,
}

impl NotFinite {
    pub fn all() -> Result<Vec<Self>> {
        let make = |case: Case| {
            let tensor = |name: &str| {
                let classes = values(&case.tensor(&format!("class_{name}")));
                let numbers = case.tensor(name);
                let with_classes = |(number, class): (f64, f64)| {
                    let special = [number, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
                    special[class as usize] as f32
                };
                let data: Vec<f32> =
                    values(&numbers).into_iter().zip(classes).map(with_classes).collect();
                Tensor::from_vec(data, numbers.shape(), numbers.device())
            };
            let inputs = Inputs {
                qkv: tensor("qkv")?,
                tables: [tensor("rel_pos_h")?, tensor("rel_pos_w")?],
                pad: case.get("pad").map(|_| tensor("pad")).transpose()?,
                grad_out: tensor("grad_out")?,
            };
            let settings = Settings::new(&case);
            Ok(Self { name: case.name.clone(), inputs, settings, case })
        };
        cases("ops/attention_not_finite.safetensors").into_iter().map(make).collect()
    }

    /// The first difference of a tensor from PyTorch's, if any. An element differs by its kind (number, NaN, infinity),
    /// or by more than `bound`. The bound is relative to the largest value if that is above 1.
    pub fn difference(&self, name: &str, got: &[f64], bound: f64, rule: Rule) -> Option<String> {
        let real = rule != Rule::FiniteWithPadding && self.settings.window.is_some();
        let real = if real { "real_" } else { "" };
        let classes = values(&self.case.tensor(&format!("{real}class_{name}")));
        let expected = values(&self.case.tensor(&format!("{real}{name}")));
        assert_eq!(got.len(), expected.len(), "{} {name}", self.name);
        let wrong = |(got, &expected): (&f64, &f64)| match rule {
            Rule::Exact => class(*got) != expected as usize,
            Rule::Finite | Rule::FiniteWithPadding => got.is_finite() != (expected == 0.0),
        };
        let count = got.iter().zip(&classes).filter(|&pair| wrong(pair)).count();
        if let Some(at) = got.iter().zip(&classes).position(wrong) {
            let kind = ["a number", "NaN", "infinity", "-infinity"][classes[at] as usize];
            return Some(format!(
                "{count} of {} differ; {at} is {}, not {kind}",
                got.len(),
                got[at]
            ));
        }
        let largest = expected.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
        let far = |&(got, expected): &(&f64, &f64)| {
            got.is_finite() && (got - expected).abs() > bound * largest
        };
        let (got, expected) = got.iter().zip(&expected).find(far)?;
        Some(format!("{got:e}, expected {expected:e}, of up to {largest:e}"))
    }
}
