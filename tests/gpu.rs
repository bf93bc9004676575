//! Everything that wants a GPU, in one binary: the operations against the f64 reference, the composed graph and the
//! emulator, in every dtype, behind any strides, again and again, on two streams, in a CUDA graph; the model, and its
//! training; with `--bench` timings. Without a device it says so and passes, unless CANDLE_SAM_LORA_REQUIRE_GPU is set.

#[path = "gpu/bench.rs"]
mod bench;
mod common;
#[path = "gpu/emulated.rs"]
mod emulated;
#[path = "gpu/graph.rs"]
mod graph;
#[path = "gpu/model.rs"]
mod model;
#[path = "gpu/ops.rs"]
mod ops;
#[path = "gpu/train.rs"]
mod train;

use candle_core::Device;
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;

/// A trial that gets a device of its own.
fn trial(
    name: String,
    test: impl FnOnce(&Device) -> candle_core::Result<()> + Send + 'static,
) -> Trial {
    Trial::test(name, move || {
        let device = Device::new_cuda(0).map_err(Failed::from)?;
        test(&device).map_err(Failed::from)
    })
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One GPU, one test: what a trial measures or captures is its own.
    arguments.test_threads.get_or_insert(1);
    if !arguments.list {
        if let Err(error) = Device::new_cuda(0) {
            let error = error.to_string();
            println!("skipped: no CUDA device: {}", error.lines().next().unwrap_or_default());
            let required = std::env::var_os("CANDLE_SAM_LORA_REQUIRE_GPU").is_some();
            return ExitCode::from(u8::from(required));
        }
    }
    let trials = [
        ops::trials(),
        graph::trials(),
        emulated::trials(),
        model::trials(),
        train::trials(),
        bench::trials(),
    ];
    libtest_mimic::run(&arguments, trials.into_iter().flatten().collect()).exit_code()
}
