//! A training step whose launches, forward, backward and AdamW, are one CUDA graph.

use super::adamw::{table_bytes, Launched, Outcome};
use crate::driver::{self, Replay};
use crate::launch::adamw::OUTCOME;
use crate::problem::{AdamWRates, AdamWStep};
use candle_core::{DType, Device, Error, Result, Var};

/// A recorded step. The tensors that it reads and changes must outlive it.
pub struct RecordedStep {
    replay: Replay,
    /// Its outcome is in memory that no replay allocates.
    launched: Launched,
}

impl RecordedStep {
    /// Records a step in a mode with this seed, of so many parameters.
    pub fn record(
        device: &Device,
        seed: u64,
        parameters: usize,
        step: impl FnOnce() -> Result<Launched>,
    ) -> Result<Self> {
        let outcome = Var::zeros(OUTCOME, DType::F32, device)?;
        let mut launched = None;
        let replay = Replay::record(device, seed, table_bytes(parameters), || {
            let step = step()?;
            launched = Some(step.with_outcome(&outcome)?);
            Ok(())
        })?;
        let launched = launched.ok_or_else(|| Error::msg("no step was recorded"))?;
        Ok(Self { replay, launched })
    }

    /// Makes the step with the dropout masks of a seed and the numbers of each parameter, and waits for it.
    pub fn run(
        &mut self,
        seed: u64,
        rates: impl Iterator<Item = AdamWRates>,
        step: &AdamWStep,
    ) -> Result<Outcome> {
        self.replay.run(seed, &self.launched.table(rates, step)?)?;
        self.launched.read()
    }
}

/// Runs a step as it is, so that the same step can be recorded.
pub fn warm_up<T>(device: &Device, step: impl FnOnce() -> Result<T>) -> Result<T> {
    driver::warm_up(device, step)
}
