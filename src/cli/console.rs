//! The program's speech: notes for people, results for people or machines, progress on a terminal.

use super::processes::Told;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use std::fmt::Display;
use std::io::{stderr, stdout, Write};
use std::process::ExitCode;

/// How the program speaks
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Console {
    /// Print results as JSON, one object a line; notes go to standard error
    #[arg(long)]
    json: bool,
    /// Print results and errors only: no notes, no progress
    #[arg(long, short)]
    quiet: bool,
    /// One of many processes, of which another one speaks.
    #[arg(skip)]
    mute: bool,
}

impl Console {
    /// Only the first process speaks.
    pub fn of(self, rank: usize) -> Self {
        Self { mute: rank > 0, ..self }
    }

    /// Prints a line that explains: what was found in a file, what is left out. A closed pipe, as `head` leaves it, is
    /// no reason to stop.
    pub fn note(self, line: impl Display) {
        let _ = match self {
            Self { quiet: true, .. } | Self { mute: true, .. } => Ok(()),
            Self { json: true, .. } => writeln!(stderr(), "{line}"),
            _ => writeln!(stdout(), "{line}"),
        };
    }

    /// Prints a result: the text for people, or the object for machines.
    pub fn result(self, text: impl Display, object: Value) {
        let _ = match self.json {
            _ if self.mute => Ok(()),
            true => writeln!(stdout(), "{object}"),
            false => writeln!(stdout(), "{text}"),
        };
    }

    /// A bar of `len` steps with the time left, drawn on standard error if that is a terminal. `template` is what
    /// stands after the bar, in indicatif's words.
    pub fn bar(self, len: u64, template: &str) -> ProgressBar {
        let target = match self.quiet || self.mute {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        };
        let bar = ProgressBar::with_draw_target(Some(len), target);
        let template =
            format!("{{bar:40}} {{pos}}/{{len}} {template}  {{elapsed}} elapsed, {{eta}} left");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        bar
    }
}

/// The exit code of `result`; prints the error, if it is one.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Told>() => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
