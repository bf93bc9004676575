//! Adapter folders: PEFT's load with PEFT's outputs and are written back bit for bit; what is damaged or foreign is an
//! error that changes nothing.

use crate::common::property;
use crate::support::folders::{assert_same, assert_same_tensors, changed, copy_of, tensors_of};
use crate::support::linears::{fixture, injected, loaded, read, refused, Net, F32_BOUND, KINDS};
use crate::support::{adapted, bits, relative_error, snapshot, trained};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{
    adapter_state, add_adapter, inject, load_adapter, merge, read_adapter, save_adapter,
    save_pretrained, set_adapter_state, write_adapter, BiasTraining, LoraConfig, ModuleNames,
    CARD_FILE, CONFIG_FILE, TENSORS_FILE,
};
use candle_sam_lora::nn::{
    trainable_variables, Buffer, Fixed, Linear, Mode, Tied, DEFAULT_ADAPTER,
};
use candle_sam_lora::{module_tree, Error};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

fn config() -> LoraConfig {
    LoraConfig::new(4).alpha(32.0).target_modules(["q", "v"])
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn peft_adapters_compute_what_peft_computes() {
    let io = read("io.safetensors");
    for kind in KINDS {
        let got = loaded(kind).forward(&io["x"], Mode::Eval).unwrap();
        let error = relative_error(&got, &io[&format!("out/{kind}")]);
        assert!(error < F32_BOUND, "{kind}: {error}");
        let unadapted = Net::base().forward(&io["x"], Mode::Eval).unwrap();
        assert!(relative_error(&unadapted, &io[&format!("out/{kind}")]) > 1e-2, "{kind}");
    }
}

#[test]
fn peft_adapters_are_written_back_bit_for_bit() {
    for kind in KINDS {
        let mut model = Net::base();
        let config = load_adapter(&mut model, fixture(kind)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        save_adapter(&model, &config, dir.path()).unwrap();
        assert_eq!(entries(dir.path()), [CONFIG_FILE, TENSORS_FILE]);
        assert_same(CONFIG_FILE, dir.path(), &fixture(kind));
        let (got, mut expected) = (tensors_of(dir.path()), tensors_of(&fixture(kind)));
        if kind == "bias_all_save" {
            // PEFT writes these biases under its wrappers' names too.
            assert!(expected.remove("base_model.model.head.original_module.bias").is_some());
            assert!(expected.remove("base_model.model.head.modules_to_save.bias").is_some());
        } else {
            assert_same(TENSORS_FILE, dir.path(), &fixture(kind));
        }
        assert_same_tensors(kind, &got, &expected);
        assert!(got.values().all(|tensor| tensor.dtype() == DType::F32), "{kind}");
    }
}

#[test]
fn a_loaded_adapter_is_trainable_as_an_injected_one() {
    for kind in KINDS {
        let (mut loaded, mut injected) = (Net::base(), Net::base());
        let config = load_adapter(&mut loaded, fixture(kind)).unwrap();
        inject(&mut injected, &config, 0).unwrap();
        assert_eq!(trained(&loaded), trained(&injected), "{kind}");
        let stream = |model: &Net| model.q.adapters.get(DEFAULT_ADAPTER).unwrap().stream;
        assert_eq!(stream(&loaded), stream(&injected), "{kind}");
    }
}

#[test]
fn half_precision_adapter_files_load_in_f32() {
    let dir = changed(&fixture("plain"), |tensors| {
        tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::BF16).unwrap());
    });
    let halves = tensors_of(dir.path());
    let mut model = Net::base();
    load_adapter(&mut model, dir.path()).unwrap();
    let a = &model.q.adapters.get(DEFAULT_ADAPTER).unwrap().a;
    assert_eq!(a.dtype(), DType::F32);
    assert_eq!(bits(a), bits(&halves["base_model.model.q.lora_A.weight"]));
}

#[test]
fn every_difference_is_listed_and_nothing_is_changed() {
    let key = |name: &str| format!("base_model.model.{name}");
    let dir = changed(&fixture("dora"), |tensors| {
        tensors.remove(&key("q.lora_B.weight")).unwrap();
        tensors.remove(&key("mlp.lin1.lora_magnitude_vector")).unwrap();
        let wrong = Tensor::zeros((5, 8), DType::F32, &Device::Cpu).unwrap();
        tensors.insert(key("q.lora_A.weight"), wrong.clone());
        tensors.insert(key("v.lora_A.weight"), wrong);
    });
    let error = refused(dir.path());
    let Error::Mismatch(mismatch) = &error else { panic!("{error}") };
    assert_eq!(mismatch.missing, [key("mlp.lin1.lora_magnitude_vector"), key("q.lora_B.weight")]);
    assert_eq!(mismatch.surplus, [key("v.lora_A.weight")]);
    assert_eq!(mismatch.misshaped, [(key("q.lora_A.weight"), vec![4, 8], vec![5, 8])]);
    assert!(error.to_string().contains(TENSORS_FILE));
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    struct Other {
        query: Linear,
    }
    module_tree!(Other { query });
    struct Narrow {
        q: Linear,
        v: Linear,
    }
    module_tree!(Narrow { q, v });
    let linear = || Linear::load(3, 3, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
    let mut other = Other { query: linear() };
    let error = load_adapter(&mut other, fixture("plain")).unwrap_err().to_string();
    assert!(error.contains("does not fit this model") && error.contains("query"), "{error}");
    let mut narrow = Narrow { q: linear(), v: linear() };
    let error = load_adapter(&mut narrow, fixture("plain")).unwrap_err().to_string();
    assert!(error.contains("q.lora_A.weight: expected [4, 3], found [4, 8]"), "{error}");
    assert!(adapted(&narrow).is_empty());
    let error = load_adapter(&mut loaded("plain"), fixture("dora")).unwrap_err().to_string();
    assert!(error.contains("already carries an adapter"), "{error}");
}

#[test]
fn integers_are_no_adapter() {
    let dir = changed(&fixture("plain"), |tensors| {
        let integers = Tensor::zeros((4, 8), DType::U8, &Device::Cpu).unwrap();
        tensors.insert("base_model.model.q.lora_A.weight".to_string(), integers);
    });
    let error = refused(dir.path()).to_string();
    assert!(error.contains("q.lora_A.weight: expected floating point, got U8"), "{error}");
}

#[test]
fn a_folder_that_lacks_a_file_says_which() {
    for file in [CONFIG_FILE, TENSORS_FILE] {
        let dir = copy_of(&fixture("plain"));
        std::fs::remove_file(dir.path().join(file)).unwrap();
        let error = refused(dir.path());
        assert!(matches!(error, Error::Io { .. }));
        assert!(error.to_string().contains(file), "{error}");
    }
}

#[test]
fn a_damaged_pickled_adapter_is_named() {
    let dir = copy_of(&fixture("plain"));
    let tensors = dir.path().join(TENSORS_FILE);
    let pickle = dir.path().join("adapter_model.bin");
    std::fs::write(&pickle, b"PK\x03\x04").unwrap();
    load_adapter(&mut Net::base(), dir.path()).unwrap();
    std::fs::remove_file(tensors).unwrap();
    let error = refused(dir.path()).to_string();
    for word in [pickle.to_str().unwrap(), "torch.save", "4 bytes are truncated"] {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn the_model_card_is_pefts_but_for_its_prose() {
    let cards = std::fs::read_to_string(fixture("../cards.json")).unwrap();
    let cards: Vec<serde_json::Value> = serde_json::from_str(&cards).unwrap();
    assert_eq!(cards.len(), 8);
    let ours = format!("- candle-sam-lora {}", env!("CARGO_PKG_VERSION"));
    for card in cards {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Net::base();
        let mut config = config();
        config.base_model_name_or_path = card["base"].as_str().map(str::to_string);
        inject(&mut model, &config, 0).unwrap();
        let path = dir.path().join(CARD_FILE);
        if let Some(before) = card["before"].as_str() {
            std::fs::write(&path, before).unwrap();
        }
        save_pretrained(&model, DEFAULT_ADAPTER, &config, dir.path()).unwrap();
        assert_eq!(entries(dir.path()), [CARD_FILE, CONFIG_FILE, TENSORS_FILE]);
        let written = std::fs::read_to_string(&path).unwrap();
        let (header, text) = written.strip_prefix("---\n").unwrap().split_once("---\n").unwrap();
        assert_eq!(header, card["header"].as_str().unwrap());
        let expected = card["text"].as_str().unwrap().replace("- PEFT 0.21.2", &ours);
        match card["before"].is_null() {
            true => assert!(text.trim_end().ends_with(&expected), "{text}"),
            false => assert_eq!(text.trim_end(), expected),
        }
        // Saved once more it stays as it is.
        save_pretrained(&model, DEFAULT_ADAPTER, &config, dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), written);
        load_adapter(&mut Net::base(), dir.path()).unwrap();
    }
}

#[test]
fn an_adapter_of_another_name_has_a_folder_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Net::base();
    add_adapter(&mut model, "cells", &config(), 0).unwrap();
    let mut named = config();
    named.base_model_name_or_path = Some("a: \"strange\" name".into());
    save_pretrained(&model, "cells", &named, dir.path()).unwrap();
    assert_eq!(entries(dir.path()), [CARD_FILE, "cells"]);
    assert_eq!(entries(&dir.path().join("cells")), [CONFIG_FILE, TENSORS_FILE]);
    let card = std::fs::read_to_string(dir.path().join(CARD_FILE)).unwrap();
    assert!(card.contains(r#"base_model: "a: \"strange\" name""#), "{card}");
    load_adapter(&mut Net::base(), dir.path().join("cells")).unwrap();
}

#[test]
fn saving_replaces_another_adapter_whole() {
    let dir = copy_of(&fixture("dora"));
    let model = injected(&config(), 3);
    save_adapter(&model, &config(), dir.path()).unwrap();
    assert_eq!(entries(dir.path()), [CONFIG_FILE, TENSORS_FILE]);
    let mut again = Net::base();
    let read = load_adapter(&mut again, dir.path()).unwrap();
    assert!(!read.use_dora);
    assert_eq!(snapshot(&again), snapshot(&model));
}

#[test]
fn saving_makes_the_folder_and_failing_leaves_what_was_there() {
    let mut model = Net::base();
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a/b");
    assert!(save_adapter(&model, &config(), &deep).is_err(), "there is no adapter");
    assert!(entries(dir.path()).is_empty());
    inject(&mut model, &config(), 0).unwrap();
    save_adapter(&model, &config(), &deep).unwrap();
    assert_eq!(entries(&deep), [CONFIG_FILE, TENSORS_FILE]);

    let before = std::fs::read(deep.join(TENSORS_FILE)).unwrap();
    merge(&mut model).unwrap();
    let error = save_adapter(&model, &config(), &deep).unwrap_err().to_string();
    assert!(error.contains("unmerge"), "{error}");
    assert_eq!(std::fs::read(deep.join(TENSORS_FILE)).unwrap(), before);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let model = injected(&config(), 0);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    // As of a variable that is not set.
    let message = save_adapter(&model, &config(), "").unwrap_err().to_string();
    assert!(message.contains("the name of a folder is empty"), "{message}");
    let message = load_adapter(&mut Net::base(), "").unwrap_err().to_string();
    assert!(message.contains("the name of a folder is empty"), "{message}");
    let error = save_adapter(&model, &config(), &file).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
}

#[cfg(unix)]
#[test]
fn saved_files_have_the_permissions_of_any_other() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let model = injected(&config(), 0);
    save_adapter(&model, &config(), dir.path()).unwrap();
    std::fs::write(dir.path().join("other"), "").unwrap();
    let mode = |file: &str| dir.path().join(file).metadata().unwrap().permissions().mode();
    assert_eq!(mode(CONFIG_FILE), mode("other"));
    assert_eq!(mode(TENSORS_FILE), mode("other"));
}

#[cfg(unix)]
#[test]
fn a_folder_without_write_permission_keeps_its_adapter() {
    use std::os::unix::fs::PermissionsExt;
    let dir = copy_of(&fixture("plain"));
    let model = injected(&config(), 0);
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
    if std::fs::write(dir.path().join("probe"), "").is_ok() {
        return; // The superuser may write everywhere.
    }
    let result = save_adapter(&model, &config(), dir.path());
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(result, Err(Error::Io { .. })));
    for file in [CONFIG_FILE, TENSORS_FILE] {
        assert_same(file, dir.path(), &fixture("plain"));
    }
}

#[test]
fn state_is_a_copy_and_goes_back_into_the_same_variables() {
    let config = config().dora().bias(BiasTraining::All).modules_to_save(["head"]);
    let mut model = injected(&config, 1);
    let state = adapter_state(&model, &config).unwrap();
    let before = snapshot(&model);
    let variables = trainable_variables(&model).unwrap();
    for (_, variable) in &variables {
        variable.set(&(variable.as_tensor() + 1.0).unwrap()).unwrap();
    }
    assert_ne!(snapshot(&model), before);
    set_adapter_state(&mut model, &config, &state).unwrap();
    assert_eq!(snapshot(&model), before);
    for ((name, held), (_, now)) in variables.iter().zip(trainable_variables(&model).unwrap()) {
        assert_eq!(bits(held.as_tensor()), bits(now.as_tensor()), "{name}: another variable");
        assert_eq!(held.as_tensor().id(), now.as_tensor().id(), "{name}: another variable");
    }
}

#[test]
fn buffers_of_saved_modules_travel_but_are_not_trained() {
    struct Head {
        weight: Tensor,
        table: Buffer,
    }
    module_tree!(Head { weight, table });
    struct Model {
        q: Linear,
        head: Head,
    }
    module_tree!(Model { q, head });
    let filled = |value: f64| {
        let tensor = (Tensor::ones(3, DType::F32, &Device::Cpu).unwrap() * value).unwrap();
        let q = Linear::load(4, 4, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
        Model { q, head: Head { weight: tensor.clone(), table: Buffer(tensor) } }
    };
    let config = LoraConfig::new(2).target_modules(["q"]).modules_to_save(["head"]);
    let (mut model, mut other) = (filled(1.0), filled(2.0));
    inject(&mut model, &config, 0).unwrap();
    assert!(model.head.weight.is_variable() && !model.head.table.0.is_variable());
    let dir = tempfile::tempdir().unwrap();
    save_adapter(&model, &config, dir.path()).unwrap();
    load_adapter(&mut other, dir.path()).unwrap();
    assert_eq!(bits(&other.head.table.0), bits(&model.head.table.0));
    assert_eq!(bits(&other.head.weight), bits(&model.head.weight));
    assert!(other.head.weight.is_variable() && !other.head.table.0.is_variable());
}

#[test]
fn tied_parameters_part_when_one_is_saved() {
    struct Head {
        table: Tied,
    }
    module_tree!(Head { table });
    struct Model {
        q: Linear,
        first: Fixed,
        head: Head,
    }
    module_tree!(Model { q, first => "tail.first", head });
    let new = |value: f64| {
        let q = Linear::load(4, 4, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
        let first = Fixed((Tensor::ones(3, DType::F32, &Device::Cpu).unwrap() * value).unwrap());
        Model { q, first, head: Head { table: Tied::to("tail.first") } }
    };
    for (saved, keys) in [
        (&["head"][..], &["head.table"][..]),
        (&["tail"], &["tail.first"]),
        (&["head", "tail"], &["head.table", "tail.first"]),
    ] {
        let config =
            LoraConfig::new(2).target_modules(["q"]).modules_to_save(saved.iter().copied());
        let (mut model, mut other) = (new(1.0), new(2.0));
        inject(&mut model, &config, 0).unwrap();
        let base = |(name, _): &(String, _)| !name.starts_with("q.");
        let trained: Vec<_> =
            trainable_variables(&model).unwrap().into_iter().filter(base).collect();
        let mut names: Vec<&str> = trained.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, keys);
        for (index, (_, variable)) in trained.iter().enumerate() {
            variable.set(&(variable.as_tensor() + (index + 3) as f64).unwrap()).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        save_adapter(&model, &config, dir.path()).unwrap();
        load_adapter(&mut other, dir.path()).unwrap();
        let values =
            |model: &Model| [bits(&model.first.0), bits(&model.head.table.own.as_ref().unwrap().0)];
        let (trained, mut loaded) = (values(&model), values(&other));
        // A module that is not saved keeps the value of its own base.
        for (name, value, old) in [("head.table", 1, &trained[1]), ("tail.first", 0, &trained[0])] {
            if !keys.contains(&name) {
                assert_eq!(loaded[value], vec![2f32.to_bits(); 3], "{saved:?}");
                loaded[value].clone_from(old);
            }
        }
        assert_eq!(loaded, trained, "{saved:?}");
    }
}

#[test]
fn state_of_another_adapter_is_refused() {
    let mut model = Net::base();
    assert!(adapter_state(&model, &config()).is_err());
    assert!(set_adapter_state(&mut model, &config(), &BTreeMap::new()).is_err());
    inject(&mut model, &config(), 1).unwrap();
    let before = snapshot(&model);
    let mut state = adapter_state(&model, &config()).unwrap();
    state.remove("base_model.model.v.lora_B.weight").unwrap();
    let error = set_adapter_state(&mut model, &config(), &state).unwrap_err();
    let Error::Mismatch(mismatch) = error else { panic!("{error}") };
    assert_eq!(mismatch.missing, ["base_model.model.v.lora_B.weight"]);
    assert_eq!(snapshot(&model), before);
    let state = adapter_state(&model, &config()).unwrap();
    merge(&mut model).unwrap();
    assert!(set_adapter_state(&mut model, &config(), &state).is_err());
}

proptest! {
    #![proptest_config(property::config(256))]

    /// Whatever bytes the files hold, loading gives an adapter or an error, and an error changes nothing.
    #[test]
    fn damaged_files_never_panic(
        kind in 0..KINDS.len(),
        in_config in any::<bool>(),
        edits in prop::collection::vec((0..4000usize, any::<u8>()), 0..4),
        cut in prop::option::of(0..4000usize),
    ) {
        let dir = copy_of(&fixture(KINDS[kind]));
        let path = dir.path().join(if in_config { CONFIG_FILE } else { TENSORS_FILE });
        let mut bytes = std::fs::read(&path).unwrap();
        for (position, byte) in edits {
            let position = position % bytes.len();
            bytes[position] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        std::fs::write(&path, &bytes).unwrap();
        let mut model = Net::base();
        if load_adapter(&mut model, dir.path()).is_err() {
            prop_assert_eq!(snapshot(&model), snapshot(&Net::base()));
        } else {
            prop_assert!(!adapted(&model).is_empty());
        }
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    let key = "base_model.model.q.lora_B.weight";
    for value in [f64::NAN, f64::INFINITY, 1e300] {
        let dir = changed(&fixture("dora"), |tensors| {
            let like = tensors[key].to_dtype(DType::F64).unwrap().ones_like().unwrap();
            tensors.insert(key.to_string(), (like * value).unwrap());
        });
        let error = refused(dir.path()).to_string();
        assert!(error.contains(key) && error.contains(TENSORS_FILE), "{value}: {error}");
        assert!(error.contains("NaN, infinite or too large"), "{value}: {error}");
    }
}

#[test]
fn an_excluded_layer_is_no_other_spelling() {
    let mut config = LoraConfig::new(2).target_modules(["lin1"]);
    let dir = tempfile::tempdir().unwrap();
    save_adapter(&injected(&config, 0), &config, dir.path()).unwrap();
    config.exclude_modules = Some(ModuleNames::List(vec!["mlp.lin1".into()]));
    std::fs::write(dir.path().join(CONFIG_FILE), config.to_json().unwrap()).unwrap();
    let error = refused(dir.path()).to_string();
    assert!(error.contains("does not fit this model"), "{error}");
}

/// As it was written, without what PEFT's rules add to it.
#[test]
fn a_wrong_expression_is_shown_with_its_file() {
    let mut config = LoraConfig::new(2).target_modules(["lin1"]);
    let dir = tempfile::tempdir().unwrap();
    save_adapter(&injected(&config, 0), &config, dir.path()).unwrap();
    config.rank_pattern.insert("mlp.(lin1".into(), 2);
    std::fs::write(dir.path().join(CONFIG_FILE), config.to_json().unwrap()).unwrap();
    let error = refused(dir.path()).to_string();
    let expected = format!("{CONFIG_FILE}: regular expression \"mlp.(lin1\": ");
    assert!(error.contains(&expected), "{error}");
}

/// Each tensor tells the configuration that it belongs to.
#[cfg(unix)]
#[test]
fn writers_of_one_folder_take_turns() {
    const WRITES: usize = 30;
    let dir = tempfile::tempdir().unwrap();
    let write = |alpha: f64| {
        let config = LoraConfig::new(4).alpha(alpha).target_modules(["q", "v"]);
        let mut tensors = adapter_state(&injected(&config, 0), &config).unwrap();
        for tensor in tensors.values_mut() {
            *tensor = (tensor.ones_like().unwrap() * alpha).unwrap();
        }
        for _ in 0..WRITES {
            write_adapter(&config, &tensors, dir.path()).unwrap();
        }
    };
    let read = || {
        let (config, tensors) = read_adapter(dir.path()).unwrap();
        for tensor in tensors.values() {
            let value = tensor.flatten_all().unwrap().get(0).unwrap().to_scalar::<f32>().unwrap();
            assert_eq!(f64::from(value), config.alpha);
        }
    };
    write(8.0);
    std::thread::scope(|scope| {
        let writers = [8.0, 16.0].map(|alpha| scope.spawn(move || write(alpha)));
        while !writers.iter().all(|writer| writer.is_finished()) {
            read();
        }
    });
    read();
}

/// Other tensors would not load; another scaling would load and compute something else.
#[test]
fn another_configuration_than_the_adapters_is_refused() {
    let base = || LoraConfig::new(4).alpha(8.0).target_modules(["q", "v"]);
    let mut model = injected(&base(), 0);
    let state = adapter_state(&model, &base()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (config, parts) in [
        (base().alpha(16.0), ["scaling 2", "scaling 4"]),
        (base().rslora(), ["scaling 2", "scaling 4"]),
        (base().alpha_of("v", 80.0), ["v has rank 4, scaling 2", "scaling 20"]),
        (LoraConfig::new(8).alpha(16.0).target_modules(["q", "v"]), ["rank 4", "rank 8"]),
        (base().dora(), ["use_dora false", "use_dora true"]),
        (base().lora_bias(), ["lora_bias false", "lora_bias true"]),
        (base().target_modules(["q"]), ["1 layers differ", "v has this adapter and is no target"]),
        (base().target_modules(["q", "v", "head"]), ["head", "a target without this adapter"]),
    ] {
        let path = dir.path().join("adapter");
        let saved = save_adapter(&model, &config, &path).unwrap_err().to_string();
        let set = set_adapter_state(&mut model, &config, &state).unwrap_err().to_string();
        for error in [saved, set] {
            let named = error.contains("the configuration is not that of the adapter \"default\"");
            assert!(named && parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert!(!path.exists());
    }
    // Dropout is for training alone.
    save_adapter(&model, &base().dropout(0.5), dir.path()).unwrap();
}
