//! Trials of each fault, and the state that must hold after it.

use crate::full_disk::full_disk;
use crate::run::{self, ADAPTER, COMMAND, STARVED, STATE};
use crate::trace::{run as traced, End, Fault};
use anyhow::{ensure, Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitCode};

pub fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The tracer waits for any child of its process.
    arguments.test_threads = Some(1);
    // Where the system lets no process be traced there is nothing to run, which is said.
    let forbidden = traced(&mut Command::new("true"), None).err();
    let forbidden =
        forbidden.filter(|e| matches!(e.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)));
    if let Some(error) = &forbidden {
        println!("no faults: ptrace: {error}");
    }
    let trial = |name: &str, test: fn() -> Result<()>| {
        Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:#}"))))
            .with_ignored_flag(forbidden.is_some())
    };
    let trials = vec![
        trial("killed_at_every_point", || every_point(2, &[Fault::Kill])),
        trial("disk_full_at_every_point", || every_point(2, &[Fault::Refuse(libc::ENOSPC)])),
        trial("every_refusal_at_every_point", || {
            use libc::{EACCES, EDQUOT, EIO, ENOMEM, ENOSPC, EROFS};
            let refusals = [EACCES, EDQUOT, EIO, ENOMEM, ENOSPC, EROFS].map(Fault::Refuse);
            every_point(4, &[&[Fault::Kill], &refusals[..]].concat())
        })
        .with_ignored_flag(true),
        trial("killed_again_and_again", killed_again_and_again),
        trial("newest_state_damaged_and_then_killed", newest_state_damaged_and_then_killed),
        trial("out_of_memory", out_of_memory),
        trial("full_disk", full_disk),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A run in `folder`, its error messages going to `log`.
pub fn command(folder: &Path, steps: &str, log: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([COMMAND.as_ref(), folder.as_os_str(), steps.as_ref()]);
    command.env("RAYON_NUM_THREADS", "1").env("CANDLE_NUM_THREADS", "1");
    command.stderr(std::fs::File::create(log)?);
    Ok(command)
}

/// Files of an undisturbed run: every adapter on its way, and the last state.
pub struct Undisturbed {
    points: usize,
    pub adapters: BTreeSet<Option<Vec<u8>>>,
    state: Vec<u8>,
    last: Option<Vec<u8>>,
}

pub fn undisturbed(steps: u64) -> Result<Undisturbed> {
    let scratch = tempfile::tempdir()?;
    let (folder, log) = (scratch.path().join("run"), scratch.path().join("log"));
    std::fs::create_dir(&folder)?;
    let mut adapters = BTreeSet::from([None]);
    for step in 1..=steps {
        let end = traced(&mut command(&folder, &step.to_string(), &log)?, None)?.1;
        ensure!(end == End::Code(0), "{}", std::fs::read_to_string(&log)?);
        adapters.insert(run::adapter(&folder.join(ADAPTER))?);
    }
    ensure!(adapters.len() as u64 == steps + 1, "a step left the adapter as it was");
    let whole = scratch.path().join("whole");
    std::fs::create_dir(&whole)?;
    let (points, end) = traced(&mut command(&whole, &steps.to_string(), &log)?, None)?;
    ensure!(end == End::Code(0), "{}", std::fs::read_to_string(&log)?);
    // A run that was stopped after each step and one that never stopped.
    let state = std::fs::read(whole.join(STATE))?;
    ensure!(state == std::fs::read(folder.join(STATE))?, "a continued run has other bits");
    let last = run::adapter(&whole.join(ADAPTER))?;
    Ok(Undisturbed { points, adapters, state, last })
}

impl Undisturbed {
    /// Checks that the files on disk are whole, and that a run that goes on from them ends as this one did.
    pub fn check(&self, folder: &Path, steps: u64) -> Result<()> {
        let adapter = run::adapter(&folder.join(ADAPTER)).context("the adapter is damaged")?;
        ensure!(self.adapters.contains(&adapter), "an adapter that never was");
        let log = folder.with_extension("log");
        let end = traced(&mut command(folder, &steps.to_string(), &log)?, None)?.1;
        ensure!(end == End::Code(0), "does not go on: {}", std::fs::read_to_string(&log)?);
        ensure!(std::fs::read(folder.join(STATE))? == self.state, "goes on to another state");
        ensure!(run::adapter(&folder.join(ADAPTER))? == self.last, "goes on to another adapter");
        Ok(())
    }
}

fn every_point(steps: u64, faults: &[Fault]) -> Result<()> {
    let undisturbed = undisturbed(steps)?;
    ensure!(undisturbed.points >= 10 * steps as usize, "{} points", undisturbed.points);
    for fault in faults {
        for point in 1..=undisturbed.points {
            disturbed(&undisturbed, steps, point, *fault)
                .with_context(|| format!("{fault:?} at point {point}"))?;
        }
        println!("{fault:?} at each of {} points of {steps} steps", undisturbed.points);
    }
    Ok(())
}

fn disturbed(undisturbed: &Undisturbed, steps: u64, point: usize, fault: Fault) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (folder, log) = (scratch.path().join("run"), scratch.path().join("log"));
    std::fs::create_dir(&folder)?;
    let mut disturbed = command(&folder, &steps.to_string(), &log)?;
    let (_, end) = traced(&mut disturbed, Some((point, fault)))?;
    match fault {
        Fault::Kill => ensure!(end == End::Signal(libc::SIGKILL), "ended with {end:?}"),
        Fault::Refuse(_) if end == End::Code(0) => {
            // Only what nobody misses: a temporary file that stays.
            ensure!(std::fs::read(folder.join(STATE))? == undisturbed.state, "lost a state");
            let adapter = run::adapter(&folder.join(ADAPTER))?;
            ensure!(adapter == undisturbed.last, "lost an adapter");
        }
        Fault::Refuse(_) => {
            let message = std::fs::read_to_string(&log)?;
            let named = message.contains(&folder.display().to_string());
            ensure!(end == End::Code(1) && named, "ended with {end:?} and {message:?}");
        }
    }
    undisturbed.check(&folder, steps)
}

/// Killed at the first point, then at the second of what is left, and so on, until it ends by itself.
fn killed_again_and_again() -> Result<()> {
    let undisturbed = undisturbed(3)?;
    let scratch = tempfile::tempdir()?;
    let (folder, log) = (scratch.path().join("run"), scratch.path().join("log"));
    std::fs::create_dir(&folder)?;
    let mut point = 1;
    while traced(&mut command(&folder, "3", &log)?, Some((point, Fault::Kill)))?.1 != End::Code(0) {
        run::adapter(&folder.join(ADAPTER)).with_context(|| format!("after {point} kills"))?;
        point += 1;
    }
    ensure!(point > 5, "ended after {point} kills");
    undisturbed.check(&folder, 3)
}

/// The run goes on from the state before a damaged one, and may then be killed anywhere as any other.
fn newest_state_damaged_and_then_killed() -> Result<()> {
    let undisturbed = undisturbed(3)?;
    let mut point = 1;
    loop {
        let scratch = tempfile::tempdir()?;
        let (folder, log) = (scratch.path().join("run"), scratch.path().join("log"));
        std::fs::create_dir(&folder)?;
        traced(&mut command(&folder, "2", &log)?, None)?;
        let mut state = std::fs::read(folder.join(STATE))?;
        let last = state.len() - 1;
        state[last] ^= 1;
        std::fs::write(folder.join(STATE), state)?;
        let (points, end) = traced(&mut command(&folder, "3", &log)?, Some((point, Fault::Kill)))?;
        undisturbed.check(&folder, 3).with_context(|| format!("killed at point {point}"))?;
        if end == End::Code(0) {
            ensure!(points > 10, "{points} points");
            return Ok(());
        }
        point += 1;
    }
}

/// An allocation that fails ends the process with a message; what was saved before is whole.
fn out_of_memory() -> Result<()> {
    let undisturbed = undisturbed(2)?;
    let scratch = tempfile::tempdir()?;
    let (folder, log) = (scratch.path().join("run"), scratch.path().join("log"));
    std::fs::create_dir(&folder)?;
    let (_, end) = traced(&mut command(&folder, STARVED, &log)?, None)?;
    let message = std::fs::read_to_string(&log)?;
    ensure!(end == End::Signal(libc::SIGABRT), "ended with {end:?} and {message:?}");
    ensure!(message.contains("memory allocation of"), "{message:?}");
    undisturbed.check(&folder, 2)
}
