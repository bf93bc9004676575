//! Adapters exchanged with tools that know the fused `qkv` alone, against PEFT, and those of SAMed and micro-sam,
//! against PyTorch; all in f64.

use crate::common;
use crate::common::adapters::{adapted, folder, read, run, Kind, KINDS, TIMES_PYTORCH};
use crate::common::model::{self, relative_error, Tensors, Worst};
use crate::common::property;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::lora::{
    fuse_qkv, inject, load_adapter, load_adapter_tensors, read_adapter, read_samed_adapter,
    split_qkv, write_adapter, LoraConfig, CONFIG_FILE,
};
use candle_sam_lora::nn::{named_parameters, Mode};
use candle_sam_lora::sam::{checkpoint, AttentionKind, SamModel};
use candle_sam_lora::{files, Error};
use std::collections::BTreeMap;
use std::path::PathBuf;

const DEVICE: Device = Device::Cpu;
const PREFIX: &str = "base_model.model.";
const FUSED: [&str; 6] = ["lora_qv", "rslora", "lora_bias", "dora", "patterns", "bias_all"];

/// Norms of rows of 32 values in f32.
const NORM: f64 = 3e-7;

fn fused_folder(kind: &str) -> PathBuf {
    common::fixtures().join("peft/qkv").join(kind)
}

fn base(attention: AttentionKind) -> Result<SamModel> {
    model::model("tiny", attention, DType::F32)
}

fn inputs() -> Result<Tensors> {
    read(folder("inputs.safetensors"), &DEVICE)
}

fn embeddings(model: &SamModel) -> Result<Tensor> {
    Ok(model.vision_encoder.forward(&inputs()?["pixel_values"], Mode::Eval)?)
}

/// The errors of PyTorch and PEFT in outputs and gradients of a kind.
fn pytorch(kind: &str) -> Result<(f64, f64)> {
    let Kind { outputs, gradients, .. } =
        KINDS.iter().find(|of| of.name == kind).context("no kind")?;
    Ok((TIMES_PYTORCH * outputs, TIMES_PYTORCH * gradients))
}

/// The gradients of sum(image_embeddings * G), by PEFT's keys.
fn gradients(model: &SamModel) -> Result<Tensors> {
    let out = model.vision_encoder.forward(&inputs()?["pixel_values"], Mode::Eval)?;
    let store = (out * &inputs()?["G"])?.sum_all()?.backward()?;
    let mut gradients = Tensors::new();
    for (name, parameter) in named_parameters(model) {
        if let Some(gradient) = store.get(&parameter) {
            gradients.insert(format!("{PREFIX}{name}"), gradient.clone());
        }
    }
    Ok(gradients)
}

fn expected_gradients(kind: &str) -> Result<Tensors> {
    let io = read(fused_folder(kind).join("io.safetensors"), &DEVICE)?;
    let gradient = |(name, tensor): (&String, &Tensor)| {
        let key = name.strip_prefix("eval/grad/")?.replace(".base_layer.", ".");
        Some((key, tensor.clone()))
    };
    Ok(io.iter().filter_map(gradient).collect())
}

#[test]
fn q_k_and_v_become_the_qkv_that_peft_computes_with() -> Result<()> {
    for kind in FUSED {
        let config = LoraConfig::load(folder(kind).join(CONFIG_FILE))?;
        let (config, tensors) = fuse_qkv(&adapted(kind, &DEVICE)?, "default", &config)?;
        let (peft, expected) = read_adapter(fused_folder(kind))?;
        assert_eq!(config.target_modules, peft.target_modules, "{kind}");
        assert_eq!((config.rank, config.alpha), (peft.rank, peft.alpha), "{kind}");
        assert_eq!(config.rank_pattern, peft.rank_pattern, "{kind}");
        assert_eq!(config.alpha_pattern, peft.alpha_pattern, "{kind}");
        assert_eq!((config.dropout, config.bias), (peft.dropout, peft.bias), "{kind}");
        assert_eq!(tensors.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (key, tensor) in &tensors {
            let error = relative_error(tensor, &expected[key])?;
            let bound = if key.ends_with("lora_magnitude_vector") { NORM } else { 0.0 };
            assert!(error <= bound, "{kind}: {key}: {error}");
        }

        let scratch = tempfile::tempdir()?;
        write_adapter(&config, &tensors, scratch.path())?;
        let mut fused = base(AttentionKind::Fused)?;
        load_adapter(&mut fused, scratch.path())?;
        let io = read(fused_folder(kind).join("io.safetensors"), &DEVICE)?;
        let (output_bound, gradient_bound) = pytorch(kind)?;
        let error = relative_error(&embeddings(&fused)?, &io["eval/image_embeddings"])?;
        assert!(error <= output_bound, "{kind}: {error}");
        let got = gradients(&fused)?;
        let mut worst = Worst::default();
        for (key, want) in expected_gradients(kind)? {
            let got = got.get(&key).with_context(|| format!("{kind}: {key} has no gradient"))?;
            worst.compare(kind, got, &want)?;
        }
        worst.assert_within(gradient_bound);
    }
    Ok(())
}

#[test]
fn a_qkv_becomes_q_k_and_v_with_pefts_outputs_and_gradients() -> Result<()> {
    for kind in FUSED.into_iter().chain(["fused_qkv"]) {
        let source = if kind == "fused_qkv" { folder(kind) } else { fused_folder(kind) };
        let (config, tensors) = read_adapter(&source)?;
        let mut split = base(AttentionKind::Split)?;
        let (config, tensors) = split_qkv(&split, &config, &tensors)?;
        load_adapter_tensors(&mut split, "default", &config, tensors)?;
        let io = read(source.join("io.safetensors"), &DEVICE)?;
        let (output_bound, gradient_bound) = pytorch(kind)?;
        let error = relative_error(&embeddings(&split)?, &io["eval/image_embeddings"])?;
        assert!(error <= output_bound, "{kind}: {error}");

        // And back: three times the rank, the same outputs.
        let (config, tensors) = fuse_qkv(&split, "default", &config)?;
        let mut fused = base(AttentionKind::Fused)?;
        load_adapter_tensors(&mut fused, "default", &config, tensors)?;
        let error = relative_error(&embeddings(&fused)?, &io["eval/image_embeddings"])?;
        assert!(error <= output_bound, "{kind}: {error}");

        if kind == "fused_qkv" {
            continue;
        }
        // A is shared, so its gradient is the sum; the rest is rows.
        let got = gradients(&split)?;
        let mut worst = Worst::default();
        for (key, want) in expected_gradients(kind)? {
            if !key.contains(".attn.qkv.") {
                continue;
            }
            let parts = ["q", "k", "v"].map(|part| key.replace(".qkv.", &format!(".{part}.")));
            let parts =
                parts.iter().map(|part| got.get(part).cloned().with_context(|| part.clone()));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            let sum = match key.ends_with("lora_A.weight") {
                true => Tensor::stack(&parts, 0)?.sum(0)?,
                false => Tensor::cat(&parts, 0)?,
            };
            worst.compare(kind, &sum, &want)?;
        }
        worst.assert_within(gradient_bound);
    }
    Ok(())
}

#[test]
fn other_layers_and_single_blocks_keep_their_adapters() -> Result<()> {
    let mut split = base(AttentionKind::Split)?;
    let config = LoraConfig::new(2).alpha(5.0).target_regex(
        r"vision_encoder\.layers\.1\.attn\.(q|proj)|vision_encoder\.layers\.2\.mlp\.lin1",
    );
    inject(&mut split, &config, 3)?;
    for (_, variable) in candle_sam_lora::nn::trainable_variables(&split)? {
        variable.set(&variable.rand_like(-0.4, 0.4)?)?;
    }
    let (config, tensors) = fuse_qkv(&split, "default", &config)?;
    let mut fused = base(AttentionKind::Fused)?;
    load_adapter_tensors(&mut fused, "default", &config, tensors.clone())?;
    let adapted: Vec<_> = tensors.keys().filter(|key| key.ends_with("lora_A.weight")).collect();
    let layer = |name: &str| format!("{PREFIX}vision_encoder.layers.{name}.lora_A.weight");
    let expected = ["1.attn.proj", "1.attn.qkv", "2.mlp.lin1"].map(layer);
    assert_eq!(adapted, expected.iter().collect::<Vec<_>>());
    let want = embeddings(&split)?;
    let (bound, _) = pytorch("mlp_and_decoder")?;
    assert!(relative_error(&embeddings(&fused)?, &want)? <= bound);

    let (config, tensors) = split_qkv(&base(AttentionKind::Split)?, &config, &tensors)?;
    let mut again = base(AttentionKind::Split)?;
    load_adapter_tensors(&mut again, "default", &config, tensors)?;
    assert!(relative_error(&embeddings(&again)?, &want)? <= bound);
    Ok(())
}

#[test]
fn what_cannot_be_fused_or_split_is_an_error() -> Result<()> {
    let mut model = base(AttentionKind::Split)?;
    let expect = |result: candle_sam_lora::Result<(LoraConfig, Tensors)>, expected: &str| {
        let error = result.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    let other = LoraConfig::new(2).target_modules(["lin1"]);
    expect(fuse_qkv(&model, "default", &other), "no adapter");
    inject(&mut model, &other, 0)?;
    expect(fuse_qkv(&model, "default", &other), "on no q, k or v");
    expect(fuse_qkv(&model, "default", &other.clone().init("pissa")), "convert it");
    expect(fuse_qkv(&model, "default", &other.clone().modules_to_save(["attn.k"])), "saved whole");
    let (config, mut tensors) = read_adapter(folder("fused_qkv"))?;
    expect(split_qkv(&model, &other, &BTreeMap::new()), "on no qkv");
    let mut saved = tensors.clone();
    let key = format!("{PREFIX}vision_encoder.layers.1.attn.qkv.weight");
    saved.insert(key, Tensor::zeros((96, 32), DType::F32, &DEVICE)?);
    expect(split_qkv(&model, &config, &saved), "saved whole");
    for (key, tensor) in &mut tensors {
        if key.ends_with("lora_B.weight") {
            *tensor = tensor.narrow(0, 0, 8)?;
        }
    }
    expect(split_qkv(&model, &config, &tensors), "has 8 rows");
    Ok(())
}

fn foreign(name: &str) -> PathBuf {
    common::fixtures().join("foreign").join(name).with_extension("safetensors")
}

/// The outputs of a model with an adapter of another tool, against PyTorch's.
fn compare(name: &str, model: &SamModel, outputs: &[&str]) -> Result<()> {
    let io = read(foreign("io"), &DEVICE)?;
    let got = run(model, &inputs()?, Mode::Eval)?;
    let mut worst = Worst::default();
    for output in outputs {
        worst.compare(name, &got[output], &io[&format!("{name}/{output}")])?;
    }
    // Adapters of the same places and strength.
    let (bound, _) = pytorch("mlp_and_decoder")?;
    worst.assert_within(bound);
    Ok(())
}

const ALL: [&str; 3] = ["image_embeddings", "pred_masks", "iou_scores"];

#[test]
fn samed_files_compute_what_samed_computes() -> Result<()> {
    let mut model = base(AttentionKind::Split)?;
    let (config, tensors) = read_samed_adapter(&model, foreign("samed"), None)?;
    assert_eq!(config, LoraConfig::new(3).alpha(3.0).target_modules(["q", "v"]));
    checkpoint::load(&mut model.prompt_encoder, foreign("samed"))?;
    checkpoint::load(&mut model.mask_decoder, foreign("samed"))?;
    load_adapter_tensors(&mut model, "default", &config, tensors.clone())?;
    compare("samed", &model, &ALL)?;
    // On disk it is an adapter as any other; and another's qkv, if that is wanted.
    let scratch = tempfile::tempdir()?;
    write_adapter(&config, &tensors, scratch.path())?;
    let (config, tensors) = fuse_qkv(&model, "default", &config)?;
    let mut fused = base(AttentionKind::Fused)?;
    load_adapter_tensors(&mut fused, "default", &config, tensors)?;
    compare("samed", &fused, &["image_embeddings"])?;
    let mut again = base(AttentionKind::Split)?;
    load_adapter(&mut again, scratch.path())?;
    compare("samed", &again, &["image_embeddings"])?;

    let mut model = base(AttentionKind::Split)?;
    let (config, tensors) = read_samed_adapter(&model, foreign("samed_some"), Some(&[0, 2]))?;
    load_adapter_tensors(&mut model, "default", &config, tensors)?;
    compare("samed_some", &model, &["image_embeddings"])?;

    let mut model = model::zeros(&model::config("tiny")?, AttentionKind::Split)?;
    checkpoint::load(&mut model.vision_encoder, foreign("samed_model"))?;
    let (config, tensors) = read_samed_adapter(&model, foreign("samed_model"), None)?;
    load_adapter_tensors(&mut model, "default", &config, tensors)?;
    let io = read(foreign("io"), &DEVICE)?;
    let want = &io["samed_model/image_embeddings"];
    assert!(relative_error(&embeddings(&model)?, want)? <= pytorch("mlp_and_decoder")?.0);
    Ok(())
}

#[test]
fn micro_sam_files_hold_model_and_adapter() -> Result<()> {
    let mut model = model::zeros(&model::config("tiny")?, AttentionKind::Split)?;
    checkpoint::load(&mut model, foreign("micro_sam"))?;
    let (config, tensors) = read_samed_adapter(&model, foreign("micro_sam"), None)?;
    load_adapter_tensors(&mut model, "default", &config, tensors)?;
    compare("micro_sam", &model, &ALL)
}

#[test]
fn files_of_other_kinds_are_refused_with_what_they_are() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let model = base(AttentionKind::Split)?;
    let expect = |result: candle_sam_lora::Result<(LoraConfig, Tensors)>, expected: &str| {
        let error = result.expect_err(expected);
        assert!(matches!(error, Error::File { .. } | Error::Config(_)), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    let pickled = scratch.path().join("lora.pth");
    for (start, expected) in [
        (&b"PK\x03\x04\0\0\x08\x08\0\0\0\0"[..], "12 bytes are truncated"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", "torch.save(torch.load("),
    ] {
        std::fs::write(&pickled, start)?;
        expect(read_samed_adapter(&model, &pickled, None), expected);
    }
    expect(
        read_samed_adapter(&model, model::folder("tiny").join("original.safetensors"), None),
        "no LoRA",
    );
    expect(read_samed_adapter(&model, foreign("samed_some"), None), "adapts 2 blocks");
    expect(read_samed_adapter(&model, foreign("samed_some"), Some(&[1])), "adapts 2 blocks");
    expect(read_samed_adapter(&model, foreign("samed_some"), Some(&[1, 7])), "has not");
    let fused = base(AttentionKind::Fused)?;
    expect(read_samed_adapter(&fused, foreign("samed"), None), "q, k and v apart");

    let file = scratch.path().join("some.safetensors");
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &DEVICE);
    for (name, tensor, expected) in [
        ("sa_a_000", zeros(&[3, 32])?, "no kind of adapter"),
        ("image_encoder.blocks.0.attn.qkv.q_FacTs.weight", zeros(&[3, 3])?, "no kind of adapter"),
        ("image_encoder.blocks.0.mlp.adapter.weight", zeros(&[3, 3])?, "no kind of adapter"),
        ("sam.image_encoder.blocks.9.attn.qkv.w_a_linear_q.weight", zeros(&[3, 32])?, "has not"),
        ("image_encoder.blocks.0.attn.qkv.w_a_linear_q.weight", zeros(&[3])?, "a matrix"),
    ] {
        files::write_tensors(&file, &Tensors::from([(name.to_string(), tensor)]))?;
        expect(read_samed_adapter(&model, &file, None), expected);
    }
    // Half of a pair.
    let mut tensors = files::read_tensors(foreign("samed"), &DEVICE)?;
    tensors.remove("w_b_003");
    files::write_tensors(&file, &tensors)?;
    let (config, tensors) = read_samed_adapter(&model, &file, None)?;
    let mut model = model;
    let error = load_adapter_tensors(&mut model, "default", &config, tensors).expect_err("half");
    assert!(error
        .to_string()
        .contains("missing: base_model.model.vision_encoder.layers.1.attn.v.lora_B"));
    Ok(())
}

proptest::proptest! {
    #![proptest_config(property::config(200))]

    /// Names, shapes and lengths of a file of SAMed with some bytes changed: imported or refused, and whatever is
    /// imported loads or is refused.
    #[test]
    fn damaged_files_never_panic(changes in proptest::collection::vec((0usize..552, 32u8..127), 1..4)) {
        let mut bytes = std::fs::read(foreign("samed_some")).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("samed.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let mut model = base(AttentionKind::Split).unwrap();
        if let Ok((config, tensors)) = read_samed_adapter(&model, &path, Some(&[0, 2])) {
            let _ = load_adapter_tensors(&mut model, "default", &config, tensors);
        }
    }
}
