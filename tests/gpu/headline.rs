//! The times that count, by CUDA events, all in one process: SAM's layers with each implementation and each tile. The
//! attention runs over several grids, with and without tables: the slope is the loop, the intercept the prologue.
//!
//! ```text
//! headline --list
//! headline --without attention_global_80 --only forward
//! ```
//! A line of JSON for each measurement: microseconds of a run, TFLOP/s, and from when to when it was measured. By these
//! times, clocks that are read beside it can be told apart.

use crate::clock::{Clock, Times};
use crate::layers::{family, By, Family, Layer, Size, REAL, SMALL};
use crate::{gpu, implementations, watchdog};
use anyhow::{anyhow, bail, ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::cuda::{self, Kernels};
use candle_sam_lora::launch::projection::sm90::tiles::Pass as Kernel;
use candle_sam_lora::launch::rel_pos_attention::sm90::tiles::widths;
use candle_sam_lora::launch::tiles::Forced;
use candle_sam_lora::ops::native;
use clap::Parser;
use serde_json::json;
use std::time::{SystemTime, UNIX_EPOCH};

/// Twice the largest last-level cache of a GPU that we know (H200: 50 MB): inputs take turns so that none is in it.
const CACHE: usize = 100 << 20;

#[derive(Parser)]
#[command(about = "Times SAM's layers by CUDA events")]
struct Args {
    /// Prints the names of the measurements.
    #[arg(long)]
    list: bool,
    /// Only measurements whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Not these families.
    #[arg(long)]
    without: Vec<String>,
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// On small grids with one head, one run each: to see that everything runs.
    #[arg(long)]
    small: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Pass {
    Forward,
    /// With frozen weights and tables; adapters are trained.
    Backward,
}

/// The tiles that a pass of a layer is measured with, besides the rule's.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tiles {
    None,
    /// Those of the attention over whole grids, for heads of so many channels.
    Attention(usize),
    /// Those of the projections.
    Projection,
}

/// A layer, a pass of it, and its tiles.
struct Problem {
    family: Family,
    size: Size,
    pass: Pass,
    tiles: Tiles,
}

impl Problem {
    fn name(&self) -> String {
        let Size { batch, grid, tables, .. } = self.size;
        let pass = if self.pass == Pass::Forward { "forward" } else { "backward" };
        let tables = if tables { "" } else { " without tables" };
        format!("{} {pass} batch {batch} grid {grid}{tables}", self.family.name)
    }

    /// Names of tiles, and how to force each.
    fn tiles(&self) -> Vec<(String, Forced)> {
        match (self.tiles, self.pass) {
            (Tiles::None, _) => Vec::new(),
            (Tiles::Attention(head_dim), _) => {
                let forced = |cols| Forced { attention_cols: Some(cols), ..Forced::NONE };
                widths(head_dim).map(|cols| (format!("cols{cols}"), forced(cols))).collect()
            }
            (Tiles::Projection, Pass::Forward) => {
                let forced = |tile| Forced { projection_forward: Some(tile), ..Forced::NONE };
                Kernel::Forward.tiles().iter().map(|t| (t.name.to_string(), forced(t))).collect()
            }
            (Tiles::Projection, Pass::Backward) => {
                let forced = |tile| Forced { projection_backward: Some(tile), ..Forced::NONE };
                let tiles = Kernel::BackwardInput.tiles().iter();
                tiles.map(|t| (t.name.to_string(), forced(t))).collect()
            }
        }
    }
}

/// The measurements, the most important first.
fn problems(small: bool) -> Result<Vec<Problem>> {
    const BOTH: [Pass; 2] = [Pass::Forward, Pass::Backward];
    let size = |batch, grid| match small {
        true => Size { batch: 1, grid: grid / 4, ..SMALL },
        false => Size { batch, grid, ..REAL },
    };
    let mut problems = Vec::new();
    let mut push = |name, size, pass, tiles| -> Result<()> {
        problems.push(Problem { family: family(name)?, size, pass, tiles });
        Ok(())
    };
    for pass in BOTH {
        push("attention_global_64", size(1, 64), pass, Tiles::Attention(64))?;
    }
    for pass in BOTH {
        push("attention_windows_64", size(8, 64), pass, Tiles::None)?;
    }
    for name in ["qkv_lora", "lin1_gelu", "lin2"] {
        for pass in BOTH {
            push(name, size(4, 64), pass, Tiles::Projection)?;
        }
    }
    for (name, tiles) in
        [("attention_global_80", Tiles::Attention(80)), ("attention_windows_80", Tiles::None)]
    {
        for pass in BOTH {
            push(name, size(1, 64), pass, tiles)?;
        }
    }
    for pass in BOTH {
        for (grid, tables) in [(32, true), (96, true), (32, false), (64, false), (96, false)] {
            push("attention_global_64", Size { tables, ..size(1, grid) }, pass, Tiles::None)?;
        }
    }
    Ok(problems)
}

/// The command.
pub fn main() -> Result<()> {
    let args = Args::parse();
    for name in &args.without {
        family(name)?;
    }
    let mut problems = problems(args.small)?;
    problems.retain(|p| {
        p.name().contains(&args.only) && !args.without.iter().any(|name| name == p.family.name)
    });
    if args.list {
        problems.iter().for_each(|problem| println!("{}", problem.name()));
        return Ok(());
    }
    ensure!(!problems.is_empty(), "no measurement is called {:?}", args.only);
    let device = gpu().map_err(|message| anyhow!("no CUDA device: {message}"))?;
    watchdog::start().map_err(anyhow::Error::msg)?;
    let dtype: DType = args.dtype.parse()?;
    let clock = if args.small { Clock { batches: 1, batch_s: 0.0 } } else { Clock::default() };
    let copies = if args.small { 1 } else { usize::MAX };
    let mut failed = 0;
    for problem in &problems {
        println!("{}", json!({"begun": problem.family.name}));
        watchdog::progress(problem.name());
        let work = Work::new(problem, dtype, device, copies);
        for &kernels in implementations(device) {
            let mut choices = vec![None];
            if kernels == Kernels::Native && implementations(device).len() > 1 {
                choices.extend(problem.tiles().into_iter().map(Some));
            }
            for choice in choices {
                let tile = choice.as_ref().map(|(name, _)| name);
                watchdog::progress(format!("{} ({kernels:?} kernels, {tile:?})", problem.name()));
                let forced = choice.as_ref().map(|(_, forced)| native::gpu(device, *forced));
                let by = forced.transpose()?.flatten().map_or(By::Kernels, By::These);
                cuda::set_kernels(kernels);
                let from = now()?;
                let times = match &work {
                    Ok(work) => work.time(by, clock, device),
                    Err(error) => Err(anyhow!("its tensors: {error:#}")),
                };
                let until = now()?;
                cuda::set_kernels(Kernels::default());
                watchdog::answers(device, &problem.name());
                let mut line = json!({
                    "name": problem.name(), "family": problem.family.name, "kernels": format!("{kernels:?}"),
                    "tile": tile, "batch": problem.size.batch, "grid": problem.size.grid,
                    "tables": problem.size.tables, "from": from, "until": until,
                });
                match times {
                    Ok((Times { median, least, most, runs }, flops)) => {
                        line["us"] = (1e6 * median).into();
                        line["least_us"] = (1e6 * least).into();
                        line["most_us"] = (1e6 * most).into();
                        line["runs"] = runs.into();
                        line["tflops"] = (flops / median / 1e12).into();
                    }
                    Err(error) => {
                        failed += 1;
                        line["failed"] = format!("{error:#}").into();
                    }
                }
                println!("{line}");
            }
        }
        watchdog::rest();
    }
    ensure!(failed == 0, "{failed} measurements failed");
    Ok(())
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// A problem's tensors, in as many copies of the first as do not fit into the cache.
struct Work {
    layer: Layer,
    copies: Vec<Layer>,
    pass: Pass,
    /// Trained in the backward: x, and adapters but not tables.
    trained: usize,
    flops: f64,
}

impl Work {
    fn new(problem: &Problem, dtype: DType, device: &Device, most: usize) -> Result<Self> {
        let layer = Layer::new(problem.family, problem.size, dtype, device)?;
        let bytes = layer.inputs[0].elem_count() * dtype.size_in_bytes();
        let copy = |_| -> Result<Layer> {
            let mut copy = layer.clone();
            copy.inputs[0] = copy.inputs[0].copy()?;
            Ok(copy)
        };
        let copies = (0..(CACHE / bytes + 1).min(most)).map(copy).collect::<Result<_>>()?;
        let trained = if problem.tiles == Tiles::Projection { layer.trainable } else { 1 };
        let [forward, backward] = layer.flops();
        let flops = if problem.pass == Pass::Forward { forward } else { backward };
        Ok(Self { layer, copies, pass: problem.pass, trained, flops })
    }

    /// Times of a run, and its floating-point operations.
    fn time(&self, by: By, clock: Clock, device: &Device) -> Result<(Times, f64)> {
        let mut turn = (0..self.copies.len()).cycle();
        let mut next = move || turn.next().unwrap_or(0);
        if self.pass == Pass::Forward {
            let times = clock.time(device, || {
                let layer = &self.copies[next()];
                Ok(layer.run(&layer.inputs, by)?)
            })?;
            return Ok((times, self.flops));
        }
        let losses = self.copies.iter().map(|layer| layer.loss(self.trained, by));
        let losses = losses.collect::<candle_core::Result<Vec<_>>>()?;
        let whole = clock.time(device, || Ok(losses[next()].2.backward()?))?;
        // The loss's own backward, which is not the layer's: a product with a tensor as large as the output.
        let out = Tensor::zeros_like(&self.layer.grad)?;
        let out = candle_core::Var::from_tensor(&out)?;
        let loss = (out.as_tensor() * &self.layer.grad)?.sum_all()?;
        let of_loss = clock.time(device, || Ok(loss.backward()?))?.median;
        if of_loss >= whole.least {
            bail!("the loss alone takes {of_loss:.1e} s of {:.1e} s", whole.least)
        }
        let less = |seconds| seconds - of_loss;
        let [median, least, most] = [whole.median, whole.least, whole.most].map(less);
        Ok((Times { median, least, most, ..whole }, self.flops))
    }
}
