//! A disk that is really full: a file system of one megabyte, filled up to the last pages. It lies in the memory of a
//! mount namespace of its own. Where the system allows no such namespace there is nothing to run, which is said.

use crate::run::{self, ADAPTER};
use crate::trials::{command, undisturbed};
use anyhow::{ensure, Context, Result};
use std::path::Path;
use std::process::{Command, ExitCode};

/// The first argument of a process that has such a file system at the path that follows.
pub const COMMAND: &str = "--full-disk";

const PAGE: usize = 4096;
const PAGES: usize = 256;
const STEPS: u64 = 3;

/// Runs `script` in a mount namespace whose user is root there, "$1" being a file system of its own.
fn in_namespace(script: &str, disk: &Path) -> Result<std::process::Output> {
    let mount = format!("mount -t tmpfs -o size={} none \"$1\" && {script}", PAGES * PAGE);
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &mount]);
    Ok(command.arg(std::env::current_exe()?).arg(disk).output()?)
}

/// The trial, run by a process in a namespace.
pub fn full_disk() -> Result<()> {
    let disk = tempfile::tempdir()?;
    match in_namespace("true", disk.path()) {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            println!("no full disk: {}", String::from_utf8_lossy(&output.stderr).trim());
            return Ok(());
        }
        Err(error) => {
            println!("no full disk: unshare: {error}");
            return Ok(());
        }
    }
    let output = in_namespace(&format!("exec \"$0\" {COMMAND} \"$1\""), disk.path())?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// In the namespace.
pub fn main(disk: &Path) -> ExitCode {
    match every_number_of_pages(disk) {
        Ok(full) => {
            println!("a run stopped by a full disk at each of {full} numbers of free pages");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One page is left free, then two, until the run has all it needs: how many were too few.
fn every_number_of_pages(disk: &Path) -> Result<usize> {
    let undisturbed = undisturbed(STEPS)?;
    let logs = tempfile::tempdir()?;
    for free in 0..PAGES {
        let folder = disk.join(format!("run{free}"));
        std::fs::create_dir(&folder)?;
        let filler = disk.join("filler");
        std::fs::write(&filler, vec![1; (PAGES - free) * PAGE])
            .with_context(|| format!("{free} pages of {PAGES} to be left free"))?;
        let log = logs.path().join("log");
        let status = command(&folder, &STEPS.to_string(), &log)?.status()?;
        let message = std::fs::read_to_string(&log)?;
        if !status.success() {
            let told = message.contains(&folder.display().to_string())
                && message.contains("No space left on device");
            ensure!(status.code() == Some(1) && told, "ended with {status}: {message}");
        }
        let adapter = run::adapter(&folder.join(ADAPTER)).context("the adapter is damaged")?;
        ensure!(undisturbed.adapters.contains(&adapter), "an adapter that never was");
        std::fs::remove_file(&filler)?;
        undisturbed.check(&folder, STEPS).with_context(|| format!("{free} free pages"))?;
        std::fs::remove_dir_all(&folder)?;
        if status.success() {
            ensure!(free > 4, "{free} pages are enough");
            return Ok(free);
        }
    }
    anyhow::bail!("{PAGES} pages are not enough")
}
