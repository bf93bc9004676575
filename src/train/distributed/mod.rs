//! Many processes, one run: N processes give the bits of one that makes N times the parts a step.
//!
//! ```text
//! part      0        1        ..  N-1      N        N+1      ..      of a step's batch
//! rank      0        1        ..  N-1      0        1        ..      computes it
//! gradient  ((g0   +   g1)  + ..    + gN-1)  +  gN)   + ..           added in this order, whoever computed it
//! ```
//! Floating-point sums depend on their order, so ranks send each part's gradient and not sums of their own. Small
//! gradients go to all ranks. With large gradients, rank r adds the r-th chunk of all, and the chunks are gathered once
//! a step. A parameter then crosses the network twice, however many ranks there are. Norm, clipping and optimizer are
//! then the same computation on every rank.
//!
//! Before each exchange every rank says whether its part succeeded. A failure on one is an error on all, which names
//! it.

mod agreement;
mod broadcast;
mod host;
#[cfg(feature = "mpi")]
mod mpi;
mod ordered_sum;
mod outcome;
mod queue;
mod step_times;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;

pub use agreement::check_agreement;
pub(super) use broadcast::broadcast;
pub use host::{device_of_rank, threads_of_rank};
pub(super) use ordered_sum::OrderedSum;
pub use outcome::together;
pub use queue::share;
pub use step_times::StepTimes;

use crate::{Error, Result};
use std::io::{stderr, Write};
use std::time::Duration;

/// The exit status of a job that a lost rank has ended.
const LOST: i32 = 75;
/// How long a rank lets another one speak of a lost rank.
const GRACE: Duration = Duration::from_secs(1);

/// Processes that work on one run together, and how they exchange bytes.
///
/// Every rank makes the same calls in the same order. An error means that the exchange failed, not that another rank's
/// work did; the run ends then, because ranks may have stopped at different calls.
///
/// [Example](crate::train::share)
pub trait Communicator: std::fmt::Debug + Send + Sync {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn size(&self) -> usize;

    /// Gathers the bytes of every rank, by rank. Lengths may differ.
    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Exchanges bytes between all ranks: sends `pieces[r]` to rank `r`, and returns the bytes for this rank, by
    /// sender.
    fn all_to_all(&self, pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>>;

    /// Ranks of the processes on this host, this one among them, ascending.
    fn on_this_host(&self) -> Vec<usize> {
        vec![self.rank()]
    }

    /// Sends bytes to a rank, which takes them by [`receive`](Self::receive). Only [`share`] needs messages.
    fn send(&self, _rank: usize, _bytes: &[u8]) -> Result<()> {
        Err(Error::config(
            "these processes exchange no messages, which the division of items needs",
        ))
    }

    /// A message that has come, with its sender; none if there is none yet.
    fn receive(&self) -> Result<Option<(usize, Vec<u8>)>> {
        Err(Error::config(
            "these processes exchange no messages, which the division of items needs",
        ))
    }

    /// How long a rank waits for another one.
    fn patience(&self) -> Duration {
        Duration::MAX
    }

    /// Ends this process and all others at once: for an error that others cannot learn of by an exchange.
    fn abort(&self, status: i32) -> ! {
        std::process::exit(status)
    }
}

/// A process by itself.
///
/// [Example](crate::train::share)
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![own.to_vec()])
    }

    fn all_to_all(&self, pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        Ok(pieces.iter().map(|piece| piece.to_vec()).collect())
    }
}

/// Says which ranks did not come, and ends the job. The lowest of the ranks that came speaks for all.
fn lost(communicator: &dyn Communicator, ranks: &[usize], waited: Duration) -> ! {
    let speaker = (0..communicator.size()).find(|rank| !ranks.contains(rank));
    if speaker != Some(communicator.rank()) {
        // The speaker ends this process meanwhile, unless it hangs, too.
        std::thread::sleep(GRACE);
    }
    let message = format!(
        "error: rank {} of {} waited {:.0} s for rank {}, which did not come; the job ends\n",
        communicator.rank(),
        communicator.size(),
        waited.as_secs_f64(),
        ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
    );
    // In one piece, or mpirun mixes it with what others say.
    let _ = stderr().write_all(message.as_bytes());
    communicator.abort(LOST)
}
