//! Whether every kernel family is right at SAM's own sizes, in seconds. Values and gradients of each implementation are
//! compared with the composed graph in f32, all of it on the GPU. Ten runs must have the same bits.
//!
//! ```text
//! smoke --list
//! smoke --dtype bf16 --without attention_global_80
//! ```
//! A line of JSON for each family before it begins, and for each of its implementations when it has ended. Bounds are
//! those of the tests: twice the error of the composed graph in the same dtype, or one rounding. The last line is the
//! library's own self-test of all families at small sizes.

use crate::layers::{By, Family, Layer, FAMILIES, REAL, SMALL};
use crate::{gpu, implementations, watchdog};
use anyhow::{anyhow, ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::cuda::{self, Kernels, SelfTestRow};
use clap::Parser;
use half::{bf16, f16};
use serde_json::{json, Value};
use std::time::Instant;

/// Runs that must give the same bits.
const RUNS: usize = 10;

#[derive(Parser)]
#[command(about = "Sees whether every kernel family is right at SAM's sizes")]
struct Args {
    /// Prints the names of the families.
    #[arg(long)]
    list: bool,
    /// Only these families.
    #[arg(long)]
    only: Vec<String>,
    /// Not these.
    #[arg(long)]
    without: Vec<String>,
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// On grids of 16 x 16 with one head: what the emulator can do.
    #[arg(long)]
    small: bool,
}

/// The command.
pub fn main() -> Result<()> {
    let args = Args::parse();
    for name in args.only.iter().chain(&args.without) {
        crate::layers::family(name)?;
    }
    let wanted = |family: &Family| {
        let named = |names: &[String]| names.iter().any(|name| name == family.name);
        (args.only.is_empty() || named(&args.only)) && !named(&args.without)
    };
    let families: Vec<_> = FAMILIES.into_iter().filter(wanted).collect();
    if args.list {
        families.iter().for_each(|family| println!("{}", family.name));
        return Ok(());
    }
    let device = gpu().map_err(|message| anyhow!("no CUDA device: {message}"))?;
    watchdog::start().map_err(anyhow::Error::msg)?;
    let size = if args.small { SMALL } else { REAL };
    let dtype: DType = args.dtype.parse()?;
    let names = implementations(device).iter().map(|kernels| format!("{kernels:?}"));
    println!("{}", json!({"kernels_here": names.collect::<Vec<_>>()}));
    let mut wrong = Vec::new();
    for family in families {
        println!("{}", json!({"begun": family.name}));
        let prepared = watchdog::unwatched(|| -> Result<_> {
            let layer = Layer::new(family, size, dtype, device)?;
            let expected = Expected::new(&layer)?;
            Ok((layer, expected))
        });
        for &kernels in implementations(device) {
            watchdog::progress(format!("{} ({kernels:?} kernels)", family.name));
            let start = Instant::now();
            cuda::set_kernels(kernels);
            let outcome = match &prepared {
                Ok((layer, expected)) => compare(layer, expected, kernels),
                Err(error) => Err(anyhow!("the composed graph: {error:#}")),
            };
            cuda::set_kernels(Kernels::default());
            watchdog::answers(device, family.name);
            let (ok, mut line) =
                outcome.unwrap_or_else(|e| (false, json!({"failed": format!("{e:#}")})));
            line["family"] = family.name.into();
            line["kernels"] = format!("{kernels:?}").into();
            line["dtype"] = dtype.as_str().into();
            line["seconds"] = start.elapsed().as_secs_f64().into();
            line["ok"] = ok.into();
            println!("{line}");
            if !ok {
                wrong.push(format!("{} ({kernels:?})", family.name));
            }
        }
        watchdog::rest();
    }
    println!("{}", self_test(device)?);
    ensure!(wrong.is_empty(), "wrong: {}", wrong.join(", "));
    Ok(())
}

/// The library's own findings before a kernel's first use. They decide for users, not here.
fn self_test(device: &Device) -> Result<Value> {
    watchdog::progress("self-test");
    let start = Instant::now();
    let report = cuda::self_test_report(device)?;
    let seconds = start.elapsed().as_secs_f64();
    watchdog::rest();
    let row = |row: &SelfTestRow| {
        let worst = row.worst().map(ToString::to_string);
        json!({
            "family": row.family.to_string(),
            "dtype": row.dtype.as_str(),
            "kernels": row.kernels.to_string(),
            "ok": row.passed(),
            "worst": worst,
            "failure": row.failure,
        })
    };
    let rows: Vec<_> = report.rows.iter().map(row).collect();
    let ok = report.passed();
    Ok(json!({"self_test": rows, "ok": ok, "compiler": report.compiler, "seconds": seconds}))
}

/// Output and gradients of a layer by the composed graph, and the error that is allowed for each.
struct Expected {
    results: Vec<Tensor>,
    bounds: Vec<f64>,
}

impl Expected {
    fn new(layer: &Layer) -> Result<Self> {
        let dtype = layer.grad.dtype();
        let rounding = match dtype {
            DType::F16 => 1.0 / 2048.0,
            DType::BF16 => 1.0 / 256.0,
            _ => 1e-5,
        };
        let results = layer.to_dtype(DType::F32)?.results(layer.trainable, By::ComposedGraph)?;
        let eager = layer.results(layer.trainable, By::ComposedGraph)?;
        let mut bounds = Vec::new();
        for (index, (eager, result)) in eager.iter().zip(&results).enumerate() {
            // The output's rounding enters the backward.
            let roundings = if index == 0 { 1.0 } else { 2.0 };
            bounds.push((2.0 * largest_error(eager, result)?).max(roundings * rounding));
        }
        Ok(Self { results, bounds })
    }
}

/// Whether it is right, and the line that says how far off it is.
fn compare(layer: &Layer, expected: &Expected, kernels: Kernels) -> Result<(bool, Value)> {
    let results = layer.results(layer.trainable, By::Kernels)?;
    // With all but the first input frozen, its gradient takes another path.
    let frozen = layer.results(1, By::Kernels)?;
    let (mut outputs, mut right) = (Vec::new(), true);
    for (results, what) in [(&results, ""), (&frozen, ", rest frozen")] {
        for (index, result) in results.iter().enumerate() {
            let (truth, bound) = (&expected.results[index], expected.bounds[index]);
            let error = largest_error(result, truth)?;
            // Not `error > bound`: NaN is not right.
            right &= error <= bound;
            let name = match index {
                0 => format!("value{what}"),
                _ => format!("gradient {}{what}", index - 1),
            };
            let distance = distance(result, truth)?;
            outputs
                .push(json!({"name": name, "error": error, "bound": bound, "distance": distance}));
        }
    }
    let bits = all_bits(&results)?;
    let mut same = 1;
    for _ in 1..RUNS {
        watchdog::progress(format!("{} ({kernels:?} kernels)", layer.family.name));
        same += usize::from(all_bits(&layer.results(layer.trainable, By::Kernels)?)? == bits);
    }
    let mut in_turn = true;
    if kernels == Kernels::Native {
        cuda::set_kernels(Kernels::NativeInTurn);
        in_turn = all_bits(&layer.results(layer.trainable, By::Kernels)?)? == bits;
        cuda::set_kernels(kernels);
    }
    let ok = right && same == RUNS && in_turn;
    let line = json!({
        "outputs": outputs, "runs": RUNS, "same_bits": same, "same_bits_in_turn": in_turn,
    });
    Ok((ok, line))
}

/// The largest difference, relative to the largest magnitude expected.
fn largest_error(got: &Tensor, expected: &Tensor) -> Result<f64> {
    let largest = |t: &Tensor| -> Result<f64> {
        // Not a maximum: candle's may leave out NaN.
        let values = t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let finite = values.iter().all(|x| x.is_finite());
        let largest = values.into_iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        Ok(if finite { largest.into() } else { f64::NAN })
    };
    ensure!(got.dims() == expected.dims(), "{:?} instead of {:?}", got.dims(), expected.dims());
    Ok(largest(&(got.to_dtype(DType::F32)? - expected)?)? / largest(expected)?)
}

/// `|got - expected| / |expected|`, of the vectors.
pub fn distance(got: &Tensor, expected: &Tensor) -> Result<f64> {
    let square = |t: &Tensor| -> Result<f64> {
        Ok(t.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?.into())
    };
    Ok((square(&(got.to_dtype(DType::F32)? - expected)?)? / square(expected)?).sqrt())
}

fn all_bits(tensors: &[Tensor]) -> Result<Vec<Vec<u32>>> {
    tensors.iter().map(bits).collect()
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::F16 => flat.to_vec1::<f16>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        _ => flat.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect(),
    })
}
