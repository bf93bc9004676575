//! The program `candle-sam-lora`: one file a command, and what commands share.
//!
//! A command is a struct of options and a function `run`. Results go to standard output, progress to standard error. An
//! error is one line there and exit code 1, a wrong command line exit code 2.

mod arguments;
mod console;
mod division;
mod draw;
mod embeddings;
mod encode;
mod export;
pub mod finetune;
mod import;
mod listed;
mod lora_arguments;
mod masks;
mod merge;
mod model;
mod model_folder;
mod params;
mod photo;
mod processes;
mod segment;
mod settings;
mod sheet;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

/// Segment Anything with LoRA: segments images, trains adapters, converts models
#[derive(Parser)]
#[command(name = "candle-sam-lora", version)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Masks(masks::Options),
    Segment(segment::Options),
    Finetune(Box<finetune::Options>),
    Encode(encode::Options),
    Params(params::Options),
    Merge(merge::Options),
    Export(export::Options),
    Import(import::Options),
    /// Prints a script that completes this program's command lines in a shell
    Completions {
        shell: Shell,
    },
}

/// Runs the program with these arguments, the first of them its name.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    // Errors are one line: candle adds a backtrace where RUST_BACKTRACE alone is set, which is for panics.
    const BACKTRACE: &str = "RUST_LIB_BACKTRACE";
    if std::env::var_os(BACKTRACE).is_none() {
        std::env::set_var(BACKTRACE, "0");
    }
    let program = match Program::try_parse_from(arguments) {
        Ok(program) => program,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    if let Err(error) = processes::check_threads() {
        return console::exit_code(Err(error));
    }
    console::exit_code(match &program.command {
        Command::Masks(options) => masks::run(options),
        Command::Segment(options) => segment::run(options),
        Command::Finetune(options) => finetune::run(options).map(drop),
        Command::Encode(options) => encode::run(options),
        Command::Params(options) => params::run(options),
        Command::Merge(options) => merge::run(options),
        Command::Export(options) => export::run(options),
        Command::Import(options) => import::run(options),
        Command::Completions { shell } => {
            let (mut script, mut program) = (vec![], Program::command());
            clap_complete::generate(*shell, &mut program, "candle-sam-lora", &mut script);
            // A closed pipe is no reason to complain.
            let _ = std::io::stdout().write_all(&script);
            Ok(())
        }
    })
}
