//! One case in candle as published, in a process of its own: one line of JSON with the keys that `benches/cases.rs`
//! prints.
//!
//! ```text
//! cargo run --release --manifest-path benches/peers/candle/Cargo.toml -- --case global_layer_forward --reps 5
//! ```
//! The layers are `src/ops/composed.rs`, the same source as the `composed` of `benches/cases.rs`, with candle's own
//! dropout; the encoder is candle-transformers'. Unlike there, nothing here switches on a feature of candle's
//! dependencies: its matrix products are those of a program without this crate. With `--features avx512` they are those
//! of a program with it.

// Each program uses a part of what they share.
mod candle_sam;
#[allow(dead_code)]
#[path = "../../../support/clock.rs"]
mod clock;
mod layer;
#[allow(dead_code)]
#[path = "../../../support/memory.rs"]
mod memory;
#[allow(dead_code)]
mod ops;
#[allow(dead_code)]
#[path = "../../../support/vit.rs"]
mod vit;

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use clap::{Parser, ValueEnum};
use clock::Measurement;
use layer::Attention;
use ops::Dropout;
use serde_json::json;
use vit::VIT_B;

/// A measured case, see `benches/cases.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Case {
    GlobalLayerForward,
    WindowedLayerForward,
    GlobalLayerTrain,
    WindowedLayerTrain,
    /// candle-transformers' image encoder.
    EncoderForward,
    /// The f32 product of candle, output allocated: [4096, 768] x [768, 2304].
    Matmul,
}

#[derive(Parser)]
#[command(about = "Measures one case in candle as published and prints it as JSON")]
struct Args {
    #[arg(long)]
    case: Case,
    /// Which the case says already; taken for the report's sake.
    #[arg(long, default_value = "composed")]
    implementation: String,
    /// Tokens a side.
    #[arg(long, default_value_t = 64)]
    grid: usize,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 0.1)]
    dropout: f32,
    /// Runs after the first.
    #[arg(long, default_value_t = 3)]
    reps: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let measured = measure(&args)?;
    let case = args.case.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string());
    let line = json!({
        "case": case,
        "implementation": args.implementation,
        "config": {
            "model": VIT_B.name, "grid": args.grid, "batch": 1, "rank": args.rank, "dropout": args.dropout,
            "dtype": "f32", "device": "cpu", "threads": rayon::current_num_threads(),
        },
        "first_s": measured.first_s,
        "wall_s": measured.wall_s,
        "cpu_s": measured.cpu_s,
        "memory": measured.memory,
    });
    println!("{line}");
    Ok(())
}

fn measure(args: &Args) -> Result<Measurement> {
    let windowed = matches!(args.case, Case::WindowedLayerForward | Case::WindowedLayerTrain);
    let tokens = || normal(&[1, args.grid, args.grid, VIT_B.dim]);
    match args.case {
        Case::GlobalLayerForward | Case::WindowedLayerForward => {
            let (layer, x) = (Attention::new(&VIT_B, args.grid, windowed, 0)?, tokens()?);
            run(args, || layer.forward(&x, None))
        }
        Case::GlobalLayerTrain | Case::WindowedLayerTrain => {
            let layer = Attention::new(&VIT_B, args.grid, windowed, args.rank)?;
            let x = Var::from_tensor(&tokens()?)?;
            run(args, || {
                let out = layer.forward(x.as_tensor(), Some(Dropout(args.dropout)))?;
                out.sqr()?.mean_all()?.backward()
            })
        }
        Case::EncoderForward => {
            let encoder = candle_sam::encoder(&VIT_B, args.grid, DType::F32, &Device::Cpu)?;
            let pixels = normal(&[1, 3, 16 * args.grid, 16 * args.grid])?;
            run(args, || encoder.forward(&pixels))
        }
        Case::Matmul => {
            let (a, b) = (normal(&[4096, 768])?, normal(&[768, 2304])?);
            run(args, || a.matmul(&b))
        }
    }
}

fn normal(shape: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::randn(0f32, 1f32, shape, &Device::Cpu)
}

fn run<T>(args: &Args, mut f: impl FnMut() -> candle_core::Result<T>) -> Result<Measurement> {
    clock::measure(args.reps, &Device::Cpu, || Ok(f().map(drop)?))
}
