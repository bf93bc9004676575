//! The training loop's body: loss, backward, optimizer step, and the state that lets it go on later.
//!
//! ```text
//! for each step:
//!   for each part of its batch:  loss = closure(part, Mode::Train { seed of this part });  g += backward(loss / parts)
//!   clip g;  learning rate of the schedule;  AdamW
//! ```
//! The closure must draw all randomness from (seed, part), see [`StepRng`]. Then a run that was saved and continued has
//! the bits of one that was not. With one part a step, part and step are the same number. Many processes share the
//! parts of a step, see [`Communicator`].

use super::averages::Averages;
use super::checkpoint::previous_state_path;
use super::distributed::{
    broadcast, check_agreement, together, Alone, Communicator, OrderedSum, StepTimes,
};
use super::lost_gradients::{check_zeros, missing};
use super::slope::Loss;
use super::{AdamW, Gradients, HeldOutScores, StepRng, StepScores, TrainerConfig, TrainingState};
use crate::files::Checksum;
use crate::files::TensorFile;
use crate::nn::{trainable_variables, Mode, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{bail, Device, Tensor, Var};
use candle_nn::Optimizer;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
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
        let mode =
            |part| Mode::Train { seed: StepRng::new(self.config.seed, "dropout", part).bits64() };
        let mut loss = |part: u64| checked(loss(part, mode(part))?, step);
        let communicator = self.communicator.clone();
        let (rank, size) = (communicator.rank() as u64, communicator.size() as u64);
        let parts = self.config.accumulation * size;
        let (mut sum, mut first) = (OrderedSum::new(&*communicator), None);
        for round in 0..self.config.accumulation {
            let part = step * parts + round * size + rank;
            let own = self.part(part, parts, &mut loss).map(|(value, here, found)| {
                first.get_or_insert((part, here));
                (value, found)
            });
            sum.add(own)?;
        }
        let (Some((sum, mut gradients, mut times)), Some((part, here))) = (sum.finish()?, first)
        else {
            bail!("train: a step has no part")
        };
        let (start, is_first) = (Instant::now(), !self.zeros_checked);
        if is_first {
            // One rank's look is enough, and its first part is the one that a single process looks at.
            let looked = match rank {
                0 => check_zeros(self.optimizer.parameters(), &gradients, here, || {
                    Loss::of(&loss(part)?)
                }),
                _ => Ok(()),
            };
            let looked = looked.map_err(|error| {
                candle_core::Error::msg(format!("train: step {}: {error}", step + 1))
            });
            together(&*communicator, looked, |()| vec![])?;
            self.zeros_checked = true;
        }
        let grad_norm = gradients.norm()?;
        if let Some(max_norm) = self.config.max_grad_norm {
            gradients = gradients.clipped(grad_norm, max_norm)?;
        }
        let lr = self.config.optimizer.lr * self.config.schedule.factor(step, &self.evaluations);
        self.optimizer.set_learning_rate(lr);
        self.optimizer.apply(&gradients)?;
        if let Some(averages) = &mut self.averages {
            averages.update(step + 1)?;
        }
        let loss = sum / parts as f32;
        self.losses.push(loss);
        if !is_first {
            (times.steps, times.update) = (1, start.elapsed());
            self.times += times;
        }
        Ok(StepMetrics { step: step + 1, loss, lr, grad_norm })
    }

    /// The loss of a part and its share of the step's gradients.
    fn part(
        &self,
        part: u64,
        parts: u64,
        loss: &mut impl FnMut(u64) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<(f32, Loss, Gradients)> {
        let value = loss(part)?;
        let here = Loss::of(&value)?;
        let scalar = value.to_scalar::<f32>()?;
        let share = if parts > 1 { (value / parts as f64)? } else { value };
        let store = share.backward()?;
        let lost: Vec<_> =
            self.optimizer.parameters().filter(|(_, var)| store.get(var).is_none()).collect();
        if !lost.is_empty() {
            let of = self.optimizer.parameters().count();
            let error = missing(&lost, of, here, || Loss::of(&loss(part)?));
            bail!("train: step {}: {error}", self.steps() + 1)
        }
        Ok((scalar, here, self.optimizer.gradients(&store)?))
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

    /// Changes the state on rank 0, then gives it to the others; an error of one is an error of all.
    fn through_first<T: Default>(
        &mut self,
        path: &Path,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let communicator = self.communicator.clone();
        if communicator.size() == 1 {
            return work(self);
        }
        let is_first = communicator.rank() == 0;
        let own = match is_first {
            true => work(self).and_then(|done| Ok((done, self.state()?.to_bytes()?))),
            false => Ok((T::default(), vec![])),
        };
        let ((done, bytes), _) = together(&*communicator, own, |_| vec![])?;
        let bytes = broadcast(&*communicator, &bytes)?;
        let taken = match is_first {
            true => Ok(()),
            false => TrainingState::from_bytes(&bytes).and_then(|state| self.go_on(path, state)),
        };
        together(&*communicator, taken, |()| vec![])?;
        Ok(done)
    }

    /// Writes the run's state to `path`, atomically; the one that was there is kept as the previous one. Rank 0 writes it.
    ///
    /// # Errors
    /// - the file cannot be written, on every rank.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let saved = match self.communicator.rank() {
            0 => self.state().and_then(|state| state.save(path)),
            _ => Ok(()),
        };
        together(&*self.communicator, saved, |()| vec![]).map(|_| ())
    }

    fn state(&self) -> Result<TrainingState> {
        Ok(TrainingState {
            step: self.steps(),
            seed: self.config.seed,
            settings: self.settings.clone(),
            losses: self.losses.clone(),
            evaluations: self.evaluations.clone(),
            tensors: self.tensors()?,
        })
    }

    /// Every tensor that a continued run needs, by name.
    fn tensors(&self) -> candle_core::Result<BTreeMap<String, Tensor>> {
        let mut state = self.optimizer.state()?;
        state.extend(self.averages.iter().flat_map(Averages::state));
        Ok(state)
    }

    /// Goes on from the state at `path`, or, if that is missing or damaged, from the one before, which takes its place.
    /// Rank 0 reads it and gives it to the others. Returns, on rank 0, what was wrong with the newest state if the one
    /// before had to do.
    ///
    /// # Errors
    /// When both are damaged, or the state was written with another seed, other settings or another model; nothing was
    /// changed then.
    pub fn resume(&mut self, path: impl AsRef<Path>) -> Result<Option<Error>> {
        let path = path.as_ref();
        self.through_first(path, |own| own.resume_alone(path))
    }

    fn resume_alone(&mut self, path: &Path) -> Result<Option<Error>> {
        match self.read(path) {
            Ok(state) => self.go_on(path, state).map(|()| None),
            Err(damage) => match self.read(&previous_state_path(path)) {
                Ok(state) => {
                    self.go_on(&previous_state_path(path), state)?;
                    // Or the next state saved would push the damaged one into the place of this one.
                    std::fs::rename(previous_state_path(path), path)
                        .map_err(|e| Error::io(path, e))?;
                    Ok(Some(damage))
                }
                Err(_) => Err(damage),
            },
        }
    }

    /// After a failed step, goes back to the newest state at `path` with parameters known to be good, because the step
    /// after it succeeded. Without such a one, to the oldest there is.
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    pub fn roll_back(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.through_first(path, |own| own.roll_back_alone(path))
    }

    fn roll_back_alone(&mut self, path: &Path) -> Result<()> {
        let newest = self.read(path)?;
        if newest.step < self.steps() {
            return self.go_on(path, newest);
        }
        match self.read(&previous_state_path(path)) {
            Ok(state) => self.go_on(&previous_state_path(path), state),
            Err(_) => self.go_on(path, newest),
        }
    }

    /// The state at `path`, unless its header says that it is no run's of this model. It is read whole before its
    /// checksum is known.
    fn read(&self, path: &Path) -> Result<TrainingState> {
        // Losses and evaluations come on top: four bytes and 32 a step at most.
        const HISTORY: u64 = 1 << 30;
        let file = TensorFile::open(path)?;
        let (found, own) = (file.data_len(), self.optimizer.state_bytes());
        if found > own + HISTORY {
            let message = format!("{found} bytes of tensors; a state of this model has {own}");
            return Err(Error::file(path, message));
        }
        TrainingState::read(&file, &Device::Cpu)
    }

    fn go_on(&mut self, path: &Path, mut state: TrainingState) -> Result<()> {
        state.check_settings(path, &self.settings)?;
        if state.seed != self.config.seed {
            let message = format!("this run has seed {}, not {}", state.seed, self.config.seed);
            return Err(Error::file(path, message));
        }
        // An optimizer's state is known whole before anything of it is put back, so the averages may go first.
        if let Some(averages) = &mut self.averages {
            averages.load(&mut state.tensors)?;
        }
        self.optimizer.load_state(state.step, &state.tensors)?;
        (self.losses, self.evaluations) = (state.losses, state.evaluations);
        self.agreed = false;
        Ok(())
    }
}

/// The loss of a part as an f32 scalar.
fn checked(loss: Tensor, step: u64) -> candle_core::Result<Tensor> {
    if loss.elem_count() != 1 {
        bail!("train: step {}: the loss must be a scalar, has shape {:?}", step + 1, loss.dims())
    }
    let loss = loss.to_dtype(candle_core::DType::F32)?.reshape(())?;
    let value = loss.to_scalar::<f32>()?;
    if !value.is_finite() {
        bail!("train: step {}: the loss is {value}; try a lower learning rate", step + 1)
    }
    Ok(loss)
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
