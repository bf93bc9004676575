//! A network that is slower than the one there is: sleep before each exchange.

use candle_sam_lora::train::Communicator;
use candle_sam_lora::Result;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Processes behind a network of this latency and bandwidth.
#[derive(Debug)]
pub struct Network {
    pub processes: Arc<dyn Communicator>,
    /// Time of an exchange of nothing.
    pub latency: Duration,
    /// Bytes a second that a process sends and receives.
    pub bandwidth: f64,
    /// Exchanges in which each rank got a piece of its own.
    pub divided: AtomicUsize,
}

impl Network {
    pub fn new(processes: Arc<dyn Communicator>, latency: Duration, bandwidth: f64) -> Self {
        Self { processes, latency, bandwidth, divided: AtomicUsize::new(0) }
    }

    fn sleep(&self, bytes: usize) {
        std::thread::sleep(self.latency + Duration::from_secs_f64(bytes as f64 / self.bandwidth));
    }
}

impl Communicator for Network {
    fn rank(&self) -> usize {
        self.processes.rank()
    }

    fn size(&self) -> usize {
        self.processes.size()
    }

    fn on_this_host(&self) -> Vec<usize> {
        self.processes.on_this_host()
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.sleep((self.size() - 1) * own.len());
        self.processes.all_gather(own)
    }

    fn all_to_all(&self, pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        self.divided.fetch_add(1, Ordering::Relaxed);
        let others = pieces.iter().enumerate().filter(|(rank, _)| *rank != self.rank());
        self.sleep(others.map(|(_, piece)| piece.len()).sum());
        self.processes.all_to_all(pieces)
    }

    fn send(&self, rank: usize, bytes: &[u8]) -> Result<()> {
        self.sleep(bytes.len());
        self.processes.send(rank, bytes)
    }

    fn receive(&self) -> Result<Option<(usize, Vec<u8>)>> {
        self.processes.receive()
    }

    fn patience(&self) -> Duration {
        self.processes.patience()
    }
}
