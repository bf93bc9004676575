//! The state of a run, in one safetensors file that is replaced as a whole.
//!
//! ```text
//! tensors     what the optimizer gives (parameters and moments), `losses` [steps],
//!             `evaluations` [evaluations, 11] in f64: step and scores; NaN of masks that were not made
//! metadata    "state": "<checksum> <JSON of step, seed, settings>"
//! ```
//! A run killed at any instant leaves a complete file. The state before is kept beside it, in
//! `<stem>.previous.<ending>`, and is what a run goes on from if the newest one is damaged. The checksum is that of
//! `files/sealed.rs`. `settings` is whatever must not change between a run and its continuation: hyperparameters, the
//! model's and the data's listing.

use super::{HeldOutScores, StepScores};
use crate::files::{self, Seal, TensorFile};
use crate::{Error, Result};
use candle_core::{bail, DType, Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

const SEAL: Seal = Seal { key: "state", what: "a training state" };
const LOSSES: &str = "losses";
const EVALUATIONS: &str = "evaluations";

/// A run after some steps.
///
/// [Example](crate::train::Trainer)
#[derive(Clone, Debug)]
pub struct TrainingState {
    /// Steps made.
    pub step: u64,
    /// Seed of the run.
    pub seed: u64,
    /// Settings that a continuation must have equal, by name.
    pub settings: Map<String, Value>,
    /// The loss of each step.
    pub losses: Vec<f32>,
    /// Scores of the evaluations on the way.
    pub evaluations: Vec<StepScores>,
    /// Parameters and optimizer state, by name.
    pub tensors: BTreeMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    step: u64,
    seed: u64,
    settings: Map<String, Value>,
}

impl TrainingState {
    /// Writes the state, atomically; the one that was there becomes the [`previous_state_path`] one.
    /// Writers of one file take turns.
    ///
    /// # Errors
    /// When the file cannot be written; the old one remains then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (header, tensors) = self.contents()?;
        let staged = SEAL.stage(path, &header, &tensors)?;
        let _alone = files::locked(files::parent(path), File::lock);
        if path.is_file() {
            std::fs::rename(path, previous_state_path(path)).map_err(|e| Error::io(path, e))?;
        }
        staged.commit()
    }

    /// Reads a state.
    ///
    /// # Errors
    /// When the file cannot be read, is truncated or damaged, or is no training state.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        Self::read(&TensorFile::open(path)?, device)
    }

    /// Reads the state in a file whose header has been looked at.
    pub(super) fn read(file: &TensorFile, device: &Device) -> Result<Self> {
        let (header, tensors) = SEAL.read(file, device)?;
        Self::of_contents(&header, tensors).map_err(|e| SEAL.invalid(file, e))
    }

    /// The state as one process of a run gives it to another.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let (header, tensors) = self.contents()?;
        let metadata = HashMap::from([(SEAL.key.to_string(), header)]);
        safetensors::serialize(&tensors, Some(metadata)).map_err(|e| Error::config(e.to_string()))
    }

    /// The state in the bytes of [`to_bytes`](Self::to_bytes).
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let read = || -> candle_core::Result<Self> {
            let (_, metadata) = SafeTensors::read_metadata(bytes)?;
            let header = metadata.metadata().as_ref().and_then(|entries| entries.get(SEAL.key));
            let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?;
            Self::of_contents(header.map_or("", String::as_str), tensors.into_iter().collect())
        };
        read().map_err(|e| Error::config(format!("the state that rank 0 gave: {e}")))
    }

    /// The header and the tensors of the file.
    fn contents(&self) -> Result<(String, BTreeMap<String, Tensor>)> {
        let mut tensors = self.tensors.clone();
        let losses = Tensor::from_slice(&self.losses, self.losses.len(), &Device::Cpu)?;
        tensors.insert(LOSSES.into(), losses);
        tensors.insert(EVALUATIONS.into(), evaluations_tensor(&self.evaluations)?);
        let header = Header { step: self.step, seed: self.seed, settings: self.settings.clone() };
        let header = serde_json::to_string(&header).map_err(|e| Error::config(e.to_string()))?;
        Ok((header, tensors))
    }

    fn of_contents(
        header: &str,
        mut tensors: BTreeMap<String, Tensor>,
    ) -> candle_core::Result<Self> {
        let Header { step, seed, settings } =
            serde_json::from_str(header).map_err(candle_core::Error::wrap)?;
        let Some(losses) = tensors.remove(LOSSES) else { bail!("`losses` is missing") };
        let losses = losses.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let evaluations = match tensors.remove(EVALUATIONS) {
            Some(rows) => evaluations_of(&rows)?,
            None => vec![],
        };
        if losses.len() as u64 != step {
            bail!("{} losses after {step} steps", losses.len())
        }
        Ok(Self { step, seed, settings, losses, evaluations, tensors })
    }

    /// Fails unless `settings` are those of this state, telling every difference.
    pub fn check_settings(&self, path: &Path, settings: &Map<String, Value>) -> Result<()> {
        let differences = differences("", &self.settings, settings);
        if differences.is_empty() {
            return Ok(());
        }
        let lines = differences.iter().map(|Difference { name, first, second }| {
            format!("\n  {name}: was {first}, is {second}")
        });
        let message = format!(
            "this run was started with other settings, and cannot go on with these:{}",
            lines.collect::<String>()
        );
        Err(Error::file(path, message))
    }
}

/// Where the state before that at `path` is kept.
///
/// [Example](crate::train::Trainer)
pub fn previous_state_path(path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    let ending = path.extension().map_or(String::new(), |e| format!(".{}", e.to_string_lossy()));
    path.with_extension(format!("previous{ending}"))
}

fn evaluations_tensor(evaluations: &[StepScores]) -> candle_core::Result<Tensor> {
    let rows = evaluations.iter().flat_map(|StepScores { step, scores }| {
        std::iter::once(*step as f64).chain(scores.values().map(|value| value.unwrap_or(f64::NAN)))
    });
    let columns = 1 + HeldOutScores::COUNT;
    Tensor::from_vec(rows.collect::<Vec<f64>>(), (evaluations.len(), columns), &Device::Cpu)
}

fn evaluations_of(rows: &Tensor) -> candle_core::Result<Vec<StepScores>> {
    let rows = rows.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let evaluated = |row: Vec<f64>| match row[..] {
        [step, ref scores @ ..] if scores.len() == HeldOutScores::COUNT => {
            let mut values = [None; HeldOutScores::COUNT];
            let found = scores.iter().map(|value| Some(*value).filter(|value| !value.is_nan()));
            values.iter_mut().zip(found).for_each(|(place, value)| *place = value);
            Ok(StepScores { step: step as u64, scores: HeldOutScores::from_values(values) })
        }
        _ => {
            let expected = 1 + HeldOutScores::COUNT;
            candle_core::bail!("an evaluation of {} numbers, not {expected}", row.len())
        }
    };
    rows.into_iter().map(evaluated).collect()
}

/// A value that two settings do not have in common.
pub(super) struct Difference {
    /// Its path.
    pub name: String,
    /// As text in the one.
    pub first: String,
    /// And in the other.
    pub second: String,
}

/// Each value that differs.
pub(super) fn differences(
    path: &str,
    first: &Map<String, Value>,
    second: &Map<String, Value>,
) -> Vec<Difference> {
    let shown = |value: Option<&Value>| value.map_or("nothing".to_string(), short);
    let names: BTreeSet<&String> = first.keys().chain(second.keys()).collect();
    let of = |name: &String| match (first.get(name), second.get(name)) {
        (one, other) if one == other => vec![],
        (Some(Value::Object(one)), Some(Value::Object(other))) => {
            differences(&format!("{path}{name}."), one, other)
        }
        (one, other) => {
            let name = format!("{path}{name}");
            vec![Difference { name, first: shown(one), second: shown(other) }]
        }
    };
    names.into_iter().flat_map(of).collect()
}

/// A value as text, cut where it would fill the screen.
fn short(value: &Value) -> String {
    const LONGEST: usize = 200;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
