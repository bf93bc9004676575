//! Without the feature `decompositions`, what needs one is an error that names the feature.
#![cfg(not(feature = "decompositions"))]

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{self, inject, LoraConfig};
use candle_sam_lora::nn::{named_parameters, Linear};
use candle_sam_lora::{module_tree, Result};

struct Model {
    linear: Linear,
}

module_tree!(Model { linear });

fn config() -> LoraConfig {
    LoraConfig::new(2).target_modules(["linear"])
}

fn model() -> Result<Model> {
    Ok(Model { linear: Linear::load_no_bias(4, 4, VarBuilder::zeros(DType::F32, &Device::Cpu))? })
}

#[test]
fn initialisations_by_decomposition_name_the_feature() -> Result<()> {
    for name in ["orthogonal", "olora", "pissa", "pissa_niter_4"] {
        let mut model = model()?;
        let config = config().init(name);
        let error = inject(&mut model, &config, 1).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("`decompositions`"), "{error}");
        assert_eq!(named_parameters(&model).len(), 1, "{name} changed the model");
    }
    Ok(())
}

#[test]
fn weighted_sums_by_svd_name_the_feature() -> Result<()> {
    let mut model = model()?;
    lora::add_adapter(&mut model, "a", &config(), 1)?;
    let combination = lora::Combination::svd(None);
    let adapters = [("a", 1.0), ("a", 2.0)];
    let error = lora::add_weighted_adapter(&mut model, "sum", &adapters, combination);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`decompositions`"), "{error}");
    Ok(())
}
