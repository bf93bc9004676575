//! Merging: the merged model computes what the unmerged one does, and unmerging restores every bit.

use crate::support::linears::{fixture, injected, loaded, read, Net, F32_BOUND, KINDS};
use crate::support::{adapted, bits, relative_error, snapshot, values};
use candle_core::{DType, Tensor};
use candle_sam_lora::lora::{
    load_adapter, merge, merge_and_unload, safe_merge, unload, unmerge, LoraConfig,
};
use candle_sam_lora::nn::{randomize, set_trainable, trainable_variables, Mode, DEFAULT_ADAPTER};

#[test]
fn merged_equals_unmerged_and_peft() {
    let io = read("io.safetensors");
    for kind in KINDS {
        let mut model = loaded(kind);
        let forward = |model: &Net| model.forward(&io["x"], Mode::Eval).unwrap();
        let (before, unmerged) = (snapshot(&model), forward(&model));
        merge(&mut model).unwrap();
        let merged = forward(&model);
        assert_ne!(bits(&model.q.weight), bits(&Net::base().q.weight), "{kind}");
        let error = relative_error(&merged, &unmerged);
        assert!(error < F32_BOUND, "{kind}: {error}");
        let error = relative_error(&merged, &io[&format!("merged/{kind}")]);
        assert!(error < F32_BOUND, "{kind}: {error}");

        let once = snapshot(&model);
        merge(&mut model).unwrap();
        assert_eq!(snapshot(&model), once, "{kind}: merging twice is merging once");
        unmerge(&mut model).unwrap();
        assert_eq!(snapshot(&model), before, "{kind}");
        assert_eq!(bits(&forward(&model)), bits(&unmerged), "{kind}");
    }
}

#[test]
fn a_merged_model_has_no_dropout_and_no_trained_part_of_its_own() {
    let mut model = loaded("plain");
    let x = &read("io.safetensors")["x"];
    merge(&mut model).unwrap();
    let train = model.forward(x, Mode::Train { seed: 5 }).unwrap();
    assert_eq!(bits(&train), bits(&model.forward(x, Mode::Eval).unwrap()));
    assert!(!model.q.weight.is_variable());
}

#[test]
fn merging_and_unloading_leaves_a_plain_model() {
    let x = &read("io.safetensors")["x"];
    for kind in KINDS {
        let mut model = loaded(kind);
        merge(&mut model).unwrap();
        let expected = model.forward(x, Mode::Eval).unwrap();
        merge_and_unload(&mut model).unwrap();
        assert!(adapted(&model).is_empty());
        assert_eq!(bits(&model.forward(x, Mode::Eval).unwrap()), bits(&expected), "{kind}");
        assert!(merge(&mut model).unwrap_err().to_string().contains("no adapter in use"));
    }
}

#[test]
fn ejecting_a_merged_model_restores_the_base() {
    let mut model = loaded("dora");
    merge(&mut model).unwrap();
    unload(&mut model).unwrap();
    assert_eq!(snapshot(&model), snapshot(&Net::base()));
}

#[test]
fn a_lora_bias_needs_a_bias_to_go_to() {
    let config = LoraConfig::new(2).target_modules(["q", "lin2"]).lora_bias();
    let mut model = injected(&config, 0);
    let before = snapshot(&model);
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("mlp.lin2"), "{error}");
    assert_eq!(snapshot(&model), before);
    assert!(model.q.adapters.unmerged.is_none());
}

#[test]
fn a_broken_adapter_is_refused_by_the_safe_merge_alone() {
    for (broken, at) in [(f64::NAN, "lora_B.weight"), (f64::INFINITY, "lora_B.bias")] {
        let mut model = loaded("lora_bias");
        for (name, variable) in trainable_variables(&model).unwrap() {
            if name == format!("v.{at}") {
                variable.set(&(variable.ones_like().unwrap() * broken).unwrap()).unwrap();
            }
        }
        let before = snapshot(&model);
        let error = safe_merge(&mut model).unwrap_err().to_string();
        assert!(error.contains("v: merging gives values that are not finite"), "{error}");
        assert_eq!(snapshot(&model), before);
        merge(&mut model).unwrap();
    }
    let mut model = loaded("lora_bias");
    safe_merge(&mut model).unwrap();
    let mut other = loaded("lora_bias");
    merge(&mut other).unwrap();
    assert_eq!(snapshot(&model), snapshot(&other));
}

#[test]
fn half_precision_weights_are_rounded_once() {
    for dtype in [DType::F16, DType::BF16] {
        let mut model = Net::base_in(dtype);
        load_adapter(&mut model, fixture("dora")).unwrap();
        let adapter = model.q.adapters.get(DEFAULT_ADAPTER).cloned().unwrap();
        let (weight, magnitude) = (values(&model.q.weight), adapter.magnitude.unwrap());
        let (a, b, magnitude) = (values(&adapter.a), values(&adapter.b), values(&magnitude));
        let mut expected = Vec::new();
        for (row, magnitude) in magnitude.iter().enumerate() {
            let sum = |col: usize| {
                let delta: f64 =
                    (0..4).map(|r| f64::from(b[row * 4 + r]) * f64::from(a[r * 8 + col])).sum();
                f64::from(weight[row * 8 + col]) + adapter.scaling * delta
            };
            let norm = (0..8).map(|col| sum(col).powi(2)).sum::<f64>().sqrt();
            expected.extend((0..8).map(|col| (f64::from(*magnitude) / norm * sum(col)) as f32));
        }
        let expected = Tensor::new(expected, model.q.weight.device()).unwrap();
        let original = bits(&model.q.weight);
        merge(&mut model).unwrap();
        assert_eq!(model.q.weight.dtype(), dtype);
        let got = model.q.weight.flatten_all().unwrap();
        assert_eq!(bits(&got), bits(&expected.to_dtype(dtype).unwrap()));
        unmerge(&mut model).unwrap();
        assert_eq!(bits(&model.q.weight), original);
    }
}

#[test]
fn weights_that_unmerging_would_undo_are_refused() {
    let mut model = loaded("lora_bias");
    merge(&mut model).unwrap();
    let before = snapshot(&model);
    let trained = set_trainable(&mut model, |_| true).unwrap_err().to_string();
    let random = randomize(&mut model, 0, 0.1).unwrap_err().to_string();
    for message in [trained, random] {
        assert!(message.contains("merged"), "{message}");
    }
    assert_eq!(snapshot(&model), before);
    set_trainable(&mut model, |_| false).unwrap();
    unmerge(&mut model).unwrap();
    set_trainable(&mut model, |_| true).unwrap();
}
