//! Rows that a sanitizer must report: the test runs itself again in a process that the sanitizer watches.

use libtest_mimic::Failed;
use std::path::PathBuf;
use std::process::Command;

/// A sanitizer of the C++ compiler.
#[derive(Debug)]
pub struct Sanitizer {
    kind: &'static str,
    runtime: &'static str,
    /// Stands in its reports.
    report: &'static str,
}

pub const ADDRESS: Sanitizer = Sanitizer {
    kind: "address",
    runtime: "libasan.so",
    report: "AddressSanitizer: heap-buffer-overflow",
};
pub const THREAD: Sanitizer =
    Sanitizer { kind: "thread", runtime: "libtsan.so", report: "ThreadSanitizer: data race" };

/// Set in the watched process.
const WATCHED: &str = "PLANTED_BUGS_WATCHED";

impl Sanitizer {
    /// Runs the test of this name, whose body is `run`, in a process of its own; the report must name `file`. Passes if
    /// the compiler lacks the sanitizer.
    pub fn check(
        &self,
        test: &str,
        file: &str,
        run: impl FnOnce() -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        if std::env::var_os(WATCHED).is_some() {
            return run();
        }
        let cxx = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
        let output =
            Command::new(cxx).arg(format!("-print-file-name={}", self.runtime)).output()?;
        let library = PathBuf::from(String::from_utf8(output.stdout)?.trim());
        if !library.is_absolute() || !library.exists() {
            println!("skipped: the C++ compiler has no {}", self.runtime);
            return Ok(());
        }
        let output = with_fixed_addresses()
            .arg(format!("LD_PRELOAD={}", library.display()))
            .arg(std::env::current_exe()?)
            .args([test, "--exact", "--test-threads=1"])
            .env(WATCHED, "1")
            .env("EMULATOR_SANITIZE", self.kind)
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .env("TSAN_OPTIONS", "halt_on_error=1:ignore_noninstrumented_modules=1")
            .output()?;
        let report = String::from_utf8_lossy(&output.stderr);
        let named = report.contains(self.report) && report.contains(file);
        match !output.status.success() && named {
            true => Ok(()),
            false => Err(format!("not caught by the {} sanitizer: {report}", self.kind).into()),
        }
    }
}

/// A command `env` without address randomisation, if the system allows that. Sanitizers of older compilers sometimes
/// find their addresses taken where the system scatters them widely.
fn with_fixed_addresses() -> Command {
    let fixed = [std::env::consts::ARCH, "--addr-no-randomize"];
    let works = Command::new("setarch").args(fixed).arg("true").output();
    if !works.is_ok_and(|output| output.status.success()) {
        return Command::new("env");
    }
    let mut command = Command::new("setarch");
    command.args(fixed).arg("env");
    command
}
