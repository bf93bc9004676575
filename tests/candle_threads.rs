//! Encoders, decoders, losses and the optimizer start none of candle's threads, which spin while they wait for each other.
#![cfg(target_os = "linux")]

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, VarBuilder};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{randomize, trainable_variables, Mode};
use candle_sam_lora::sam::{
    AttentionKind, SamMaskDecoder, SamMaskDecoderConfig, SamMaskDecoderInput, SamVisionConfig,
    SamVisionEncoder,
};
use candle_sam_lora::train::{AdamW, AdamWConfig, LossWeights};

/// Threads of candle's pool in this process.
fn spinning() -> Result<usize> {
    let mut count = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let name = std::fs::read_to_string(task?.path().join("comm"))?;
        count += usize::from(name.starts_with("candle-bp"));
    }
    Ok(count)
}

/// From this many elements on candle's operations use their threads.
const LARGE: usize = 1 << 16;

#[test]
fn none_of_candles_threads_is_started() -> Result<()> {
    // The pool looks when it is first used; on a machine of one core it would have no threads to be seen.
    std::env::set_var("CANDLE_NUM_THREADS", "3");
    let zeros = || VarBuilder::zeros(DType::F32, &Device::Cpu);
    let random = |shape: &[usize]| Tensor::randn(0f32, 1f32, shape, &Device::Cpu);
    let config = SamVisionConfig {
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        image_size: 512,
        output_channels: 64,
        global_attn_indexes: vec![1],
        ..SamVisionConfig::default()
    };
    let mut encoder = SamVisionEncoder::new(&config, AttentionKind::Split, zeros())?;
    randomize(&mut encoder, 0, 0.02)?;
    inject(&mut encoder, &LoraConfig::new(4).dropout(0.1).target_modules(["q", "v"]), 1)?;
    let mut optimizer = AdamW::new(trainable_variables(&encoder)?, AdamWConfig::default())?;
    // A training step: each channel of the embedding is a mask.
    let masks = encoder.forward(&random(&[1, 3, 512, 512])?, Mode::Train { seed: 1 })?;
    assert!(masks.elem_count() >= LARGE);
    let targets = random(&[1, 32, 32])?.gt(0f32)?.to_dtype(DType::F32)?;
    let loss = LossWeights::SAM.loss(&masks, &random(&[1, 64])?, &targets)?;
    optimizer.step(&loss.backward()?)?;
    assert_eq!(spinning()?, 0, "after a step");

    let mut decoder = SamMaskDecoder::new(&SamMaskDecoderConfig::default(), zeros())?;
    randomize(&mut decoder, 0, 0.02)?;
    let input = SamMaskDecoderInput {
        image_embeddings: &random(&[1, 256, 16, 16])?,
        image_positions: &random(&[1, 16, 16, 256])?,
        sparse: Some(&random(&[1, 8, 2, 256])?),
        dense: &random(&[1, 1, 1, 256])?,
    };
    decoder.forward(&input, true, Mode::Eval)?;
    assert_eq!(spinning()?, 0, "after masks of prompts");

    let large = random(&[LARGE])?;
    (&large + &large)?;
    assert_eq!(spinning()?, 2, "candle's own sum of large tensors has them");
    Ok(())
}
