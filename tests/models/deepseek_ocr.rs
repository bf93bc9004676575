//! DeepSeek-OCR's SAM encoder against PyTorch in f64, on every grid in use: values, gradients, checkpoint, adapters.

use crate::common::model;
use crate::common::model::{below, folder, lookup, read, relative_error, Tensors, Worst};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, load_adapter, save_adapter, LoraConfig};
use candle_sam_lora::nn::{self, set_trainable, Mode};
use candle_sam_lora::ops::resize_bicubic;
use candle_sam_lora::sam::{
    checkpoint, AttentionKind, DeepSeekOcrEncoder, SamVisionConfig, SamVisionEncoder,
};

/// As in `tests/sam/encoder.rs`, which derives it for three layers; PyTorch's own f32 is up to 1.8e-6 off here.
const F32_TOLERANCE: f64 = 3.8e-6;
const GRIDS: [usize; 4] = [32, 40, 64, 80];
const PATCH: usize = 2;

fn config() -> SamVisionConfig {
    SamVisionConfig {
        hidden_size: 12,
        output_channels: 8,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        image_size: 64 * PATCH,
        patch_size: PATCH,
        mlp_dim: Some(24),
        global_attn_indexes: vec![2],
        ..Default::default()
    }
}

fn zeros(kind: AttentionKind, dtype: DType) -> Result<DeepSeekOcrEncoder> {
    Ok(DeepSeekOcrEncoder::new(&config(), [20, 28], kind, VarBuilder::zeros(dtype, &Device::Cpu))?)
}

fn encoder(kind: AttentionKind, dtype: DType) -> Result<DeepSeekOcrEncoder> {
    let mut encoder = zeros(kind, dtype)?;
    checkpoint::load(&mut encoder, folder("deepseek"))?;
    Ok(encoder)
}

fn pixels(io: &Tensors, grid: usize) -> Result<Tensor> {
    let side = grid * PATCH;
    Ok(io["pixels/pixel_values"].narrow(2, 0, side)?.narrow(3, 0, side)?)
}

#[test]
fn embeddings_equal_pytorch_on_every_grid() -> Result<()> {
    let io = read("deepseek", "io.safetensors")?;
    let mut worst = Worst::default();
    for kind in [AttentionKind::Fused, AttentionKind::Split] {
        let encoder = encoder(kind, DType::F32)?;
        for grid in GRIDS {
            let got = encoder.forward(&pixels(&io, grid)?, Mode::Eval)?;
            let want = &io[&format!("{grid}/image_embeddings")];
            worst.compare(&format!("{kind:?} {grid} x {grid}"), &got, want)?;
        }
    }
    worst.assert_within(F32_TOLERANCE);
    Ok(())
}

/// As `half_precision_follows_f32` in `tests/sam/encoder.rs`.
#[test]
fn half_precision_follows_f32() -> Result<()> {
    let io = read("deepseek", "io.safetensors")?;
    for (dtype, unit) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        let got = encoder(AttentionKind::Split, dtype)?.forward(&pixels(&io, 40)?, Mode::Eval)?;
        assert_eq!(got.dtype(), dtype);
        let error = relative_error(&got, &io["40/image_embeddings"])?;
        assert!(error < 9.0 * unit, "{dtype:?}: {error:.3e}");
    }
    Ok(())
}

/// Gradients sum over up to 1024 tokens more than values do: sqrt(1024) times 2^-24 beside the values' error. The
/// tables of the global layer are resized from 127 rows. Their weights, as PyTorch's in f32, come from positions with
/// three roundings of up to 127 * 2^-24.
#[test]
fn gradients_of_every_parameter_equal_pytorch() -> Result<()> {
    let io = read("deepseek", "io.safetensors")?;
    let mut encoder = encoder(AttentionKind::Split, DType::F32)?;
    set_trainable(&mut encoder, |_| true)?;
    let out = encoder.forward(&pixels(&io, 32)?, Mode::Eval)?;
    let grads = (out * &io["gradients/G"])?.sum_all()?.backward()?;
    let wanted = below(&io, "gradients/grad/");
    let (mut worst, mut tables) = (Worst::default(), Worst::default());
    let parameters = nn::named_parameters(&encoder);
    assert_eq!(parameters.len(), wanted.len() + 3 * 4, "q, k and v are one in the fixture");
    for (name, parameter) in parameters {
        let grad =
            grads.get(&parameter).ok_or_else(|| anyhow::anyhow!("{name} has no gradient"))?;
        // The key's bias has no effect but through padded windows: its gradient is judged beside the others of qkv.
        let want = lookup(&wanted, &name)?;
        let scale = match name.split_once(".attn.k.bias") {
            Some((layer, _)) => wanted[&format!("{layer}.attn.qkv.bias")].clone(),
            None => want.clone(),
        };
        let resized = name.contains("layers.2.attn.rel_pos");
        let worst = if resized { &mut tables } else { &mut worst };
        worst.add(&name, model::error_relative_to(&scale, grad, &want)?);
    }
    worst.assert_within(F32_TOLERANCE + 32.0 * 2f64.powi(-24));
    tables.assert_within(3.0 * 127.0 * 2f64.powi(-24));
    Ok(())
}

#[test]
fn bicubic_resizing_equals_pytorch() -> Result<()> {
    let io = read("deepseek", "io.safetensors")?;
    let mut worst = Worst::default();
    for side in [1, 5, 8, 11, 15, 16, 17, 20, 33] {
        let got = resize_bicubic(&io["bicubic/grid"], side)?;
        worst.compare(&format!("16 to {side}"), &got, &io[&format!("bicubic/to_{side}")])?;
    }
    // Two passes over at most 16 weights each.
    worst.assert_within(1e-6);
    Ok(())
}

#[test]
fn checkpoints_are_those_of_deepseek_ocr_and_of_nobody_else() -> Result<()> {
    // SAM alone comes out of the same file.
    let mut sam = SamVisionEncoder::new(
        &config(),
        AttentionKind::Split,
        VarBuilder::zeros(DType::F32, &Device::Cpu),
    )?;
    nn::checkpoint::load(&mut sam, folder("deepseek"), &checkpoint::DEEPSEEK_OCR)?;
    // The written encoder is read again, without the rest of DeepSeek-OCR.
    let original = encoder(AttentionKind::Split, DType::F32)?;
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("encoder.safetensors");
    for naming in [checkpoint::Naming::Original, checkpoint::Naming::HuggingFace] {
        checkpoint::save(&original, &path, naming, None)?;
        let mut again = zeros(AttentionKind::Fused, DType::F32)?;
        checkpoint::load(&mut again, &path)?;
        let io = read("deepseek", "io.safetensors")?;
        let embeddings = |e: &DeepSeekOcrEncoder| {
            e.forward(&pixels(&io, 32)?, Mode::Eval).map_err(anyhow::Error::from)
        };
        assert!(relative_error(&embeddings(&again)?, &embeddings(&original)?)? < F32_TOLERANCE);
    }
    // A SAM lacks the two convolutions.
    checkpoint::save(&sam, &path, checkpoint::Naming::Original, None)?;
    let error = checkpoint::load(&mut zeros(AttentionKind::Split, DType::F32)?, &path)
        .expect_err("a SAM was taken for DeepSeek-OCR's")
        .to_string();
    assert!(error.contains("net_2.weight") && error.contains("net_3.weight"), "{error}");
    let load = |path: &std::path::Path| {
        let loaded = DeepSeekOcrEncoder::from_pretrained(
            path,
            AttentionKind::Split,
            DType::F32,
            &Device::Cpu,
        );
        loaded.map(|_| ()).expect_err("accepted").to_string()
    };
    assert!(load(&path).contains("has no tensor net_2.weight"), "{}", load(&path));
    // Widths are the checkpoint's; the rest is to be ViT-B's.
    let error = load(&folder("deepseek"));
    assert!(error.contains("patch_embed") && !error.contains("net_3"), "{error}");
    Ok(())
}

#[test]
fn adapters_train_and_load() -> Result<()> {
    let io = read("deepseek", "io.safetensors")?;
    let pixels = pixels(&io, 40)?;
    let mut model = encoder(AttentionKind::Split, DType::F32)?;
    let plain = model.forward(&pixels, Mode::Eval)?;
    let lora = LoraConfig::new(2).alpha(4.0).target_modules(["q", "v"]);
    inject(&mut model, &lora, 7)?;
    assert_eq!(relative_error(&model.forward(&pixels, Mode::Eval)?, &plain)?, 0.0);
    let variables = nn::trainable_variables(&model)?;
    assert_eq!(variables.len(), 3 * 2 * 2, "{variables:?}");
    for _ in 0..2 {
        let loss = model.forward(&pixels, Mode::Train { seed: 1 })?.sqr()?.mean_all()?;
        let grads = loss.backward()?;
        for (name, var) in &variables {
            let grad = grads.get(var).ok_or_else(|| anyhow::anyhow!("{name} has no gradient"))?;
            var.set(&(var.as_tensor() - (grad * 0.1)?)?)?;
        }
    }
    let adapted = model.forward(&pixels, Mode::Eval)?;
    assert!(relative_error(&adapted, &plain)? > 1e-4);
    let scratch = tempfile::tempdir()?;
    save_adapter(&model, &lora, scratch.path())?;
    let mut again = encoder(AttentionKind::Split, DType::F32)?;
    load_adapter(&mut again, scratch.path())?;
    assert_eq!(relative_error(&again.forward(&pixels, Mode::Eval)?, &adapted)?, 0.0);
    Ok(())
}

#[test]
fn images_that_do_not_fit_are_refused() -> Result<()> {
    let encoder = zeros(AttentionKind::Split, DType::F32)?;
    for shape in [
        &[1, 3, 64, 62][..],
        &[1, 3, 63, 63],
        &[1, 4, 64, 64],
        &[3, 64, 64],
        &[0, 3, 64, 64],
        &[1, 3, 0, 0],
    ] {
        let pixels = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        let error = encoder.forward(&pixels, Mode::Eval).map(|_| ()).expect_err("accepted");
        let message = error.to_string();
        assert!(
            message.contains("[B, 3, S, S]") && message.contains(&format!("{shape:?}")),
            "{message}"
        );
    }
    Ok(())
}
