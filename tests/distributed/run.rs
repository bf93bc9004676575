//! A run of a few steps over the fixture model, by one process or several.
#![allow(dead_code)]

use anyhow::{bail, Result};
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{trainable_variables, Mode};
use candle_sam_lora::sam::{AttentionKind, SamInput, SamModel};
use candle_sam_lora::train::{
    AdamWConfig, Alone, Batch, BatchImages, Communicator, Corrections, LossWeights, ObjectMasks,
    PromptedObjects, StepRng, Trainer, TrainerConfig,
};
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

/// A batch of an image with a point on each of two objects, corrected in rounds, drawn from the part's number.
fn corrected(pixel_values: &Tensor, part: u64) -> candle_core::Result<Batch> {
    let mut draws = StepRng::new(11, "corrections", part);
    let corrections = Corrections { points: 2, mask_probability: 0.5, mask_rounds: 1 };
    let rounds = corrections.draw(&mut draws);
    let inside = |i: usize| f32::from(u8::from((i % 32).abs_diff(12 + i / 1024 * 8) < 6));
    let targets: Vec<f32> = (0..2 * 32 * 32).map(inside).collect();
    let targets = Tensor::from_vec(targets, (2, 32, 32), &Device::Cpu)?;
    let prompts = SamInput {
        input_points: Some(
            Tensor::new(&[24f32, 30.0, 40.0, 30.0], &Device::Cpu)?.reshape((1, 2, 1, 2))?,
        ),
        input_labels: Some(Tensor::ones((1, 2, 1), DType::F32, &Device::Cpu)?),
        ..Default::default()
    };
    let objects = vec![ObjectMasks { targets, ignored: None }];
    let groups = vec![PromptedObjects { images: vec![0], prompts, objects }];
    let images = BatchImages::Pixels(pixel_values.clone());
    Ok(Batch { images, groups, rounds, draws, loss: LossWeights::SAM, mask_size: 32 })
}

/// The loss of a part: an image, a point and targets drawn from its number, and SAM's loss over rounds of corrections.
pub fn loss(sam: &SamModel, part: u64, mode: Mode) -> candle_core::Result<Tensor> {
    let mut draws = StepRng::new(11, "image", part);
    let pixels = (0..3 * 64 * 64).map(|_| draws.uniform() as f32 * 2.0 - 1.0).collect();
    let pixels = Tensor::from_vec::<_, f32>(pixels, (1, 3, 64, 64), &Device::Cpu)?;
    let dtype = sam.shared_image_embedding.positional_embedding.0.dtype();
    let point = [draws.uniform() as f32 * 64.0, draws.uniform() as f32 * 64.0];
    let pixels = pixels.to_dtype(dtype)?;
    let embeddings = sam.vision_encoder.forward(&pixels, mode)?;
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
    sum + corrected(&pixels, part)?.loss(sam, mode)?
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
