//! A run's figures as CSV, a row a step: `step,loss,lr,grad_norm`, and after an evaluation the measures of
//! [`HeldOutScores`], which are empty else.
//!
//! Each row is on its way to the disk when its step is over. A continued run drops the rows of steps that it will make
//! again. In the end its file has the bytes of an uninterrupted one.

use super::{HeldOutScores, StepMetrics};
use crate::{files, Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The first columns.
const STEP: &str = "step,loss,lr,grad_norm";

/// An open table.
///
/// ```
/// use candle_sam_lora::train::{EventFile, HeldOutScores, MetricsCsv, ObjectScores, StepMetrics};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let folder = tempfile::tempdir()?;
/// let mut table = MetricsCsv::open(folder.path().join("metrics.csv"), 0)?;
/// let mut events = EventFile::create(folder.path(), 0)?; // for TensorBoard
/// let step = StepMetrics { step: 1, loss: 0.5, lr: 1e-3, grad_norm: 2.0 };
/// let scores = HeldOutScores::from(ObjectScores { iou: 0.75, ..Default::default() });
/// table.row(&step, Some(&scores))?;
/// events.scalars(step.step, &[("loss", step.loss)])?;
/// let text = std::fs::read_to_string(folder.path().join("metrics.csv"))?;
/// assert_eq!(text.lines().count(), 2); // names, and the row
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct MetricsCsv {
    file: File,
    path: PathBuf,
}

impl MetricsCsv {
    /// The table at `path` with the rows of the first `steps` steps, of those that are there.
    ///
    /// # Errors
    /// When a file is there that is no such table, or it cannot be written.
    pub fn open(path: impl AsRef<Path>, steps: u64) -> Result<Self> {
        let path = path.as_ref();
        let names: Vec<&str> = HeldOutScores::names().collect();
        let header = format!("{STEP},{}", names.join(","));
        let mut text = format!("{header}\n");
        if steps > 0 && path.exists() {
            let old = files::read_text(path)?;
            let mut lines = old.lines();
            if lines.next() != Some(header.as_str()) {
                return Err(Error::file(
                    path,
                    format!("is no table of metrics: expected {header}"),
                ));
            }
            // A kill may have cut the last row.
            let kept = lines.filter(|line| {
                let step = line.split(',').next().and_then(|step| step.parse::<u64>().ok());
                let columns = |line: &str| line.matches(',').count();
                step.is_some_and(|step| step <= steps) && columns(line) == columns(&header)
            });
            kept.for_each(|line| text.extend([line, "\n"]));
        }
        files::write_atomic(path, |file| file.write_all(text.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io(path, e))?;
        Ok(Self { file, path: path.to_path_buf() })
    }

    /// Adds the row of a step, with what an evaluation after it found.
    ///
    /// # Errors
    /// When the file cannot be written to.
    pub fn row(&mut self, step: &StepMetrics, scores: Option<&HeldOutScores>) -> Result<()> {
        let StepMetrics { step, loss, lr, grad_norm } = step;
        let scores = scores.map_or([None; HeldOutScores::COUNT], HeldOutScores::values);
        let scores = scores.map(|value| value.map_or_else(String::new, |value| value.to_string()));
        let row = format!("{step},{loss},{lr},{grad_norm},{}\n", scores.join(","));
        self.file.write_all(row.as_bytes()).map_err(|e| Error::io(&self.path, e))
    }
}
