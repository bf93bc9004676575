//! A training loop: LoRA on q and v of SAM's image encoder, on images with masks.

use anyhow::Result;
use candle_core::{DType, Device};
use candle_sam_lora::lora::{count_parameters, inject, save_adapter, LoraConfig};
use candle_sam_lora::sam::{AttentionKind, SamModel, SamProcessor};
use candle_sam_lora::train::{
    AdamWConfig, Batch, BatchConfig, BatchSource, Dataset, DatasetOptions, Trainer, TrainerConfig,
};

pub fn main() -> Result<()> {
    let (folder, device) = ("assets/tiny-sam", Device::Cpu);
    let mut model = SamModel::from_pretrained(folder, AttentionKind::Split, DType::F32, &device)?;
    let processor = SamProcessor::load(folder, model.config().vision_config.image_size)?;
    let lora = LoraConfig::new(16).alpha(32.0).dropout(0.1).target_modules(["q", "v"]);
    inject(&mut model, &lora, 42)?;
    println!("{}", count_parameters(&model));

    let nuclei = "assets/photos/nuclei/train";
    let dataset = Dataset::open(
        format!("{nuclei}/images"),
        format!("{nuclei}/masks"),
        &DatasetOptions::min_area(20),
    )?;
    let source = BatchSource {
        dataset: &dataset,
        processor: &processor,
        config: BatchConfig { prompts: 4, ..Default::default() },
        mask_size: 4 * model.config().vision_config.grid_size(),
        seed: 42,
        device: &device,
        embeddings: None,
    };
    let optimizer = AdamWConfig { lr: 1e-3, ..Default::default() };
    let mut trainer = Trainer::new(&model, TrainerConfig { seed: 42, ..optimizer.into() })?;
    for _ in 0..5 {
        let step = trainer.step(|part, mode| Batch::draw(&source, part)?.loss(&model, mode))?;
        println!("step {}: loss {:.4}, gradient {:.4}", step.step, step.loss, step.grad_norm);
    }
    // peft's PeftModel.from_pretrained reads it.
    save_adapter(&model, &lora, std::env::temp_dir().join("candle-sam-lora-adapter"))?;
    Ok(())
}
