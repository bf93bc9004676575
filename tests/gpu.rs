//! Everything that wants a GPU, in one binary: the operations against the f64 reference, the composed graph and the
//! emulator, in every dtype, behind any strides, again and again, on two streams, in a CUDA graph; the model, and its
//! training. Without a device it says so and passes, unless CANDLE_SAM_LORA_REQUIRE_GPU is set.
//!
//! For scripts/gpu/, where one binary has to do, it is also the benchmark and the example of these names, and what
//! measures tiles: called as `cases`, `finetune` or `tune`, that is what it is.

#[path = "../benches/cases.rs"]
mod cases;
mod common;
#[path = "gpu/driver_calls.rs"]
mod driver_calls;
#[path = "gpu/emulated.rs"]
mod emulated;
#[path = "../examples/finetune/main.rs"]
mod finetune;
#[path = "gpu/graph.rs"]
mod graph;
#[path = "gpu/graphed.rs"]
mod graphed;
#[path = "gpu/model.rs"]
mod model;
#[path = "gpu/ops.rs"]
mod ops;
#[path = "gpu/self_test.rs"]
mod self_test;
#[path = "gpu/train.rs"]
mod train;
#[path = "gpu/tune.rs"]
mod tune;

use candle_core::{bail, Device, Result};
use candle_sam_lora::cuda::{self, Kernels};
use libtest_mimic::{Arguments, Failed, Trial};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;

/// The GPU of this process: candle loads its kernels once for each device.
fn gpu() -> std::result::Result<&'static Device, String> {
    static GPU: OnceLock<std::result::Result<Device, String>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| Device::new_cuda(0).map_err(|e| e.to_string()));
    gpu.as_ref().map_err(String::clone)
}

/// Sees at a test's end, however it comes, whether the GPU still answers. After an illegal access it never does again in
/// this process: to go on would blame the tests that follow.
struct Watch<'a> {
    test: &'a str,
    device: &'a Device,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.device.synchronize() {
            eprintln!("{}: the GPU does not answer any more: {error}", self.test);
            std::process::exit(70);
        }
    }
}

/// A trial on the GPU.
fn trial(name: String, test: impl FnOnce(&Device) -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name.clone(), move || {
        let device = gpu()?;
        let _watch = Watch { test: &name, device };
        test(device).map_err(Failed::from)
    })
}

/// Runs a test with each implementation that the device has kernels of, and says with which one it failed.
fn with_each(device: &Device, test: impl Fn() -> Result<()>) -> Result<()> {
    for &kernels in cuda::available_kernels(device) {
        cuda::set_kernels(kernels);
        let outcome = catch_unwind(AssertUnwindSafe(&test));
        cuda::set_kernels(Kernels::default());
        let failure = match outcome {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => match panic.downcast::<String>() {
                Ok(message) => *message,
                Err(panic) => resume_unwind(panic),
            },
        };
        bail!("{kernels:?} kernels: {failure}")
    }
    Ok(())
}

fn tests() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One stream, one test: what a trial captures is its own.
    arguments.test_threads = Some(1);
    if !arguments.list {
        if let Err(error) = gpu() {
            println!("skipped: no CUDA device: {}", error.lines().next().unwrap_or_default());
            let required = std::env::var_os("CANDLE_SAM_LORA_REQUIRE_GPU").is_some();
            return ExitCode::from(u8::from(required));
        }
    }
    let trials = [
        ops::trials(),
        graph::trials(),
        graphed::trials(),
        emulated::trials(),
        model::trials(),
        train::trials(),
        driver_calls::trials(),
        self_test::trials(),
    ];
    libtest_mimic::run(&arguments, trials.into_iter().flatten().collect()).exit_code()
}

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    match Path::new(&name).file_name().and_then(|name| name.to_str()) {
        Some("cases") => cases::main(),
        Some("finetune") => finetune::main(),
        Some("tune") => tune::main(),
        _ => tests(),
    }
}
