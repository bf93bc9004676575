//! Several adapters on one model against PEFT in f64: each alone, and sums in any order, DoRA among them. Dropout,
//! gradients, merging, and a different adapter for each image are compared too.

use crate::support::blocks::{adapter, below, facts, input, loaded, read, Net, F32_BOUND, NAMES};
use crate::support::folders::assert_saved;
use crate::support::{bits, relative_error, snapshot, values, Tensors};
use candle_core::{IndexOp, Tensor};
use candle_sam_lora::lora::{
    active_adapters, adapter_names, add_adapter, delete_adapter, disable_adapters, enable_adapters,
    forward_mixed_batch, load_named_adapter, merge, safe_merge, set_adapter, unmerge, LoraConfig,
    NO_ADAPTER,
};
use candle_sam_lora::nn::{named_parameters, set_trainable, trainable_variables, Mode};
use std::collections::BTreeSet;

/// The combinations in the fixture, with their tensors.
fn combinations() -> Vec<(Vec<String>, Tensors)> {
    let io = read("several.safetensors");
    let cases: BTreeSet<&str> = io.keys().filter_map(|key| key.split('/').next()).collect();
    cases
        .into_iter()
        .filter(|case| !["mixed", "weighted", "hotswap", "none"].contains(case))
        .map(|case| {
            let names = case.split('+').map(str::to_string).collect();
            (names, below(&io, &format!("{case}/")))
        })
        .collect()
}

#[test]
fn any_adapters_in_any_order_compute_what_peft_computes() {
    let mut model = loaded(&NAMES);
    assert_eq!(
        adapter_names(&model).into_iter().collect::<BTreeSet<_>>(),
        BTreeSet::from(NAMES.map(str::to_string))
    );
    let x = input();
    let seed = facts("several.safetensors", "seed").as_u64().unwrap();
    let combinations = combinations();
    assert_eq!(combinations.len(), 20);
    for (names, io) in combinations {
        let active: Vec<&str> = names.iter().map(String::as_str).collect();
        set_adapter(&mut model, &active).unwrap();
        assert_eq!(active_adapters(&model), names);
        let error = relative_error(&model.forward(&x, Mode::Eval).unwrap(), &io["out"]);
        assert!(error < F32_BOUND, "{names:?}: {error}");
        let out = model.forward(&x, Mode::Train { seed }).unwrap();
        let error = relative_error(&out, &io["train"]);
        assert!(error < F32_BOUND, "{names:?} in training: {error}");

        let before = snapshot(&model);
        safe_merge(&mut model).unwrap();
        let error = relative_error(&model.forward(&x, Mode::Eval).unwrap(), &io["merged"]);
        assert!(error < F32_BOUND, "{names:?} merged: {error}");
        let weights: Tensors = named_parameters(&model).into_iter().collect();
        let changed = below(&io, "weight/");
        assert!(!changed.is_empty());
        for (name, weight) in changed {
            let error = relative_error(&weights[&name], &weight);
            assert!(error < 1e-6, "{names:?} merged: {name}: {error}");
        }
        unmerge(&mut model).unwrap();
        assert_eq!(snapshot(&model), before, "{names:?}");
    }
}

/// Gradients pass through every layer twice: ten times the bound of the outputs.
#[test]
fn gradients_of_every_active_adapter_equal_peft() {
    let mut model = loaded(&NAMES);
    let (x, weights) = (input(), read("inputs.safetensors")["G"].clone());
    let seed = facts("several.safetensors", "seed").as_u64().unwrap();
    for (names, io) in combinations() {
        let active: Vec<&str> = names.iter().map(String::as_str).collect();
        set_adapter(&mut model, &active).unwrap();
        let out = model.forward(&x, Mode::Train { seed }).unwrap();
        let gradients = (out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        let expected = below(&io, "grad/");
        let mut compared = 0;
        for (name, variable) in trainable_variables(&model).unwrap() {
            // q.lora_A.<adapter>.weight in the tree, <adapter>/base_model.model.q.lora_A.weight in the fixture.
            let owner = active.iter().find(|own| name.split('.').any(|part| part == **own));
            let owner = owner.unwrap_or_else(|| panic!("{name} is trainable"));
            let parts: Vec<&str> = name.split('.').filter(|part| part != owner).collect();
            let leaf = parts.join(".");
            let want = &expected[&format!("{owner}/base_model.model.{leaf}")];
            let error = relative_error(gradients.get(&variable).unwrap(), want);
            assert!(error < 10.0 * F32_BOUND, "{names:?}: {name}: {error}");
            compared += 1;
        }
        assert_eq!(compared, expected.len(), "{names:?}");
    }
}

#[test]
fn several_lora_adapters_are_one_fused_projection() {
    let mut model = loaded(&["a", "d", "e", "c"]);
    let linear = |model: &Net, mode| {
        let q = &model.encoder.layers[0].q;
        let parts = q.low_rank(mode).unwrap();
        (parts.len(), q.projection(&parts).map(|p| p.lora.map(|lora| lora.a.dims()[0])))
    };
    let train = Mode::Train { seed: 1 };
    set_adapter(&mut model, &["a", "d", "e"]).unwrap();
    assert_eq!(linear(&model, Mode::Eval), (1, Some(Some(7))));
    assert_eq!(linear(&model, train), (3, None), "masks differ");
    set_adapter(&mut model, &["a", "d"]).unwrap();
    assert_eq!(linear(&model, train), (1, Some(Some(5))));
    set_adapter(&mut model, &["a", "c"]).unwrap();
    assert_eq!(linear(&model, Mode::Eval), (2, None), "DoRA is no sum");
    set_adapter(&mut model, &[]).unwrap();
    assert_eq!(linear(&model, Mode::Eval), (0, Some(None)));
}

#[test]
fn each_image_gets_its_own_adapter() {
    let mut model = loaded(&NAMES);
    set_adapter(&mut model, &["c"]).unwrap();
    let before = snapshot(&model);
    let x = input();
    let run = |model: &Net, images: &Tensor| {
        Ok(vec![model.forward(&x.index_select(images, 0)?, Mode::Eval)?])
    };
    let adapters = facts("several.safetensors", "mixed");
    let adapters: Vec<&str> = adapters["adapters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    let mixed = forward_mixed_batch(&mut model, &adapters, run).unwrap();
    let error = relative_error(&mixed[0], &read("several.safetensors")["mixed/out"]);
    assert!(error < F32_BOUND, "{error}");

    // Kinds that PEFT refuses in a mixed batch are no exception.
    let adapters = ["conv_dora", NO_ADAPTER, "c", "conv_dora"];
    let mixed = forward_mixed_batch(&mut model, &adapters, run).unwrap();
    assert_eq!((active_adapters(&model), snapshot(&model)), (vec!["c".into()], before));
    assert_each_as_alone(&mut model, &adapters, &mixed[0], Ok);
}

/// Each image of a mixed batch is as if its adapter alone had computed it, and `order` had ordered its elements.
fn assert_each_as_alone(
    model: &mut Net,
    adapters: &[&str],
    mixed: &Tensor,
    order: fn(Tensor) -> candle_core::Result<Tensor>,
) {
    for (i, name) in adapters.iter().enumerate() {
        let active: &[&str] = if *name == NO_ADAPTER { &[] } else { &[name] };
        set_adapter(model, active).unwrap();
        let alone = model.forward(&input().narrow(0, i, 1).unwrap(), Mode::Eval).unwrap();
        // A product over one image's rows may round otherwise than over two images'.
        let error = relative_error(&mixed.i(i..i + 1).unwrap(), &order(alone).unwrap());
        assert!(error < 1e-6, "image {i}: {error}");
    }
}

/// A batch that is not mixed is run once and not copied, whatever strides the output has. An image encoder's output has
/// those of a permutation.
#[test]
fn outputs_of_any_strides_are_put_in_order() {
    let mut model = loaded(&["a", "b"]);
    let x = input();
    let out = |model: &Net, images: &Tensor| {
        Ok(vec![model.forward(&x.index_select(images, 0)?, Mode::Eval)?.permute((0, 3, 1, 2))?])
    };
    for adapters in [["b"; 4], [NO_ADAPTER; 4], ["b", "a", "b", NO_ADAPTER]] {
        let mixed = forward_mixed_batch(&mut model, &adapters, out).unwrap();
        let first = |alone: Tensor| alone.permute((0, 3, 1, 2));
        assert_each_as_alone(&mut model, &adapters, &mixed[0], first);
    }
}

#[test]
fn a_mixed_batch_that_cannot_be_is_refused_and_leaves_the_model_as_it_was() {
    let mut model = loaded(&["a", "b"]);
    let x = input();
    let good = |model: &Net, images: &Tensor| {
        Ok(vec![model.forward(&x.index_select(images, 0)?, Mode::Eval)?])
    };
    let whole = |model: &Net, _: &Tensor| Ok(vec![model.forward(&x, Mode::Eval)?]);
    let message = |result: candle_sam_lora::Result<Vec<Tensor>>| result.unwrap_err().to_string();
    assert!(message(forward_mixed_batch(&mut model, &["a", "x"], good)).contains("\"x\""));
    assert!(message(forward_mixed_batch(&mut model, &[], good)).contains("empty"));
    assert!(message(forward_mixed_batch(&mut model, &["a", "b"], whole)).contains("1 images"));
    disable_adapters(&mut model).unwrap();
    assert!(message(forward_mixed_batch(&mut model, &["a"], good)).contains("disabled"));
    enable_adapters(&mut model).unwrap();
    merge(&mut model).unwrap();
    assert!(message(forward_mixed_batch(&mut model, &["a"], good)).contains("merged"));
    unmerge(&mut model).unwrap();
    assert_eq!(active_adapters(&model), ["a"]);
}

#[test]
fn disabled_adapters_are_as_if_they_were_not() {
    let mut model = loaded(&["a", "c", "conv"]);
    set_adapter(&mut model, &["a", "c", "conv"]).unwrap();
    let x = input();
    let forward = |model: &Net| bits(&model.forward(&x, Mode::Train { seed: 1 }).unwrap());
    let (base, with) = (forward(&Net::base()), forward(&model));
    assert_ne!(base, with);
    disable_adapters(&mut model).unwrap();
    assert_eq!(forward(&model), base);
    enable_adapters(&mut model).unwrap();
    assert_eq!(forward(&model), with);
    merge(&mut model).unwrap();
    disable_adapters(&mut model).unwrap();
    assert_eq!(forward(&model), base, "merged ones are taken out");
    let message = merge(&mut model).unwrap_err().to_string();
    assert!(message.contains("disabled"), "{message}");
    for name in ["a", "c", "conv"] {
        delete_adapter(&mut model, name).unwrap();
    }
    load_named_adapter(&mut model, "a", adapter("a")).unwrap();
    assert_eq!(forward(&model), forward(&loaded(&["a"])), "a new adapter is not disabled");
}

#[test]
fn the_active_are_trained_and_the_others_frozen() {
    let mut model = loaded(&["a", "b"]);
    let owners = |model: &Net| -> BTreeSet<String> {
        let owner = |name: String| ["a", "b"].map(|own| (name.contains(&format!(".{own}.")), own));
        let names =
            trainable_variables(model).unwrap().into_iter().flat_map(|(name, _)| owner(name));
        names.filter(|(own, _)| *own).map(|(_, name)| name.to_string()).collect()
    };
    let set = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<BTreeSet<_>>();
    assert_eq!(owners(&model), set(&["a"]), "the first loaded is the active one");
    set_adapter(&mut model, &["b"]).unwrap();
    assert_eq!(owners(&model), set(&["b"]));
    set_adapter(&mut model, &["a", "b"]).unwrap();
    assert_eq!(owners(&model), set(&["a", "b"]));
    let held = trainable_variables(&model).unwrap();
    set_adapter(&mut model, &["b", "a"]).unwrap();
    for ((name, old), (_, new)) in held.iter().zip(trainable_variables(&model).unwrap()) {
        assert_eq!(old.as_tensor().id(), new.as_tensor().id(), "{name} is another variable");
    }
    // Frozen for inference, an added adapter changes nothing of what computes.
    set_trainable(&mut model, |_| false).unwrap();
    let out = bits(&model.forward(&input(), Mode::Eval).unwrap());
    load_named_adapter(&mut model, "c", adapter("c")).unwrap();
    assert_eq!(bits(&model.forward(&input(), Mode::Eval).unwrap()), out);
    assert!(trainable_variables(&model).unwrap().is_empty());
}

#[test]
fn deleting_the_active_adapter_activates_the_first_that_remains() {
    let mut model = loaded(&["a", "b", "c"]);
    set_adapter(&mut model, &["b"]).unwrap();
    delete_adapter(&mut model, "b").unwrap();
    assert_eq!(
        (adapter_names(&model), active_adapters(&model)),
        (vec!["a".into(), "c".into()], vec!["a".into()])
    );
    set_adapter(&mut model, &["c", "a"]).unwrap();
    delete_adapter(&mut model, "c").unwrap();
    assert_eq!(active_adapters(&model), ["a"]);
    assert_eq!(snapshot(&model), snapshot(&loaded(&["a"])));
    merge(&mut model).unwrap();
    assert!(delete_adapter(&mut model, "a").unwrap_err().to_string().contains("merged"));
    unmerge(&mut model).unwrap();
    delete_adapter(&mut model, "a").unwrap();
    assert!(adapter_names(&model).is_empty());
    assert_eq!(snapshot(&model), snapshot(&Net::base()));
}

#[test]
fn each_adapter_is_written_back_bit_for_bit_without_its_name() {
    let mut model = Net::base();
    let configs: Vec<LoraConfig> = NAMES
        .iter()
        .map(|name| load_named_adapter(&mut model, name, adapter(name)).unwrap())
        .collect();
    for (name, config) in NAMES.iter().zip(&configs) {
        assert_saved(&model, name, config, &adapter(name));
    }
}

#[test]
fn what_does_not_go_together_is_refused_and_changes_nothing() {
    let mut model = loaded(&["a"]);
    let new = || LoraConfig::new(2).target_modules(["q"]);
    let before = snapshot(&model);
    let cases = [
        ("a", new(), "already carries an adapter"),
        ("", new(), "name"),
        ("x.y", new(), "name"),
        ("../x", new(), "name"),
        ("lora_x", new(), "lora_"),
        (NO_ADAPTER, new(), "no adapter"),
        ("x", new().modules_to_save(["head"]), "alone"),
        ("x", new().bias(candle_sam_lora::lora::BiasTraining::All), "alone"),
    ];
    for (name, config, expected) in cases {
        let error = add_adapter(&mut model, name, &config, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "{name:?}: {error}");
        assert_eq!(snapshot(&model), before);
    }
    for names in [&["x"][..], &["a", "a"]] {
        assert!(set_adapter(&mut model, names).is_err());
        assert_eq!(active_adapters(&model), ["a"]);
    }
    let mut alone = Net::base();
    add_adapter(&mut alone, "x", &new().modules_to_save(["head"]), 0).unwrap();
    let error = load_named_adapter(&mut alone, "a", adapter("a")).unwrap_err().to_string();
    assert!(error.contains("alone"), "{error}");
}

#[test]
fn a_new_adapter_of_a_convolution_changes_nothing_at_first() {
    for config in [
        LoraConfig::new(2).target_modules(["patch", "conv1", "conv2"]),
        LoraConfig::new(2).target_modules(["patch", "conv1", "conv2"]).dora(),
    ] {
        let mut model = Net::base();
        add_adapter(&mut model, "default", &config, 3).unwrap();
        let a = &model.neck.conv2.adapters.get("default").unwrap().a;
        assert_eq!(a.dims(), [2, 6, 3, 3]);
        assert!(values(a).iter().all(|a| a.abs() <= 1.0 / 54f32.sqrt()));
        let got = model.forward(&input(), Mode::Eval).unwrap();
        let error = relative_error(&got, &Net::base().forward(&input(), Mode::Eval).unwrap());
        assert!(error < F32_BOUND, "{error}");
    }
}
