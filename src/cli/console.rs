//! The program's speech: notes for people, results for people or machines, progress on a terminal.

use super::processes::Told;
use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt::Display;
use std::io::{stderr, stdout, ErrorKind, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

/// Lines that are kept until their turn. As standard output, there is one of a process.
static KEPT: Mutex<Vec<Line>> = Mutex::new(vec![]);

/// A line for standard output, or for standard error.
#[derive(Debug, Serialize, Deserialize)]
pub enum Line {
    Out(String),
    Err(String),
}

/// Whether and when lines are printed.
#[derive(Clone, Copy, Debug, Default)]
enum Voice {
    /// At once.
    #[default]
    Aloud,
    /// Never: another process speaks.
    Mute,
    /// When their turn has come.
    Kept,
}

/// How the program speaks
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Console {
    /// Print results as JSON, one object a line; notes go to standard error
    #[arg(long)]
    json: bool,
    /// Print results and errors only: no notes, no progress
    #[arg(long, short)]
    quiet: bool,
    #[arg(skip)]
    voice: Voice,
}

impl Console {
    /// Only the first process speaks.
    pub fn of(self, rank: usize) -> Self {
        Self { voice: if rank > 0 { Voice::Mute } else { Voice::Aloud }, ..self }
    }

    /// Keeps what is said until [`take_kept`], in whatever process.
    pub fn kept(self) -> Self {
        Self { voice: Voice::Kept, ..self }
    }

    /// Prints a line that explains: what was found in a file, what is left out.
    pub fn note(self, line: impl Display) {
        match self {
            Self { quiet: true, .. } => {}
            Self { json: true, .. } => self.say(Line::Err(line.to_string())),
            _ => self.say(Line::Out(line.to_string())),
        }
    }

    /// Prints a result: the text for people, or the object for machines.
    pub fn result(self, text: impl Display, object: Value) {
        self.say(Line::Out(if self.json { object.to_string() } else { text.to_string() }));
    }

    /// Prints a line. A closed pipe, as `head` leaves it, is no reason to stop; [`exit_code`] tells of lines that were
    /// lost otherwise.
    pub fn say(self, line: Line) {
        match (self.voice, line) {
            (Voice::Mute, _) => {}
            (Voice::Kept, line) => KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(line),
            (Voice::Aloud, Line::Out(line)) => print(&line),
            (Voice::Aloud, Line::Err(line)) => drop(writeln!(stderr(), "{line}")),
        }
    }

    /// A bar of `len` steps with the time left, drawn on standard error if that is a terminal. `template` is what
    /// stands after the bar, in indicatif's words.
    pub fn bar(self, len: u64, template: &str) -> ProgressBar {
        let target = match self.quiet || !matches!(self.voice, Voice::Aloud) {
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

/// Why the first line for standard output was lost.
static LOST: Mutex<Option<std::io::Error>> = Mutex::new(None);

fn print(line: &str) {
    match writeln!(stdout(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            LOST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        _ => {}
    }
}

/// The lines that were kept; none are then.
pub fn take_kept() -> Vec<Line> {
    std::mem::take(&mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The exit code of `result`; prints the error, if it is one. A line that standard output did not take is one, too.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    let lost = LOST.lock().unwrap_or_else(PoisonError::into_inner).take();
    let result = match (result, lost) {
        (Ok(()), Some(error)) => Err(anyhow!("standard output: {error}")),
        (result, _) => result,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Told>() => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
