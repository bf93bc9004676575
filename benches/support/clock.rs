//! Times, CPU time and peak memory of a run. Also of those in `benches/peers/candle`.

use super::memory::Memory;
use anyhow::Result;
use candle_core::Device;
use std::time::Instant;

/// A measurement, in seconds and bytes.
#[derive(Debug, Default)]
pub struct Measurement {
    pub first_s: f64,
    pub wall_s: Vec<f64>,
    /// Wall times of the baseline that ran in turns with it.
    pub base_wall_s: Vec<f64>,
    pub cpu_s: Vec<f64>,
    /// Growth of the peak of memory in use; none where the system does not tell.
    pub memory: Option<u64>,
    /// On a GPU the peak itself, weights and all.
    pub gpu_peak: Option<u64>,
}

/// Runs once, then `reps` times.
pub fn measure(
    reps: usize,
    device: &Device,
    run: impl FnMut() -> Result<()>,
) -> Result<Measurement> {
    measure_all(reps, device, run, None::<fn() -> Result<()>>)
}

/// As [`measure`], with a run of `base` before each.
pub fn measure_in_turns(
    reps: usize,
    device: &Device,
    run: impl FnMut() -> Result<()>,
    base: impl FnMut() -> Result<()>,
) -> Result<Measurement> {
    measure_all(reps, device, run, Some(base))
}

fn measure_all(
    reps: usize,
    device: &Device,
    mut run: impl FnMut() -> Result<()>,
    mut base: Option<impl FnMut() -> Result<()>>,
) -> Result<Measurement> {
    let memory = Memory::now(device);
    let mut measured =
        Measurement { first_s: timed(device, &mut run)?.0, ..Measurement::default() };
    if let Some(base) = &mut base {
        timed(device, base)?;
    }
    for _ in 0..reps {
        if let Some(base) = &mut base {
            measured.base_wall_s.push(timed(device, base)?.0);
        }
        let (wall, cpu) = timed(device, &mut run)?;
        measured.wall_s.push(wall);
        measured.cpu_s.extend(cpu);
    }
    measured.gpu_peak = memory.as_ref().and_then(Memory::gpu_peak);
    measured.memory = memory.and_then(|memory| memory.growth());
    Ok(measured)
}

/// Wall time, and CPU time where the system tells it.
fn timed(device: &Device, run: &mut impl FnMut() -> Result<()>) -> Result<(f64, Option<f64>)> {
    let (start, cpu) = (Instant::now(), cpu_time());
    run()?;
    device.synchronize()?;
    let used = cpu_time().zip(cpu).map(|(end, start)| end - start);
    Ok((start.elapsed().as_secs_f64(), used))
}

/// Seconds of all threads of this process.
#[cfg(unix)]
fn cpu_time() -> Option<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Some(time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64)
}

#[cfg(not(unix))]
fn cpu_time() -> Option<f64> {
    None
}
