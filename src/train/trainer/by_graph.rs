//! Steps that a CUDA graph repeats.

use super::{scalar, StepMetrics, Trainer};
use crate::nn::Mode;
use crate::ops::recorded::warm_up;
use crate::train::step_graphs::{form_of, RecordedForm, MOST_FORMS};
use crate::train::{StepGraphs, StepInput, StepTimes};
use candle_core::{Result, Tensor, Var};
use std::collections::hash_map::Entry;
use std::time::Instant;

impl Trainer {
    /// Makes one step, by a graph where [`StepGraphs`] has one for the form of the input. `input` gets the number of
    /// the part and returns what the loss is computed from. The step has the bits of [`step`](Self::step).
    ///
    /// The run's first step is made as ever. So is every step of several parts or processes, or by other kernels than
    /// those of a GPU. Averages of the parameters are updated after the graph.
    ///
    /// # Errors
    /// - as [`step`](Self::step);
    /// - the loss reads a value on the host, or copies other values to the GPU than in the step before;
    /// - the attention has dropout, or a dropout has another seed than the mode.
    pub fn step_by_graph<I: StepInput, F: Fn(&I, Mode) -> Result<Tensor>>(
        &mut self,
        graphs: &mut StepGraphs<F>,
        mut input: impl FnMut(u64) -> Result<I>,
    ) -> Result<StepMetrics> {
        let StepGraphs { forms, loss, replayed, plain } = graphs;
        let loss = &*loss;
        let alone = self.config.accumulation == 1 && self.communicator.size() == 1;
        let gpu = self.optimizer.gpu().filter(|_| alone && self.zeros_checked);
        let Some(gpu) = gpu.cloned() else {
            *plain += 1;
            return self.step(|part, mode| loss(&input(part)?, mode));
        };
        let input = input(self.steps())?;
        let form = form_of(&input)?;
        let form = form.filter(|form| forms.len() < MOST_FORMS || forms.contains_key(form));
        let Some(form) = form else {
            *plain += 1;
            return self.step(|_, mode| loss(&input, mode));
        };
        match forms.entry(form) {
            Entry::Vacant(new) => {
                let made = warm_up(&gpu, || self.step(|_, mode| loss(&input, mode)))?;
                *plain += 1;
                new.insert(None);
                Ok(made)
            }
            Entry::Occupied(known) => {
                let known = known.into_mut();
                let recorded = match known.take() {
                    Some(recorded) if recorded.changes(self.optimizer.changed()) => recorded,
                    _ => self.record(loss, &input)?,
                };
                *replayed += 1;
                self.replay(known.insert(recorded), &input)
            }
        }
    }

    fn record<I: StepInput>(
        &self,
        loss: &impl Fn(&I, Mode) -> Result<Tensor>,
        input: &I,
    ) -> Result<RecordedForm> {
        let (step, seed) = (self.steps(), self.seeds()(self.steps()));
        let mut fixed = vec![];
        let input = input.map(&mut |tensor| {
            let var = Var::from_tensor(&tensor.detach())?;
            let tensor = var.as_detached_tensor();
            fixed.push(var);
            Ok(tensor)
        })?;
        let mut loss = |_| scalar(loss(&input, Mode::Train { seed })?, step);
        let gradients = || self.part(step, 1, &mut loss);
        let recorded = self.optimizer.record(seed, self.config.max_grad_norm, gradients)?;
        let changed = self.optimizer.changed().cloned().collect();
        Ok(RecordedForm { step: recorded, input: fixed, changed })
    }

    fn replay(
        &mut self,
        recorded: &mut RecordedForm,
        input: &impl StepInput,
    ) -> Result<StepMetrics> {
        let start = Instant::now();
        let mut fixed = recorded.input.iter();
        input.map(&mut |tensor| {
            fixed.next().map_or(Ok(()), |var| var.set(&tensor.detach()))?;
            Ok(tensor.clone())
        })?;
        self.schedule();
        let (seed, max_norm) = (self.seeds()(self.steps()), self.config.max_grad_norm);
        let measures = self.optimizer.replay(&mut recorded.step, seed, max_norm)?;
        let made = self.made(measures, 1)?;
        self.times += StepTimes { steps: 1, compute: start.elapsed(), ..StepTimes::default() };
        Ok(made)
    }
}
