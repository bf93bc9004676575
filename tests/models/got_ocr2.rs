//! GOT-OCR 2.0's vision tower and projector against transformers in f64: values, gradients, checkpoint, adapters.

use crate::common::model::{below, bits, folder, gradient_errors, read, Worst};
use anyhow::Result;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, load_adapter, save_adapter, LoraConfig};
use candle_sam_lora::nn::{self, set_trainable, Mode};
use candle_sam_lora::sam::{checkpoint, AttentionKind, GotOcr2Encoder, SamVisionConfig};

/// As in tests/sam/model.rs, for values and for gradients.
const TOLERANCE: f64 = 5.4e-6;
const GRADIENT_TOLERANCE: f64 = 7.6e-6;
const KINDS: [AttentionKind; 2] = [AttentionKind::Fused, AttentionKind::Split];

fn encoder(kind: AttentionKind) -> Result<GotOcr2Encoder> {
    let config = SamVisionConfig {
        hidden_size: 32,
        output_channels: 24,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        image_size: 64,
        patch_size: 8,
        mlp_dim: Some(48),
        window_size: 3,
        global_attn_indexes: vec![2],
        ..Default::default()
    };
    let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let mut encoder = GotOcr2Encoder::new(&config, 20, kind, zeros)?;
    nn::checkpoint::load(&mut encoder, folder("got"), &checkpoint::GOT_OCR2)?;
    Ok(encoder)
}

#[test]
fn tokens_equal_transformers() -> Result<()> {
    let io = read("got", "io.safetensors")?;
    let mut worst = Worst::default();
    for kind in KINDS {
        let encoder = encoder(kind)?;
        let embeddings = encoder.vision_tower.forward(&io["all/pixel_values"], Mode::Eval)?;
        worst.compare(&format!("{kind:?} embeddings"), &embeddings, &io["all/image_embeddings"])?;
        let tokens = io["all/pixel_values"].apply(&encoder)?;
        worst.compare(&format!("{kind:?} tokens"), &tokens, &io["all/tokens"])?;
    }
    worst.assert_within(TOLERANCE);
    Ok(())
}

#[test]
fn gradients_equal_pytorch() -> Result<()> {
    let io = read("got", "io.safetensors")?;
    let mut worst = Worst::default();
    for kind in KINDS {
        let mut encoder = encoder(kind)?;
        set_trainable(&mut encoder, |_| true)?;
        let tokens = encoder.forward(&io["all/pixel_values"], Mode::Train { seed: 0 })?;
        let gradients = (tokens * &io["all/G"])?.sum_all()?.backward()?;
        for (name, error) in gradient_errors(&encoder, &gradients, &below(&io, "all/grad/"))? {
            worst.add(&format!("{kind:?} {name}"), error);
        }
    }
    worst.assert_within(GRADIENT_TOLERANCE);
    Ok(())
}

#[test]
fn an_adapter_comes_back() -> Result<()> {
    let io = read("got", "io.safetensors")?;
    let mut adapted = encoder(AttentionKind::Split)?;
    let lora = LoraConfig::new(2).target_modules(["q", "v", "multimodal_projector"]);
    inject(&mut adapted, &lora, 1)?;
    nn::randomize(&mut adapted, 2, 0.1)?;
    let dir = tempfile::tempdir()?;
    save_adapter(&adapted, &lora, dir.path())?;
    let mut loaded = encoder(AttentionKind::Split)?;
    load_adapter(&mut loaded, dir.path())?;
    let names = |encoder: &GotOcr2Encoder| candle_sam_lora::lora::adapter_state(encoder, &lora);
    for ((key, want), (_, got)) in names(&adapted)?.iter().zip(names(&loaded)?) {
        assert_eq!(bits(&got)?, bits(want)?, "{key}");
    }
    assert_eq!(loaded.forward(&io["all/pixel_values"], Mode::Eval)?.dims(), [2, 4, 20]);
    Ok(())
}

#[test]
fn a_width_of_zero_is_refused() {
    let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let encoder = GotOcr2Encoder::new(&Default::default(), 0, AttentionKind::Fused, zeros);
    assert!(encoder.unwrap_err().to_string().contains("width is 0"));
}
