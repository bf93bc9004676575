//! The program `candle-sam-lora`: one file a command, and what commands share.
//!
//! A command is a struct of options and a function `run`. Results go to standard output, progress to standard error; an error is
//! one line there and exit code 1, a wrong command line exit code 2.

mod arguments;
mod console;
mod draw;
mod encode;
pub mod finetune;
mod lora_arguments;
mod masks;
mod model;
mod params;
mod photo;
mod segment;

use clap::{Parser, Subcommand};
use std::ffi::OsString;
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
    Finetune(finetune::Options),
    Encode(encode::Options),
    Params(params::Options),
}

/// Runs the program with these arguments, the first of them its name.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let program = match Program::try_parse_from(arguments) {
        Ok(program) => program,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    console::exit_code(match &program.command {
        Command::Masks(options) => masks::run(options),
        Command::Segment(options) => segment::run(options),
        Command::Finetune(options) => finetune::run(options).map(drop),
        Command::Encode(options) => encode::run(options),
        Command::Params(options) => params::run(options),
    })
}
