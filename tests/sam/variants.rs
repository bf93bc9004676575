//! Configurations that no published SAM has, against transformers in f64 (tests/fixtures/gen/variants.py). They differ
//! in activations, downsampling rates and missing layers. An image is no whole number of patches; image encoders stand
//! alone.

use crate::common::model;
use crate::common::model::{below, fixtures, gradient_errors, largest, Tensors, Worst};
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::files::{read_tensors, write_tensors};
use candle_sam_lora::lora::load_adapter;
use candle_sam_lora::nn::{set_trainable, Mode};
use candle_sam_lora::sam::{checkpoint, model_type, AttentionKind, SamConfig, SamInput, SamModel};
use candle_sam_lora::sam::{SamVisionConfig, SamVisionModel};
use std::path::{Path, PathBuf};

const VARIANTS: [&str; 4] = ["rate_4", "rate_1", "bare", "no_layers"];
const KINDS: [AttentionKind; 2] = [AttentionKind::Fused, AttentionKind::Split];
/// As in tests/sam/model.rs, for values and for gradients.
const TOLERANCE: f64 = 5.4e-6;
const GRADIENT_TOLERANCE: f64 = 7.6e-6;

fn folder(name: &str) -> PathBuf {
    fixtures().join("variants").join(name)
}

fn read(path: impl AsRef<Path>) -> Result<Tensors> {
    Ok(read_tensors(path, &Device::Cpu)?)
}

fn load(name: &str, kind: AttentionKind, dtype: DType) -> Result<(SamConfig, SamModel)> {
    let config = SamConfig::load(folder(name).join("config.json"))?;
    let mut model = SamModel::new(&config, kind, VarBuilder::zeros(dtype, &Device::Cpu))?;
    checkpoint::load(&mut model, folder(name))?;
    Ok((config, model))
}

fn input(io: &Tensors) -> SamInput {
    let tensor = |name: &str| io.get(&format!("all/{name}")).cloned();
    SamInput {
        pixel_values: tensor("pixel_values"),
        input_points: tensor("input_points"),
        input_labels: tensor("input_labels"),
        input_boxes: tensor("input_boxes"),
        input_masks: tensor("input_masks"),
        ..Default::default()
    }
}

#[test]
fn outputs_equal_transformers() -> Result<()> {
    let mut worst = Worst::default();
    for (name, kind) in VARIANTS.iter().flat_map(|name| KINDS.map(|kind| (name, kind))) {
        let io = read(folder(name).join("io.safetensors"))?;
        let (_, model) = load(name, kind, DType::F32)?;
        let out = model.forward(&input(&io), Mode::Eval)?;
        let embeddings = model.vision_encoder.forward(&io["all/pixel_values"], Mode::Eval)?;
        for (what, got) in [
            ("pred_masks", &out.pred_masks),
            ("iou_scores", &out.iou_scores),
            ("image_embeddings", &embeddings),
        ] {
            worst.compare(&format!("{name} {what}"), got, &io[&format!("all/{what}")])?;
        }
    }
    worst.assert_within(TOLERANCE);
    Ok(())
}

#[test]
fn gradients_equal_transformers() -> Result<()> {
    let mut worst = Worst::default();
    // Trainable matrices and frozen ones go different ways through the operations.
    for (name, matrices) in VARIANTS.iter().flat_map(|name| [(name, true), (name, false)]) {
        let io = read(folder(name).join("io.safetensors"))?;
        let expected = below(&io, "all/grad/");
        let (_, mut model) = load(name, AttentionKind::Split, DType::F32)?;
        set_trainable(&mut model, |name| matrices || name.ends_with("bias"))?;
        let out = model.forward(&input(&io), Mode::Eval)?;
        let loss = (out.pred_masks * &io["all/G_pred_masks"])?.sum_all()?
            + (out.iou_scores * &io["all/G_iou_scores"])?.sum_all()?;
        let gradients = loss?.backward()?;
        let errors = gradient_errors(&model, &gradients, &expected)?;
        for (parameter, error) in &errors {
            let part = parameter.split('.').next().unwrap_or_default();
            worst.add(&format!("{name} {part}"), *error);
        }
        let compared = errors.len();
        ensure!(compared > if matrices { 40 } else { 15 }, "{name}: {compared} compared");
    }
    worst.assert_within(GRADIENT_TOLERANCE);
    Ok(())
}

/// At most twice as far from the truth as transformers in the same dtype.
#[test]
fn half_precision_follows_f32() -> Result<()> {
    for (name, dtype) in VARIANTS.iter().flat_map(|name| [(name, DType::F16), (name, DType::BF16)])
    {
        let io = read(folder(name).join("io.safetensors"))?;
        let (_, model) = load(name, AttentionKind::Split, dtype)?;
        let masks = model.forward(&input(&io), Mode::Eval)?.pred_masks;
        let error = model::relative_error(&masks, &io["all/pred_masks"])?;
        let theirs = if dtype == DType::F16 { "error_float16" } else { "error_bfloat16" };
        let theirs = largest(&io[&format!("all/{theirs}")])?;
        println!("{name} {dtype:?}: {error:.2e}, transformers {theirs:.2e}");
        ensure!(error <= 2.0 * theirs, "{name} {dtype:?}: {error:.3e}, transformers {theirs:.3e}");
    }
    Ok(())
}

/// The other way: what is written here has the tensors and the settings of what transformers wrote.
#[test]
fn saved_models_are_those_transformers_wrote() -> Result<()> {
    for name in VARIANTS {
        let here = tempfile::tempdir()?;
        let (config, model) = load(name, AttentionKind::Split, DType::F32)?;
        checkpoint::save_pretrained(&model, &config, here.path())?;
        let (ours, theirs) = (
            read(here.path().join("model.safetensors"))?,
            read(folder(name).join("model.safetensors"))?,
        );
        ensure!(ours.keys().eq(theirs.keys()), "{name}: other tensors");
        for (tensor, value) in &theirs {
            ensure!(ours[tensor].dims() == value.dims(), "{name}: {tensor} {:?}", ours[tensor]);
            ensure!(largest(&(&ours[tensor] - value)?)? == 0.0, "{name}: {tensor} differs");
        }
        let json = |folder: &Path| -> Result<serde_json::Value> {
            Ok(serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?)
        };
        ensure!(json(here.path())? == json(&folder(name))?, "{name}: another config.json");
    }
    Ok(())
}

fn vision_model(path: &Path, kind: AttentionKind, dtype: DType) -> Result<SamVisionModel> {
    let config = SamVisionConfig::load(path.join("config.json"))?;
    let mut model = SamVisionModel::new(&config, kind, VarBuilder::zeros(dtype, &Device::Cpu))?;
    checkpoint::load(&mut model, path)?;
    Ok(model)
}

#[test]
fn an_encoder_alone_equals_transformers() -> Result<()> {
    let (vision, mut worst) = (folder("vision"), Worst::default());
    ensure!(model_type(vision.join("config.json"))? == SamVisionConfig::MODEL_TYPE, "model_type");
    let io = read(vision.join("io.safetensors"))?;
    for kind in KINDS {
        let model = vision_model(&vision, kind, DType::F32)?;
        let pixels = &io["base/pixel_values"];
        let out = model.vision_encoder.forward_with_states(pixels, false, Mode::Eval)?;
        worst.compare("embeddings", &out.image_embeddings, &io["base/image_embeddings"])?;
        ensure!(out.hidden_states.len() == 3, "{} states", out.hidden_states.len());
        for (i, state) in out.hidden_states.iter().enumerate() {
            worst.compare("states", state, &io[&format!("base/hidden_states.{i}")])?;
        }
        let forward = model.forward(pixels, Mode::Eval)?;
        worst.compare("forward", &forward, &io["base/image_embeddings"])?;
    }
    worst.assert_within(TOLERANCE);
    Ok(())
}

#[test]
fn adapters_on_an_encoder_alone_equal_peft() -> Result<()> {
    let (vision, mut worst) = (folder("vision"), Worst::default());
    let io = read(vision.join("io.safetensors"))?;
    for (name, kind) in
        [("adapter_fused", AttentionKind::Fused), ("adapter_split", AttentionKind::Split)]
    {
        let mut model = vision_model(&vision, kind, DType::F32)?;
        load_adapter(&mut model, vision.join(name))?;
        let embeddings = model.forward(&io["base/pixel_values"], Mode::Eval)?;
        worst.compare(name, &embeddings, &io[&format!("{name}/image_embeddings")])?;
    }
    worst.assert_within(TOLERANCE);
    Ok(())
}

/// The files such a checkpoint comes in, made of the fixture models: bare names, shards, other dtypes, whole SAMs.
#[test]
fn an_encoder_alone_loads_from_every_kind_of_file() -> Result<()> {
    let here = tempfile::tempdir()?;
    let path = here.path();
    for name in ["tiny", "slim", "plain"] {
        let whole = model::model(name, AttentionKind::Split, DType::F32)?;
        let pixels = model::read(name, "io.safetensors")?["encoder/pixel_values"].clone();
        let expected = whole.vision_encoder.forward(&pixels, Mode::Eval)?;
        let config = std::fs::read(model::folder(name).join("config.json"))?;
        let config: serde_json::Value = serde_json::from_slice(&config)?;
        let mut vision = config["vision_config"].clone();
        vision["model_type"] = SamVisionConfig::MODEL_TYPE.into();
        std::fs::write(path.join("config.json"), vision.to_string())?;
        let all = model::read(name, "model.safetensors")?;
        let part: Tensors =
            all.iter().filter(|(name, _)| name.starts_with("vision_encoder.")).map(own).collect();
        let bare = below(&all, "vision_encoder.");
        let below: Tensors =
            part.iter().map(|(name, t)| (format!("sam.{name}"), t.clone())).collect();
        let check = |what: &str, dtype: DType, tolerance: f64| -> Result<()> {
            let model = vision_model(path, AttentionKind::Split, dtype)?;
            let error = model::relative_error(&model.forward(&pixels, Mode::Eval)?, &expected)?;
            ensure!(error <= tolerance, "{name}, {what}: {error:e}");
            Ok(())
        };
        for (what, tensors) in
            [("prefix", &part), ("bare", &bare), ("below", &below), ("whole", &all)]
        {
            write_tensors(path.join("model.safetensors"), tensors)?;
            check(what, DType::F32, 0.0)?;
        }
        for (dtype, tolerance) in [(DType::F16, 0.01), (DType::BF16, 0.1), (DType::F64, 0.0)] {
            let cast = |(name, t): (&String, &Tensor)| Ok((name.clone(), t.to_dtype(dtype)?));
            let cast = part.iter().map(cast).collect::<Result<Tensors>>()?;
            write_tensors(path.join("model.safetensors"), &cast)?;
            check(&format!("{dtype:?}"), DType::F32, tolerance)?;
        }
        std::fs::remove_file(path.join("model.safetensors"))?;
        let (first, second): (Tensors, Tensors) =
            bare.iter().map(own).partition(|(name, _)| name.as_str() < "layers.1");
        let mut index = serde_json::Map::new();
        for (file, tensors) in [("1.safetensors", first), ("2.safetensors", second)] {
            write_tensors(path.join(file), &tensors)?;
            index.extend(tensors.keys().map(|name| (name.clone(), file.into())));
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": index}).to_string();
        let index_path = path.join("model.safetensors.index.json");
        std::fs::write(&index_path, index)?;
        check("shards", DType::F32, 0.0)?;
        check("shards in bf16", DType::BF16, 0.1)?;
        std::fs::remove_file(index_path)?;
    }
    Ok(())
}

fn own((name, tensor): (&String, &Tensor)) -> (String, Tensor) {
    (name.clone(), tensor.clone())
}

#[test]
fn a_whole_sam_is_not_made_of_an_encoder_alone() -> Result<()> {
    let config = folder("vision").join("config.json");
    let message = SamConfig::load(&config).map(drop).unwrap_err().to_string();
    for word in
        ["config.json", "sam_vision_model", "without the prompt encoder and the mask decoder"]
    {
        ensure!(message.contains(word), "{message}");
    }
    // An encoder's weights under a whole SAM's configuration.
    let (_, mut model) = load("rate_4", AttentionKind::Fused, DType::F32)?;
    let message = checkpoint::load(&mut model, folder("vision")).unwrap_err().to_string();
    ensure!(message.contains("missing: mask_decoder.iou_token.weight"), "{message}");
    let whole = SamVisionConfig::load(folder("rate_4").join("config.json"))?;
    ensure!(
        whole == load("rate_4", AttentionKind::Fused, DType::F32)?.0.vision_config,
        "{whole:?}"
    );
    Ok(())
}

/// Configurations of SlimSAM as the hub has them, and MedSAM's, which is ViT-B's. Values of a head 14 wide are checked
/// with the fixture `slim`.
#[test]
fn pruned_and_medical_sams_are_configurations() -> Result<()> {
    let here = tempfile::tempdir()?;
    for (vision, head_dim) in [
        (r#"{"hidden_size": 168, "mlp_dim": 696, "model_type": ""}"#, 14),
        (r#"{"hidden_size": 384, "mlp_dim": 1536, "model_type": ""}"#, 32),
        (r#"{"model_type": "sam_vision_model"}"#, 64),
    ] {
        let file = here.path().join("config.json");
        let empty = r#"{"model_type": ""}"#;
        std::fs::write(
            &file,
            format!(
                r#"{{"model_type": "sam", "vision_config": {vision}, "mask_decoder_config": {empty},
                "prompt_encoder_config": {empty}}}"#
            ),
        )?;
        let mut config = SamConfig::load(&file)?;
        ensure!(config.vision_config.head_dim() == head_dim, "{vision}");
        ensure!(
            config.vision_config.num_hidden_layers == 12 && config.vision_config.grid_size() == 64
        );
        // Two layers and small images keep the test short.
        let vision = &mut config.vision_config;
        (vision.num_hidden_layers, vision.global_attn_indexes) = (2, vec![1]);
        (vision.image_size, config.prompt_encoder_config.image_size) = (320, 320);
        let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let mut model = SamModel::new(&config, AttentionKind::Split, zeros)?;
        model.randomize(1, 0.02)?;
        let weights = here.path().join("weights.safetensors");
        checkpoint::save(&model, &weights, checkpoint::Naming::Original, None)?;
        std::fs::remove_file(file)?;
        let told = checkpoint::sizes(&weights)?.config.vision_config;
        let sizes = |vision: &SamVisionConfig| {
            let (heads, windows) = (vision.num_attention_heads, vision.window_size);
            (vision.hidden_size, heads, vision.mlp_dim(), windows, vision.image_size)
        };
        ensure!(sizes(&told) == sizes(&config.vision_config), "{told:?}");
        let pixels = Tensor::randn(0f32, 1.0, (1, 3, 320, 320), &Device::Cpu)?;
        let embedding = model.vision_encoder.forward(&pixels, Mode::Eval)?;
        ensure!(embedding.dims() == [1, 256, 20, 20] && largest(&embedding)? > 0.0);
    }
    Ok(())
}

/// SlimSAM before its uniform pruning: an attention narrower than the tokens is no configuration of SAM.
#[test]
fn an_attention_of_another_width_is_refused_by_name() -> Result<()> {
    let here = tempfile::tempdir()?;
    let path = here.path().join("model.safetensors");
    let mut tensors = model::read("slim", "model.safetensors")?;
    let name = "vision_encoder.layers.0.attn.qkv.weight";
    tensors.insert(name.into(), tensors[name].narrow(0, 0, 60)?);
    write_tensors(&path, &tensors)?;
    let mut model = model::zeros(&model::config("slim")?, AttentionKind::Fused)?;
    let message = checkpoint::load(&mut model, &path).unwrap_err().to_string();
    ensure!(message.contains(name) && message.contains("60"), "{message}");
    Ok(())
}
