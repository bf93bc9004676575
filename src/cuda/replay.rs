//! A training step's launches as a CUDA graph, and what differs from step to step: a few bytes in device memory.
//!
//! ```text
//! values    [ seed | 0 | table of the optimizer ]       written by one copy before each replay
//! ```
//! While a step is recorded, kernels get the address of the seed, and those of the optimizer that of the table.

use super::graphed::record;
use crate::launch::device_ptr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, DevicePtr};
use candle_core::{bail, CudaDevice, Device, Error, Result};
use std::cell::Cell;

/// Bytes before the table, which is aligned to 16.
const BEFORE_TABLE: usize = 16;

/// Work of this thread for a graph.
#[derive(Clone, Copy)]
enum Work {
    /// A run whose small copies to the GPU candle keeps for the recorded run.
    WarmUp,
    /// The recorded run, of a mode with this seed. The values lie at the address.
    Recorded { seed: u64, values: device_ptr },
}

thread_local! {
    static WORK: Cell<Option<Work>> = const { Cell::new(None) };
}

/// Forgets the work, however it ends.
struct Ending;

impl Drop for Ending {
    fn drop(&mut self) {
        WORK.set(None);
    }
}

fn during<T>(work: Work, run: impl FnOnce() -> T) -> T {
    WORK.set(Some(work));
    let _ending = Ending;
    run()
}

/// Whether a step is recorded on this thread, or warms up for that. A tensor that it keeps for later steps may not be
/// one that a cache frees.
pub(crate) fn prepares_graph() -> bool {
    WORK.get().is_some()
}

/// Whether a step is recorded on this thread.
pub(crate) fn is_recording() -> bool {
    matches!(WORK.get(), Some(Work::Recorded { .. }))
}

/// The seed of the recorded step, and the address of those in its place.
pub(super) fn seed() -> Option<(u64, device_ptr)> {
    match WORK.get() {
        Some(Work::Recorded { seed, values }) => Some((seed, values)),
        _ => None,
    }
}

/// The address of the recorded step's table.
pub(super) fn table() -> Option<device_ptr> {
    seed().map(|(_, values)| values + BEFORE_TABLE as u64)
}

/// Runs a step as it is, once, so that the same step can be recorded.
///
/// # Errors
/// - the device is no GPU;
/// - `step` fails.
pub(crate) fn warm_up<T>(device: &Device, step: impl FnOnce() -> Result<T>) -> Result<T> {
    let _kept = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    during(Work::WarmUp, step)
}

/// A recorded step.
pub(crate) struct Replay {
    graph: CudaGraph,
    device: CudaDevice,
    values: CudaSlice<u8>,
}

impl Replay {
    /// Records the launches of `step`, in a mode with this seed. The optimizer's table has `table_bytes`.
    ///
    /// # Errors
    /// - the device is no GPU, or tracks events between several streams;
    /// - the step fails, reads a value on the host, or copies to the GPU what it did not copy in the warm-up;
    /// - the step has a dropout whose seed is not that of its mode.
    pub fn record(
        device: &Device,
        seed: u64,
        table_bytes: usize,
        step: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let device = super::graphed::gpu(device)?;
        let stream = device.cuda_stream();
        // SAFETY: `run` writes it before every replay.
        let values = unsafe { stream.alloc::<u8>(BEFORE_TABLE + table_bytes) };
        let values = values.map_err(Error::wrap)?;
        let work = Work::Recorded { seed, values: values.device_ptr(&stream).0 };
        let _kept = device.enable_cuda_graph_htod_cache();
        let graph = during(work, || record(device, step))?;
        Ok(Self { graph, device: device.clone(), values })
    }

    /// Launches the step with another seed and the optimizer's table for it.
    ///
    /// # Errors
    /// - the table has another length than the recorded one's;
    /// - the driver fails.
    pub fn run(&mut self, seed: u64, table: &[u8]) -> Result<()> {
        if BEFORE_TABLE + table.len() != self.values.len() {
            bail!("a table of {} bytes in {}", table.len(), self.values.len())
        }
        let mut bytes = vec![0; BEFORE_TABLE];
        bytes[..size_of::<u64>()].copy_from_slice(&seed.to_le_bytes());
        bytes.extend(table);
        let stream = self.device.cuda_stream();
        stream.memcpy_htod(&bytes, &mut self.values).map_err(Error::wrap)?;
        self.graph.launch().map_err(|e| Error::wrap(e).context("replaying a step"))
    }
}
