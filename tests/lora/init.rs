//! Initialisations. They take out of the base what PEFT does, and adapters trained on the rest load with PEFT's
//! outputs. The random ones have their distribution.

use crate::support::blocks::{below, fixture, input, read, Net, F32_BOUND};
use crate::support::folders::{
    assert_same, assert_same_tensors, assert_saved, tensors_of, written,
};
use crate::support::{assert_refused, relative_error, snapshot, values, Tensors};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{
    adapter_state, add_adapter, convert_to_lora, inject, load_adapter, save_adapter,
    InitLoraWeights, LoraConfig, CONFIG_FILE,
};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{trainable_variables, Linear, Mode, Node, DEFAULT_ADAPTER};
use std::path::PathBuf;

const KINDS: [&str; 4] = ["pissa", "olora", "pissa_rslora", "pissa_dora"];

/// PEFT decomposes in f32, where each singular vector is off by some 6e-8 over its relative gap, of 0.1 here.
const DECOMPOSED: f32 = 2e-6;

fn folder(kind: &str, part: &str) -> PathBuf {
    fixture("init").join(kind).join(part)
}

fn tensors(kind: &str, part: &str) -> Tensors {
    tensors_of(&folder(kind, part))
}

fn config(kind: &str, part: &str) -> LoraConfig {
    LoraConfig::load(folder(kind, part).join(CONFIG_FILE)).unwrap()
}

/// Weight and `scaling B A` of the adapted layers.
fn adapted(model: &Net) -> Vec<(String, Tensor, Tensor)> {
    use candle_sam_lora::nn::ModuleTree;
    let mut layers = Vec::new();
    model.visit("", &mut |path, node| {
        if let Node::Layer(layer) = node {
            if let Some(adapter) = layer.adapters.get("default") {
                layers.push((path.to_string(), layer.weight.clone(), adapter.delta().unwrap()));
            }
        }
    });
    layers
}

#[test]
fn the_start_is_taken_out_of_the_base_as_in_peft() {
    let fixture = read("init.safetensors");
    let base = Net::base().forward(&input(), Mode::Eval).unwrap();
    for kind in KINDS {
        let io = below(&fixture, &format!("{kind}/"));
        let mut model = Net::base();
        inject(&mut model, &config(kind, "trained"), 1).unwrap();
        let layers = adapted(&model);
        assert_eq!(layers.len(), below(&io, "weight/").len());
        for (path, weight, product) in layers {
            let error = relative_error(&product, &io[&format!("product/{path}")]);
            assert!(error < DECOMPOSED, "{kind}: product of {path}: {error}");
            // The rest of the base can be small; the error is relative to the part taken out.
            let difference = (weight - &io[&format!("weight/{path}")]).unwrap();
            let error = relative_error(&(&product + difference).unwrap(), &product);
            assert!(error < DECOMPOSED, "{kind}: weight of {path}: {error}");
        }
        let error = relative_error(&model.forward(&input(), Mode::Eval).unwrap(), &base);
        assert!(error < F32_BOUND, "{kind}: the model computes something else: {error}");
    }
}

#[test]
fn adapters_trained_on_the_rest_load_with_pefts_outputs() {
    let fixture = read("init.safetensors");
    for kind in KINDS {
        let mut model = Net::base();
        let config = load_adapter(&mut model, folder(kind, "trained")).unwrap();
        let got = model.forward(&input(), Mode::Eval).unwrap();
        let error = relative_error(&got, &fixture[&format!("{kind}/out")]);
        assert!(error < 2.0 * F32_BOUND, "{kind}: {error}");
        assert_saved(&model, DEFAULT_ADAPTER, &config, &folder(kind, "trained"));
    }
}

#[test]
fn conversion_to_plain_lora_is_pefts() {
    for kind in ["pissa", "olora", "pissa_rslora"] {
        let (start, trained) = (tensors(kind, "start"), tensors(kind, "trained"));
        let (config, converted) =
            convert_to_lora(&config(kind, "trained"), &start, &trained).unwrap();
        assert_same_tensors(kind, &converted, &tensors(kind, "converted"));
        let dir = written(&config, &converted);
        assert_same(CONFIG_FILE, dir.path(), &folder(kind, "converted"));
        let mut model = Net::base();
        load_adapter(&mut model, dir.path()).unwrap();
        let got = model.forward(&input(), Mode::Eval).unwrap();
        let error = relative_error(&got, &read("init.safetensors")[&format!("{kind}/out")]);
        assert!(error < 2.0 * F32_BOUND, "{kind}: {error}");
    }
    let (start, trained) = (Tensors::new(), tensors("pissa", "trained"));
    assert!(convert_to_lora(&config("pissa", "trained"), &start, &trained).is_err());
    assert!(convert_to_lora(&config("pissa_dora", "trained"), &trained, &trained).is_err());
}

/// One layer, wide enough for statistics.
struct One {
    q: Linear,
}
module_tree!(One { q });

impl One {
    /// Its singular values decay, as those of trained weights.
    fn random() -> Self {
        let mut one = Self {
            q: Linear::load_no_bias(48, 40, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap(),
        };
        candle_sam_lora::nn::randomize(&mut one, 5, 1.0).unwrap();
        let decay: Vec<f32> = (0..48).map(|column| 0.7f32.powi(column)).collect();
        let decay = Tensor::new(decay, &Device::Cpu).unwrap();
        one.q.weight = one.q.weight.broadcast_mul(&decay).unwrap();
        one
    }

    fn injected(config: LoraConfig) -> Self {
        let mut one = Self::random();
        inject(&mut one, &config.target_modules(["q"]), 9).unwrap();
        one
    }

    fn parts(&self) -> (Vec<f32>, Vec<f32>) {
        let adapter = self.q.adapters.get("default").unwrap();
        (values(&adapter.a), values(&adapter.b))
    }

    /// Largest `scaling B A`.
    fn largest_delta(&self) -> f32 {
        let delta = self.q.adapters.get("default").unwrap().delta().unwrap();
        values(&delta).iter().fold(0f32, |max, value| max.max(value.abs()))
    }
}

/// Mean and mean square of n values lie within 4 standard deviations of what they should be.
fn check_moments(values: &[f32], variance: f64, fourth: f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let square = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
    assert!(mean.abs() < 4.0 * (variance / n).sqrt(), "mean {mean}");
    let deviation = ((fourth - variance * variance) / n).sqrt();
    assert!((square - variance).abs() < 4.0 * deviation, "mean square {square}, not {variance}");
}

#[test]
fn random_starts_have_their_distribution() {
    let named = |name: &str| LoraConfig::new(20).alpha(20.0).init(name);
    let (a, b) = One::injected(named("gaussian")).parts();
    let variance = 1.0 / 400.0;
    check_moments(&a, variance, 3.0 * variance * variance);
    assert!(b.iter().all(|b| *b == 0.0));

    let mut plain = LoraConfig::new(20).alpha(20.0);
    plain.init_lora_weights = InitLoraWeights::Default(false);
    let (a, b) = One::injected(plain).parts();
    for (values, bound) in [(a, 1.0 / 48f64.sqrt()), (b, 1.0 / 20f64.sqrt())] {
        assert!(values.iter().all(|value| f64::from(value.abs()) <= bound));
        check_moments(&values, bound.powi(2) / 3.0, bound.powi(4) / 5.0);
    }

    let one = One::injected(named("orthogonal"));
    let (a, b) = one.parts();
    for values in [&a, &b] {
        // A sum of half of a unit vector's squares, each times a squared normal number, over 100.
        let square = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let mean = square / values.len() as f64;
        assert!((mean * 200.0 - 1.0).abs() < 0.2, "{mean}");
    }
    assert!(one.largest_delta() < 1e-6, "the two halves are orthogonal");
}

#[test]
fn iterated_pissa_comes_close_to_the_decomposition_and_is_the_same_when_loaded() {
    let config = |name: &str| LoraConfig::new(3).alpha(6.0).init(name).target_modules(["q"]);
    let whole = One::injected(config("pissa"));
    let iterated = One::injected(config("pissa_niter_60"));
    let (left, right) = (&whole.q, &iterated.q);
    let delta = |layer: &Linear| layer.adapters.get("default").unwrap().delta().unwrap();
    let error = relative_error(&delta(right), &delta(left));
    assert!(error < 1e-3, "{error}");
    assert!(relative_error(&right.weight, &left.weight) < 1e-3);

    let config = config("pissa_niter_2");
    let few = One::injected(config.clone());
    let dir = tempfile::tempdir().unwrap();
    save_adapter(&few, &config, dir.path()).unwrap();
    let mut loaded = One::random();
    load_adapter(&mut loaded, dir.path()).unwrap();
    assert_eq!(snapshot(&loaded), snapshot(&few));
}

#[test]
fn a_run_and_its_conversion_agree() {
    for name in ["pissa", "olora", "pissa_niter_4"] {
        let config = LoraConfig::new(2).alpha(3.0).init(name).target_modules(["q", "v", "head"]);
        let mut model = Net::base();
        inject(&mut model, &config, 0).unwrap();
        let initial = adapter_state(&model, &config).unwrap();
        for (_, variable) in trainable_variables(&model).unwrap() {
            variable.set(&(variable.as_tensor() * 1.25).unwrap()).unwrap();
        }
        let trained = adapter_state(&model, &config).unwrap();
        let (config, tensors) = convert_to_lora(&config, &initial, &trained).unwrap();
        let dir = written(&config, &tensors);
        let mut plain = Net::base();
        load_adapter(&mut plain, dir.path()).unwrap();
        let forward = |model: &Net| model.forward(&input(), Mode::Eval).unwrap();
        let error = relative_error(&forward(&plain), &forward(&model));
        assert!(error < 2.0 * F32_BOUND, "{name}: {error}");
    }
}

#[test]
fn impossible_starts_are_refused_and_change_nothing() {
    let new = |rank: usize| LoraConfig::new(rank).target_modules(["q"]);
    assert_refused(
        Net::base,
        [
            (new(9).init("pissa"), "at most 8"),
            (new(9).init("olora"), "at most 8"),
            (new(2).alpha(-1.0).init("pissa"), "positive"),
            (new(3).init("orthogonal"), "even rank"),
            (new(2).init("eva"), "needs data"),
            (new(2).init("unheard_of"), "init_lora_weights"),
            (new(2).init("gaussian").lora_bias(), "lora_bias"),
            (LoraConfig::new(2).target_modules(["patch"]).init("pissa"), "convolution"),
            (LoraConfig::new(2).target_modules(["patch"]).init("orthogonal"), "convolution"),
        ],
    );
    let mut model = Net::base();
    add_adapter(&mut model, "a", &new(2), 0).unwrap();
    let error = add_adapter(&mut model, "b", &new(2).init("pissa"), 0).unwrap_err().to_string();
    assert!(error.contains("alone"), "{error}");
}
