//! Criterion's settings for operations that take milliseconds to seconds.

use super::work::Work;
use candle_core::{Device, Result};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput};
use std::time::Duration;

/// True when everything is to be measured (BENCH_ALL=1), at the full sizes; else a choice that ends in minutes.
pub fn all() -> bool {
    std::env::var("BENCH_ALL").is_ok_and(|value| value != "0")
}

/// A group of ten samples each, of as few iterations as fill the time.
pub fn group<'a>(c: &'a mut Criterion, name: &str, work: Work) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    let (flops, bytes) = (work.flops as u64, work.bytes as u64);
    group
        .sample_size(10)
        .sampling_mode(SamplingMode::Flat)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .throughput(match flops {
            0 => Throughput::Bytes(bytes),
            _ => Throughput::ElementsAndBytes { elements: flops, bytes },
        });
    group
}

/// Measures `run`, with the device's work done; an error ends the program.
pub fn bench(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    device: &Device,
    mut run: impl FnMut() -> Result<()>,
) {
    group.bench_function(name, |b| {
        b.iter(|| {
            if let Err(error) = run().and_then(|()| device.synchronize()) {
                eprintln!("{name}: {error}");
                std::process::exit(1);
            }
        })
    });
}
