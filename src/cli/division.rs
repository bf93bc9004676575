//! Images and files that the processes of a job divide, with the output of one process.

use super::arguments::ModelArguments;
use super::console::{take_kept, Console, Line};
use super::model::{Placement, Prompted, Source};
use super::processes::{Processes, Told};
use crate::files::{create_dir, Checksum};
use crate::nn::{ModuleTree, Node};
use crate::train::{check_agreement, share, together, Communicator};
use crate::Error;
use anyhow::{anyhow, Result};
use candle_core::Device;
use indicatif::ProgressBar;
use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::{json, Map};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// No line about the progress comes sooner after another.
const PAUSE: Duration = Duration::from_secs(10);

/// The processes of a job, and the console that speaks for all.
pub struct Division {
    processes: Arc<dyn Communicator>,
    /// Mute in all processes but the first.
    pub console: Console,
}

/// Work on one item: how it speaks, and how it shows that it goes on.
pub struct Turn<'a> {
    /// Its lines are printed in the order of the items.
    pub console: Console,
    /// Called now and then.
    pub alive: &'a dyn Fn(),
}

impl Division {
    /// Joins the job, or stays alone.
    pub fn join(processes: Processes, console: Console) -> Result<Self> {
        let processes = processes.join()?;
        let console = console.of(processes.rank());
        Ok(Self { processes, console })
    }

    /// All processes.
    pub fn processes(&self) -> &dyn Communicator {
        &*self.processes
    }

    /// Whether there are several processes.
    pub fn is_divided(&self) -> bool {
        self.processes.size() > 1
    }

    /// Whether this is the first process, which does the first item and writes what is of all.
    pub fn is_first(&self) -> bool {
        self.processes.rank() == 0
    }

    /// The result of this process, see [`ended`](super::processes::ended).
    pub fn ended(&self, result: Result<()>) -> Result<()> {
        super::processes::ended(&*self.processes, result)
    }

    /// Does it in every process; an error of one is an error of all.
    pub fn each<T>(&self, own: impl FnOnce() -> Result<T>) -> Result<T> {
        Ok(together(&*self.processes, own(), |_| vec![])?.0)
    }

    /// Fails unless all processes have the same command line and the same inputs, by their names.
    pub fn agree_on_inputs<'a>(&self, inputs: impl Iterator<Item = &'a Path>) -> Result<()> {
        let (mut names, mut count) = (Checksum::new(), 0);
        for input in inputs {
            names.add(&input.to_string_lossy(), &[]);
            count += 1;
        }
        let command: Vec<String> =
            std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
        self.agree([
            ("version", env!("CARGO_PKG_VERSION").to_string()),
            ("command", command.join(" ")),
            ("inputs", format!("{count}, checksum of the names {names}")),
        ])
    }

    /// The model that the arguments name, in every process; fails unless it is one model.
    pub fn load(&self, model: &ModelArguments, place: &Placement) -> Result<(Source, Prompted)> {
        let loaded = self.each(|| {
            let source = model.find(self.console)?;
            let prompted = source.load_prompted(place, self.console)?;
            Ok((source, prompted))
        })?;
        self.agree_on_model(loaded.1.tree())?;
        Ok(loaded)
    }

    /// Fails unless all processes have the same model, by a checksum of its tensors.
    pub fn agree_on_model(&self, model: &dyn ModuleTree) -> Result<()> {
        if !self.is_divided() {
            return Ok(());
        }
        let (mut weights, mut failed) = (Checksum::new(), None);
        model.visit("", &mut |name, node| {
            if let Node::Parameter(tensor) | Node::Buffer(tensor) = node {
                match tensor.to_device(&Device::Cpu) {
                    Ok(tensor) => weights.add(name, &safetensors::View::data(&tensor)),
                    Err(error) => failed = Some(error),
                }
            }
        });
        let own = failed.map_or(Ok(()), |error| Err(Error::from(error)));
        together(&*self.processes, own, |()| vec![])?;
        self.agree([("model", format!("checksum of the tensors {weights}"))])
    }

    fn agree<const N: usize>(&self, settings: [(&str, String); N]) -> Result<()> {
        let settings = settings.map(|(name, value)| (name.to_string(), json!(value)));
        Ok(check_agreement(&*self.processes, &Map::from_iter(settings))?)
    }

    /// Makes a folder for results, and fails unless it is one folder for all processes.
    pub fn make_folder(&self, folder: &Path) -> Result<()> {
        let mut mark = None;
        let mut own = || -> Result<PathBuf> {
            create_dir(folder)?;
            let made = tempfile::Builder::new().prefix(".tmp-shared-").tempfile_in(folder);
            Ok(mark.insert(made.map_err(|e| Error::io(folder, e))?).path().to_path_buf())
        };
        if !self.is_divided() {
            return Ok(create_dir(folder)?);
        }
        let own = if self.is_first() { own() } else { Ok(PathBuf::new()) };
        let name =
            |path: &PathBuf| json!(path.file_name().map(|n| n.to_string_lossy())).to_string();
        let (_, told) = together(&*self.processes, own, |path| name(path).into_bytes())?;
        self.each(|| {
            let name: String = serde_json::from_slice(&told[0])?;
            match folder.join(name).exists() {
                true => Ok(()),
                false => Err(anyhow!(
                    "{}: is another folder than that of rank 0; all processes need one for the results",
                    folder.display()
                )),
            }
        })
    }

    /// Looks at all items, each process at its share; every process gets all answers.
    pub fn survey<T: Serialize + DeserializeOwned>(
        &self,
        count: usize,
        look: impl FnMut(usize) -> Result<T>,
    ) -> Result<Vec<T>> {
        let (rank, size) = (self.processes.rank(), self.processes.size());
        let own = (rank..count).step_by(size).map(look).collect::<Result<Vec<T>>>();
        if size == 1 {
            return own;
        }
        let (_, told) = together(&*self.processes, own, |own| json!(own).to_string().into_bytes())?;
        let shares = told.iter().map(|share| serde_json::from_slice::<Vec<T>>(share));
        let mut shares = shares.map(|share| Ok(share?.into_iter())).collect::<Result<Vec<_>>>()?;
        let next = |item: usize| shares[item % size].next();
        let all: Option<Vec<T>> = (0..count).map(next).collect();
        all.ok_or_else(|| anyhow!("a process did not look at its share"))
    }

    /// Does items, which the processes take as they become free. The first process collects the results as they come.
    /// It prints the lines of an item once those before it are printed. `bar` counts items if several processes do
    /// them.
    pub fn divide<T: Serialize + DeserializeOwned>(
        &self,
        names: &[String],
        bar: &ProgressBar,
        mut work: impl FnMut(usize, Turn<'_>) -> Result<T>,
        mut collect: impl FnMut(usize, T) -> Result<()> + Send,
    ) -> Result<()> {
        let (console, divided) = (self.console, self.is_divided());
        let voice = if divided { console.kept() } else { console };
        if divided {
            bar.set_length(names.len() as u64);
        }
        let work = |item: usize, alive: &dyn Fn()| -> Result<Vec<u8>> {
            let result = work(item, Turn { console: voice, alive })
                .map_err(|error| with_name(error, &names[item]))?;
            Ok(serde_json::to_vec(&(take_kept(), result))?)
        };
        let (mut waiting, mut next, mut done) = (BTreeMap::<usize, Vec<Line>>::new(), 0, 0);
        let mut said = Instant::now();
        let collect = |item: usize, told: Vec<u8>| {
            let (lines, result) = serde_json::from_slice(&told)?;
            collect(item, result)?;
            waiting.insert(item, lines);
            while let Some(lines) = waiting.remove(&next) {
                bar.suspend(|| lines.into_iter().for_each(|line| console.say(line)));
                next += 1;
            }
            done += 1;
            if divided {
                bar.set_position(done);
                bar.set_message(names[item].clone());
            }
            // Without a terminal there is no bar, and the lines of what is done wait for a slow item.
            if bar.is_hidden() && !waiting.is_empty() && said.elapsed() > PAUSE {
                said = Instant::now();
                let (all, slow) = (names.len(), &names[next]);
                console.note(format!("{done} of {all} are done; the first that is not is {slow}"));
            }
            Ok(())
        };
        share(&*self.processes, names.len(), work, collect)
    }
}

/// The error of an item, with its name if the text lacks it.
fn with_name(error: anyhow::Error, name: &str) -> anyhow::Error {
    match error.is::<Told>() || error.to_string().contains(name) {
        true => error,
        false => anyhow!("{name}: {error}"),
    }
}
