//! The processes of a job that mpirun or a scheduler has started, or this one alone.

use crate::train::{threads_of_rank, together, Alone, Communicator};
use anyhow::Context;
use std::io::{stderr, Write};
use std::sync::Arc;

/// More threads than any host has cores take minutes to start.
const MOST_THREADS: i64 = 1024;

/// Refuses numbers of threads in the environment that are none, or too many. Their readers pass over the former.
pub fn check_threads() -> anyhow::Result<()> {
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        let Ok(text) = std::env::var(name) else { continue };
        let is_right = |count: i64| (0..=MOST_THREADS).contains(&count);
        if !text.is_empty() && !text.parse().is_ok_and(is_right) {
            anyhow::bail!(
                "{name} is {text:?}, expected a number of threads, {MOST_THREADS} at most"
            )
        }
    }
    Ok(())
}

/// How long processes wait for each other
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Processes {
    /// Seconds after which a process that waits for another one ends the job. More than the slowest image or part of a
    /// step takes, and one process's share of an evaluation
    #[arg(long, default_value_t = 1800, value_name = "SECONDS")]
    wait: u64,
    /// Threads of this process [default: RAYON_NUM_THREADS, or its share of the host's cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MOST_THREADS))]
    threads: Option<u16>,
}

impl Processes {
    /// Joins the job that started this process, or stays alone; starts this process's threads.
    pub fn join(self) -> anyhow::Result<Arc<dyn Communicator>> {
        let processes = self.connect()?;
        // All ask, whatever each was told.
        let share = threads_of_rank(&*processes)?;
        let shared = processes.on_this_host().len() > 1;
        let threads = match self.threads {
            Some(threads) => Some(usize::from(threads)),
            None if shared && std::env::var_os("RAYON_NUM_THREADS").is_none() => Some(share),
            None => None,
        };
        if let Some(threads) = threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build_global()
                .with_context(|| format!("{threads} threads"))?;
        }
        Ok(processes)
    }

    fn connect(self) -> anyhow::Result<Arc<dyn Communicator>> {
        // OpenMPI and PMIx; MPICH, Intel MPI and Slurm's PMI-2.
        let sizes = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].map(|name| std::env::var(name).ok());
        let in_job = sizes.iter().any(Option::is_some) || std::env::var_os("PMIX_RANK").is_some();
        if !in_job {
            return Ok(Arc::new(Alone));
        }
        #[cfg(feature = "mpi")]
        {
            let patience = std::time::Duration::from_secs(self.wait);
            let processes = crate::train::Mpi::initialize(patience)?;
            let found = processes.size().to_string();
            // Under another library's launcher each process would be alone, and all would do the same work.
            match sizes.into_iter().flatten().next() {
                Some(size) if size != found => anyhow::bail!(
                    "started as one of {size} processes, and MPI says {found}: start it by the launcher of the MPI library \
                     that it was built with"
                ),
                _ => Ok(Arc::new(processes)),
            }
        }
        #[cfg(not(feature = "mpi"))]
        match sizes.into_iter().flatten().next() {
            Some(size) if size == "1" => Ok(Arc::new(Alone)),
            size => anyhow::bail!(
                "one of {} processes, but this program was built without the feature mpi: each would do all the work; \
                 build it with --features cli,mpi",
                size.as_deref().unwrap_or("several")
            ),
        }
    }
}

/// Says how many processes there are, and how the first one's host is shared.
pub fn census(communicator: &dyn Communicator) -> String {
    let (all, here) = (communicator.size(), communicator.on_this_host().len());
    let threads = rayon::current_num_threads();
    format!("{all} processes, {here} on this host (threads each: {threads})")
}

/// Does what only the first process does; its error is the error of all.
pub fn on_first(
    communicator: &dyn Communicator,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let own = if communicator.rank() == 0 { work() } else { Ok(()) };
    together(communicator, own, |()| vec![]).map(|_| ())
}

/// The result of this process. An error that names a rank is an error of all: the first process tells it, before MPI
/// may end and mpirun with it. With an error of its own, a process ends the others.
pub fn ended<T>(communicator: &dyn Communicator, result: anyhow::Result<T>) -> anyhow::Result<T> {
    let rank = communicator.rank();
    result.map_err(|error| match communicator.size() {
        1 => error,
        _ if !names_a_rank(&error.to_string()) => {
            say(&format!("error: rank {rank}: {error}\n"));
            communicator.abort(1)
        }
        _ => {
            if rank == 0 {
                say(&format!("error: {error}\n"));
            }
            Told.into()
        }
    })
}

/// Writes a message in one piece, or mpirun mixes it with what others say.
fn say(message: &str) {
    let _ = stderr().write_all(message.as_bytes());
}

/// Whether a message begins as "rank 2: ". An error about the rank of an adapter does not.
fn names_a_rank(message: &str) -> bool {
    let number = message.strip_prefix("rank ").and_then(|rest| rest.split_once(": "));
    number.is_some_and(|(number, _)| number.parse::<usize>().is_ok())
}

/// The error of a process whose message is printed.
#[derive(Debug, thiserror::Error)]
#[error("told by the first process")]
pub struct Told;

#[cfg(test)]
mod tests {
    use super::names_a_rank;

    #[test]
    fn an_error_of_all_names_a_rank() {
        assert!(names_a_rank("rank 2: train: step 2: the loss is NaN"));
        assert!(!names_a_rank("rank must be at least 1: got 0"));
        assert!(!names_a_rank("photos: rank 2: no such folder"));
    }
}
