//! The limits of the machine.

use super::clock::{measure, Measurement};
use super::work::Work;
use anyhow::{Context, Result};
use candle_core::Device;
use rayon::prelude::*;

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
