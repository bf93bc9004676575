//! The training loop's body: loss, backward, optimizer step, and the state that lets it go on later.
//!
//! ```text
//! for each step:  loss = closure(step, Mode::Train { seed of this step });  backward;  AdamW
//! ```
//! The closure must draw whatever is random from (seed, step), see [`Draws`]; then a run that was
//! saved and continued has the bits of one that was not.

use super::checksum::Checksum;
use super::{AdamW, AdamWConfig, Draws, State};
use crate::nn::{trainable, Mode, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{bail, Device, Tensor};
use serde_json::{Map, Value};
use std::path::Path;

/// The trainable parameters of a model on their way.
#[derive(Debug)]
pub struct Trainer {
    optimizer: AdamW,
    seed: u64,
    settings: Map<String, Value>,
    losses: Vec<f32>,
}

impl Trainer {
    /// A run at step 0 over whatever is trainable in `model`.
    ///
    /// `settings` describe what must be equal when the run is continued; those of the optimizer are added to them,
    /// and a checksum of what is frozen in `model`.
    ///
    /// # Errors
    /// When nothing is trainable, or the optimizer's configuration is impossible.
    pub fn new(
        model: &dyn ModuleTree,
        config: AdamWConfig,
        seed: u64,
        mut settings: Map<String, Value>,
    ) -> Result<Self> {
        let optimizer = AdamW::new(trainable(model)?, config)?;
        settings.insert("model".into(), frozen_checksum(model).to_string().into());
        for (name, value) in [
            ("lr", config.lr),
            ("beta1", config.beta1),
            ("beta2", config.beta2),
            ("eps", config.eps),
            ("weight_decay", config.weight_decay),
        ] {
            settings.insert(name.into(), value.into());
        }
        Ok(Self { optimizer, seed, settings, losses: Vec::new() })
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The loss of each step made.
    pub fn losses(&self) -> &[f32] {
        &self.losses
    }

    /// Makes one step; `loss` gets the number of steps made before and the mode with this step's dropout masks,
    /// and returns a scalar. Returns the loss before the step.
    ///
    /// # Errors
    /// When the loss is no scalar or not finite, or as [`AdamW::step`]; no parameter was changed then.
    pub fn step(
        &mut self,
        loss: impl FnOnce(u64, Mode) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<f32> {
        let step = self.steps();
        let mode = Mode::Train { seed: Draws::new(self.seed, "dropout", step).bits64() };
        let loss = loss(step, mode)?;
        if loss.elem_count() != 1 {
            bail!(
                "train: step {}: the loss must be a scalar, has shape {:?}",
                step + 1,
                loss.dims()
            )
        }
        let loss = loss.to_dtype(candle_core::DType::F32)?.reshape(())?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            bail!("train: step {}: the loss is {value}; try a lower learning rate", step + 1)
        }
        self.optimizer.step(&loss.backward()?)?;
        self.losses.push(value);
        Ok(value)
    }

    /// Writes the run's state to `path`, atomically.
    pub fn save(&self, path: &Path) -> Result<()> {
        State {
            step: self.steps(),
            seed: self.seed,
            settings: self.settings.clone(),
            losses: self.losses.clone(),
            tensors: self.optimizer.state()?,
        }
        .save(path)
    }

    /// Goes on from the state at `path`.
    ///
    /// # Errors
    /// When the file is damaged, or was written with another seed, other settings or another model; nothing was
    /// changed then.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let state = State::load(path, &Device::Cpu)?;
        state.check_settings(path, &self.settings)?;
        if state.seed != self.seed {
            let message = format!("this run has seed {}, not {}", state.seed, self.seed);
            return Err(Error::file(path, message));
        }
        self.optimizer.load_state(state.step, &state.tensors)?;
        self.losses = state.losses;
        Ok(())
    }
}

/// Over every tensor of the model that training leaves as it is.
fn frozen_checksum(model: &dyn ModuleTree) -> Checksum {
    let mut checksum = Checksum::new();
    model.visit("", &mut |name, node| {
        if let Node::Parameter(tensor) | Node::Buffer(tensor) = node {
            if !tensor.is_variable() {
                checksum.add(name, &safetensors::View::data(tensor));
            }
        }
    });
    checksum
}
