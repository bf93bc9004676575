//! A candle program uses this crate: its layers become ours, ours are its `Module`s, its `VarBuilder` gives the weights.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{seq, Module, Optimizer, VarBuilder, VarMap};
use candle_sam_lora::lora::{inject, merge, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{self, Embedding, LayerNorm, Linear, MlpBlock, Mode};
use candle_sam_lora::ops::Activation;
use candle_sam_lora::sam::{AttentionKind, SamVisionConfig, SamVisionEncoder};
use candle_sam_lora::train::{AdamW, AdamWConfig};
use common::random;

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

fn builder(map: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(map, DType::F32, &Device::Cpu)
}

/// Variables of the map that the module's parameters are.
fn shared(map: &VarMap, module: &dyn nn::ModuleTree) -> usize {
    let variables = map.all_vars();
    let parameters = nn::named_parameters(module);
    let is_shared = |(_, parameter): &&(String, Tensor)| {
        variables.iter().any(|variable| variable.as_tensor().id() == parameter.id())
    };
    parameters.iter().filter(is_shared).count()
}

#[derive(Debug)]
struct Head {
    norm: LayerNorm,
    mlp: MlpBlock,
}

module_tree!(Head { norm, mlp });

impl Head {
    fn zeros() -> Result<Self> {
        let (dtype, device) = (DType::F32, &Device::Cpu);
        Ok(Self {
            norm: LayerNorm::load(8, 1e-6, VarBuilder::zeros(dtype, device))?,
            mlp: MlpBlock::load(8, 12, Activation::Gelu, VarBuilder::zeros(dtype, device))?,
        })
    }

    /// A head whose parameters are variables that `map` makes below `head`.
    fn in_map(map: &VarMap) -> Result<Self> {
        let vb = builder(map).pp("head");
        let (lin1, lin2) = (vb.pp("mlp.lin1"), vb.pp("mlp.lin2"));
        let (lin1, lin2) = (Linear::load(8, 12, lin1)?, Linear::load(12, 8, lin2)?);
        let mlp = MlpBlock { lin1, lin2, activation: Activation::Gelu };
        Ok(Self { norm: LayerNorm::load(8, 1e-6, vb.pp("norm"))?, mlp })
    }
}

#[test]
fn a_converted_linear_keeps_its_variables_and_values() -> Result<()> {
    let map = VarMap::new();
    let theirs = candle_nn::linear(6, 4, builder(&map))?;
    let ours = Linear::from(theirs.clone());
    assert_eq!(shared(&map, &ours), 2);
    let x = random(1, &[3, 6]);
    let difference = (x.apply(&theirs)? - x.apply(&ours)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(difference < 1e-6, "{difference:e}");
    Ok(())
}

#[test]
fn a_converted_embedding_shares_its_table() -> Result<()> {
    let map = VarMap::new();
    let ours = Embedding::from(candle_nn::embedding(5, 3, builder(&map))?);
    assert_eq!((shared(&map, &ours), ours.weight.dims()), (1, &[5, 3][..]));
    Ok(())
}

#[test]
fn layers_are_modules_in_evaluation() -> Result<()> {
    let map = VarMap::new();
    let vb = builder(&map);
    let linear = Linear::load(6, 4, vb.pp("linear"))?;
    let norm = LayerNorm::load(4, 1e-5, vb.pp("norm"))?;
    let x = random(2, &[3, 6]);
    let expected = norm.forward(&linear.forward(&x, Mode::Eval)?)?;
    let sequence = seq().add(linear).add(norm);
    assert_eq!(bits(&x.apply(&sequence)?)?, bits(&expected)?);
    Ok(())
}

#[test]
fn a_loaded_norm_computes_candles_norm() -> Result<()> {
    let map = VarMap::new();
    let ours = LayerNorm::load(6, 1e-5, builder(&map))?;
    let theirs = candle_nn::layer_norm(6, 1e-5, builder(&map))?;
    assert_eq!((map.all_vars().len(), shared(&map, &ours)), (2, 2));
    let x = random(3, &[3, 6]);
    let difference = (x.apply(&theirs)? - x.apply(&ours)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(difference < 1e-5, "{difference:e}");
    Ok(())
}

#[test]
fn the_encoder_is_a_module() -> candle_sam_lora::Result<()> {
    let config = SamVisionConfig {
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        image_size: 32,
        patch_size: 8,
        output_channels: 8,
        window_size: 2,
        global_attn_indexes: vec![1],
        ..SamVisionConfig::default()
    };
    let mut encoder = SamVisionEncoder::new(
        &config,
        AttentionKind::Split,
        VarBuilder::zeros(DType::F32, &Device::Cpu),
    )?;
    nn::randomize(&mut encoder, 1, 0.2)?;
    let image = random(4, &[1, 3, 32, 32]);
    let expected = encoder.forward(&image, Mode::Eval)?;
    assert_eq!(bits(&Module::forward(&encoder, &image)?)?, bits(&expected)?);
    Ok(())
}

#[test]
fn a_map_behind_the_builder_keeps_all_variables() -> candle_sam_lora::Result<()> {
    let map = VarMap::new();
    Head::in_map(&map)?;
    let mut head = Head::zeros()?;
    nn::load(&mut head, &builder(&map).pp("head"))?;
    nn::randomize(&mut head, 7, 0.1)?;
    assert_eq!((map.all_vars().len(), shared(&map, &head)), (6, 6));

    // A step of the optimizer over the map moves the module.
    let before = bits(&head.mlp.lin1.weight)?;
    let x = random(5, &[4, 8]);
    let loss = head.mlp.forward_normed(&x, &head.norm, Mode::Eval)?.sqr()?.mean_all()?;
    let config = AdamWConfig { lr: 1e-2, ..Default::default() };
    AdamW::new(map.all_vars(), config)?.backward_step(&loss)?;
    assert_ne!(bits(&head.mlp.lin1.weight)?, before);
    Ok(())
}

#[test]
fn a_files_tensors_fill_the_module() -> candle_sam_lora::Result<()> {
    let map = VarMap::new();
    let saved = Head::in_map(&map)?;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.safetensors");
    map.save(&file)?;

    let tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut loaded = Head::zeros()?;
    nn::load(&mut loaded, &vb.pp("head"))?;
    for ((name, expected), (_, found)) in
        nn::named_parameters(&saved).into_iter().zip(nn::named_parameters(&loaded))
    {
        assert_eq!(bits(&found)?, bits(&expected)?, "{name}");
    }
    Ok(())
}

#[test]
fn a_mismatch_is_listed_whole_and_changes_nothing() -> Result<()> {
    let mut tensors = std::collections::HashMap::new();
    for (name, shape) in [("norm.weight", vec![8]), ("mlp.lin1.weight", vec![12, 9])] {
        tensors.insert(name.to_string(), Tensor::ones(shape, DType::F32, &Device::Cpu)?);
    }
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut head = Head::zeros()?;
    let before = nn::named_parameters(&head);
    let error = nn::load(&mut head, &vb).unwrap_err().to_string();
    for line in [
        "4 missing, 0 surplus, 1 mis-shaped",
        "missing: norm.bias",
        "missing: mlp.lin2.bias",
        "mlp.lin1.weight: expected [12, 8], found [12, 9]",
    ] {
        assert!(error.contains(line), "{error}\nlacks {line:?}");
    }
    for ((name, before), (_, after)) in before.iter().zip(nn::named_parameters(&head)) {
        assert_eq!(before.id(), after.id(), "{name}");
    }
    Ok(())
}

#[test]
fn a_map_lists_what_it_lacks_and_gains_nothing() -> Result<()> {
    let map = VarMap::new();
    builder(&map).get((12, 9), "mlp.lin1.weight")?;
    let error = nn::load(&mut Head::zeros()?, &builder(&map)).unwrap_err().to_string();
    for line in ["5 missing", "missing: norm.weight", "mlp.lin1.weight: shape mismatch", "[12, 9]"]
    {
        assert!(error.contains(line), "{error}\nlacks {line:?}");
    }
    assert_eq!(map.all_vars().len(), 1);
    Ok(())
}

#[test]
fn the_builders_dtype_is_taken() -> Result<()> {
    let map = VarMap::new();
    Head::in_map(&map)?;
    let tensors = map.data().lock().unwrap().clone().into_iter();
    let tensors = tensors.map(|(name, variable)| (name, variable.into_inner())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu).to_dtype(DType::BF16);
    let mut head = Head::zeros()?;
    nn::load(&mut head, &vb.pp("head"))?;
    for (name, parameter) in nn::named_parameters(&head) {
        assert_eq!(parameter.dtype(), DType::BF16, "{name}");
    }
    Ok(())
}

#[test]
fn adapters_stay_and_must_not_be_merged() -> candle_sam_lora::Result<()> {
    let map = VarMap::new();
    let mut head = Head::in_map(&map)?;
    let lora = LoraConfig::new(2).target_modules(["lin1"]);
    inject(&mut head, &lora, 3)?;
    let adapters = |head: &Head| {
        let mut parameters = nn::named_parameters(head);
        parameters.retain(|(name, _)| nn::is_adapter_tensor(name));
        parameters
    };
    let before = adapters(&head);
    assert_eq!(before.len(), 2);
    nn::load(&mut head, &builder(&map).pp("head"))?;
    for ((name, before), (_, after)) in before.iter().zip(adapters(&head)) {
        assert_eq!(before.id(), after.id(), "{name}");
    }
    merge(&mut head)?;
    let error = nn::load(&mut head, &builder(&map).pp("head")).unwrap_err().to_string();
    assert!(error.contains("mlp.lin1") && error.contains("unmerge"), "{error}");
    Ok(())
}
