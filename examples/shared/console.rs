//! What an example says, and how it ends: quietly, or with its error on stderr and exit code 1.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

/// Prints a line. A reader that went away, as `head` does, is no reason to stop.
pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The exit code of `result`; prints the error, if it is one.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
