//! Processes that MPI has started: by `mpirun`, Slurm or Kubernetes.

use super::Communicator;
use crate::{Error, Result};
use mpi::environment::Universe;
use mpi::request::{LocalScope, Request};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives, Destination, Source};
use mpi::Threading;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of a message at most; MPI counts elements in 32 bits with a sign.
const MESSAGE: usize = 1 << 30;
/// How long an exchange polls without sleeping.
const SPIN: Duration = Duration::from_micros(200);
const NAP: Duration = Duration::from_micros(100);
/// Time between two polls that counts as waiting, at most: a process that was stopped itself has not waited.
const POLL: Duration = Duration::from_millis(500);
/// The tag of messages, which belong to no exchange.
const MESSAGE_TAG: i32 = 1;

/// The processes of one MPI job.
///
/// [Example](crate::guide::distributed)
pub struct Mpi {
    rank: usize,
    size: usize,
    on_this_host: Vec<usize>,
    /// How long the other ranks may take to come to an exchange.
    patience: Duration,
    /// Ends MPI when dropped. One exchange at a time.
    universe: Mutex<Universe>,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Mpi {{ rank: {}, size: {}, patience: {:?} }}",
            self.rank, self.size, self.patience
        )
    }
}

impl Mpi {
    /// Joins the job that started this process; alone if none did.
    ///
    /// `patience` is how long a rank waits in an exchange for the others. It must be longer than the slowest part of a
    /// step and the slowest evaluation. MPI cannot take back a message, so when it has passed the job is aborted: one
    /// line to stderr says which ranks did not come.
    ///
    /// # Errors
    /// - MPI was initialized before;
    /// - the MPI library does not take calls from threads in turns.
    pub fn initialize(patience: Duration) -> Result<Self> {
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized)
        else {
            return Err(Error::config("MPI is initialized already"));
        };
        if threading < Threading::Serialized {
            let message = format!("this MPI library has thread support {threading:?} only");
            return Err(Error::config(message));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        let host = world.split_shared(world.rank());
        let mut neighbours = vec![0; host.size() as usize];
        host.all_gather_into(&world.rank(), &mut neighbours[..]);
        let on_this_host = neighbours.into_iter().map(|rank| rank as usize).collect();
        Ok(Self { rank, size, on_this_host, patience, universe: Mutex::new(universe) })
    }

    fn universe(&self) -> MutexGuard<'_, Universe> {
        self.universe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends to each rank and receives from each; `received` has the right lengths.
    fn exchange(&self, sent: &[&[u8]], received: &mut [Vec<u8>]) {
        // Two threads' exchanges would take each other's messages.
        let universe = self.universe();
        let world = universe.world();
        mpi::request::scope(|scope| {
            let mut requests = vec![];
            for (rank, buffer) in received.iter_mut().enumerate() {
                if rank == self.rank {
                    buffer.copy_from_slice(sent[rank]);
                    continue;
                }
                let peer = world.process_at_rank(rank as i32);
                for message in buffer.chunks_mut(MESSAGE) {
                    requests.push((rank, peer.immediate_receive_into(scope, message)));
                }
            }
            for (rank, bytes) in sent.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
                let peer = world.process_at_rank(rank as i32);
                for message in bytes.chunks(MESSAGE) {
                    requests.push((rank, peer.immediate_send(scope, message)));
                }
            }
            self.complete(requests);
        });
    }

    /// Polls until all are done, or aborts the job.
    fn complete<'a>(&self, mut requests: Vec<(usize, Request<'a, [u8], &LocalScope<'a>>)>) {
        let (mut waited, mut last) = (Duration::ZERO, Instant::now());
        loop {
            requests = requests
                .into_iter()
                .filter_map(|(rank, request)| request.test().err().map(|request| (rank, request)))
                .collect();
            if requests.is_empty() {
                return;
            }
            waited += last.elapsed().min(POLL);
            last = Instant::now();
            if waited > self.patience {
                let missing: BTreeSet<usize> = requests.iter().map(|(rank, _)| *rank).collect();
                super::lost(self, &missing.into_iter().collect::<Vec<_>>(), waited)
            }
            if waited > SPIN {
                std::thread::sleep(NAP);
            }
        }
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn on_this_host(&self) -> Vec<usize> {
        self.on_this_host.clone()
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.all_to_all(&vec![own; self.size])
    }

    fn all_to_all(&self, pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        if pieces.len() != self.size {
            let message = format!("{} pieces for {} ranks", pieces.len(), self.size);
            return Err(Error::config(message));
        }
        let lengths: Vec<_> =
            pieces.iter().map(|piece| (piece.len() as u64).to_ne_bytes()).collect();
        let lengths: Vec<&[u8]> = lengths.iter().map(|length| length.as_slice()).collect();
        let mut received = vec![vec![0; size_of::<u64>()]; self.size];
        self.exchange(&lengths, &mut received);
        let mut buffers = vec![];
        for (rank, length) in received.iter().enumerate() {
            buffers.push(buffer(rank, length)?);
        }
        self.exchange(pieces, &mut buffers);
        Ok(buffers)
    }

    fn send(&self, rank: usize, bytes: &[u8]) -> Result<()> {
        let universe = self.universe();
        let peer = universe.world();
        let peer = peer.process_at_rank(rank as i32);
        let length = (bytes.len() as u64).to_ne_bytes();
        mpi::request::scope(|scope| {
            let parts = [length.as_slice()].into_iter().chain(bytes.chunks(MESSAGE));
            let sent = parts
                .map(|part| (rank, peer.immediate_send_with_tag(scope, part, MESSAGE_TAG)))
                .collect();
            self.complete(sent);
        });
        Ok(())
    }

    fn receive(&self) -> Result<Option<(usize, Vec<u8>)>> {
        let universe = self.universe();
        let world = universe.world();
        let Some(status) = world.any_process().immediate_probe_with_tag(MESSAGE_TAG) else {
            return Ok(None);
        };
        let rank = status.source_rank() as usize;
        let peer = world.process_at_rank(status.source_rank());
        let receive = |bytes: &mut [u8]| {
            mpi::request::scope(|scope| {
                let received = bytes
                    .chunks_mut(MESSAGE)
                    .map(|part| {
                        (rank, peer.immediate_receive_into_with_tag(scope, part, MESSAGE_TAG))
                    })
                    .collect();
                self.complete(received);
            });
        };
        let mut length = [0; size_of::<u64>()];
        receive(&mut length);
        let mut bytes = buffer(rank, &length)?;
        receive(&mut bytes);
        Ok(Some((rank, bytes)))
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    fn abort(&self, status: i32) -> ! {
        // Not by the universe, which an exchange that hangs may hold.
        SimpleCommunicator::world().abort(status)
    }
}

/// A buffer for as many bytes as a rank says it sends.
fn buffer(rank: usize, length: &[u8]) -> Result<Vec<u8>> {
    let length = length.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    let mut buffer = vec![];
    if buffer.try_reserve_exact(length as usize).is_err() {
        let message = format!("sends {length} bytes, more than there is memory here");
        return Err(Error::Rank { rank, message });
    }
    buffer.resize(length as usize, 0);
    Ok(buffer)
}
