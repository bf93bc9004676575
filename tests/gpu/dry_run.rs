//! Memory, launches, allocations and copies of a training step and of an inference. The driver's stand-in counts them
//! in a dry run (emulator/driver/src/dry_run.rs), where the encoders have their real sizes and every value is zero.
//!
//! The counts are those of scripts/launch-budget.tsv, or the test fails. Host allocations may differ a little: a hash
//! map with a seed of its own grows when it will. `CANDLE_SAM_LORA_WRITE_BUDGET` in the environment makes the file
//! anew.

use crate::driver_calls::{calls, stand_in};
use crate::host_allocations;
use crate::trial;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Error, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::cuda;
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{set_trainable, trainable_variables, without_gradients, Mode};
use candle_sam_lora::sam::{AttentionKind, SamConfig, SamVisionEncoder};
use candle_sam_lora::train::{AdamW, AdamWConfig, StepGraphs, Trainer, TrainerConfig};
use libtest_mimic::Trial;
use std::fmt::Write as _;
use std::path::Path;

/// Kinds of events, and the beginnings of the names that are counted as such.
const KINDS: [(&str, &[&str]); 8] = [
    ("launches", &["cuLaunchKernel"]),
    ("of candle", &["candle::"]),
    ("cuBLAS", &["cublasGemm"]),
    ("memsets", &["cuMemset"]),
    ("copies", &["cuMemcpyHtoD", "cuMemcpyDtoD"]),
    ("waits", &["cuMemcpyDtoH"]),
    ("allocations", &["cuMemAlloc"]),
    ("graphs", &["cuGraphLaunch"]),
];
/// Names of bytes moved beside products and attention.
const MOVED: &[&str] = &["moved::"];

/// The rank of the adapters, on q and v.
const RANK: usize = 16;

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    /// With an adapter that nothing trains.
    Inference,
    /// With an adapter that is trainable, by a copy without gradients.
    Evaluation,
    Training,
    Checkpointed,
    /// A training step by a CUDA graph.
    Replayed,
}

const PASSES: [(&str, Pass); 5] = [
    ("inference", Pass::Inference),
    ("evaluation", Pass::Evaluation),
    ("training", Pass::Training),
    ("checkpointed", Pass::Checkpointed),
    ("replayed", Pass::Replayed),
];

pub fn trials() -> Vec<Trial> {
    // SAFETY: the function has this type.
    let is_dry = unsafe { stand_in::<extern "C" fn() -> bool>("emulated_driver_is_dry") };
    let is_dry = is_dry.is_some_and(|is_dry| is_dry());
    let test = |device: &Device| run(device).map_err(Error::wrap);
    vec![trial("dry run".to_string(), test).with_ignored_flag(!is_dry)]
}

fn run(device: &Device) -> Result<()> {
    cuda::self_test(false); // it compares values
    let kinds = KINDS.map(|(kind, _)| kind).join("\t");
    let mut table = format!(
        "# encoder\tdtype\tpass\tMiB before\tMiB at most\t{kinds}\tMiB moved beside products\tneeded\thost allocations\n"
    );
    let sizes = [
        ("vit_b", DType::F32),
        ("vit_b", DType::BF16),
        ("vit_l", DType::BF16),
        ("vit_h", DType::BF16),
    ];
    for (name, dtype) in sizes {
        for (pass_name, pass) in PASSES {
            let config = SamConfig::by_name(name)?;
            let (counts, on_host) = counts(&config, dtype, pass, device)?;
            let needed = match pass {
                Pass::Training => format!("{:.1}", mebibytes_needed(&config, dtype)),
                _ => "-".to_string(),
            };
            let (dtype, counts) = (dtype.as_str(), counts.join("\t"));
            writeln!(table, "{name}\t{dtype}\t{pass_name}\t{counts}\t{needed}\t{on_host}")?;
        }
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/launch-budget.tsv");
    println!("{table}");
    if std::env::var_os("CANDLE_SAM_LORA_WRITE_BUDGET").is_some() {
        return std::fs::write(&file, table).with_context(|| file.display().to_string());
    }
    let expected = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let agree = table.lines().count() == expected.lines().count()
        && table.lines().zip(expected.lines()).all(|(got, expected)| agrees(got, expected));
    ensure!(agree, "{} has other counts:\n{expected}", file.display());
    Ok(())
}

/// Whether two lines of the table are equal, but for 2 host allocations and one of a hundred.
fn agrees(got: &str, expected: &str) -> bool {
    let split = |line: &str| {
        let (counts, on_host) = line.rsplit_once('\t')?;
        Some((counts.to_string(), on_host.parse::<u64>().ok()?))
    };
    match (split(got), split(expected)) {
        (Some((got, on_host)), Some((expected, most))) => {
            got == expected && on_host.abs_diff(most) <= 2 + most / 100
        }
        _ => got == expected,
    }
}

/// Memory in use and at most, a number for each of [`KINDS`], and bytes moved beside products, of the second of two
/// equal passes. With them its allocations on the host.
fn counts(
    config: &SamConfig,
    dtype: DType,
    pass: Pass,
    device: &Device,
) -> Result<(Vec<String>, u64)> {
    let config = &config.vision_config;
    let weights = VarBuilder::zeros(dtype, device);
    let mut encoder = SamVisionEncoder::new(config, AttentionKind::Split, weights)?;
    set_trainable(&mut encoder, |_| false)?;
    let lora = LoraConfig::new(RANK).alpha(32.0).dropout(0.1).target_modules(["q", "v"]);
    inject(&mut encoder, &lora, 1)?;
    if pass == Pass::Inference {
        set_trainable(&mut encoder, |_| false)?;
    }
    encoder.gradient_checkpointing = pass == Pass::Checkpointed;
    if pass == Pass::Replayed {
        return replayed(&encoder, config.image_size, device);
    }
    let trains = matches!(pass, Pass::Training | Pass::Checkpointed);
    let variables = if trains { trainable_variables(&encoder)? } else { vec![] };
    let mut optimizer =
        if trains { Some(AdamW::new(variables, AdamWConfig::default())?) } else { None };
    let pixels = Tensor::zeros((1, 3, config.image_size, config.image_size), DType::F32, device)?;
    let mut both = [(vec![], 0), (vec![], 0)];
    for (found, on_host) in &mut both {
        let events = events();
        let [resident, _] = bytes()?;
        let before = host_allocations::count();
        match &mut optimizer {
            None if pass == Pass::Evaluation => {
                drop(without_gradients(&encoder)?.forward(&pixels, Mode::Eval)?);
            }
            None => drop(encoder.forward(&pixels, Mode::Eval)?),
            Some(optimizer) => step(&encoder, &pixels, optimizer)?,
        }
        *on_host = host_allocations::count() - before;
        let [after, peak] = bytes()?;
        ensure!(after == resident, "{} bytes are left behind", after.abs_diff(resident));
        *found = [resident, peak].map(mebibytes).into_iter().chain(events()).collect();
    }
    let [_, second] = both;
    Ok(second)
}

/// MiB of a training step beside products and attention, if each formula reads its tensors and writes its result once.
fn mebibytes_needed(config: &SamConfig, dtype: DType) -> f64 {
    let config = &config.vision_config;
    let (tokens, layers) = (config.grid_size().pow(2), config.num_hidden_layers);
    let (hidden, mlp, neck) = (config.hidden_size, config.mlp_dim(), config.output_channels);
    // Two layer norms: x and y; the gradients of y and of the residual, x and its gradient. GELU's sum and both
    // gradients.
    let layer = tokens * (2 * (2 + 4) * hidden + 3 * mlp);
    // The image as rows of patches; the sum with positions.
    let embedding = tokens * (2 * 3 * config.patch_size.pow(2) + 3 * hidden);
    // Two layer norms without residuals, the columns of 3 x 3 and their gradient, the change of layout and back.
    let end = tokens * neck * (2 * (2 + 3) + 2 * (9 + 1) + 2 * 2);
    // The loss: its input; that and the gradient.
    let loss = tokens * neck * 3;
    let typed = (layers * layer + embedding + end + loss) * dtype.size_in_bytes();
    // A cast reads f32.
    let cast = if dtype == DType::F32 { 0 } else { 4 + dtype.size_in_bytes() };
    let pixels = 3 * config.image_size.pow(2) * cast;
    // The norm reads gradients; AdamW reads them again, and reads and writes parameters and moments.
    let adapters = layers * 2 * 2 * RANK * hidden * (4 + 28);
    (typed + pixels + adapters) as f64 / f64::from(1 << 20)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// Tells the number of each of [`KINDS`] since now, and the bytes moved.
fn events() -> impl Fn() -> Vec<String> {
    let before = (KINDS.map(|(_, names)| counted(names)), counted(MOVED));
    move || {
        let events = KINDS.iter().zip(before.0).map(|((_, names), before)| counted(names) - before);
        let moved = mebibytes(counted(MOVED) - before.1);
        events.map(|count| count.to_string()).chain([moved]).collect()
    }
}

/// The fourth step of a trainer: the first replay of a graph that is there. The stand-in keeps all memory of a graph,
/// so its bytes in use say nothing; those that a graph moves are not counted.
fn replayed(
    encoder: &SamVisionEncoder,
    side: usize,
    device: &Device,
) -> Result<(Vec<String>, u64)> {
    let config = TrainerConfig { max_grad_norm: Some(1.0), ..TrainerConfig::new(1e-3) };
    let mut trainer = Trainer::new(encoder, config)?;
    let mut graphs = StepGraphs::new(|x: &Vec<Tensor>, mode| {
        encoder.forward(&x[0], mode)?.sqr()?.mean_all()?.to_dtype(DType::F32)
    });
    let pixels = Tensor::zeros((1, 3, side, side), DType::F32, device)?;
    let mut step = || trainer.step_by_graph(&mut graphs, |_| Ok(vec![pixels.clone()]));
    for _ in 0..3 {
        step()?;
    }
    let (events, before) = (events(), host_allocations::count());
    step()?;
    let on_host = host_allocations::count() - before;
    let mut events = events();
    events.pop();
    let counts = ["-"; 2].map(String::from).into_iter().chain(events).chain(["-".to_string()]);
    Ok((counts.collect(), on_host))
}

/// A training step, as a trainer makes it.
fn step(encoder: &SamVisionEncoder, pixels: &Tensor, optimizer: &mut AdamW) -> Result<()> {
    let (loss, gradients) = optimizer.backward(|| {
        let out = encoder.forward(pixels, Mode::Train { seed: 1 })?;
        out.sqr()?.mean_all()?.to_dtype(DType::F32)
    })?;
    optimizer.apply(&gradients, Some(&loss), Some(1.0))?;
    Ok(())
}

fn counted(names: &[&str]) -> u64 {
    names.iter().filter_map(|name| calls(name)).sum()
}

/// Bytes in use, and the most since the last call.
fn bytes() -> Result<[u64; 2]> {
    let mut peak = 0;
    // SAFETY: the function has this type, and writes one number.
    let now = unsafe {
        let bytes: unsafe extern "C" fn(*mut u64) -> u64 =
            stand_in("emulated_driver_bytes").context("no stand-in for the driver")?;
        bytes(&mut peak)
    };
    Ok([now, peak])
}
