//! Two hosts, which are network namespaces joined by a cable that delays and loses packets: `scripts/mpi_two_hosts.py`.

use crate::run::{adapted, alone, trainer};
use crate::{job, Job, JOB, SOON, STEPS};
use anyhow::{ensure, Context, Result};
use candle_sam_lora::train::Alone;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/mpi_two_hosts.py");
/// Exit status of the script where network namespaces or TUN devices are forbidden.
const FORBIDDEN: i32 = 77;

/// Does a job by one process on each host. Returns the script's output and its time, or nothing where hosts are
/// forbidden.
fn on_two_hosts(cable: &[&str], job: &Job) -> Result<Option<(Output, Duration)>> {
    let start = Instant::now();
    let output = Command::new("python3")
        .arg(SCRIPT)
        .args(cable)
        .arg("--")
        .arg(std::env::current_exe()?)
        .env(JOB, serde_json::to_string(job)?)
        .env("RAYON_NUM_THREADS", "1")
        .env_remove("RUST_BACKTRACE")
        .output()
        .context("python3")?;
    if output.status.code() == Some(FORBIDDEN) {
        println!("skipped: {}", String::from_utf8_lossy(&output.stderr).trim());
        return Ok(None);
    }
    Ok(Some((output, start.elapsed())))
}

pub fn a_slow_lossy_cable_changes_no_bits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cable = ["--delay", "20", "--loss", "0.01", "--seed", "3"];
    let Some((output, _)) = on_two_hosts(&cable, &job("lora", folder.path()))? else {
        return Ok(());
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains("packets were lost") && !said.contains(" 0 of "), "{said}");
    let expected = alone("lora", STEPS)?;
    for rank in 0..2 {
        let found = std::fs::read(folder.path().join(format!("bits.{rank}")))?;
        ensure!(found == bytemuck::cast_slice::<u32, u8>(&expected), "rank {rank}: other bits");
    }
    Ok(())
}

pub fn a_cable_cut_in_mid_step_ends_all() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let state = folder.path().join("state.safetensors");
    let second = folder.path().join("state.previous.safetensors").display().to_string();
    let endless = Job { steps: u64::MAX, ..job("lora", folder.path()) };
    let cable = ["--delay", "20", "--loss", "0.01", "--seed", "3", "--cut-when", &second];
    let Some((output, took)) = on_two_hosts(&cable, &endless)? else { return Ok(()) };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && took < SOON, "{took:?}: {said}");
    ensure!(said.contains("s after the cut"), "{said}");
    // The other host says the same, and nobody hears it.
    ensure!(said.matches("s for rank 1, which did not come; the job ends").count() == 1, "{said}");
    ensure!(said.matches("error: ").count() == 1, "{said}");
    let sam = adapted("lora")?;
    let mut run = trainer(&sam, Arc::new(Alone))?;
    ensure!(run.resume(&state)?.is_none() && run.steps() > 0, "a damaged state");
    Ok(())
}
