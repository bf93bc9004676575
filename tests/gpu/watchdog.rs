//! Ends a process whose GPU hangs. A kernel that waits for a barrier that nobody reaches never ends, nor does
//! a wait for that kernel. So a thread of the host looks at the clock.
//!
//! `CANDLE_SAM_LORA_WATCHDOG` is the time without progress after which it acts, in seconds; unset, it never does.

use candle_core::Device;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Exit status of a process that made no progress.
const HANGS: i32 = 71;
/// Exit status of a process whose GPU answers with errors alone.
const BROKEN: i32 = 70;

/// The task that the process waits for, and since when.
static TASK: Mutex<Option<(String, Instant)>> = Mutex::new(None);

fn set(task: Option<String>) -> Option<(String, Instant)> {
    let task = task.map(|name| (name, Instant::now()));
    std::mem::replace(&mut *TASK.lock().unwrap_or_else(PoisonError::into_inner), task)
}

/// Starts the thread, if the environment asks for it.
///
/// # Errors
/// - the variable is not a positive number of seconds.
pub fn start() -> Result<(), String> {
    const VARIABLE: &str = "CANDLE_SAM_LORA_WATCHDOG";
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let seconds = text.to_str().and_then(|text| text.parse().ok());
    let limit = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let Some(limit) = limit.filter(|limit| !limit.is_zero()) else {
        return Err(format!("{VARIABLE}: expected a positive number of seconds, got {text:?}"));
    };
    std::thread::spawn(move || loop {
        std::thread::sleep((limit / 10).min(Duration::from_millis(200)));
        let task = TASK.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, since)) = task.as_ref().filter(|(_, since)| since.elapsed() > limit) {
            eprintln!(
                "{name}: no progress for {:.0} s, the GPU hangs",
                since.elapsed().as_secs_f64()
            );
            end(HANGS);
        }
    });
    Ok(())
}

/// The task that the process waits for; empty if there is none.
pub fn task() -> String {
    let task = TASK.lock().unwrap_or_else(PoisonError::into_inner);
    task.as_ref().map_or_else(String::new, |(name, _)| name.clone())
}

/// Names the task that the process begins to wait for.
pub fn progress(task: impl Into<String>) {
    set(Some(task.into()));
}

/// Says that the process waits for nothing.
pub fn rest() {
    set(None);
}

/// Runs work that launches none of our kernels, however long it takes: sums on the host, candle's kernels, compilation.
pub fn unwatched<T>(work: impl FnOnce() -> T) -> T {
    let task = set(None);
    let result = work();
    set(task.map(|(name, _)| name));
    result
}

/// Ends the process if the GPU does not answer after this work. After an illegal access it never does again.
pub fn answers(device: &Device, work: &str) {
    if let Err(error) = device.synchronize() {
        eprintln!("{work}: the GPU does not answer any more: {error}");
        end(BROKEN);
    }
}

/// Ends the process at once. Its exit handlers are not run: the driver's wait for the GPU.
fn end(status: i32) -> ! {
    #[cfg(unix)]
    // SAFETY: takes any number, reads and writes no memory of this process.
    unsafe {
        libc::_exit(status)
    }
    #[cfg(not(unix))]
    std::process::exit(status)
}
