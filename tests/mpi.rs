//! Processes that mpirun starts: the bits of one process, and failures that end all of them with one message.
//!
//! The program is its own worker: mpirun starts it with a job in the environment.

mod common;
#[path = "distributed/division.rs"]
mod division;
#[path = "distributed/finetune.rs"]
mod finetune;
#[path = "distributed/hosts.rs"]
mod hosts;
#[path = "distributed/run.rs"]
mod run;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_sam_lora::train::{Alone, Communicator, Mpi};
use libtest_mimic::{Arguments, Failed, Trial};
use run::{adapted, alone, bits, loss, trainer, KINDS};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

const JOB: &str = "CANDLE_SAM_LORA_JOB";
const STEPS: u64 = 3;
/// How long a worker waits for the others.
const PATIENCE: Duration = Duration::from_secs(4);
/// A failure ends all within it. The patience, and what mpirun takes to start and to clean up.
const SOON: Duration = Duration::from_secs(20);

/// A fault of the last rank, in the second step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Fault {
    None,
    Killed,
    NotANumber,
    Asleep,
    Stopped,
    OtherWeights,
    NoDisk,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    kind: String,
    steps: u64,
    folder: PathBuf,
    resume: bool,
    fault: Fault,
}

fn main() -> ExitCode {
    let Ok(job) = std::env::var(JOB) else { return tests() };
    match serde_json::from_str(&job).map_err(Into::into).and_then(|job| work(&job)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Work of each process of a job.
fn work(job: &Job) -> Result<()> {
    let communicator = Arc::new(Mpi::initialize(PATIENCE)?);
    let (rank, last) = (communicator.rank(), communicator.rank() + 1 == communicator.size());
    let sam = adapted(&job.kind)?;
    if job.fault == Fault::OtherWeights && last {
        let (_, var) = &candle_sam_lora::nn::trainable_variables(&sam)?[0];
        var.set(&(var.as_tensor() + 1.0)?)?;
    }
    let mut run = trainer(&sam, communicator.clone())?;
    let state = job.folder.join("state.safetensors");
    if job.resume {
        run.resume(&state)?;
    }
    while run.steps() < job.steps {
        let failing = last && run.steps() == 1;
        run.step(|part, mode| {
            match job.fault {
                Fault::Killed if failing => std::process::abort(),
                Fault::NotANumber if failing => return Tensor::new(f32::NAN, &Device::Cpu),
                Fault::Asleep if failing => std::thread::sleep(Duration::from_secs(600)),
                Fault::Stopped if failing => {
                    let own = std::process::id().to_string();
                    Command::new("kill").args(["-STOP", &own]).status()?;
                }
                _ => (),
            }
            loss(&sam, part, mode)
        })?;
        match job.fault {
            Fault::NoDisk if run.steps() == 2 => run.save(job.folder.join("no folder/state"))?,
            _ => run.save(&state)?,
        }
    }
    std::fs::write(
        job.folder.join(format!("bits.{rank}")),
        bytemuck::cast_slice(&bits(&run, &sam)?),
    )?;
    Ok(())
}

/// mpirun with the threads and messages of a test.
fn mpirun() -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"])
        .env("RAYON_NUM_THREADS", "1")
        .env_remove("RUST_BACKTRACE");
    command
}

/// Output of mpirun, and how long it took.
fn ended(command: &mut Command) -> Result<(Output, Duration)> {
    let start = Instant::now();
    let output = command
        .output()
        .context("mpirun: install an MPI library, on Debian libopenmpi-dev and openmpi-bin")?;
    Ok((output, start.elapsed()))
}

/// Starts `size` processes of a job.
fn workers(size: usize, job: &Job) -> Result<(Output, Duration)> {
    ended(
        mpirun()
            .args(["-n", &size.to_string()])
            .arg(std::env::current_exe()?)
            .env(JOB, serde_json::to_string(job)?),
    )
}

fn job(kind: &str, folder: &Path) -> Job {
    let (kind, folder) = (kind.to_string(), folder.to_path_buf());
    Job { kind, steps: STEPS, folder, resume: false, fault: Fault::None }
}

fn succeeded(size: usize, job: &Job) -> Result<()> {
    let (output, _) = workers(size, job)?;
    ensure!(output.status.success(), "{size} ranks: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn ranks_have_the_bits_of_one(kind: &str) -> Result<()> {
    let expected = alone(kind, STEPS)?;
    for size in 1..=4 {
        let folder = tempfile::tempdir()?;
        succeeded(size, &job(kind, folder.path()))?;
        for rank in 0..size {
            let found = std::fs::read(folder.path().join(format!("bits.{rank}")))?;
            ensure!(found == bytemuck::cast_slice::<u32, u8>(&expected), "rank {rank} of {size}");
        }
    }
    Ok(())
}

fn a_run_goes_on_with_other_ranks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let first = job("lora", folder.path());
    for (size, steps) in [(2, 1), (4, 2), (1, STEPS)] {
        succeeded(size, &Job { steps, resume: steps > 1, ..first.clone() })?;
    }
    let found = std::fs::read(folder.path().join("bits.0"))?;
    ensure!(found == bytemuck::cast_slice::<u32, u8>(&alone("lora", STEPS)?), "other bits");
    Ok(())
}

/// All processes of three end soon, `told` is said, and the state of the last good step is whole.
fn ends_all(fault: Fault, told: &str, saved: Option<u64>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let job = Job { fault, ..job("lora", folder.path()) };
    let (output, took) = workers(3, &job)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{fault:?} went unnoticed");
    ensure!(said.contains(told), "{fault:?}: {said}");
    ensure!(said.matches("which did not come").count() <= 1, "told more than once: {said}");
    ensure!(took < SOON, "{fault:?} took {took:?}");
    if let Some(steps) = saved {
        let sam = adapted("lora")?;
        let mut run = trainer(&sam, Arc::new(Alone))?;
        ensure!(run.resume(folder.path().join("state.safetensors"))?.is_none(), "a damaged state");
        ensure!(run.steps() == steps, "{fault:?}: a state after {} steps", run.steps());
    }
    Ok(())
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_candle-sam-lora");

/// A folder's files with their bytes, by their paths in `root`.
fn files(root: &Path, folder: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(root, &path)?),
            false => drop(found.insert(path.strip_prefix(root)?.into(), std::fs::read(&path)?)),
        }
    }
    Ok(found)
}

fn tests() -> ExitCode {
    let test = |name: String, run: Box<dyn FnOnce() -> Result<()> + Send>| {
        Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
    };
    let bits = KINDS.map(|kind| {
        let name = format!("ranks_have_the_bits_of_one::{kind}");
        test(name, Box::new(move || ranks_have_the_bits_of_one(kind)))
    });
    let faults = [
        (Fault::Killed, "signal", Some(1)),
        (Fault::NotANumber, "rank 2: train: step 2: the loss is NaN", Some(1)),
        (Fault::Asleep, "s for rank 2, which did not come; the job ends", Some(1)),
        (Fault::Stopped, "s for rank 2, which did not come; the job ends", Some(1)),
        (Fault::OtherWeights, "rank 2: its run is not that of rank 0:\n  parameters: ", None),
        (Fault::NoDisk, "rank 0: ", Some(1)),
    ];
    let faults = faults.map(|(fault, told, saved)| {
        test(format!("ends_all::{fault:?}"), Box::new(move || ends_all(fault, told, saved)))
    });
    let differing = [
        ("--lr 0.5", "error: rank 1: its run is not that of rank 0:\n  lr: 0.5"),
        (
            "--min-area 60",
            "error: rank 1: its run is not that of rank 0:\n  data.reading.min_area: 60, on rank 0 20",
        ),
        ("--images nowhere --masks nowhere", "error: rank 1: nowhere"),
    ];
    let differing = differing.map(|(other, told)| {
        let name = format!("finetune_tells_what_differs::{}", other.replace(' ', "_"));
        test(name, Box::new(move || finetune::finetune_tells_what_differs(other, told)))
    });
    let divided = division::COMMANDS.map(|line| {
        let name = format!("files_and_output_are_those_of_one::{}", line.replace(' ', "_"));
        test(name, Box::new(move || division::files_and_output_are_those_of_one(line)))
    });
    let other = |name: &str, run: fn() -> Result<()>| test(name.to_string(), Box::new(run));
    let others = [
        other("a_run_goes_on_with_other_ranks", a_run_goes_on_with_other_ranks),
        other(
            "finetune_writes_the_files_of_one_process",
            finetune::finetune_writes_the_files_of_one_process,
        ),
        other("finetune_reads_shards_and_lists", finetune::finetune_reads_shards_and_lists),
        other(
            "the_first_ranks_folder_is_enough_to_resume",
            finetune::the_first_ranks_folder_is_enough_to_resume,
        ),
        other(
            "another_librarys_launcher_is_refused",
            finetune::another_librarys_launcher_is_refused,
        ),
        other("a_slow_lossy_cable_changes_no_bits", hosts::a_slow_lossy_cable_changes_no_bits),
        other("a_cable_cut_in_mid_step_ends_all", hosts::a_cable_cut_in_mid_step_ends_all),
        other("a_killed_job_is_resumed_by_others", division::a_killed_job_is_resumed_by_others),
        other("an_unreadable_image_is_told_once", division::an_unreadable_image_is_told_once),
        other("a_process_that_hangs_ends_the_job", division::a_process_that_hangs_ends_the_job),
        other("processes_that_differ_do_not_begin", division::processes_that_differ_do_not_begin),
    ];
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trials = bits.into_iter().chain(faults).chain(differing).chain(divided).chain(others);
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
