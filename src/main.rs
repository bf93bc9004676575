//! The program; its commands are in `src/cli`.

fn main() -> std::process::ExitCode {
    candle_sam_lora::cli::main(std::env::args_os())
}
