//! The clock, and the limits of the machine.

use super::memory::Memory;
use super::work::Work;
use anyhow::{Context, Result};
use candle_core::Device;
use rayon::prelude::*;
use std::time::Instant;

/// What was measured; seconds and bytes.
#[derive(Debug, Default)]
pub struct Measurement {
    pub first_s: f64,
    pub wall_s: Vec<f64>,
    /// Of what ran in turns with it.
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

/// The best this machine's arithmetic does: the `gemm` crate on SAM's qkv projection, into memory that is there.
pub fn gemm_peak(reps: usize) -> Result<(Measurement, Work)> {
    const M: usize = 4096;
    const K: usize = 768;
    const N: usize = 2304;
    let (lhs, rhs) = (vec![0.5f32; M * K], vec![0.25f32; K * N]);
    let mut dst = vec![0f32; M * N];
    let measured = measure(reps, &Device::Cpu, || {
        let (rows, row, col) = (N as isize, K as isize, 1);
        // SAFETY: the pointers are those of vectors of M x N, M x K and K x N, row-major, as the strides say; `dst`
        // overlaps neither.
        unsafe {
            gemm::gemm(
                M,
                N,
                K,
                dst.as_mut_ptr(),
                col,
                rows,
                false,
                lhs.as_ptr(),
                col,
                row,
                rhs.as_ptr(),
                col,
                rows,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            )
        };
        std::hint::black_box(&dst);
        Ok(())
    })?;
    let expected = 0.125 * K as f32;
    let last = *dst.last().context("gemm: an empty product")?;
    anyhow::ensure!(last == expected, "gemm: got {last}, expected {expected}");
    let flops = 2.0 * (M * N * K) as f64;
    Ok((measured, Work { flops, bytes: 4.0 * (M * K + K * N + M * N) as f64 }))
}

/// The best this machine's memory does: a copy by all threads; read and written bytes are counted.
pub fn copy_bandwidth(reps: usize) -> Result<(Measurement, Work)> {
    const SIZE: usize = 256 << 20;
    let source = vec![1u8; SIZE];
    let mut target = vec![0u8; SIZE];
    let chunk = SIZE.div_ceil(rayon::current_num_threads());
    let measured = measure(reps, &Device::Cpu, || {
        target.par_chunks_mut(chunk).zip(source.par_chunks(chunk)).for_each(|(to, from)| {
            to.copy_from_slice(from);
        });
        std::hint::black_box(&target);
        Ok(())
    })?;
    Ok((measured, Work { flops: 0.0, bytes: 2.0 * SIZE as f64 }))
}
