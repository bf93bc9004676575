//! A training run is killed, or refused by the system, at each point where it writes. The files on disk stay whole, and
//! the run goes on to the bits of one that was left alone.
//!
//! The run is a process of its own, stopped at every system call (ptrace). A point is a call that changes a file or a
//! folder: open for writing, write, sync, rename, unlink, mkdir, chmod. `cargo test --test faults -- --ignored` takes
//! more steps and more kinds of refusal. Linux on x86-64, where processes may be traced; elsewhere there is nothing to
//! run.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod full_disk;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod run;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod trace;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod trials;

use std::process::ExitCode;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match &arguments[..] {
        [_, command, folder, steps] if command == run::COMMAND => {
            return run::main(folder.as_ref(), steps)
        }
        [_, command, disk] if command == full_disk::COMMAND => {
            return full_disk::main(disk.as_ref())
        }
        _ => {}
    }
    trials::main()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() -> ExitCode {
    println!("faults are injected on Linux on x86-64 only");
    ExitCode::SUCCESS
}
