//! Fine-tuning on the GPU: the losses of the same steps, images, prompts and dropout masks as on the CPU.

use crate::common::fixtures;
use crate::watchdog::unwatched;
use crate::{trial, with_each};
use candle_core::{DType, Device, Error};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{set_trainable, Mode};
use candle_sam_lora::sam::{checkpoint, AttentionKind, SamConfig, SamModel, SamProcessor};
use candle_sam_lora::train::{
    AdamWConfig, Batch, BatchConfig, BatchSource, Dataset, DatasetOptions, StepGraphs, Trainer,
    TrainerConfig,
};
use libtest_mimic::Trial;

const SEED: u64 = 3;
const STEPS: u64 = 8;
/// Relative. The devices sum f32 in other orders. On the CPU, noise of 1e-6 on the images, sixteen roundings, moves a
/// loss by 1.2e-6 at most. Training without dropout moves the second loss by 4.5e-5, a step not made by 4.6e-2.
const BOUND: f32 = 1e-5;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("train tiny-sam".to_string(), |device| {
            let expected = unwatched(|| losses(&Device::Cpu, STEPS, false)).map_err(Error::wrap)?;
            with_each(device, || losses_are(&expected, device).map_err(Error::wrap))
        }),
        trial("step graph tiny-sam".to_string(), |device| {
            let losses = |by_graph| losses(device, 4, by_graph).map_err(Error::wrap);
            assert_eq!(losses(true)?, losses(false)?);
            Ok(())
        }),
    ]
}

/// The losses of a few steps of the command `finetune`, shortened, by a CUDA graph or by plain launches.
fn losses(device: &Device, steps: u64, by_graph: bool) -> anyhow::Result<Vec<f32>> {
    let assets = fixtures().join("../../assets");
    let (folder, nuclei) = (assets.join("tiny-sam"), assets.join("photos/nuclei/train"));
    let config = SamConfig::load(folder.join("config.json"))?;
    let mut model =
        SamModel::new(&config, AttentionKind::Split, VarBuilder::zeros(DType::F32, device))?;
    checkpoint::load(&mut model, &folder)?;
    set_trainable(&mut model, |_| false)?;
    let lora = LoraConfig::new(16).alpha(32.0).dropout(0.1).target_modules(["q", "v"]);
    inject(&mut model, &lora, SEED)?;
    let processor = SamProcessor::load(&folder, config.vision_config.image_size)?;
    let data =
        Dataset::open(nuclei.join("images"), nuclei.join("masks"), &DatasetOptions::min_area(20))?;
    let source = BatchSource {
        dataset: &data,
        processor: &processor,
        config: BatchConfig { prompts: 4, ..Default::default() },
        mask_size: 4 * config.vision_config.grid_size(),
        seed: SEED,
        device,
        embeddings: None,
    };
    let adamw = AdamWConfig { lr: 1e-3, ..Default::default() };
    let mut trainer = Trainer::new(&model, TrainerConfig { seed: SEED, ..adamw.into() })?;
    let loss = |batch: &Batch, mode: Mode| batch.loss(&model, mode);
    let draw = |step| Ok::<_, Error>(Batch::draw(&source, step)?);
    let mut graphs = StepGraphs::new(loss);
    for _ in 0..steps {
        match by_graph {
            true => trainer.step_by_graph(&mut graphs, draw)?,
            false => trainer.step(|step, mode| loss(&draw(step)?, mode))?,
        };
    }
    assert_eq!(graphs.recorded(), usize::from(by_graph), "all images have one form");
    Ok(trainer.losses().to_vec())
}

fn losses_are(expected: &[f32], device: &Device) -> anyhow::Result<()> {
    let got = losses(device, STEPS, false)?;
    println!("CPU {expected:?}\nGPU {got:?}");
    assert_eq!(got.len(), STEPS as usize);
    let errors: Vec<f32> = got.iter().zip(expected).map(|(a, b)| (a / b - 1.0).abs()).collect();
    assert!(errors.iter().all(|error| *error < BOUND), "{errors:?}");
    Ok(())
}
