//! The program's command lines, as a user has them: values in what they write, what they print, errors, exit codes.

#[path = "../common/mod.rs"]
mod common;
mod console;
mod convert;
mod encode;
mod everything;
mod masks;
mod params;
mod segment;
mod shards;

use anyhow::{ensure, Context, Result};
use candle_core::Device;
use candle_sam_lora::files::read_tensors;
use common::model::{folder, Tensors};
use std::path::{Path, PathBuf};
use std::process::Command;

/// How a command ended.
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs a command of the program in `folder`; the command line is split at spaces.
fn run(folder: &Path, command: &str, line: &str) -> Result<Ended> {
    let output = Command::new(env!("CARGO_BIN_EXE_candle-sam-lora"))
        .arg(command)
        .args(line.split_whitespace())
        .current_dir(folder)
        .output()?;
    let text = |bytes| String::from_utf8(bytes).context("not UTF-8");
    Ok(Ended { code: output.status.code(), out: text(output.stdout)?, err: text(output.stderr)? })
}

/// The output of a run that ends well.
fn succeed(folder: &Path, command: &str, line: &str) -> Result<String> {
    let Ended { code, out, err } = run(folder, command, line)?;
    ensure!(code == Some(0) && err.is_empty(), "{command} {line}: {code:?}, {err}");
    Ok(out)
}

/// A run must end with this exit code, print no more than what it loaded, and say all these words on stderr.
fn fail(folder: &Path, command: &str, line: &str, code: i32, words: &[&str]) -> Result<()> {
    let ended = run(folder, command, line)?;
    let said = words.iter().all(|word| ended.err.contains(word));
    ensure!(
        ended.code == Some(code)
            && ended.out.lines().all(|l| l.starts_with("model: ") || l.contains(": left alone, "))
            && said,
        "{command} {line}: expected {code} and {words:?}, got {:?}: {}",
        ended.code,
        ended.err
    );
    Ok(())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: PathBuf) -> Result<Tensors> {
    Ok(read_tensors(&path, &Device::Cpu)?)
}

/// A micrograph that the small SAM was not trained on, and the truth.
fn micrograph() -> (PathBuf, PathBuf) {
    let heldout = root().join("assets/photos/nuclei/heldout");
    let name = "nuclei_r6c0.png";
    (heldout.join("images").join(name), heldout.join("masks").join(name))
}
