//! The training loop's body: loss, backward, optimizer step.
//!
//! ```text
//! for each step:
//!   for each part of its batch:  loss = closure(part, Mode::Train { seed of this part });  g += backward(loss / parts)
//!   clip g;  learning rate of the schedule;  AdamW
//! ```
//! The closure must draw all randomness from (seed, part), see [`StepRng`]. Then a run that was saved and continued has
//! the bits of one that was not. With one part a step, part and step are the same number. Many processes share the
//! parts of a step, see [`Communicator`].

#[cfg(feature = "cuda")]
mod by_graph;
mod state;

use super::adamw::check_loss;
use super::averages::Averages;
use super::distributed::{check_agreement, together, Alone, Communicator, OrderedSum, StepTimes};
use super::lost_gradients::{check_zeros, missing};
use super::slope::Loss;
use super::{
    AdamW, Gradients, HeldOutScores, ParameterGroups, StepMeasures, StepRng, StepScores,
    TrainerConfig,
};
use crate::files::Checksum;
use crate::nn::{trainable_variables, Mode, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{bail, Tensor, Var};
use candle_nn::Optimizer;
use serde_json::{json, Map, Value};
use std::sync::Arc;
use std::time::Instant;

/// Metrics of a step.
///
/// [Example](crate::train::Trainer)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMetrics {
    /// Its number, from 1.
    pub step: u64,
    /// The loss before it, the mean over its parts.
    pub loss: f32,
    /// The learning rate it was made with.
    pub lr: f64,
    /// The norm of all gradients together, before clipping.
    pub grad_norm: f64,
}

/// The trainable parameters of a model on their way.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_sam_lora::nn::Linear;
/// use candle_sam_lora::train::{Trainer, TrainerConfig, TrainingState};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let model = Linear::load(4, 2, vb)?;
/// let x = Tensor::randn(0f32, 1f32, (8, 4), &Device::Cpu)?;
/// let config = TrainerConfig { accumulation: 2, ..TrainerConfig::new(1e-2) };
/// let mut trainer = Trainer::new(&model, config)?;
/// for _ in 0..3 {
///     // `part` and `mode` are for what is random: the batch and dropout.
///     let step = trainer.step(|_part, _mode| (x.apply(&model)? - 1.0)?.sqr()?.mean_all())?;
///     assert!(step.loss.is_finite() && step.grad_norm > 0.0);
/// }
/// let path = std::env::temp_dir().join("candle-sam-lora-trainer.safetensors");
/// trainer.save(&path)?;
/// let mut continued = Trainer::new(&model, config)?;
/// continued.resume(&path)?;
/// assert_eq!((continued.steps(), continued.losses()), (3, trainer.losses()));
/// assert_eq!(TrainingState::load(&path, &Device::Cpu)?.step, 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Trainer {
    optimizer: AdamW,
    averages: Option<Averages>,
    config: TrainerConfig,
    settings: Map<String, Value>,
    losses: Vec<f32>,
    evaluations: Vec<StepScores>,
    /// Whether gradients of zero have been looked at.
    zeros_checked: bool,
    communicator: Arc<dyn Communicator>,
    /// Whether the ranks are known to have the same run.
    agreed: bool,
    times: StepTimes,
}

impl Trainer {
    /// A run at step 0 over whatever is trainable in `model`.
    ///
    /// # Errors
    /// - nothing is trainable;
    /// - a parameter is computed from a variable, see [`trainable_variables`];
    /// - the configuration is impossible.
    pub fn new(model: &dyn ModuleTree, config: impl Into<TrainerConfig>) -> Result<Self> {
        let config = config.into();
        config.validate()?;
        let optimizer = AdamW::new(trainable_variables(model)?, config.optimizer)?;
        let averages = config.ema.map(|decay| Averages::new(optimizer.parameters(), decay));
        let averages = averages.transpose()?;
        let model = ("model".to_string(), frozen_checksum(model).to_string().into());
        let settings = [model].into_iter().chain(config.settings()).collect();
        Ok(Self {
            optimizer,
            averages,
            config,
            settings,
            losses: vec![],
            evaluations: vec![],
            zeros_checked: false,
            communicator: Arc::new(Alone),
            agreed: false,
            times: StepTimes::default(),
        })
    }

    /// Does not look at gradients of zero in the first step. The predicted IoU's target is such a case: it follows
    /// masks that learn no shape, on purpose without a gradient.
    pub fn with_zero_gradients(mut self) -> Self {
        self.zeros_checked = true;
        self
    }

    /// Shares the work of each step with other processes, which make the same calls with the same model and data.
    ///
    /// N processes give the bits of one with N times the accumulation. Rank 0 alone writes and reads the state.
    ///
    /// # Errors
    /// - a step has more than 2^64 parts.
    pub fn with_communicator(mut self, communicator: Arc<dyn Communicator>) -> Result<Self> {
        let size = communicator.size() as u64;
        let Some(parts) = self.config.accumulation.checked_mul(size) else {
            let message = format!("{size} ranks of {} parts a step", self.config.accumulation);
            return Err(Error::config(message));
        };
        if parts > 1 {
            self.settings.insert("accumulation".into(), parts.into());
        }
        (self.communicator, self.agreed) = (communicator, false);
        Ok(self)
    }

    /// Gives parameters the learning rates and weight decays of their groups, which become part of the settings.
    ///
    /// # Errors
    /// - as [`ParameterGroups::validate`].
    pub fn with_groups(mut self, groups: &ParameterGroups) -> Result<Self> {
        self.optimizer.set_groups(groups)?;
        if *groups != ParameterGroups::default() {
            self.settings.insert("groups".into(), json!(groups));
        }
        Ok(self)
    }

    /// Names more settings that must be equal when the run is continued, as the data. The configuration and a checksum
    /// of the frozen tensors are among them already.
    pub fn with_settings(mut self, settings: Map<String, Value>) -> Self {
        let own = std::mem::replace(&mut self.settings, settings);
        self.settings.extend(own);
        self
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The loss of each step made.
    pub fn losses(&self) -> &[f32] {
        &self.losses
    }

    /// The evaluations noted so far.
    pub fn evaluations(&self) -> &[StepScores] {
        &self.evaluations
    }

    /// Where the time went, of the steps that this trainer made after its first one, which has more to do.
    pub fn times(&self) -> &StepTimes {
        &self.times
    }

    /// Notes an evaluation after the steps made; it becomes part of the state.
    pub fn note(&mut self, scores: impl Into<HeldOutScores>) {
        self.evaluations.push(StepScores { step: self.steps(), scores: scores.into() });
    }

    /// Does some work while the parameters are their averages, if [`TrainerConfig::ema`] is set, and puts them back.
    ///
    /// # Errors
    /// - memory for the parameters is lacking.
    pub fn with_averages<T>(&self, work: impl FnOnce() -> T) -> candle_core::Result<T> {
        let before = self.take_averages()?;
        let done = work();
        before.iter().try_for_each(|(var, value)| var.set(value))?;
        Ok(done)
    }

    /// Gives the parameters their averages, if there are some. Returns what the parameters were.
    ///
    /// # Errors
    /// - memory for the parameters is lacking.
    pub fn take_averages(&self) -> candle_core::Result<Vec<(Var, Tensor)>> {
        self.averages.as_ref().map_or(Ok(vec![]), Averages::apply)
    }

    /// Makes one step; `loss` gets the number of the part and the mode with its dropout masks, and returns a scalar.
    ///
    /// Parts are numbered from 0 over the whole run. Where gradients are exactly zero, the first step tells whether an
    /// operation lost them. For that it computes the loss of its first part two times more, or some dozens. So does
    /// every step whose gradients are missing.
    ///
    /// # Errors
    /// - a loss is no scalar or not finite;
    /// - a gradient is not finite;
    /// - parameters got no gradient: the error says whether the loss depends on them;
    /// - in the first step, the loss depends on elements whose gradient is exactly zero;
    /// - one of these on another rank, or the ranks have different runs.
    ///
    /// No parameter was changed then.
    pub fn step(
        &mut self,
        mut loss: impl FnMut(u64, Mode) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<StepMetrics> {
        self.agree()?;
        let step = self.steps();
        let seeds = self.seeds();
        let mut loss = |part: u64| scalar(loss(part, Mode::Train { seed: seeds(part) })?, step);
        let communicator = self.communicator.clone();
        let (rank, size) = (communicator.rank() as u64, communicator.size() as u64);
        let parts = self.config.accumulation * size;
        let (mut sum, mut first) = (OrderedSum::new(&*communicator), None);
        for round in 0..self.config.accumulation {
            let part = step * parts + round * size + rank;
            let own = self.part(part, parts, &mut loss).inspect(|(value, _)| {
                first.get_or_insert((part, value.clone()));
            });
            sum.add(own)?;
        }
        let (Some((sum, gradients, mut times)), Some((part, here))) = (sum.finish()?, first) else {
            bail!("train: a step has no part")
        };
        let (start, is_first) = (Instant::now(), !self.zeros_checked);
        if is_first {
            // One rank's look is enough, and its first part is the one that a single process looks at.
            let looked = match rank {
                0 => Loss::of(&here).and_then(|here| {
                    let parameters = self.optimizer.parameters();
                    check_zeros(parameters, &gradients, here, || Loss::of(&loss(part)?))
                }),
                _ => Ok(()),
            };
            let looked = looked.map_err(|error| {
                candle_core::Error::msg(format!("train: step {}: {error}", step + 1))
            });
            together(&*communicator, looked, |()| vec![])?;
            self.zeros_checked = true;
        }
        self.schedule();
        let measures = self.optimizer.apply(&gradients, Some(&sum), self.config.max_grad_norm)?;
        let made = self.made(measures, parts)?;
        if !is_first {
            (times.steps, times.update) = (1, start.elapsed());
            self.times += times;
        }
        Ok(made)
    }

    /// Fails unless all trained parameters are finite. The step after one that made them infinite tells so, too; after
    /// the last step of a run nothing else does.
    ///
    /// [Example](crate::train::Trainer)
    ///
    /// # Errors
    /// - a parameter holds a value that is not finite.
    pub fn check_parameters(&self) -> candle_core::Result<()> {
        self.optimizer.check_parameters()
    }

    /// The seed of each part's dropout masks.
    fn seeds(&self) -> impl Fn(u64) -> u64 {
        let seed = self.config.seed;
        move |part| StepRng::new(seed, "dropout", part).bits64()
    }

    /// Gives the optimizer the learning rate of the next step.
    fn schedule(&mut self) {
        let factor = self.config.schedule.factor(self.steps(), &self.evaluations);
        self.optimizer.set_learning_rate(self.config.optimizer.lr * factor);
    }

    /// Notes a step that the optimizer has made, of so many parts.
    fn made(&mut self, measures: StepMeasures, parts: u64) -> candle_core::Result<StepMetrics> {
        let StepMeasures { grad_norm, loss } = measures;
        let step = self.steps();
        if let Some(averages) = &mut self.averages {
            averages.update(step)?;
        }
        let loss = loss / parts as f32;
        self.losses.push(loss);
        Ok(StepMetrics { step, loss, lr: self.optimizer.config().lr, grad_norm })
    }

    /// The loss of a part, without its graph, and its share of the step's gradients.
    ///
    /// One process alone leaves the look at them to the optimizer, but for its first step: a GPU need not wait for it.
    fn part(
        &self,
        part: u64,
        parts: u64,
        loss: &mut impl FnMut(u64) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<(Tensor, Gradients)> {
        let collector = self.optimizer.collector();
        let value = collector.during(|| loss(part))?;
        let looks = !self.zeros_checked || self.communicator.size() > 1;
        if looks {
            check_loss(value.to_scalar()?, self.steps())?;
        }
        let here = value.detach();
        let share = if parts > 1 { (value / parts as f64)? } else { value };
        let store = share.backward()?;
        let found = |var: &Var| collector.total(var, store.get(var));
        let is_lost = |var: &Var| found(var).is_ok_and(|gradient| gradient.is_none());
        let parameters = self.optimizer.parameters();
        let lost: Vec<_> = parameters.filter(|(_, var)| is_lost(var)).collect();
        if !lost.is_empty() {
            let of = self.optimizer.parameters().count();
            let error = missing(&lost, of, Loss::of(&here)?, || Loss::of(&loss(part)?));
            bail!("train: step {}: {error}", self.steps() + 1)
        }
        let gradients = Gradients::of(self.optimizer.parameters(), found)?;
        if looks {
            self.optimizer.check(&gradients)?;
        }
        Ok((here, gradients))
    }

    /// Fails unless all ranks have the same version, settings, parameters and step. A step asks it, too, if nobody has.
    ///
    /// # Errors
    /// - a rank has something else than rank 0: every difference is told, on every rank.
    pub fn agree(&mut self) -> Result<()> {
        if self.agreed || self.communicator.size() == 1 {
            return Ok(());
        }
        let mut parameters = Checksum::new();
        for (name, tensor) in self.tensors()? {
            parameters.add(&name, &safetensors::View::data(&tensor));
        }
        let mut run = self.settings.clone();
        run.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        run.insert("seed".into(), self.config.seed.into());
        run.insert("step".into(), self.steps().into());
        run.insert("parameters".into(), parameters.to_string().into());
        check_agreement(&*self.communicator, &run)?;
        self.agreed = true;
        Ok(())
    }
}

/// The loss of a part as an f32 scalar.
fn scalar(loss: Tensor, step: u64) -> candle_core::Result<Tensor> {
    if loss.elem_count() != 1 {
        bail!("train: step {}: the loss must be a scalar, has shape {:?}", step + 1, loss.dims())
    }
    loss.to_dtype(candle_core::DType::F32)?.reshape(())
}

/// Over every tensor of the model that training leaves as it is.
fn frozen_checksum(model: &dyn ModuleTree) -> Checksum {
    let mut checksum = Checksum::new();
    model.visit("", &mut |name, node| {
        if let Node::Parameter(tensor) | Node::Buffer(tensor) = node {
            if !tensor.track_op() {
                checksum.add(name, &safetensors::View::data(tensor));
            }
        }
    });
    checksum
}
