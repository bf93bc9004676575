//! Exponential moving averages of parameters, as `torch.optim.swa_utils.AveragedModel` keeps them.
//!
//! ```text
//! a <- p                           after the first step
//! a <- a + (1 - decay) (p - a)     after each step that follows
//! ```
//! They are f32 whatever the parameter's dtype.
//!
//! Source: `torch/optim/swa_utils.py`, `get_ema_multi_avg_fn`.

use crate::{Error, Result, TensorMismatch};
use candle_core::{DType, Tensor, Var};
use std::collections::BTreeMap;

/// Beginning of the names in a run's state.
const PREFIX: &str = "average.";

/// The averages of a run's parameters.
#[derive(Debug)]
pub(super) struct Averages {
    decay: f64,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    average: Tensor,
}

impl Averages {
    /// Averages that begin with the parameters as they are.
    pub fn new<'a>(
        parameters: impl Iterator<Item = (&'a str, &'a Var)>,
        decay: f64,
    ) -> Result<Self> {
        let slot = |(name, var): (&str, &Var)| {
            let average = current(var)?;
            Ok(Slot { name: format!("{PREFIX}{name}"), var: var.clone(), average })
        };
        Ok(Self { decay, slots: parameters.map(slot).collect::<Result<_>>()? })
    }

    /// Takes the parameters after the step of a number, from 1.
    pub fn update(&mut self, step: u64) -> candle_core::Result<()> {
        for Slot { var, average, .. } in &mut self.slots {
            let now = current(var)?;
            *average = match step {
                1 => now,
                _ => (&*average + ((now - &*average)? * (1.0 - self.decay))?)?,
            };
        }
        Ok(())
    }

    /// Gives the parameters their averages. Returns what they were.
    pub fn apply(&self) -> candle_core::Result<Vec<(Var, Tensor)>> {
        let mut before = vec![];
        for Slot { var, average, .. } in &self.slots {
            before.push((var.clone(), var.as_detached_tensor().copy()?));
            var.set(&average.to_dtype(var.dtype())?)?;
        }
        Ok(before)
    }

    /// The averages by name.
    pub fn state(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.slots.iter().map(|slot| (slot.name.clone(), slot.average.clone()))
    }

    /// Takes its own tensors out of a state and puts them back. Nothing is changed by a state that lacks some.
    pub fn load(&mut self, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let mut mismatch =
            TensorMismatch { source: "the training state".into(), ..Default::default() };
        let mut found = vec![];
        for Slot { name, average, .. } in &self.slots {
            match state.remove(name) {
                None => mismatch.missing.push(name.clone()),
                Some(tensor) if tensor.dims() != average.dims() => mismatch.misshaped.push((
                    name.clone(),
                    average.dims().to_vec(),
                    tensor.dims().to_vec(),
                )),
                Some(tensor) => found.push(tensor),
            }
        }
        if !mismatch.is_empty() {
            return Err(Error::Mismatch(mismatch.into()));
        }
        for (slot, tensor) in self.slots.iter_mut().zip(found) {
            slot.average = tensor.to_device(slot.var.device())?.to_dtype(DType::F32)?;
        }
        Ok(())
    }
}

/// The values of a parameter in f32, in memory of their own.
fn current(var: &Var) -> candle_core::Result<Tensor> {
    var.as_detached_tensor().to_dtype(DType::F32)?.copy()
}
