//! Injection: what is frozen, what is trained, where adapters go, and that a refusal changes nothing.

use crate::support::linears::{fixture, injected, read, Net, KINDS};
use crate::support::{
    adapted, assert_refused, bits, metadata, relative_error, snapshot, trained, values,
};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{
    count_parameters, count_parameters_as_peft, inject, unload, BiasTraining, LoraConfig,
    ParameterCount, CONFIG_FILE,
};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{trainable_variables, Linear, Mode, DEFAULT_ADAPTER};

fn config() -> LoraConfig {
    LoraConfig::new(4).alpha(32.0).dropout(0.1).target_modules(["q", "v"])
}

#[test]
fn the_base_is_frozen_and_the_output_unchanged() {
    let (base, mut model) = (Net::base(), Net::base());
    let x = &read("io.safetensors")["x"];
    assert_eq!(inject(&mut model, &config(), 7).unwrap(), ["q", "v"]);
    assert_eq!(
        trained(&model),
        ["q.lora_A.weight", "q.lora_B.weight", "v.lora_A.weight", "v.lora_B.weight"]
    );
    let adapter = model.v.adapters.get(DEFAULT_ADAPTER).unwrap();
    assert_eq!((adapter.a.dims(), adapter.b.dims()), (&[4, 8][..], &[6, 4][..]));
    assert_eq!((adapter.scaling, adapter.dropout), (8.0, 0.1));
    assert!(values(&adapter.b).iter().all(|&b| b == 0.0));
    for mode in [Mode::Eval, Mode::Train { seed: 3 }] {
        let (got, expected) =
            (model.forward(x, mode).unwrap(), base.forward(x, Mode::Eval).unwrap());
        assert_eq!(bits(&got), bits(&expected));
    }
}

#[test]
fn a_is_kaiming_uniform_and_a_function_of_the_seed() {
    struct Wide {
        q: Linear,
        v: Linear,
    }
    module_tree!(Wide { q, v });
    let made = |seed| {
        let linear =
            || Linear::load_no_bias(400, 10, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
        let mut model = Wide { q: linear(), v: linear() };
        inject(&mut model, &LoraConfig::new(25).target_modules(["q", "v"]), seed).unwrap();
        (
            values(&model.q.adapters.get(DEFAULT_ADAPTER).unwrap().a),
            values(&model.v.adapters.get(DEFAULT_ADAPTER).unwrap().a),
        )
    };
    let (q, v) = made(1);
    assert_eq!((q.clone(), v.clone()), made(1));
    assert_ne!(q, v);
    assert_ne!(q, made(2).0);
    // Uniform in (-b, b) with b = 1/20: the mean of n values lies within 4 b / sqrt(3 n), the mean square near b^2 / 3.
    let (n, b) = (q.len() as f64, 0.05);
    assert!(q.iter().all(|x| f64::from(x.abs()) <= b));
    let mean = q.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let square = q.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
    assert!(mean.abs() < 4.0 * b / (3.0 * n).sqrt(), "{mean}");
    let deviation = b * b * (4.0f64 / 45.0).sqrt() / n.sqrt();
    assert!((square - b * b / 3.0).abs() < 4.0 * deviation, "{square}");
}

#[test]
fn dora_starts_from_the_row_norms() {
    let (base, model) = (Net::base(), injected(&config().dora(), 0));
    let norms: Vec<f32> = values(&base.q.weight)
        .chunks(8)
        .map(|row| row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt() as f32)
        .collect();
    let magnitude =
        values(model.q.adapters.get(DEFAULT_ADAPTER).unwrap().magnitude.as_ref().unwrap());
    for (got, expected) in magnitude.iter().zip(&norms) {
        assert!((got - expected).abs() < 1e-6 * expected, "{got} {expected}");
    }
    let x = &read("io.safetensors")["x"];
    let got = model.forward(x, Mode::Eval).unwrap();
    assert!(relative_error(&got, &base.forward(x, Mode::Eval).unwrap()) < 1e-6);
}

#[test]
fn what_is_trained_and_counted_is_what_peft_trains_and_counts() {
    let counts = metadata(&fixture("io.safetensors"), "counts");
    for kind in KINDS {
        let config = LoraConfig::load(fixture(kind).join(CONFIG_FILE)).unwrap();
        let model = injected(&config, 0);
        let report = count_parameters_as_peft(&model, &config).unwrap();
        let expected = (counts[kind][0].as_u64().unwrap(), counts[kind][1].as_u64().unwrap());
        assert_eq!((report.trainable as u64, report.all as u64), expected, "{kind}");
        assert_eq!(report.trainable, count_parameters(&model).trainable, "{kind}");
    }
}

#[test]
fn biases_and_whole_modules_are_trained_where_asked() {
    let base = ["q.lora_A.weight", "q.lora_B.weight"];
    let expect = |config: LoraConfig, more: &[&str]| {
        let model = injected(&config.target_modules(["q"]), 0);
        let mut expected: Vec<&str> = base.iter().chain(more).copied().collect();
        let mut got = trained(&model);
        expected.sort_unstable();
        got.sort_unstable();
        assert_eq!(got, expected);
    };
    expect(config().bias(BiasTraining::LoraOnly), &["q.bias"]);
    expect(
        config().bias(BiasTraining::All),
        &["q.bias", "v.bias", "norm.bias", "mlp.lin1.bias", "head.bias"],
    );
    expect(config().modules_to_save(["norm"]), &["norm.weight", "norm.bias"]);
    expect(
        config().modules_to_save(["mlp"]),
        &["mlp.lin1.weight", "mlp.lin1.bias", "mlp.lin2.weight"],
    );
}

#[test]
fn modules_match_as_in_peft() {
    let targets = |config: LoraConfig| {
        let mut model = Net::base();
        inject(&mut model, &config, 0).map(|_| adapted(&model))
    };
    let new = || LoraConfig::new(2);
    assert_eq!(targets(new().target_modules(["lin1"])).unwrap(), ["mlp.lin1"]);
    assert_eq!(targets(new().target_modules(["mlp.lin1", "q"])).unwrap(), ["q", "mlp.lin1"]);
    assert!(targets(new().target_modules(["in1"])).is_err());
    assert_eq!(
        targets(new().target_regex(r"mlp\.lin\d|q")).unwrap(),
        ["q", "mlp.lin1", "mlp.lin2"]
    );
    assert!(targets(new().target_regex("lin1")).is_err(), "a regex must match the whole path");
    assert_eq!(targets(new().target_regex(r"(?!.*lin2)(mlp\..*)")).unwrap(), ["mlp.lin1"]);
    let all = targets(new().target_regex("all-linear").exclude_modules(["lin2"])).unwrap();
    assert_eq!(all, ["q", "v", "mlp.lin1", "head"]);
    let saved = new().target_modules(["q", "lin1"]).modules_to_save(["mlp"]);
    assert_eq!(targets(saved).unwrap(), ["q"], "below a module to save nothing is targeted");
}

#[test]
fn patterns_set_rank_and_scaling() {
    let config = LoraConfig::new(4)
        .alpha(32.0)
        .target_modules(["q", "v", "lin1"])
        .rank_of("q", 2)
        .rank_of(r"mlp\.lin\d", 8)
        .alpha_of("v", 4.0);
    let model = injected(&config, 0);
    let of = |linear: &Linear| {
        let adapter = linear.adapters.get(DEFAULT_ADAPTER).unwrap();
        (adapter.rank(), adapter.scaling)
    };
    assert_eq!(of(&model.q), (2, 16.0));
    assert_eq!(of(&model.v), (4, 1.0));
    assert_eq!(of(&model.mlp.lin1), (8, 4.0));
}

#[test]
fn a_refusal_names_its_reason_and_changes_nothing() {
    let new = || LoraConfig::new(2);
    assert_refused(
        Net::base,
        [
            (new().target_modules(["query"]), "head, lin1, lin2, q, v"),
            (new().target_modules(["q"]).exclude_modules(["q"]), "exclude_modules is [\"q\"]"),
            (
                new().target_modules(["lin1"]).modules_to_save(["mlp.lin1"]),
                "modules_to_save, which",
            ),
            (new().target_modules(["norm"]), "norm is no linear layer"),
            (new().target_modules(["mlp"]), "mlp is no linear layer"),
            (new().target_regex("("), "regular expression \"(\": "),
            (new().target_regex("(a*)*b|.*(?=x)(x*)*"), "matches no layer"),
            (new().target_modules(["q"]).rank_of("[", 2), "regular expression \"[\": "),
            (new().target_modules(["q"]).modules_to_save(["neck"]), "neck"),
            (new().target_modules(["lin1"]).modules_to_save(["in1"]), "choose one"),
            (LoraConfig::new(0).target_modules(["q"]), "rank"),
            (new().target_modules(["q"]).dora().lora_bias(), "use_dora"),
        ],
    );
    let mut model = injected(&config(), 0);
    let injected = snapshot(&model);
    let error = inject(&mut model, &config(), 1).unwrap_err().to_string();
    assert!(error.contains("already carries an adapter"), "{error}");
    assert_eq!(snapshot(&model), injected);
}

#[test]
fn a_model_without_named_layers_is_told_so() {
    let config = LoraConfig::new(2).target_regex("all-linear");
    let error = inject(&mut Net::base().q, &config, 0).unwrap_err().to_string();
    assert!(error.contains("no linear layer or convolution in a field of a name"), "{error}");
}

#[test]
fn ejecting_leaves_the_base() {
    let mut model = injected(&config(), 0);
    unload(&mut model).unwrap();
    assert_eq!(snapshot(&model), snapshot(&Net::base()));
}

#[test]
fn every_trained_tensor_gets_a_gradient_and_no_other() {
    for config in [
        config().lora_bias().bias(BiasTraining::All),
        config().dora().modules_to_save(["norm", "head"]),
    ] {
        let model = injected(&config, 0);
        let x = &read("io.safetensors")["x"];
        let y = model.forward(x, Mode::Train { seed: 1 }).unwrap();
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for (name, variable) in trainable_variables(&model).unwrap() {
            let gradient = gradients.get(&variable).unwrap_or_else(|| panic!("{name}: none"));
            let largest = values(gradient).iter().fold(0f32, |max, g| max.max(g.abs()));
            // B is zero at the start, and so is the gradient of A.
            assert_eq!(largest == 0.0, name.ends_with("lora_A.weight"), "{name}: {largest}");
        }
        assert!(gradients.get(&model.q.weight).is_none());
    }
}

#[test]
fn half_precision_models_get_adapters_in_f32() {
    let mut model = Net::base_in(DType::BF16);
    inject(&mut model, &config().dora(), 0).unwrap();
    let adapter = model.q.adapters.get(DEFAULT_ADAPTER).unwrap();
    for tensor in [&adapter.a, &adapter.b, adapter.magnitude.as_ref().unwrap()] {
        assert_eq!(tensor.dtype(), DType::F32);
    }
    assert_eq!(model.q.weight.dtype(), DType::BF16);
}

#[test]
fn an_empty_layer_is_refused() {
    struct One {
        q: Linear,
    }
    module_tree!(One { q });
    let weight = Tensor::zeros((4, 0), DType::F32, &Device::Cpu).unwrap();
    let mut model = One { q: Linear::new(weight, None) };
    let error = inject(&mut model, &LoraConfig::new(2).target_modules(["q"]), 0).unwrap_err();
    assert!(error.to_string().contains("[4, 0]"), "{error}");
}

#[test]
fn the_report_reads_as_in_peft() {
    let line = |trainable, all| ParameterCount { trainable, all }.to_string();
    assert_eq!(
        line(589_824, 94_325_296),
        "trainable params: 589,824 || all params: 94,325,296 || trainable%: 0.6253"
    );
    assert_eq!(
        line(912_384, 94_647_856),
        "trainable params: 912,384 || all params: 94,647,856 || trainable%: 0.9640"
    );
    assert_eq!(line(12, 100), "trainable params: 12 || all params: 100 || trainable%: 12.0000");
    assert_eq!(line(0, 0), "trainable params: 0 || all params: 0 || trainable%: 0.0000");
    assert_eq!(
        line(1000, 1000),
        "trainable params: 1,000 || all params: 1,000 || trainable%: 100.0000"
    );
}
