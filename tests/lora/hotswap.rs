//! Adapters swapped into the place of a loaded one, against PEFT's `hotswap_adapter`.

use crate::support::blocks::{adapter, read, Net, F32_BOUND};
use crate::support::{bits, relative_error, snapshot};
use candle_core::Tensor;
use candle_sam_lora::lora::{
    hotswap_adapter, load_adapter, load_named_adapter, merge, set_adapter, unmerge,
};
use candle_sam_lora::nn::{set_trainable, trainable_variables, Mode};

fn loaded(name: &str) -> Net {
    let mut model = Net::base();
    load_adapter(&mut model, adapter(name)).unwrap();
    model
}

fn forward(model: &Net) -> Tensor {
    model.forward(&read("inputs.safetensors")["x"], Mode::Eval).unwrap()
}

#[test]
fn a_swapped_adapter_computes_what_pefts_does() {
    let io = read("several.safetensors");
    let mut model = loaded("a");
    // One after the other: ranks grow, shrink and come back, and layers that one of them lacks do not keep the last.
    for name in ["wider", "fewer", "patterned", "a"] {
        hotswap_adapter(&mut model, "default", adapter(name)).unwrap();
        let out = forward(&model);
        let error = relative_error(&out, &forward(&loaded(name)));
        assert!(error < F32_BOUND, "{name}: {error}");
        // PEFT matches rank_pattern with the names of tensors here, and so never: the scaling is that of other layers.
        if name != "patterned" {
            let error = relative_error(&out, &io[&format!("hotswap/{name}/out")]);
            assert!(error < F32_BOUND, "{name}: {error}");
        }
    }
    assert_eq!(bits(&forward(&model)), bits(&forward(&loaded("a"))));
}

#[test]
fn variables_of_the_same_shape_stay_and_get_the_new_values() {
    let mut model = loaded("a");
    let before = trainable_variables(&model).unwrap();
    hotswap_adapter(&mut model, "default", adapter("e")).unwrap();
    let after = trainable_variables(&model).unwrap();
    assert_eq!(before.len(), after.len());
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        assert_eq!(old.as_tensor().id(), new.as_tensor().id(), "{name} is another variable");
    }
    assert_eq!(bits(&forward(&model)), bits(&forward(&loaded("e"))));
    // Frozen tensors stay frozen, and those of a clone are its own.
    set_trainable(&mut model, |_| false).unwrap();
    let served = model.clone();
    hotswap_adapter(&mut model, "default", adapter("a")).unwrap();
    assert_eq!(bits(&forward(&model)), bits(&forward(&loaded("a"))));
    assert_eq!(bits(&forward(&served)), bits(&forward(&loaded("e"))));
    hotswap_adapter(&mut model, "default", adapter("wider")).unwrap();
    assert!(trainable_variables(&model).unwrap().is_empty());
}

#[test]
fn only_the_named_adapter_is_swapped() {
    let mut model = loaded("c");
    load_named_adapter(&mut model, "other", adapter("a")).unwrap();
    let before = bits(&forward(&model));
    hotswap_adapter(&mut model, "other", adapter("wider")).unwrap();
    assert_eq!(bits(&forward(&model)), before, "the one in use is not it");
    set_adapter(&mut model, &["other"]).unwrap();
    assert_eq!(bits(&forward(&model)), bits(&forward(&loaded("wider"))));
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut model = loaded("a");
    let before = snapshot(&model);
    let refused = |model: &mut Net, name: &str, folder: &std::path::Path, expected: &str| {
        let error = hotswap_adapter(model, name, folder).unwrap_err().to_string();
        assert!(error.contains(expected), "{folder:?}: {error}");
    };
    refused(&mut model, "x", &adapter("a"), "no adapter called");
    refused(&mut model, "default", &adapter("nowhere"), "nowhere");
    refused(&mut model, "default", &adapter("c"), "use_dora");
    refused(&mut model, "default", &adapter("b"), "lora_bias");
    refused(&mut model, "default", &adapter("conv"), "neck.conv1");
    assert_eq!(snapshot(&model), before);
    merge(&mut model).unwrap();
    refused(&mut model, "default", &adapter("wider"), "merged");
    unmerge(&mut model).unwrap();
    assert_eq!(snapshot(&model), before);
}
