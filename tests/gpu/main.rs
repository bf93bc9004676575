//! Everything that wants a GPU, in one binary. The operations run against the f64 reference, the composed graph and the
//! emulator. They run in every dtype, behind any strides, again and again, on two streams, in a CUDA graph. The model
//! and its training follow. Without a device it says so and passes, unless CANDLE_SAM_LORA_REQUIRE_GPU is set.
//!
//! scripts/gpu/ has one binary for all. Called as `cases` or `finetune`, this one is the benchmark or the command of
//! that name. Called as `smoke` or `headline`, it compares or measures at SAM's sizes.
//!
//! | environment | meaning |
//! |---|---|
//! | `CANDLE_SAM_LORA_REQUIRE_GPU` | without a device the tests fail |
//! | `CANDLE_SAM_LORA_WATCHDOG` | seconds without progress after which the process ends with status 71 |
//! | `CANDLE_SAM_LORA_TEST_KERNELS` | `portable`: the tests do without the kernels for the GPU's own architecture |
//! | `CANDLE_SAM_LORA_TEST_NAMES` | a file with the names of the tests to run, one a line, in this order |

mod adamw;
mod blocks;
#[path = "../../benches/cases.rs"]
mod cases;
mod clock;
#[path = "../common/mod.rs"]
mod common;
mod driver_calls;
mod dry_run;
mod emulated;
mod graph;
mod graphed;
mod headline;
mod host_allocations;
mod joined;
mod layers;
mod model;
mod ops;
mod self_test;
mod smoke;
mod step_graphs;
mod train;
mod watchdog;

use candle_core::{bail, Device, Result};
use candle_sam_lora::cli;
use candle_sam_lora::cuda::{self, Kernels};
use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::HashMap;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;

/// The GPU of this process: candle loads its kernels once for each device.
fn gpu() -> std::result::Result<&'static Device, String> {
    static GPU: OnceLock<std::result::Result<Device, String>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| candle_sam_lora::device("cuda").map_err(|e| e.to_string()));
    gpu.as_ref().map_err(String::clone)
}

/// Sees at a test's end, however it comes, whether the GPU still answers. After an illegal access it never does again
/// in this process: to go on would blame the tests that follow.
struct Watch<'a> {
    test: &'a str,
    device: &'a Device,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        watchdog::answers(self.device, self.test);
        watchdog::rest();
    }
}

/// A trial on the GPU.
fn trial(name: String, test: impl FnOnce(&Device) -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name.clone(), move || {
        let device = gpu()?;
        watchdog::progress(&*name);
        cuda::set_kernels(implementations(device)[0]);
        let _watch = Watch { test: &name, device };
        test(device).map_err(Failed::from)
    })
}

/// The implementations that differ on this device, or the portable one alone where the environment asks for that.
fn implementations(device: &Device) -> &'static [Kernels] {
    let portable =
        std::env::var_os("CANDLE_SAM_LORA_TEST_KERNELS").is_some_and(|k| k == "portable");
    match cuda::available_kernels(device) {
        [_, Kernels::Portable] if portable => &[Kernels::Portable],
        available => available,
    }
}

/// Runs a test with each implementation that the device has kernels of, and says with which one it failed.
fn with_each(device: &Device, test: impl Fn() -> Result<()>) -> Result<()> {
    let test_name = watchdog::task();
    for &kernels in implementations(device) {
        watchdog::progress(format!("{test_name} ({kernels:?} kernels)"));
        cuda::set_kernels(kernels);
        let outcome = catch_unwind(AssertUnwindSafe(&test));
        cuda::set_kernels(implementations(device)[0]);
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
    watchdog::progress(test_name);
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
        blocks::trials(),
        joined::trials(),
        graph::trials(),
        graphed::trials(),
        emulated::trials(),
        model::trials(),
        adamw::trials(),
        train::trials(),
        step_graphs::trials(),
        driver_calls::trials(),
        dry_run::trials(),
        self_test::trials(),
    ];
    let trials = watchdog::start().and_then(|()| named(trials.into_iter().flatten().collect()));
    match trials {
        Ok(trials) => libtest_mimic::run(&arguments, trials).exit_code(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Those trials whose names the environment's file has, in its order; all, where it names no file.
///
/// # Errors
/// - the file cannot be read;
/// - it names a test that does not exist, or one twice.
fn named(trials: Vec<Trial>) -> std::result::Result<Vec<Trial>, String> {
    let Some(file) = std::env::var_os("CANDLE_SAM_LORA_TEST_NAMES") else { return Ok(trials) };
    let names = std::fs::read_to_string(&file).map_err(|e| format!("{file:?}: {e}"))?;
    let mut trials: HashMap<_, _> =
        trials.into_iter().map(|trial| (trial.name().to_string(), trial)).collect();
    let find = |name| trials.remove(name).ok_or_else(|| format!("{file:?}: no test {name:?} left"));
    names.lines().map(find).collect()
}

fn ended(command: anyhow::Result<()>) -> ExitCode {
    match command {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    // A family that the self-test refuses would be replaced: tests and times would be those of other kernels.
    cuda::self_test(false);
    match Path::new(&name).file_name().and_then(|name| name.to_str()) {
        Some("cases") => cases::main(),
        Some("finetune") => {
            let command = ["candle-sam-lora", "finetune"].map(Into::into);
            cli::main(command.into_iter().chain(std::env::args_os().skip(1)))
        }
        Some("headline") => ended(headline::main()),
        Some("smoke") => ended(smoke::main()),
        _ => tests(),
    }
}
