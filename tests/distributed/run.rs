//! A run of a few steps over the fixture model, by one process or several.
#![allow(dead_code)]

use anyhow::{bail, Result};
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{trainable_variables, Mode};
use candle_sam_lora::sam::{AttentionKind, SamInput, SamModel};
use candle_sam_lora::train::{AdamWConfig, Alone, Communicator, StepRng, Trainer, TrainerConfig};
use std::sync::Arc;

use crate::common::model;

/// Kinds of training.
pub const KINDS: [&str; 4] = ["lora", "dora", "modules_to_save", "bf16"];

/// Parts of a step, however they are divided.
pub const PARTS: u64 = 12;

/// The fixture model with an adapter that drops out.
pub fn adapted(kind: &str) -> Result<SamModel> {
    let dtype = if kind == "bf16" { DType::BF16 } else { DType::F32 };
    let mut sam = model::model("tiny", AttentionKind::Split, dtype)?;
    let config = LoraConfig::new(4).alpha(8.0).dropout(0.1).target_modules(["q", "v"]);
    let config = match kind {
        "lora" | "bf16" => config,
        "dora" => config.dora(),
        "modules_to_save" => config.modules_to_save(["mask_decoder"]),
        other => bail!("no kind {other}"),
    };
    inject(&mut sam, &config, 7)?;
    Ok(sam)
}

/// A trainer that gives this rank its share of [`PARTS`].
pub fn trainer(sam: &SamModel, communicator: Arc<dyn Communicator>) -> Result<Trainer> {
    let config = TrainerConfig {
        accumulation: PARTS / communicator.size() as u64,
        max_grad_norm: Some(0.5),
        seed: 3,
        ..AdamWConfig { lr: 0.01, ..Default::default() }.into()
    };
    Ok(Trainer::new(sam, config)?.with_communicator(communicator)?)
}

/// The loss of a part: an image, a point and targets drawn from its number.
pub fn loss(sam: &SamModel, part: u64, mode: Mode) -> candle_core::Result<Tensor> {
    let mut draws = StepRng::new(11, "image", part);
    let pixels = (0..3 * 64 * 64).map(|_| draws.uniform() as f32 * 2.0 - 1.0).collect();
    let pixels = Tensor::from_vec::<_, f32>(pixels, (1, 3, 64, 64), &Device::Cpu)?;
    let dtype = sam.shared_image_embedding.positional_embedding.0.dtype();
    let point = [draws.uniform() as f32 * 64.0, draws.uniform() as f32 * 64.0];
    let embeddings = sam.vision_encoder.forward(&pixels.to_dtype(dtype)?, mode)?;
    // Everything in the decoder is trained: the masks of both kinds and their scores.
    let mut sum = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for multimask_output in [true, false] {
        let input = SamInput {
            image_embeddings: Some(embeddings.clone()),
            input_points: Some(Tensor::new(&point, &Device::Cpu)?.reshape((1, 1, 1, 2))?),
            input_labels: Some(Tensor::ones((1, 1, 1), DType::I64, &Device::Cpu)?),
            multimask_output,
            ..Default::default()
        };
        let output = sam.forward(&input, mode)?;
        for found in [output.pred_masks, output.iou_scores] {
            sum = (sum + (found.to_dtype(DType::F32)? - draws.uniform())?.sqr()?.mean_all()?)?;
        }
    }
    Ok(sum)
}

/// Makes steps until `steps` are made.
pub fn go_on(trainer: &mut Trainer, sam: &SamModel, steps: u64) -> candle_core::Result<()> {
    while trainer.steps() < steps {
        trainer.step(|part, mode| loss(sam, part, mode))?;
    }
    Ok(())
}

/// The bits of one process alone, which has all parts, after `steps` steps.
pub fn alone(kind: &str, steps: u64) -> Result<Vec<u32>> {
    let sam = adapted(kind)?;
    let mut run = trainer(&sam, Arc::new(Alone))?;
    go_on(&mut run, &sam, steps)?;
    bits(&run, &sam)
}

/// The bits of everything trainable and of the losses.
pub fn bits(trainer: &Trainer, sam: &SamModel) -> Result<Vec<u32>> {
    let mut bits: Vec<u32> = trainer.losses().iter().map(|loss| loss.to_bits()).collect();
    for (_, var) in trainable_variables(sam)? {
        bits.extend(model::bits(&var)?);
    }
    Ok(bits)
}
