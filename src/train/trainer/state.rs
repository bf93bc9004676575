//! The state that lets a run go on later, and its ways between disk and ranks.
//!
//! ```text
//! rank 0 reads, or goes back to, the newest good state  ->  gives it to the others
//! ```
//! An error of one rank is an error of all.

use super::Trainer;
use crate::files::{self, TensorFile};
use crate::train::averages::Averages;
use crate::train::distributed::{broadcast, together};
use crate::train::{previous_state_path, TrainingState};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

impl Trainer {
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

    /// Writes the run's state to `path`, atomically; the one that was there is kept as the previous one. Rank 0 writes
    /// it.
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
    pub(super) fn tensors(&self) -> candle_core::Result<BTreeMap<String, Tensor>> {
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
                    let _alone = files::locked(files::parent(path), File::lock);
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
