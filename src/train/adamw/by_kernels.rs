//! Steps by the kernels of a GPU, launched or replayed by a CUDA graph.

use super::{check_loss, AdamW, Slot, StepMeasures};
use crate::ops::adamw;
use crate::ops::recorded::RecordedStep;
use crate::problem::{AdamWRates, AdamWStep};
use crate::train::Gradients;
use candle_core::{bail, Device, Result, Tensor};

impl AdamW {
    /// All parameters at once.
    pub(super) fn apply_by_kernels(
        &self,
        gradients: &Gradients,
        loss: Option<&Tensor>,
        step: &AdamWStep,
    ) -> Result<StepMeasures> {
        self.measures(self.launch(gradients, loss, step)?.read()?)
    }

    /// Launches a step; its outcome can be read later.
    fn launch(
        &self,
        gradients: &Gradients,
        loss: Option<&Tensor>,
        step: &AdamWStep,
    ) -> Result<adamw::Launched> {
        let loss = match (loss, self.slots.first()) {
            (Some(loss), Some(slot)) => Some(loss.to_device(slot.var.device())?),
            _ => None,
        };
        let tensors = self.slots.iter().map(|slot| slot.tensors().map(|(_, tensor)| tensor));
        let rows: Vec<_> = tensors.zip(self.rates()).collect();
        adamw::launch(&rows, gradients.tensors(), loss.as_ref(), step)
    }

    /// The numbers of the next step for each parameter.
    fn rates(&self) -> impl Iterator<Item = AdamWRates> + '_ {
        self.slots.iter().map(|slot| self.config.rates(self.steps + 1, slot.factors))
    }

    fn measures(&self, outcome: adamw::Outcome) -> Result<StepMeasures> {
        let adamw::Outcome { grad_norm, not_finite, loss } = outcome;
        check_loss(loss, self.steps)?;
        match not_finite {
            Some(place) => Err(self.not_finite(place)),
            None => self.check_norm(grad_norm).map(|()| StepMeasures { grad_norm, loss }),
        }
    }

    /// Records the launches of a step: of its loss and backward, which `gradients` runs, and of the update.
    pub(in crate::train) fn record(
        &self,
        seed: u64,
        max_norm: Option<f64>,
        gradients: impl FnOnce() -> Result<(Tensor, Gradients)>,
    ) -> Result<RecordedStep> {
        let Some(gpu) = self.gpu() else {
            bail!("adamw: no kernels of a GPU make steps of these parameters")
        };
        let numbers = self.config.at(self.steps + 1, max_norm);
        RecordedStep::record(gpu, seed, self.slots.len(), || {
            let (loss, gradients) = gradients()?;
            self.launch(&gradients, Some(&loss), &numbers)
        })
    }

    /// Makes one step by a recorded one, as [`apply`](Self::apply) makes it.
    pub(in crate::train) fn replay(
        &mut self,
        recorded: &mut RecordedStep,
        seed: u64,
        max_norm: Option<f64>,
    ) -> Result<StepMeasures> {
        self.config.validate()?;
        let step = self.steps + 1;
        let numbers = self.config.at(step, max_norm);
        let measures = self.measures(recorded.run(seed, self.rates(), &numbers)?)?;
        self.steps = step;
        Ok(measures)
    }

    /// The device whose kernels make the steps, if there is one.
    pub(in crate::train) fn gpu(&self) -> Option<&Device> {
        self.slots.first().filter(|_| self.by_kernels).map(|slot| slot.var.device())
    }

    /// The parameters and their moments.
    pub(in crate::train) fn changed(&self) -> impl Iterator<Item = &Tensor> {
        self.slots.iter().flat_map(Slot::tensors).map(|(_, tensor)| tensor)
    }
}
