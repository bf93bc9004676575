//! Many processes: the time of an exchange and of a step, by MPI.
//!
//! ```text
//! cargo bench --features mpi --bench distributed -- compare              N processes of one thread, one of N threads
//! cargo bench --features mpi --bench distributed -- --ranks 4 exchange   both ways to add gradients, by their bytes
//! cargo bench --features mpi --bench distributed -- --ranks 4 step ..    a training step; --help tells its options
//! ```
//! Prints comma-separated rows, which `scripts/scale_model.py` reads. Starts mpirun on this host. On others start the
//! program that `cargo bench --no-run` names by `mpirun` or `srun`, with the same arguments.

#[path = "../tests/distributed/network.rs"]
mod network;
mod support;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::nn::{
    randomize, set_trainable, trainable_variables, Linear, Mode, ModuleTree,
};
use candle_sam_lora::sam::SamVisionEncoder;
use candle_sam_lora::train::{AdamWConfig, Communicator, Mpi, StepRng, Trainer, TrainerConfig};
use clap::{Args, Parser, Subcommand};
use network::Network;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::models::{self, Adapters};
use support::normal;
use support::vit::VIT_B;

const PATIENCE: Duration = Duration::from_secs(300);
const EXCHANGE: &str = "ranks,bytes,whole_s,chunks_s";
const STEP: &str = "ranks,threads,model,bytes,parts,latency_us,gbit,compute_ms,spread,steps,\
                    step_s,compute_s,waiting_s,exchange_s,update_s,parts_per_s";

#[derive(Parser)]
struct Options {
    /// Processes, if this one is not one of a job
    #[arg(long, default_value_t = 2)]
    ranks: u64,
    /// Threads of each
    #[arg(long, default_value_t = 1)]
    threads: u64,
    #[command(subcommand)]
    work: Work,
    /// Given by cargo to every benchmark
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Work {
    /// Both ways to add gradients, by their bytes
    Exchange,
    /// A training step
    Step(Step),
    /// A step by N processes of one thread, and by one process of N threads
    Compare(Step),
}

#[derive(Args, Clone)]
struct Step {
    /// Side of the image in patches of 16 pixels, for ViT-B's encoder with LoRA of rank 16; 0 for a model of `bytes`
    #[arg(long, default_value_t = 32)]
    grid: usize,
    /// Bytes of gradients of the model without a grid
    #[arg(long, default_value_t = 2_359_296)]
    bytes: usize,
    /// Parts of a step, of all processes together [default: one each]
    #[arg(long)]
    parts: Option<u64>,
    /// Steps after the first
    #[arg(long, default_value_t = 3)]
    steps: u64,
    /// Sleep of each part
    #[arg(long, default_value_t = 0.0)]
    compute_ms: f64,
    /// Standard deviation of that sleep, over its mean
    #[arg(long, default_value_t = 0.0)]
    spread: f64,
    /// Latency that each exchange has on top
    #[arg(long, default_value_t = 0)]
    latency_us: u64,
    /// Bandwidth of a process [default: that of the machine]
    #[arg(long, default_value_t = f64::INFINITY)]
    gbit: f64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let in_job = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"];
    if let Work::Compare(step) = &options.work {
        return compare(options.ranks, step);
    }
    if !in_job.into_iter().any(|name| std::env::var_os(name).is_some()) {
        let arguments: Vec<_> = std::env::args().skip(1).collect();
        let status = mpirun(options.ranks, options.threads)?.args(arguments).status()?;
        ensure!(status.success(), "mpirun: {status}");
        return Ok(());
    }
    let processes = Arc::new(Mpi::initialize(PATIENCE)?);
    match &options.work {
        Work::Step(options) => step(options, processes),
        _ => exchange(&*processes),
    }
}

/// mpirun of this program, without arguments.
fn mpirun(ranks: u64, threads: u64) -> Result<Command> {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()])
        .arg(std::env::current_exe()?)
        .env("RAYON_NUM_THREADS", threads.to_string())
        .env("CANDLE_NUM_THREADS", "1");
    Ok(command)
}

/// Median time of `work`, of `count` times, with all processes at its start.
fn median(
    count: usize,
    processes: &dyn Communicator,
    work: impl Fn() -> candle_sam_lora::Result<()>,
) -> Result<f64> {
    let mut times = vec![];
    for _ in 0..count {
        processes.all_gather(&[])?;
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn exchange(processes: &dyn Communicator) -> Result<()> {
    let (rank, size) = (processes.rank(), processes.size());
    if rank == 0 {
        println!("{EXCHANGE}");
    }
    for bytes in (4..=26).step_by(2).map(|power| 1usize << power) {
        let own = vec![1u8; bytes];
        let pieces: Vec<&[u8]> = vec![&own[..bytes / size]; size];
        let loss = [0u8; 12];
        let count = ((1 << 27) / bytes).clamp(5, 300);
        let whole = median(count, processes, || processes.all_gather(&own).map(drop))?;
        let chunks = median(count, processes, || {
            processes.all_gather(&loss)?;
            processes.all_to_all(&pieces)?;
            processes.all_gather(pieces[0]).map(drop)
        })?;
        if rank == 0 {
            println!("{size},{bytes},{whole:.3e},{chunks:.3e}");
        }
    }
    Ok(())
}

/// A model and the loss of a part.
enum Model {
    Encoder(Box<SamVisionEncoder>, Tensor),
    Bytes(Linear),
}

impl Model {
    fn new(options: &Step) -> Result<Self> {
        let (grid, device) = (options.grid, Device::Cpu);
        if grid > 0 {
            let adapters = Adapters { rank: 16, dropout: 0.1 };
            let mut encoder = models::encoder(&VIT_B.config(grid), adapters, DType::F32, &device)?;
            // The same weights on every rank.
            randomize(&mut encoder, 0, 0.02)?;
            let pixels = normal(&[1, 3, 16 * grid, 16 * grid], DType::F32, &device)?;
            return Ok(Self::Encoder(Box::new(encoder), pixels));
        }
        const WIDTH: usize = 1023; // and a bias
        let rows = (options.bytes / 4 / (WIDTH + 1)).max(1);
        let mut linear = Linear::load(WIDTH, rows, VarBuilder::zeros(DType::F32, &device))?;
        randomize(&mut linear, 0, 0.02)?;
        set_trainable(&mut linear, |_| true)?;
        Ok(Self::Bytes(linear))
    }

    fn loss(&self, mode: Mode) -> candle_core::Result<Tensor> {
        match self {
            Self::Encoder(encoder, pixels) => encoder.forward(pixels, mode)?.sqr()?.mean_all(),
            Self::Bytes(linear) => {
                let bias = linear.bias.iter().map(|bias| bias.sqr()?.sum_all());
                bias.fold(linear.weight.sqr()?.sum_all(), |sum, term| sum? + term?)
            }
        }
    }
}

/// Sleep of a part.
fn sleep_of(options: &Step, part: u64) -> Duration {
    let mut draws = StepRng::new(0, "sleep", part);
    let radius = (-2.0 * (1.0 - draws.uniform()).ln()).sqrt();
    let normal = radius * (std::f64::consts::TAU * draws.uniform()).cos();
    Duration::from_secs_f64((options.compute_ms * (1.0 + options.spread * normal)).max(0.0) / 1e3)
}

fn step(options: &Step, processes: Arc<dyn Communicator>) -> Result<()> {
    let (rank, size) = (processes.rank(), processes.size() as u64);
    let model = Model::new(options)?;
    let tree: &dyn ModuleTree = match &model {
        Model::Encoder(encoder, _) => &**encoder,
        Model::Bytes(linear) => linear,
    };
    let bytes: usize = trainable_variables(tree)?.iter().map(|(_, var)| 4 * var.elem_count()).sum();
    let parts = options.parts.unwrap_or(size);
    ensure!(parts.is_multiple_of(size), "{parts} parts for {size} processes");
    let config = TrainerConfig { accumulation: parts / size, ..AdamWConfig::default().into() };
    let latency = Duration::from_micros(options.latency_us);
    let network = Network::new(processes, latency, options.gbit * 1e9 / 8.0);
    let mut trainer = Trainer::new(tree, config)?.with_communicator(Arc::new(network))?;
    let mut start = Instant::now();
    for step in 0..=options.steps {
        if step == 1 {
            start = Instant::now();
        }
        trainer.step(|part, mode| {
            std::thread::sleep(sleep_of(options, part));
            model.loss(mode)
        })?;
    }
    let wall = start.elapsed().as_secs_f64() / options.steps as f64;
    if rank == 0 {
        let times = trainer.times();
        eprintln!("{times}");
        println!("{STEP}");
        let name = if options.grid > 0 { "vit_b" } else { "bytes" };
        let Step { latency_us, gbit, compute_ms, spread, steps, .. } = options;
        let threads = rayon::current_num_threads();
        print!("{size},{threads},{name},{bytes},{parts},{latency_us},{gbit},{compute_ms},{spread},{steps},{wall:.6}");
        for time in [times.compute, times.waiting, times.exchange, times.update] {
            print!(",{:.6}", time.as_secs_f64() / times.steps as f64);
        }
        println!(",{:.4}", parts as f64 / wall);
    }
    Ok(())
}

/// Prints the rows of both, and how many parts a second processes make over those that threads make. Each runs twice,
/// in an order in which a machine that becomes slower favours neither.
fn compare(count: u64, options: &Step) -> Result<()> {
    let parts = options.parts.unwrap_or(count);
    let mut seconds = [0.0; 2];
    for which in [0, 1, 1, 0] {
        let (ranks, threads) = [(1, count), (count, 1)][which];
        let given: Vec<_> =
            std::env::args().skip(1).map(|word| word.replace("compare", "step")).collect();
        let mut command = mpirun(ranks, threads)?;
        command.args(given).args(["--parts", &parts.to_string()]).stderr(Stdio::inherit());
        let output = command.output().context("mpirun")?;
        ensure!(output.status.success(), "mpirun: {}", output.status);
        let said = String::from_utf8(output.stdout)?;
        print!("{said}");
        let rate = said.trim().rsplit(',').next().context("no row")?;
        seconds[which] += 1.0 / rate.parse::<f64>()?;
    }
    let [threads, processes] = seconds;
    println!(
        "{count} processes of one thread over one of {count} threads: {:.3}",
        threads / processes
    );
    Ok(())
}
