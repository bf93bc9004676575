//! How long the GPU takes, by events in its stream.

use anyhow::Result;
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::Device;
use std::time::Instant;

/// How much is run for one number.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The median is taken of so many.
    pub batches: usize,
    /// About the length of a batch, and of what is run before the first one.
    pub batch_s: f64,
}

/// Seconds of one run.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub median: f64,
    pub least: f64,
    pub most: f64,
    /// Runs of a batch.
    pub runs: usize,
}

impl Default for Clock {
    fn default() -> Self {
        Self { batches: 5, batch_s: 0.02 }
    }
}

impl Clock {
    pub fn time<T>(self, device: &Device, mut run: impl FnMut() -> Result<T>) -> Result<Times> {
        let mut batch = |runs: usize| of_batch(device, runs, &mut run);
        batch(1)?; // loads kernels
        let runs = (self.batch_s / batch(1)?.max(1e-7)).clamp(1.0, 2000.0) as usize;
        if runs > 1 {
            batch(runs)?;
        }
        let mut times = (0..self.batches).map(|_| batch(runs)).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        let [least, .., most] = times[..] else {
            return Ok(Times { median: times[0], least: times[0], most: times[0], runs });
        };
        Ok(Times { median: times[times.len() / 2], least, most, runs })
    }
}

/// Seconds of a run, of so many.
fn of_batch<T>(device: &Device, runs: usize, run: &mut impl FnMut() -> Result<T>) -> Result<f64> {
    let mut all = || (0..runs).try_for_each(|_| run().map(drop));
    let seconds = match device {
        Device::Cuda(cuda) => {
            let stream = cuda.cuda_stream();
            let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            let start = event()?;
            all()?;
            let end = event()?;
            cuda.synchronize()?;
            f64::from(start.elapsed_ms(&end)?) / 1e3
        }
        _ => {
            let start = Instant::now();
            all()?;
            start.elapsed().as_secs_f64()
        }
    };
    Ok(seconds / runs as f64)
}
