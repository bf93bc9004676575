//! The run that is disturbed: a small model trained for some steps, its state and its adapter saved after each.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, load_adapter, save_adapter, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{randomize, Linear, Mode};
use candle_sam_lora::train::{AdamWConfig, StepRng, Trainer, TrainerConfig};
use std::path::Path;
use std::process::ExitCode;

/// The first argument of a process that is to be such a run.
pub const COMMAND: &str = "--run";
/// In the place of the number of steps: one step, then one with less memory than it takes.
pub const STARVED: &str = "starved";
/// The state's file.
pub const STATE: &str = "state.safetensors";
/// The adapter's folder.
pub const ADAPTER: &str = "adapter";

struct Model {
    lin1: Linear,
    lin2: Linear,
}
module_tree!(Model { lin1, lin2 });

fn base() -> anyhow::Result<Model> {
    let linear = |from, to| Linear::load(from, to, VarBuilder::zeros(DType::F32, &Device::Cpu));
    let mut model = Model { lin1: linear(6, 8)?, lin2: linear(8, 3)? };
    randomize(&mut model, 3, 0.4)?;
    Ok(model)
}

fn lora() -> LoraConfig {
    LoraConfig::new(2).dropout(0.2).target_modules(["lin1", "lin2"])
}

/// Whether the adapter in a folder is whole: its parameters, or none where there is no configuration to load.
pub fn adapter(folder: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    if !folder.join("adapter_config.json").exists() {
        return Ok(None);
    }
    load_adapter(&mut base()?, folder)?;
    Ok(Some(std::fs::read(folder.join("adapter_model.safetensors"))?))
}

fn train(folder: &Path, steps: u64, rows: usize) -> anyhow::Result<()> {
    let mut model = base()?;
    inject(&mut model, &lora(), 1)?;
    let mut trainer =
        Trainer::new(&model, TrainerConfig { seed: 5, ..AdamWConfig::default().into() })?;
    let state = folder.join(STATE);
    // A state, or the one before it.
    if std::fs::read_dir(folder)?
        .flatten()
        .any(|f| f.file_name().to_string_lossy().starts_with("state"))
    {
        trainer.resume(&state)?;
    }
    while trainer.steps() < steps {
        trainer.step(|step, mode| loss(&model, step, rows, mode))?;
        trainer.save(&state)?;
        save_adapter(&model, &lora(), folder.join(ADAPTER))?;
    }
    // A run that was stopped between its last two files lacks the second.
    Ok(save_adapter(&model, &lora(), folder.join(ADAPTER))?)
}

fn loss(model: &Model, step: u64, rows: usize, mode: Mode) -> candle_core::Result<Tensor> {
    let mut draws = StepRng::new(1, "x", step);
    let x = (0..rows * 6).map(|_| draws.uniform() as f32 - 0.5).collect::<Vec<_>>();
    let x = Tensor::from_vec(x, (rows, 6), &Device::Cpu)?;
    model.lin2.forward(&model.lin1.forward(&x, mode)?, mode)?.sqr()?.mean_all()
}

/// The run as a process: exit code 1 and the error on stderr where it fails.
pub fn main(folder: &Path, steps: &str) -> ExitCode {
    let result = match steps.parse() {
        Ok(steps) => train(folder, steps, 4),
        Err(_) => starve(folder),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn starve(folder: &Path) -> anyhow::Result<()> {
    train(folder, 1, 4)?;
    let pages: u64 =
        std::fs::read_to_string("/proc/self/statm")?.split(' ').next().unwrap_or("0").parse()?;
    let bytes = pages * 4096 + (16 << 20);
    // Nor is its memory to be left behind in a file.
    for (resource, bytes) in [(libc::RLIMIT_AS, bytes), (libc::RLIMIT_CORE, 0)] {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: the limit outlives the call.
        anyhow::ensure!(unsafe { libc::setrlimit(resource, &limit) } == 0, "setrlimit");
    }
    train(folder, 2, 10_000_000)
}
