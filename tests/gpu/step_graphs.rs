//! Training steps by CUDA graphs: replays have the bits of plain launches, with dropout, clipping and a changing rate.

use crate::common::model::model_on;
use crate::common::{random, values};
use crate::driver_calls::calls;
use crate::{trial, with_each};
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{named_parameters, set_trainable, Linear, Mode, ModuleTree};
use candle_sam_lora::ops::{self, Dropout};
use candle_sam_lora::sam::{AttentionKind, SamVisionEncoder};
use candle_sam_lora::train::{
    AdamWConfig, Decay, Schedule, StepGraphs, StepMetrics, Trainer, TrainerConfig,
};
use libtest_mimic::Trial;
use std::collections::BTreeSet;
use std::process::Command;

const STEPS: u64 = 5;
/// Kernels of the encoder that read a seed: S, the gradient of A, and that of the input.
const SEEDED: [&str; 3] = ["low_rank_input", "low_rank_weight", "projection_bwd_input"];
const CONFIG: AdamWConfig =
    AdamWConfig { lr: 0.01, beta1: 0.8, beta2: 0.95, eps: 1e-3, weight_decay: 0.3 };

pub fn trials() -> Vec<Trial> {
    let emulated = calls("").is_some();
    let mut trials = vec![
        trial("step graph forms".to_string(), forms),
        trial("step graph refusals".to_string(), refusals),
    ];
    for kernel in SEEDED {
        let name = format!("step graph with a baked seed in {kernel}");
        trials.push(trial(name, move |_| baked_seed_is_seen(kernel)).with_ignored_flag(!emulated));
    }
    for dtype in [DType::F32, DType::BF16] {
        for checkpointed in [false, true] {
            let kind = if checkpointed { " checkpointed" } else { "" };
            let name = format!("step graph encoder {}{kind}", dtype.as_str());
            trials.push(trial(name, move |device| {
                with_each(device, || encoder(dtype, checkpointed, device).map_err(Error::wrap))
            }));
        }
    }
    trials
}

fn config() -> TrainerConfig {
    let decay = Decay::Linear { total_steps: 2 * STEPS };
    TrainerConfig {
        schedule: Schedule { warmup_steps: 1, decay },
        max_grad_norm: Some(0.01),
        ema: Some(0.9),
        seed: 3,
        ..CONFIG.into()
    }
}

fn adapted(dtype: DType, device: &Device) -> anyhow::Result<SamVisionEncoder> {
    let mut model = model_on(device, "tiny", AttentionKind::Split, dtype)?;
    set_trainable(&mut model, |_| false)?;
    let lora = LoraConfig::new(4).alpha(8.0).dropout(0.25);
    inject(&mut model, &lora.target_modules(["q", "v", "lin2"]), 1)?;
    Ok(model.vision_encoder)
}

/// The end of a run: its measures, its parameters and their averages.
#[derive(Debug, PartialEq)]
struct Run {
    made: Vec<StepMetrics>,
    parameters: Vec<Vec<f64>>,
    averages: Vec<Vec<f64>>,
}

fn parameters(model: &dyn ModuleTree) -> Vec<Vec<f64>> {
    named_parameters(model)
        .iter()
        .filter(|(_, t)| t.is_variable())
        .map(|(_, t)| values(t))
        .collect()
}

/// A run's steps by a graph, or by plain launches.
fn run(
    model: &dyn ModuleTree,
    loss: impl Fn(&Vec<Tensor>, Mode) -> Result<Tensor>,
    input: impl Fn(u64) -> Result<Vec<Tensor>>,
    by_graph: bool,
) -> anyhow::Result<Run> {
    let mut trainer = Trainer::new(model, config())?;
    let mut graphs = StepGraphs::new(&loss);
    let mut made = vec![];
    for _ in 0..STEPS {
        made.push(match by_graph {
            true => trainer.step_by_graph(&mut graphs, &input)?,
            false => trainer.step(|part, mode| loss(&input(part)?, mode))?,
        });
    }
    let counts = (graphs.recorded(), graphs.replayed(), graphs.plain());
    assert_eq!(counts, if by_graph { (1, STEPS - 2, 2) } else { (0, 0, 0) });
    let averages = trainer.with_averages(|| parameters(model))?;
    Ok(Run { made, parameters: parameters(model), averages })
}

fn encoder(dtype: DType, checkpointed: bool, device: &Device) -> anyhow::Result<()> {
    let launches = || calls("cuGraphLaunch").unwrap_or_default();
    let run = |by_graph| {
        let mut encoder = adapted(dtype, device)?;
        encoder.gradient_checkpointing = checkpointed;
        let input = |part| Ok(vec![random(part, (1, 3, 64, 64)).to_device(device)?]);
        let loss = |input: &Vec<Tensor>, mode| encoder.forward(&input[0], mode)?.sqr()?.mean_all();
        run(&encoder, loss, input, by_graph)
    };
    let expected = run(false)?;
    let before = launches();
    assert_eq!(run(true)?, expected);
    if calls("").is_some() {
        assert_eq!(launches() - before, STEPS - 2, "the third step is the first to be replayed");
    }
    let measures: [fn(&StepMetrics) -> f64; 2] = [|made| made.grad_norm, |made| made.lr];
    for measure in measures {
        let found: BTreeSet<_> = expected.made.iter().map(|made| measure(made).to_bits()).collect();
        assert_eq!(found.len() as u64, STEPS, "the steps differ");
    }
    Ok(())
}

/// A kernel that drops by the recorded step's seed in each replay, which the driver's stand-in plants in a process of
/// its own.
fn baked_seed_is_seen(kernel: &str) -> Result<()> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--exact", "step graph encoder f32"])
        .env("EMULATED_BAKED_SEED", kernel)
        .output()?;
    let log =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(!output.status.success(), "{kernel} was not missed");
    assert!(log.concat().contains("left: Run"), "{}\n{}", log[0], log[1]);
    Ok(())
}

struct Fit {
    linear: Linear,
}

module_tree!(Fit { linear => "" });

fn fit(device: &Device) -> Result<Fit> {
    let var = |seed, shape: &[usize]| Var::from_tensor(&random(seed, shape).to_device(device)?);
    let linear = Linear::new(var(1, &[6, 9])?.into_inner(), Some(var(2, &[6])?.into_inner()));
    Ok(Fit { linear })
}

/// A graph for each shape, and a new one after the moments were put back.
fn forms(device: &Device) -> Result<()> {
    let path = std::env::temp_dir().join(format!("step-graphs-{}.safetensors", std::process::id()));
    let input = |part| Ok(vec![random(part, (4 + part as usize % 2, 9)).to_device(device)?]);
    let mut runs = vec![];
    for by_graph in [false, true] {
        let model = fit(device)?;
        let loss = |x: &Vec<Tensor>, mode| model.linear.forward(&x[0], mode)?.sqr()?.mean_all();
        let (mut trainer, mut graphs) = (Trainer::new(&model, config())?, StepGraphs::new(loss));
        let mut made = vec![];
        for step in 0..9 {
            if step == 6 {
                trainer.save(&path)?;
            }
            made.push(match by_graph {
                true => trainer.step_by_graph(&mut graphs, input)?,
                false => trainer.step(|part, mode| loss(&input(part)?, mode))?,
            });
            if step == 7 {
                trainer.resume(&path)?;
            }
        }
        assert_eq!(graphs.recorded(), if by_graph { 2 } else { 0 });
        runs.push((made, parameters(&model)));
    }
    assert_eq!(runs[0], runs[1]);
    std::fs::remove_file(path)?;
    Ok(())
}

/// No graph holds what asks the host, or the masks of a seed that no replay replaces. The trainer goes on after that.
fn refusals(device: &Device) -> Result<()> {
    type Loss = fn(&Fit, &Vec<Tensor>, Mode) -> Result<Tensor>;
    let losses: [(&str, Loss); 2] = [
        ("captur", |model, x, mode| {
            let y = model.linear.forward(&x[0], mode)?.sqr()?.mean_all()?;
            let factor = f64::from(y.to_scalar::<f32>()?);
            y * factor
        }),
        ("seed", |model, x, mode| {
            let x = ops::dropout(&x[0], Dropout { p: 0.5, seed: 7, stream: 1 })?;
            model.linear.forward(&x, mode)?.sqr()?.mean_all()
        }),
    ];
    for (word, loss) in losses {
        let model = fit(device)?;
        let input = |part| Ok(vec![random(part, (4, 9)).to_device(device)?]);
        let mut trainer = Trainer::new(&model, config())?;
        let mut graphs = StepGraphs::new(|x: &Vec<Tensor>, mode| loss(&model, x, mode));
        for _ in 0..2 {
            trainer.step_by_graph(&mut graphs, input)?;
        }
        let message = trainer.step_by_graph(&mut graphs, input).expect_err(word).to_string();
        assert!(message.contains(word), "{message}");
        trainer.step(|part, mode| loss(&model, &input(part)?, mode))?;
        assert_eq!((trainer.steps(), graphs.recorded()), (3, 0));
    }
    Ok(())
}
