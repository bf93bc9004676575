//! LoRA on a model of candle_nn's layers, compared with what PEFT computes.

use crate::common::model::{bits, fixtures, relative_error, Tensors};
use crate::common::random;
use crate::examples::any_model::{Config, Vit};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{linear, Module, VarBuilder, VarMap};
use candle_sam_lora::files::read_tensors;
use candle_sam_lora::lora::{read_adapter, write_adapter, BiasTraining, LoraConfig, LoraLinear};
use candle_sam_lora::nn::Mode;
use std::path::PathBuf;

/// f32 against f64 through two blocks; PyTorch's own f32 is 1e-6 off.
const BOUND: f64 = 5e-6;

fn folder() -> PathBuf {
    fixtures().join("peft/vit")
}

fn tensors(file: &str) -> Result<Tensors> {
    Ok(read_tensors(folder().join(file), &Device::Cpu)?)
}

fn builder(tensors: Tensors) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu)
}

fn map_builder(map: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(map, DType::F32, &Device::Cpu)
}

/// The transformer of the fixtures, with an adapter of this builder.
fn vit(lora: Option<(&LoraConfig, VarBuilder<'_>)>) -> Result<Vit> {
    let config = Config { side: 16, patch: 4, dim: 12, hidden: 24, depth: 2, heads: 2 };
    Ok(Vit::new(&config, builder(tensors("base.safetensors")?), &lora)?)
}

/// A linear of 4 inputs and 6 outputs.
fn base() -> candle_nn::Linear {
    candle_nn::Linear::new(random(1, &[6, 4]), Some(random(2, &[6])))
}

#[test]
fn a_peft_adapter_computes_what_peft_computes() -> Result<()> {
    let io = tensors("io.safetensors")?;
    let (lora, adapter) = read_adapter(folder().join("adapter"))?;
    let adapted = vit(Some((&lora, builder(adapter).pp("base_model.model"))))?;
    for (model, name) in [(vit(None)?, "base"), (adapted, "out")] {
        let error = relative_error(&model.forward(&io["x"])?, &io[name])?;
        assert!(error < BOUND, "{name}: {error:e}");
    }
    Ok(())
}

#[test]
fn the_adapters_gradients_are_pefts() -> Result<()> {
    let io = tensors("io.safetensors")?;
    let (lora, adapter) = read_adapter(folder().join("adapter"))?;
    let map = VarMap::new();
    let model = vit(Some((&lora, map_builder(&map).pp("base_model.model"))))?;
    let keys: Vec<String> = map.data().lock().unwrap().keys().cloned().collect();
    for key in &keys {
        map.data().lock().unwrap()[key].set(adapter.get(key).context("not PEFT's key")?)?;
    }
    assert_eq!(keys.len(), adapter.len());
    let gradients = (model.forward(&io["x"])? * &io["G"])?.sum_all()?.backward()?;
    for key in keys {
        let variable = map.data().lock().unwrap()[&key].clone();
        let gradient = gradients.get(&variable).with_context(|| format!("{key}: no gradient"))?;
        let error = relative_error(gradient, &io[&format!("grad/{key}")])?;
        assert!(error < BOUND, "{key}: {error:e}");
    }
    Ok(())
}

#[test]
fn an_adapter_is_written_as_peft_wrote_it() -> Result<()> {
    let (lora, adapter) = read_adapter(folder().join("adapter"))?;
    let written = tempfile::tempdir()?;
    write_adapter(&lora, &adapter, written.path())?;
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let [ours, pefts] = [written.path().join(file), folder().join("adapter").join(file)];
        assert!(std::fs::read(ours)? == std::fs::read(pefts)?, "{file}");
    }
    Ok(())
}

#[test]
fn a_new_adapter_changes_nothing_and_is_reproducible() -> Result<()> {
    let lora = LoraConfig::new(2).alpha(4.0).dropout(0.5).target_modules(["q"]);
    let make = |map: &VarMap| LoraLinear::new(base(), &lora, map_builder(map).pp("a.q"));
    let (first, second) = (VarMap::new(), VarMap::new());
    let (layer, x) = (make(&first)?, random(3, &[5, 4]));
    assert_eq!(bits(&layer.forward(&x)?)?, bits(&LoraLinear::from(base()).forward(&x)?)?);
    make(&second)?;
    let a = |map: &VarMap| bits(map.data().lock().unwrap()["a.q.lora_A.weight"].as_tensor());
    assert_eq!(a(&first)?, a(&second)?);

    // With a B, the layer's mode decides on dropout.
    first.data().lock().unwrap()["a.q.lora_B.weight"].set(&random(4, &[6, 2]))?;
    let evaluated = layer.forward(&x)?;
    assert_ne!(bits(&evaluated)?, bits(&layer.layer.forward(&x, Mode::Train { seed: 1 })?)?);
    // Made again over the same map, it is the same layer.
    assert_eq!(bits(&make(&first)?.forward(&x)?)?, bits(&evaluated)?);
    Ok(())
}

#[test]
fn the_base_is_frozen() -> Result<()> {
    let (map, adapters) = (VarMap::new(), VarMap::new());
    let base = linear(4, 6, map_builder(&map).pp("q"))?;
    let lora = LoraConfig::new(2).target_modules(["q"]);
    let layer = LoraLinear::new(base, &lora, map_builder(&adapters).pp("q"))?;
    let gradients = layer.forward(&random(5, &[3, 4]))?.sum_all()?.backward()?;
    assert!(map.all_vars().iter().all(|variable| gradients.get(variable).is_none()));
    assert_eq!(adapters.all_vars().iter().filter(|v| gradients.get(v).is_some()).count(), 2);
    Ok(())
}

#[test]
fn patterns_and_variants_follow_the_path() -> Result<()> {
    let config = LoraConfig::new(2).target_modules(["q"]).rank_of("blocks.1.q", 3).dora();
    let map = VarMap::new();
    let vb = map_builder(&map).pp("base_model.model.blocks");
    let layers: Vec<LoraLinear> = [vb.pp("0.q"), vb.pp("1.q"), vb.pp("1.k")]
        .into_iter()
        .map(|vb| Ok(LoraLinear::new(base(), &config, vb)?))
        .collect::<Result<_>>()?;
    assert_eq!(layers.iter().map(LoraLinear::is_adapted).collect::<Vec<_>>(), [true, true, false]);
    let data = map.data().lock().unwrap();
    let dims = |name: &str| data[&format!("base_model.model.blocks.{name}")].dims().to_vec();
    assert_eq!([dims("0.q.lora_A.weight"), dims("1.q.lora_A.weight")], [[2, 4], [3, 4]]);
    assert_eq!(dims("1.q.lora_magnitude_vector"), [6]);
    assert_eq!(data.len(), 6);
    Ok(())
}

#[test]
fn what_one_layer_cannot_do_is_refused() -> Result<()> {
    let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let lora = LoraConfig::new(2).target_modules(["q"]);
    let no_tensors = builder(Tensors::new());
    let misshaped = builder([("q.lora_A.weight".to_string(), random(6, &[3, 4]))].into());
    for (config, vb, word) in [
        (lora.clone(), zeros.clone(), "as prefix"),
        (lora.clone().bias(BiasTraining::LoraOnly), zeros.pp("q"), "inject"),
        (lora.clone().init("olora"), zeros.pp("q"), "inject"),
        (LoraConfig::new(0).target_modules(["q"]), zeros.pp("q"), "rank"),
        (lora.clone(), no_tensors.pp("q"), "lora_A.weight"),
        (lora, misshaped.pp("q"), "shape mismatch"),
    ] {
        let error = LoraLinear::new(base(), &config, vb).expect_err(word).to_string();
        assert!(error.contains(word), "{error}\nlacks {word:?}");
    }
    Ok(())
}

#[test]
fn an_f16_adapter_is_read_as_f32() -> Result<()> {
    let lora = LoraConfig::new(2).target_modules(["q"]);
    let half = |seed, dims: &[usize]| random(seed, dims).to_dtype(DType::F16);
    let tensors: Tensors = [
        ("q.lora_A.weight".to_string(), half(7, &[2, 4])?),
        ("q.lora_B.weight".to_string(), half(8, &[6, 2])?),
    ]
    .into();
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F16, &Device::Cpu);
    let layer = LoraLinear::new(base(), &lora, vb.pp("q"))?;
    let kinds: Vec<_> =
        candle_sam_lora::nn::named_parameters(&layer).iter().map(|(_, t)| t.dtype()).collect();
    assert_eq!(kinds, [DType::F32; 4]);
    layer.forward(&Tensor::ones((2, 4), DType::F32, &Device::Cpu)?)?;
    Ok(())
}
