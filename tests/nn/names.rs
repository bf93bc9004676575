//! Trees in which two tensors have one name: refused before anything changes, for a walk by names would miss one of
//! them.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, load_adapter, save_adapter, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::checkpoint::{self, Names};
use candle_sam_lora::nn::{self, Linear};

struct Pair {
    first: Linear,
    second: Linear,
}
module_tree!(Pair { first => "q", second => "q" });

struct Single {
    q: Linear,
}
module_tree!(Single { q });

fn linear(value: f64) -> Result<Linear> {
    let weight = (Tensor::ones((3, 4), DType::F32, &Device::Cpu)? * value)?;
    Ok(Linear::new(weight, None))
}

#[test]
fn two_tensors_of_one_name_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = LoraConfig::new(2).target_modules(["q"]);
    let mut single = Single { q: linear(5.0)? };
    let (file, adapter) = (folder.path().join("single.safetensors"), folder.path().join("adapter"));
    checkpoint::save(&single, &file, &Names::PLAIN, None)?;
    inject(&mut single, &config, 0)?;
    save_adapter(&single, &config, &adapter)?;

    let mut pair = Pair { first: linear(1.0)?, second: linear(2.0)? };
    let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let results = [
        checkpoint::save(&pair, folder.path().join("pair.safetensors"), &Names::PLAIN, None),
        checkpoint::load(&mut pair, &file, &Names::PLAIN).map(|_| ()),
        nn::load(&mut pair, &zeros),
        inject(&mut pair, &config, 0).map(|_| ()),
        load_adapter(&mut pair, &adapter).map(|_| ()),
    ];
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("two tensors of the model are called \"q.weight\""), "{error}");
    }
    let first = |linear: &Linear| linear.weight.flatten_all()?.get(0)?.to_scalar::<f32>();
    assert_eq!((first(&pair.first)?, first(&pair.second)?), (1.0, 2.0));
    assert!(pair.first.adapters.is_empty() && !folder.path().join("pair.safetensors").exists());
    Ok(())
}
