//! The whole model against PyTorch in f64: every kind of prompt, every parameter's gradient, names and counts.

use crate::common::model;
use crate::common::model::{
    below, error_relative_to, gradient_errors, lookup, model, read, relative_error, scalars,
    Tensors, Worst,
};
use anyhow::{bail, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::nn::{named_parameters, set_trainable, Mode, ModuleTree, Node};
use candle_sam_lora::sam::{
    AttentionKind, DeepSeekOcrEncoder, SamConfig, SamInput, SamMaskDecoder, SamModel,
    SamPositionalEmbedding, SamPromptEncoder, SamTwoWayTransformer, SamVisionEncoder,
};
use std::collections::BTreeMap;

const KINDS: [AttentionKind; 2] = [AttentionKind::Fused, AttentionKind::Split];

/// sqrt(2) times the encoder's 3.8e-6 (see its test): the decoder is about as deep again.
const F32_TOLERANCE: f64 = 5.4e-6;

fn input(io: &Tensors, case: &str, multimask_output: bool) -> SamInput {
    let tensor = |name: &str| io.get(&format!("{case}/{name}")).cloned();
    SamInput {
        pixel_values: Some(io["encoder/pixel_values"].clone()),
        image_embeddings: None,
        input_points: tensor("input_points"),
        input_labels: tensor("input_labels"),
        input_boxes: tensor("input_boxes"),
        input_masks: tensor("input_masks"),
        multimask_output,
    }
}

#[test]
fn masks_and_scores_equal_pytorch_for_every_prompt() -> Result<()> {
    let mut worst = Worst::default();
    let few = &["points_boxes", "points_masks", "single"][..];
    let all =
        &["points", "boxes", "points_boxes", "masks", "points_masks", "all", "single", "none"];
    for (name, cases) in [("tiny", &all[..]), ("slim", few), ("plain", few)] {
        let io = read(name, "io.safetensors")?;
        for kind in KINDS {
            let model = model(name, kind, DType::F32)?;
            for case in cases {
                let multimask = scalars(name, case)?["multimask_output"].as_bool();
                let input = input(&io, case, multimask.context("no multimask_output")?);
                let out = model.forward(&input, Mode::Eval)?;
                let (masks, scores) = (format!("{case}/pred_masks"), format!("{case}/iou_scores"));
                worst.compare(&format!("{name} {masks}"), &out.pred_masks, &io[&masks])?;
                worst.compare(&format!("{name} {scores}"), &out.iou_scores, &io[&scores])?;
            }
        }
    }
    worst.assert_within(F32_TOLERANCE);
    Ok(())
}

/// Gradients pass through the model twice, forward and backward: sqrt(2) times as much.
const GRADIENT_TOLERANCE: f64 = 7.6e-6;

#[test]
fn gradients_of_every_parameter_equal_pytorch() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let facts = scalars("tiny", "gradients")?;
    let case = facts["prompt_case"].as_str().context("no prompt_case")?;
    let without: Vec<String> = serde_json::from_value(facts["without_gradient"].clone())?;
    let expected = below(&io, "gradients/grad/");
    let mut worst = Worst::default();
    // Trainable matrices and frozen ones go different ways through the operations.
    let no_matrix = |name: &str| !name.ends_with("weight") || group(name) != "weights";
    for (kind, matrices) in KINDS.into_iter().flat_map(|kind| [(kind, true), (kind, false)]) {
        let mut model = model("tiny", kind, DType::F32)?;
        set_trainable(&mut model, |name| matrices || no_matrix(name))?;
        let mut input = input(&io, case, true);
        let pixels = Var::from_tensor(&io["encoder/pixel_values"])?;
        input.pixel_values = Some(pixels.as_tensor().clone());
        let out = model.forward(&input, Mode::Eval)?;
        let weighted_masks = (&out.pred_masks * &io["gradients/G_pred_masks"])?;
        let weighted_scores = (&out.iou_scores * &io["gradients/G_iou_scores"])?;
        let loss = (weighted_masks.sum_all()? + weighted_scores.sum_all()?)?;
        let gradients = loss.backward()?;
        // Terms of both signs cancel in the loss, so its error is measured by their absolute sum.
        let magnitude = (weighted_masks.abs()?.sum_all()? + weighted_scores.abs()?.sum_all()?)?;
        let loss = loss.reshape(1)?;
        worst.add("loss", error_relative_to(&magnitude, &loss, &io["gradients/loss"])?);
        let pixel_gradient = gradients.get(&pixels).context("no gradient of the images")?;
        worst.compare("gradient of pixel_values", pixel_gradient, &expected["pixel_values"])?;
        let parameters = named_parameters(&model).into_iter();
        for (name, variable) in parameters.filter(|(_, tensor)| tensor.is_variable()) {
            match without.contains(&name) {
                true => assert!(gradients.get(&variable).is_none(), "{name} has a gradient"),
                false => drop(lookup(&expected, &name)?),
            }
        }
        let errors = gradient_errors(&model, &gradients, &expected)?;
        for (name, error) in &errors {
            let part = name.split('.').next().unwrap_or_default();
            worst.add(&format!("gradients of {part}: {}", group(name)), *error);
        }
        println!("{kind:?}, matrices {matrices}: {} compared", errors.len());
        assert!(errors.len() > 100);
    }
    worst.assert_within(GRADIENT_TOLERANCE);
    Ok(())
}

fn group(name: &str) -> &str {
    ["rel_pos", "pos_embed", "norm", "embed", "token.weight", "tokens.weight", "bias"]
        .into_iter()
        .find(|kind| name.contains(kind))
        .unwrap_or("weights")
}

/// Half precision: as in the encoder's test, twice as deep.
#[test]
fn half_precision_follows_f32() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    for (dtype, unit) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        let model = model("tiny", AttentionKind::Split, dtype)?;
        let out = model.forward(&input(&io, "all", true), Mode::Eval)?;
        assert_eq!(out.pred_masks.dtype(), dtype);
        for (what, got, want) in [
            ("masks", &out.pred_masks, &io["all/pred_masks"]),
            ("scores", &out.iou_scores, &io["all/iou_scores"]),
        ] {
            let error = relative_error(got, want)?;
            println!("{dtype:?} {what}: {error:.2e} = {:.1} units", error / unit);
            assert!(error < 18.0 * unit, "{dtype:?} {what}: {error:.3e}");
        }
    }
    Ok(())
}

/// Every tensor's name and shape. The positional encoding is tied: files hold it under one name or the other, or both.
fn tree(model: &SamModel) -> BTreeMap<String, Vec<usize>> {
    let mut tree = BTreeMap::new();
    model.visit("", &mut |name, node| {
        if let Node::Parameter(tensor) | Node::Buffer(tensor) = node {
            assert!(tree.insert(name.to_string(), tensor.dims().to_vec()).is_none(), "{name}");
        }
    });
    tree
}

fn untied(name: &str) -> String {
    name.replace("prompt_encoder.shared_embedding", "shared_image_embedding")
}

#[test]
fn names_and_shapes_are_those_of_the_checkpoints() -> Result<()> {
    for (kind, file) in
        [(AttentionKind::Fused, "model.safetensors"), (AttentionKind::Split, "split.safetensors")]
    {
        let model = model::zeros(&model::config("tiny")?, kind)?;
        let theirs = read("tiny", file)?;
        let theirs = theirs.into_iter().map(|(name, t)| (untied(&name), t.dims().to_vec()));
        assert_eq!(tree(&model), theirs.collect());
    }
    let model = model::zeros(&SamConfig::vit_b(), AttentionKind::Fused)?;
    let mut published = BTreeMap::new();
    for line in include_str!("../data/tensor_names_vit_b.tsv").lines().skip(1) {
        let [_, name, shape] = line.split('\t').collect::<Vec<_>>()[..] else {
            bail!("not three columns: {line}")
        };
        published.insert(untied(name), serde_json::from_str::<Vec<usize>>(shape)?);
    }
    assert_eq!(tree(&model), published);
    Ok(())
}

#[test]
fn parameter_counts_are_those_of_sam() -> Result<()> {
    // The published models hold 256 numbers more: the positional encoding, which is a buffer.
    for (config, count) in [
        (SamConfig::vit_b(), 93_735_472),
        (SamConfig::vit_l(), 312_342_832),
        (SamConfig::vit_h(), 641_090_608),
    ] {
        for kind in KINDS {
            let model = model::zeros(&config, kind)?;
            let total: usize = named_parameters(&model).iter().map(|(_, t)| t.elem_count()).sum();
            assert_eq!(total, count);
        }
    }
    Ok(())
}

#[test]
fn an_embedding_serves_for_its_image() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let model = model("tiny", AttentionKind::Split, DType::F32)?;
    let with_pixels = input(&io, "points", true);
    let embeddings = model.vision_encoder.forward(&io["encoder/pixel_values"], Mode::Eval)?;
    let with_embeddings = SamInput {
        pixel_values: None,
        image_embeddings: Some(embeddings.contiguous()?),
        ..with_pixels.clone()
    };
    let (a, b) =
        (model.forward(&with_pixels, Mode::Eval)?, model.forward(&with_embeddings, Mode::Eval)?);
    assert_eq!(relative_error(&a.pred_masks, &b.pred_masks)?, 0.0);
    assert_eq!(relative_error(&a.iou_scores, &b.iou_scores)?, 0.0);
    Ok(())
}

#[test]
fn points_without_labels_are_on_the_object() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let model = model("tiny", AttentionKind::Split, DType::F32)?;
    let mut labelled = input(&io, "points", true);
    let ones = labelled.input_labels.as_ref().context("no labels")?.ones_like()?;
    labelled.input_labels = Some(ones);
    let bare = SamInput { input_labels: None, ..labelled.clone() };
    let (a, b) = (model.forward(&labelled, Mode::Eval)?, model.forward(&bare, Mode::Eval)?);
    assert_eq!(relative_error(&a.pred_masks, &b.pred_masks)?, 0.0);
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let model = model("tiny", AttentionKind::Split, DType::F32)?;
    let good = input(&io, "all", true);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).map(Some);
    let cases = [
        (SamInput { pixel_values: None, ..good.clone() }, "neither pixel_values nor"),
        (
            SamInput { image_embeddings: zeros(&[2, 24, 8, 8])?, ..good.clone() },
            "both pixel_values and",
        ),
        (
            SamInput {
                pixel_values: None,
                image_embeddings: zeros(&[2, 24, 8, 7])?,
                ..good.clone()
            },
            "image_embeddings must have shape [B, 24, 8, 8], got [2, 24, 8, 7]",
        ),
        (
            SamInput {
                pixel_values: None,
                image_embeddings: zeros(&[0, 24, 8, 8])?,
                ..good.clone()
            },
            "image_embeddings must have shape [B, 24, 8, 8], got [0, 24, 8, 8]",
        ),
        (
            SamInput { pixel_values: zeros(&[0, 3, 64, 64])?, ..good.clone() },
            "pixel_values must have shape [B, 3, 64, 64], got [0, 3, 64, 64]",
        ),
        (
            SamInput { input_points: zeros(&[1, 2, 3, 2])?, ..good.clone() },
            "input_points must have shape [2, P, N, 2], got [1, 2, 3, 2]",
        ),
        (
            SamInput { input_points: zeros(&[2, 2, 2])?, ..good.clone() },
            "input_points must have shape [2, P, N, 2], got [2, 2, 2]",
        ),
        (
            SamInput { input_points: zeros(&[2, 2, 0, 2])?, ..good.clone() },
            "input_points must have shape [2, P, N, 2], got [2, 2, 0, 2]",
        ),
        (
            SamInput { input_labels: zeros(&[2, 2, 4])?, ..good.clone() },
            "input_labels must have shape [2, 2, 3], got [2, 2, 4]",
        ),
        (SamInput { input_points: None, ..good.clone() }, "input_labels without input_points"),
        (
            SamInput {
                input_points: Some((Tensor::ones((2, 2, 3, 2), DType::F32, &Device::Cpu)? * 1e30)?),
                ..good.clone()
            },
            "input_points must be pixels of the image, got 1e30",
        ),
        (
            // Corners of a box in the original's ONNX model.
            SamInput {
                input_labels: Some((Tensor::ones((2, 2, 3), DType::F32, &Device::Cpu)? * 2.0)?),
                ..good.clone()
            },
            "input_labels must be 1, 0, -1 or -10, got 2",
        ),
        (
            SamInput { input_boxes: zeros(&[2, 3, 4])?, ..good.clone() },
            "input_boxes must have shape [2, 2, 4], got [2, 3, 4]",
        ),
        (
            SamInput { input_masks: zeros(&[2, 1, 64, 64])?, ..good.clone() },
            "input_masks must have shape [2, 1, 32, 32], got [2, 1, 64, 64]",
        ),
    ];
    for (input, expected) in cases {
        let message =
            model.forward(&input, Mode::Eval).map(|_| ()).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
    Ok(())
}

#[test]
fn random_weights_depend_on_the_seed_alone() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let build = |seed| -> Result<SamModel> {
        let mut model = model::zeros(&model::config("tiny")?, AttentionKind::Split)?;
        set_trainable(&mut model, |name| name.ends_with("q.weight"))?;
        model.randomize(seed, 0.1)?;
        Ok(model)
    };
    let run = |model: &SamModel| -> Result<Tensor> {
        Ok(model.forward(&input(&io, "points", true), Mode::Eval)?.pred_masks)
    };
    let (a, b, c) = (build(3)?, build(3)?, build(4)?);
    assert_eq!(relative_error(&run(&a)?, &run(&b)?)?, 0.0);
    assert!(relative_error(&run(&a)?, &run(&c)?)? > 0.1);
    for (name, tensor) in named_parameters(&a) {
        assert_eq!(tensor.is_variable(), name.ends_with("q.weight"), "{name}");
    }
    assert!(build(1)?.randomize(1, f64::NAN).is_err());
    Ok(())
}

#[test]
fn every_constructor_refuses_what_no_model_can_be() -> Result<()> {
    let device = &Device::Cpu;
    let (good, f32s) = (SamConfig::default(), DType::F32);
    let mut bad = good.clone();
    (bad.vision_config.hidden_size, bad.vision_config.num_attention_heads) = (65, 2);
    let kind = AttentionKind::Split;
    let build = |config: &SamConfig, dtype: DType| {
        let vision = &config.vision_config;
        let text = |result: candle_core::Result<()>| {
            result.expect_err("a model that cannot be").to_string()
        };
        let crates = |result: candle_sam_lora::Result<()>| text(result.map_err(Into::into));
        vec![
            text(SamVisionEncoder::new(vision, kind, VarBuilder::zeros(dtype, device)).map(drop)),
            text(
                SamVisionEncoder::with_attention(vision, VarBuilder::zeros(dtype, device), |l| {
                    kind.build(l)
                })
                .map(drop),
            ),
            crates(
                DeepSeekOcrEncoder::new(vision, [4, 8], kind, VarBuilder::zeros(dtype, device))
                    .map(drop),
            ),
            crates(SamModel::new(config, kind, VarBuilder::zeros(dtype, device)).map(drop)),
            text(SamPromptEncoder::new(config, VarBuilder::zeros(dtype, device)).map(drop)),
        ]
    };
    for message in build(&bad, f32s) {
        assert!(
            message.contains("vision_config.hidden_size is 65, expected a multiple of"),
            "{message}"
        );
    }
    for dtype in [DType::F64, DType::U8, DType::I64] {
        let decoder =
            SamMaskDecoder::new(&good.mask_decoder_config, VarBuilder::zeros(dtype, device))
                .map(drop);
        let transformer =
            SamTwoWayTransformer::new(&good.mask_decoder_config, VarBuilder::zeros(dtype, device))
                .map(drop);
        let positions = SamPositionalEmbedding::new(8, VarBuilder::zeros(dtype, device)).map(drop);
        let others =
            [decoder, transformer, positions].map(|r| r.expect_err("no such dtype").to_string());
        for message in build(&good, dtype).into_iter().chain(others) {
            assert!(
                message.contains(&format!("is {dtype:?}, expected F32, F16 or BF16")),
                "{message}"
            );
        }
    }
    let narrow =
        DeepSeekOcrEncoder::new(&good.vision_config, [4, 0], kind, VarBuilder::zeros(f32s, device))
            .map(drop);
    assert!(narrow.expect_err("no width").to_string().contains("width of net_3 is 0"));
    Ok(())
}

#[test]
fn from_pretrained_reads_configuration_and_weights() -> Result<()> {
    let folder = model::folder("tiny");
    let load =
        || SamModel::from_pretrained(&folder, AttentionKind::Split, DType::F32, &Device::Cpu);
    let model = load()?;
    let mut by_hand = model::zeros(model.config(), AttentionKind::Split)?;
    candle_sam_lora::sam::checkpoint::load(&mut by_hand, &folder)?;
    let (found, expected) = (named_parameters(&model), named_parameters(&by_hand));
    assert_eq!(found.len(), expected.len());
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert_eq!(difference, 0.0, "{name}");
    }
    let kind = AttentionKind::Split;
    let error = SamModel::from_pretrained("no/such@model!", kind, DType::F32, &Device::Cpu);
    assert!(error.unwrap_err().to_string().contains("no/such@model!"));
    Ok(())
}
