//! A candle program uses this crate: its layers become ours, ours are its `Module`s, its `VarBuilder` gives the
//! weights.

use crate::common::model::{self, bits};
use crate::common::random;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{seq, Conv2dConfig, ConvTranspose2dConfig, Module, Optimizer, VarBuilder, VarMap};
use candle_sam_lora::lora::{inject, merge, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{
    self, Conv2d, ConvTranspose2d, Embedding, Fixed, LayerNorm, Linear, MlpBlock, Mode, ModuleTree,
    Node,
};
use candle_sam_lora::ops::Activation;
use candle_sam_lora::sam::{
    AttentionKind, SamModel, SamTwoWayTransformer, SamVisionConfig, SamVisionEncoder,
};
use candle_sam_lora::train::{AdamW, AdamWConfig};
use std::collections::{BTreeMap, BTreeSet, HashMap};

fn builder(map: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(map, DType::F32, &Device::Cpu)
}

/// Variables of the map that the module's parameters are.
fn shared(map: &VarMap, module: &dyn ModuleTree) -> usize {
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
    fn load(vb: VarBuilder<'_>) -> Result<Self> {
        let mlp = MlpBlock::load(8, 12, Activation::Gelu, vb.pp("mlp"))?;
        Ok(Self { norm: LayerNorm::load(8, 1e-6, vb.pp("norm"))?, mlp })
    }

    fn zeros() -> Result<Self> {
        Self::load(VarBuilder::zeros(DType::F32, &Device::Cpu))
    }

    /// A head whose parameters are variables that `map` makes below `head`.
    fn in_map(map: &VarMap) -> Result<Self> {
        Self::load(builder(map).pp("head"))
    }
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}

#[test]
fn a_converted_linear_keeps_its_variables_and_values() -> Result<()> {
    let map = VarMap::new();
    let theirs = candle_nn::linear(6, 4, builder(&map))?;
    let ours = Linear::from(theirs.clone());
    assert_eq!(shared(&map, &ours), 2);
    let x = random(1, &[3, 6]);
    let difference = largest_difference(&x.apply(&theirs)?, &x.apply(&ours)?)?;
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
fn a_converted_convolution_computes_candles() -> Result<()> {
    // Kernel, stride, padding; products of at most 9 * 3 numbers, so f32 rounding stays below 1e-5.
    for (kernel, stride, padding) in [(2, 2, 0), (1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 3, 2)] {
        let map = VarMap::new();
        let config = Conv2dConfig { padding, stride, ..Default::default() };
        let theirs = candle_nn::conv2d(3, 4, kernel, config, builder(&map))?;
        let ours = Conv2d::try_from(theirs.clone())?;
        assert_eq!(shared(&map, &ours), 2);
        let x = random(6, &[2, 6, 6, 3]);
        let expected = theirs.forward(&x.permute((0, 3, 1, 2))?)?.permute((0, 2, 3, 1))?;
        let difference = largest_difference(&x.apply(&ours)?, &expected)?;
        assert!(difference < 1e-5, "kernel {kernel}, stride {stride}: {difference:e}");
    }
    let map = VarMap::new();
    let config = ConvTranspose2dConfig { stride: 2, ..Default::default() };
    let theirs = candle_nn::conv_transpose2d(3, 4, 2, config, builder(&map))?;
    let ours = ConvTranspose2d::try_from(theirs.clone())?;
    let x = random(7, &[2, 3, 3, 3]);
    let expected = theirs.forward(&x.permute((0, 3, 1, 2))?)?.permute((0, 2, 3, 1))?;
    let difference = largest_difference(&x.apply(&ours)?, &expected)?;
    assert_eq!(shared(&map, &ours), 2);
    assert!(difference < 1e-5, "transposed: {difference:e}");
    Ok(())
}

#[test]
fn what_has_no_counterpart_here_is_refused() -> Result<()> {
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let conv = |kernel: usize, config: Conv2dConfig| {
        let conv = candle_nn::conv2d(4, 4, kernel, config, vb.clone())?;
        Ok::<_, candle_core::Error>(Conv2d::try_from(conv).expect_err("accepted").to_string())
    };
    let plain = Conv2dConfig::default();
    for (kernel, config, word) in [
        (3, plain, "padding by 1"),
        (4, Conv2dConfig { stride: 2, padding: 2, ..plain }, "must be odd"),
        (3, Conv2dConfig { stride: 4, padding: 1, ..plain }, "1..=3"),
        (3, Conv2dConfig { stride: 3, padding: 1, ..plain }, "padding by 0"),
        (3, Conv2dConfig { padding: 1, groups: 2, ..plain }, "2 groups"),
        (3, Conv2dConfig { padding: 1, dilation: 2, ..plain }, "dilation 2"),
    ] {
        let message = conv(kernel, config)?;
        assert!(message.contains(word), "{message}\nlacks {word:?}");
    }
    let transposed = |config| candle_nn::conv_transpose2d(4, 4, 2, config, vb.clone());
    let overlapping = ConvTranspose2d::try_from(transposed(ConvTranspose2dConfig::default())?);
    assert!(overlapping.expect_err("accepted").to_string().contains("that is the stride"));
    let weight = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    for norm in [
        candle_nn::LayerNorm::rms_norm(weight.clone(), 1e-5),
        candle_nn::LayerNorm::new_no_bias(weight, 1e-5),
    ] {
        let message = LayerNorm::try_from(norm).expect_err("accepted").to_string();
        assert!(message.contains("no bias"), "{message}");
    }
    let centred = candle_nn::LayerNormConfig { remove_mean: false, ..Default::default() };
    let message = LayerNorm::try_from(candle_nn::layer_norm(4, centred, vb)?);
    assert!(message.expect_err("accepted").to_string().contains("remove_mean false"));
    Ok(())
}

#[test]
fn a_fixed_view_of_a_variable_is_a_parameter() -> candle_sam_lora::Result<()> {
    let variable = candle_core::Var::ones((4, 2), DType::F32, &Device::Cpu)?;
    let kinds = |fixed: Fixed| {
        let mut parameters = vec![];
        fixed.visit("g", &mut |_, node| match node {
            Node::Parameter(_) => parameters.push(true),
            Node::Buffer(_) => parameters.push(false),
            _ => {}
        });
        parameters
    };
    assert_eq!(kinds(Fixed(variable.as_tensor().clone())), [true]);
    assert_eq!(kinds(Fixed(variable.narrow(0, 0, 2)?)), [true]);
    assert_eq!(kinds(Fixed(variable.as_detached_tensor())), [false]);
    Ok(())
}

/// Every tensor of a tree by its name, buffers included.
fn tensors(module: &dyn ModuleTree) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    module.visit("", &mut |name, node| {
        if let Node::Parameter(tensor) | Node::Buffer(tensor) = node {
            tensors.insert(name.to_string(), tensor.clone());
        }
    });
    tensors
}

#[test]
fn a_model_in_a_map_has_the_names_of_its_tree() -> anyhow::Result<()> {
    for kind in [AttentionKind::Fused, AttentionKind::Split] {
        let map = VarMap::new();
        let sam = SamModel::new(&model::config("tiny")?, kind, builder(&map))?;
        let in_map: BTreeSet<String> = map.data().lock().unwrap().keys().cloned().collect();
        assert_eq!(in_map, tensors(&sam).into_keys().collect());
        // All but the frequencies of positions, which are fixed.
        assert_eq!(shared(&map, &sam), in_map.len() - 1);
    }
    Ok(())
}

#[test]
fn a_hugging_face_file_is_a_builder_for_the_model() -> anyhow::Result<()> {
    let folder = model::folder("tiny");
    let file = folder.join("model.safetensors");
    let mut in_file = candle_core::safetensors::load(file, &Device::Cpu)?;
    let make = |tensors: HashMap<String, Tensor>| {
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        SamModel::new(&model::config("tiny")?, AttentionKind::Fused, vb)
            .map_err(anyhow::Error::from)
    };
    let expected = model::model("tiny", AttentionKind::Fused, DType::F32)?;
    let (expected, made) = (tensors(&expected), tensors(&make(in_file.clone())?));
    assert!(made.keys().eq(expected.keys()));
    for (name, tensor) in &made {
        assert_eq!(bits(tensor)?, bits(&expected[name])?, "{name}");
    }

    // Frequencies of the prompts alone are not dropped.
    let own = "prompt_encoder.shared_embedding.positional_embedding";
    let shared = &made["shared_image_embedding.positional_embedding"];
    in_file.insert(own.to_string(), shared.clone());
    assert!(!tensors(&make(in_file.clone())?).contains_key(own));
    let doubled = (shared * 2.0)?;
    in_file.insert(own.to_string(), doubled.clone());
    assert_eq!(bits(&tensors(&make(in_file.clone())?)[own])?, bits(&doubled)?);

    in_file.remove("mask_decoder.iou_token.weight");
    let error = make(in_file).expect_err("a tensor is missing").to_string();
    assert!(error.contains("mask_decoder.iou_token.weight"), "{error}");
    Ok(())
}

#[test]
fn the_decoders_parts_validate() -> anyhow::Result<()> {
    let mut config = model::config("tiny")?.mask_decoder_config;
    config.num_attention_heads = 5;
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let decoder = candle_sam_lora::sam::SamMaskDecoder::new(&config, vb.clone()).map(drop);
    let transformer = SamTwoWayTransformer::new(&config, vb).map(drop);
    for refused in [decoder, transformer] {
        let message = refused.expect_err("heads that do not divide").to_string();
        assert!(message.contains("mask_decoder_config.hidden_size is"), "{message}");
    }
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
    let difference = largest_difference(&x.apply(&theirs)?, &x.apply(&ours)?)?;
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
    // Part by part, as the modules of a candle program.
    let mut x = image.apply(&encoder.patch_embed)?;
    if let Some(pos_embed) = &encoder.pos_embed {
        x = (x + pos_embed)?;
    }
    for layer in &encoder.layers {
        x = x.apply(layer)?;
    }
    assert_eq!(bits(&x.apply(&encoder.neck)?.permute((0, 3, 1, 2))?)?, bits(&expected)?);
    let mlp = &encoder.layers[0].mlp;
    assert_eq!(bits(&x.apply(mlp)?)?, bits(&mlp.forward(&x, Mode::Eval)?)?);
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
    let mut tensors = HashMap::new();
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
