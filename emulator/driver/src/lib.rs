//! Stands in for the CUDA driver where there is none, so that its callers run in tests. It has all that candle and
//! candle-sam-lora use: allocations, copies, modules, launches and their attributes, tensor maps, streams, graphs.
//!
//! ```text
//! cargo build --release -p candle-sam-lora-driver
//! LD_PRELOAD=target/release/libcandle_sam_lora_driver.so  a program built with the `cuda` feature
//! ```
//!
//! The functions of this library go before those of the libraries that the program is linked with. There is one device,
//! with the host's memory. A function's work is done before it returns, so everything is in every stream's order.
//! Kernels of candle-sam-lora run in the emulator (`launch`). Candle's own kernels run if they prepare operands
//! (`candle`). Calls that the driver would refuse are refused. A kernel that fails leaves the device broken, as on a
//! GPU, and says why on stderr.
//!
//! In the environment, `EMULATED_CAPABILITY` is the device's compute capability, 90 unless it says another.
//! `EMULATED_FAULT` names kernels that compute wrongly, `EMULATED_BAKED_SEED` those whose replays drop as their first
//! run did. A kernel whose name contains `EMULATED_HANG` never ends, for tests of what watches the GPU.
//! `EMULATED_DRY_RUN` turns the work off (`dry_run`). `emulated_driver_calls` tells how often a function was called,
//! `emulated_driver_bytes` how much memory is in use.

mod calls;
mod candle;
mod device;
mod dry_run;
mod element;
mod fault;
mod graph;
mod launch;
mod libraries;
mod memory;
mod memory_calls;
mod traffic;

use std::sync::atomic::{AtomicI32, Ordering};

/// `CUresult`; the numbers are those of cuda.h.
type Status = i32;
const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const INVALID_CONTEXT: Status = 201;
const NOT_FOUND: Status = 500;
const LAUNCH_FAILED: Status = 719;
const NOT_SUPPORTED: Status = 801;
const STREAM_CAPTURE_UNSUPPORTED: Status = 900;
const STREAM_CAPTURE_INVALIDATED: Status = 901;

/// A status and the reason for it.
type Outcome = Result<(), (Status, String)>;

/// Status that a kernel's failure left: it stays, as on a GPU.
static BROKEN: AtomicI32 = AtomicI32::new(SUCCESS);

/// Says why a call failed; returns what the caller is told.
fn told(outcome: Outcome) -> Status {
    match outcome {
        Ok(()) => BROKEN.load(Ordering::SeqCst),
        Err((status, reason)) => {
            eprintln!("emulated driver: {reason}");
            if status == LAUNCH_FAILED {
                BROKEN.store(status, Ordering::SeqCst);
            }
            status
        }
    }
}
