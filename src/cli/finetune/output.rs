//! The output folder: what a run writes there, and that nobody's files are lost.

use super::options::Options;
use crate::files::create_dir;
use crate::{Error, Result};
use anyhow::bail;
use std::path::Path;

/// The adapter as PEFT has it.
pub const ADAPTER: &str = "adapter";
/// The adapter with the best evaluation.
pub const BEST: &str = "best";
/// Masks found without a prompt, before and after.
pub const AUTOMATIC: &str = "automatic";
/// How predicted IoUs follow the true ones.
pub const CALIBRATION: &str = "calibration.png";
/// The loss curve.
pub const LOSS: &str = "loss.png";
/// Pictures before and after.
pub const OVERLAYS: &str = "overlays";
/// Everything on one page.
pub const PAGE: &str = "report.html";
/// Contact sheet of the masks found without a prompt.
pub const SHEET: &str = "automatic.png";
/// Written last: a folder with a state and without it holds a run that is not finished.
pub const METRICS: &str = "metrics.json";
/// A row a step.
pub const TABLE: &str = "metrics.csv";
/// Event files.
pub const TENSORBOARD: &str = "tensorboard";
/// The state that a run goes on from, and the one before.
pub const STATE: &str = "state.safetensors";
const PREVIOUS: &str = "state.previous.safetensors";

/// A run may find these in its output folder and replace them.
const OUTPUTS: [&str; 13] = [
    ADAPTER,
    AUTOMATIC,
    BEST,
    CALIBRATION,
    LOSS,
    OVERLAYS,
    METRICS,
    PAGE,
    SHEET,
    TABLE,
    TENSORBOARD,
    STATE,
    PREVIOUS,
];
/// A new run must not find these: they would be taken for its own.
const LEFTOVERS: [&str; 5] = [BEST, TABLE, TENSORBOARD, STATE, PREVIOUS];

/// Refuses an output folder in which something would be lost, or nothing can be gone on with.
pub fn check(options: &Options) -> anyhow::Result<()> {
    let output = &options.output;
    let unfinished = [STATE, PREVIOUS].iter().any(|state| output.join(state).is_file());
    if options.resume {
        if !unfinished {
            bail!(
                "--resume: there is no {}; start the run without --resume",
                output.join(STATE).display()
            )
        }
        return Ok(());
    }
    if !output.exists() {
        return Ok(());
    }
    if !output.is_dir() {
        bail!("{}: is a file; expected a folder, or a name for a new one", output.display())
    }
    for entry in std::fs::read_dir(output).map_err(|e| Error::io(output, e))? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        // A kill in the middle of a writing leaves a temporary file.
        if !OUTPUTS.contains(&name.as_ref()) && !name.starts_with(".tmp") {
            bail!(
                "{}: holds {name}, which is no result of this program; choose another --output",
                output.display()
            )
        }
    }
    let finished = output.join(METRICS).exists() || output.join(ADAPTER).exists();
    if options.overwrite || !(finished || unfinished) {
        return Ok(());
    }
    if unfinished && !output.join(METRICS).exists() {
        bail!(
            "{}: holds a run that is not finished; go on with --resume, or replace it with --overwrite",
            output.display()
        )
    }
    bail!(
        "{}: holds a finished run; replace it with --overwrite, or choose another --output",
        output.display()
    )
}

/// Makes the output folder, and marks the run in it as not finished; a new run finds nothing of an old one.
pub fn begin(options: &Options) -> Result<()> {
    let output = &options.output;
    create_dir(output)?;
    if !options.resume {
        for name in LEFTOVERS {
            remove(&options.output.join(name))?;
        }
    }
    remove(&options.output.join(METRICS))
}

/// Removes a file or folder, if it is there.
fn remove(path: &Path) -> Result<()> {
    let removed =
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}
