//! Many processes, one run: N processes give the bits of one that makes N times the parts a step.
//!
//! ```text
//! part      0        1        ..  N-1      N        N+1      ..      of a step's batch
//! rank      0        1        ..  N-1      0        1        ..      computes it
//! gradient  ((g0   +   g1)  + ..    + gN-1)  +  gN)   + ..           added in this order, whoever computed it
//! ```
//! Floating-point sums depend on their order, so ranks send each part's gradient and not sums of their own. Small
//! gradients go to all ranks. With large gradients, rank r adds the r-th chunk of all, and the chunks are gathered once a
//! step. A parameter then crosses the network twice, however many ranks there are. Norm, clipping and optimizer are then the same
//! computation on every rank.
//!
//! Before each exchange every rank says whether its part succeeded. A failure on one is an error on all, which names it.

mod agreement;
mod host;
#[cfg(feature = "mpi")]
mod mpi;
mod ordered_sum;
mod outcome;
mod step_times;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;

pub(super) use agreement::check_agreement;
pub use host::{device_of_rank, threads_of_rank};
pub(super) use ordered_sum::OrderedSum;
pub use outcome::together;
pub use step_times::StepTimes;

use crate::Result;

/// Processes that work on one run together, and how they exchange bytes.
///
/// Every rank makes the same calls in the same order. An error means that the exchange failed, not that another rank's work
/// did; the run ends then, because ranks may have stopped at different calls.
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

    /// Ends this process and all others at once: for an error that others cannot learn of by an exchange.
    fn abort(&self, status: i32) -> ! {
        std::process::exit(status)
    }
}

/// A process by itself.
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
