//! Measures tiles on the GPU, each against the composed graph in f32, and writes the table of the fastest:
//!
//! ```text
//! tune --seconds 540 --table measured.rs --json tiles.json --about "NVIDIA H200, 2026-01-31"
//! ```
//! The table is `src/launch/measured.rs`; problems for which there was no time keep what they have.

#[path = "sweep.rs"]
mod sweep;

use crate::clock::Clock;
use crate::smoke::distance;
use crate::watchdog;
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sam_lora::cuda::{available_kernels, set_kernels, Kernels};
use candle_sam_lora::launch::measured::MEASURED;
use candle_sam_lora::launch::rel_pos_attention::{BackwardOperands, Inputs};
use candle_sam_lora::launch::tiles::{self, ATTENTION, PROJECTION};
use candle_sam_lora::launch::{rel_pos_attention, AttentionProblem};
use candle_sam_lora::ops::{self, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::testing::composed;
use clap::Parser;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use sweep::{merge, source, sweep, Outcome, Problem, Swept};

/// Images of the attention's problems.
const BATCH: usize = 2;
const RANK: usize = 16;

#[derive(Parser)]
#[command(about = "Finds the fastest tiles on this GPU")]
struct Args {
    /// For everything together.
    #[arg(long, default_value_t = 540.0)]
    seconds: f64,
    /// On the CPU, which has no tiles, it can be seen that everything runs.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Only problems whose line contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Not the problems of these families of the smoke test.
    #[arg(long)]
    without: Vec<String>,
    /// Where to write the table.
    #[arg(long, default_value = "measured.rs")]
    table: PathBuf,
    /// Where to write every time and error.
    #[arg(long, default_value = "tiles.json")]
    json: PathBuf,
    /// What the table says of the measurement: GPU and date.
    #[arg(long, default_value = "a GPU")]
    about: String,
}

pub fn main() -> ExitCode {
    match tune(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tune(args: &Args) -> Result<()> {
    let start = Instant::now();
    let device = candle_sam_lora::device(&args.device)?;
    let hopper = available_kernels(&device).contains(&Kernels::Portable);
    let mut prepared = None;
    let measure = |problem: &Problem<Work>, tile| {
        watchdog::progress(format!("{} {:?} {tile}", problem.family, problem.shape));
        let outcome = measure(problem, tile, &device, &mut prepared);
        tiles::force(None);
        set_kernels(Kernels::default());
        outcome
    };
    let in_time = || start.elapsed().as_secs_f64() < args.seconds;
    let how = format!("Measured on {}.", args.about);
    let mut problems = problems(hopper);
    for name in &args.without {
        crate::layers::family(name)?;
    }
    problems.retain(|p| {
        let line = format!("{} {:?} {}", p.family, p.shape, p.rows);
        line.contains(&args.only) && !args.without.iter().any(|name| *name == in_smoke(p))
    });
    ensure!(!problems.is_empty(), "no problem is called {:?}", args.only);
    watchdog::start().map_err(anyhow::Error::msg)?;
    let swept = sweep(&problems, in_time, measure, |swept| {
        if let Some(last) = swept.last() {
            println!("{}", line(last));
        }
        // After each problem: what was done is kept whatever happens.
        write(&args.table, &source(&merge(MEASURED, swept), &how))?;
        write(
            &args.json,
            &serde_json::to_string_pretty(&swept.iter().map(record).collect::<Vec<_>>())?,
        )
    })?;
    let found = swept.iter().filter(|s| s.best.is_some()).count();
    println!("{found} of {} problems have a tile: {}", problems.len(), args.table.display());
    ensure!(found > 0, "no tile gave the right results in time");
    Ok(())
}

/// Writes beside the file and renames, so that whoever ends this process leaves a whole file.
fn write(path: &Path, text: &str) -> Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, text).with_context(|| part.display().to_string())?;
    std::fs::rename(&part, path).with_context(|| path.display().to_string())
}

/// The family of the smoke test that runs a problem's kernels.
fn in_smoke(problem: &Problem<Work>) -> String {
    match &problem.work {
        Work::Attention { window, .. } => {
            let kind = if window.is_some() { "windows" } else { "global" };
            format!("attention_{kind}_{}", problem.shape[0])
        }
        Work::Projection { widths } if widths.len() == 3 => "qkv_lora".to_string(),
        Work::Projection { widths } if widths[0] > problem.shape[0] => "lin1_gelu".to_string(),
        Work::Projection { .. } => "lin2".to_string(),
    }
}

/// Problem and times, the chosen tile marked.
fn line(swept: &Swept) -> String {
    let mut text = format!("{:28} {:?} {:6}", swept.family, swept.shape, swept.rows);
    for (tile, outcome) in &swept.outcomes {
        text += &match outcome {
            Ok(Outcome { seconds, error, bound }) => {
                let wrong = if error <= bound { "" } else { " WRONG" };
                format!("   {tile} {:.1} us (error {error:.1e}){wrong}", 1e6 * seconds)
            }
            Err(error) => format!("   {tile}: {error:#}"),
        };
    }
    text + &format!("   -> {}", swept.best.unwrap_or("none"))
}

fn record(swept: &Swept) -> serde_json::Value {
    let outcomes = swept.outcomes.iter().map(|(tile, outcome)| match outcome {
        Ok(o) => json!({"tile": tile, "seconds": o.seconds, "error": o.error, "bound": o.bound}),
        Err(error) => json!({"tile": tile, "failed": format!("{error:#}")}),
    });
    json!({
        "family": swept.family, "bytes": swept.bytes, "shape": swept.shape, "rows": swept.rows,
        "tiles": outcomes.collect::<Vec<_>>(), "best": swept.best,
    })
}

/// What a problem computes.
#[derive(Clone, Debug, PartialEq)]
enum Work {
    Attention {
        heads: usize,
        grid: usize,
        window: Option<usize>,
    },
    /// LoRA of rank 16 on all but the second.
    Projection {
        widths: Vec<usize>,
    },
}

/// SAM's layers, in 16 bits; what matters most first.
fn problems(hopper: bool) -> Vec<Problem<Work>> {
    let mut problems = Vec::new();
    let mut push = |family: &'static str, shape: [usize; 2], rows, work| {
        if hopper || !family.ends_with("_sm90") {
            let mut tiles = tiles::candidates(family, 2, shape);
            let today = tiles::current(family, DType::BF16, shape, rows);
            tiles.sort_by_key(|tile| Some(*tile) != today);
            problems.push(Problem { family, bytes: 2, shape, rows, tiles, work });
        }
    };
    for (grid, window) in [(64, None), (64, Some(14)), (40, None), (32, None), (48, None)] {
        for (head_dim, heads) in [(64, 12), (80, 16)] {
            // Windows that hang over the grid are not for Hopper's.
            for family in ATTENTION.into_iter().take(if window.is_some() { 2 } else { 5 }) {
                let work = Work::Attention { heads, grid, window };
                push(family, [head_dim, window.unwrap_or(grid)], 0, work);
            }
        }
    }
    for rows in [4096, 16384, 32768] {
        for dim in [768, 1024, 1280] {
            let linears =
                [(dim, vec![dim; 3]), (dim, vec![dim]), (dim, vec![4 * dim]), (4 * dim, vec![dim])];
            for (in_dim, widths) in linears {
                for family in PROJECTION {
                    let shape = [in_dim, widths.iter().sum()];
                    push(family, shape, rows, Work::Projection { widths: widths.clone() });
                }
            }
        }
    }
    problems
}

/// A problem's tensors and what comes out of them by the composed graph, kept for all of its tiles.
struct Prepared {
    key: (&'static str, [usize; 2], usize, Work),
    inputs: Vec<Tensor>,
    /// Of the output.
    grad: Tensor,
    expected: Tensor,
    bound: f64,
}

impl Prepared {
    fn new(problem: &Problem<Work>, device: &Device) -> Result<Self> {
        let normal = |shape: &[usize], scale: f64| {
            (Tensor::randn(0f32, 1f32, shape, device)? * scale)?.to_dtype(DType::BF16)
        };
        let mut inputs = Vec::new();
        let mut out_shape;
        match &problem.work {
            Work::Attention { heads, grid, window } => {
                let [head_dim, side] = problem.shape;
                ensure!(side == window.unwrap_or(*grid), "the shape's width is the window's");
                out_shape = vec![BATCH, *grid, *grid, heads * head_dim];
                inputs.push(normal(&[BATCH, *grid, *grid, 3 * heads * head_dim], 1.0)?);
                inputs.push(normal(&[2 * side - 1, head_dim], 0.3)?);
                inputs.push(normal(&[2 * side - 1, head_dim], 0.3)?);
            }
            Work::Projection { widths } => {
                let in_dim = problem.shape[0];
                let scale = (in_dim as f64).powf(-0.5);
                out_shape = vec![problem.rows, 0];
                inputs.push(normal(&[problem.rows, in_dim], 1.0)?);
                for &width in widths {
                    out_shape[1] += width;
                    inputs.push(normal(&[width, in_dim], scale)?);
                    inputs.push(normal(&[width], 1.0)?);
                    inputs.push(normal(&[RANK, in_dim], scale)?);
                    inputs.push(normal(&[width, RANK], 0.1)?);
                }
            }
        }
        let grad = normal(&out_shape, 1.0)?;
        let wide = inputs
            .iter()
            .map(|t| t.to_dtype(DType::F32))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let expected = result(problem, &wide, &grad.to_dtype(DType::F32)?, false)?;
        let eager = distance(&result(problem, &inputs, &grad, false)?, &expected)?;
        // As the tests have it: twice as far off as the composed graph, or one rounding.
        let bound = (2.0 * eager).max(1.0 / 256.0);
        Ok(Self { key: key(problem), inputs, grad, expected, bound })
    }
}

fn key(problem: &Problem<Work>) -> (&'static str, [usize; 2], usize, Work) {
    (problem.family, problem.shape, problem.rows, problem.work.clone())
}

/// What is computed: the output, or in a backward the first input's gradient.
fn result(
    problem: &Problem<Work>,
    inputs: &[Tensor],
    grad: &Tensor,
    fused: bool,
) -> Result<Tensor> {
    if !backward(problem) {
        return run(problem, inputs, fused);
    }
    let (first, loss) = loss(problem, inputs, grad, fused)?;
    loss.backward()?.remove(&first).context("no gradient")
}

/// The first input as a variable, and a scalar to go back from.
fn loss(
    problem: &Problem<Work>,
    inputs: &[Tensor],
    grad: &Tensor,
    fused: bool,
) -> Result<(Var, Tensor)> {
    let mut inputs = inputs.to_vec();
    let first = Var::from_tensor(&inputs[0])?;
    inputs[0] = first.as_tensor().clone();
    let loss = (run(problem, &inputs, fused)? * grad)?.sum_all()?;
    Ok((first, loss))
}

fn backward(problem: &Problem<Work>) -> bool {
    problem.family.contains("_bwd_")
}

/// The operation, by the kernels or as the composed graph.
fn run(problem: &Problem<Work>, inputs: &[Tensor], fused: bool) -> Result<Tensor> {
    match &problem.work {
        Work::Attention { heads, window, .. } => {
            let config = RelPosAttention {
                num_heads: *heads,
                softmax_scale: (problem.shape[0] as f64).powf(-0.5),
                rel_pos: Some((&inputs[1], &inputs[2])),
                window: *window,
                pad: None,
                dropout: None,
            };
            Ok(match fused {
                true => ops::rel_pos_attention(&inputs[0], &config)?,
                false => composed::rel_pos_attention(&inputs[0], &config)?.0,
            })
        }
        Work::Projection { .. } => {
            let parts = inputs[1..].chunks_exact(4).enumerate().map(projection);
            let parts = parts.collect::<Result<Vec<_>>>()?;
            Ok(match (&parts[..], fused) {
                ([one], true) => ops::lora_linear(&inputs[0], one, Activation::Identity, None)?,
                ([one], false) => {
                    composed::lora_linear(&inputs[0], one, Activation::Identity, None)?
                }
                (&[q, k, v], true) => ops::lora_qkv(&inputs[0], &[q, k, v])?,
                (&[q, k, v], false) => composed::lora_qkv(&inputs[0], &[q, k, v])?,
                _ => bail!("one projection or three"),
            })
        }
    }
}

/// Of weight, bias, A and B.
fn projection((index, tensors): (usize, &[Tensor])) -> Result<Projection<'_>> {
    let [weight, bias, a, b] = tensors else { bail!("a projection has four tensors") };
    let lora = Lora { a, b, b_bias: None, scaling: 2.0, dropout: None };
    Ok(Projection { weight, bias: Some(bias), lora: (index != 1).then_some(lora) })
}

fn measure(
    problem: &Problem<Work>,
    tile: &'static str,
    device: &Device,
    prepared: &mut Option<Prepared>,
) -> Result<Outcome> {
    if prepared.as_ref().is_none_or(|p| p.key != key(problem)) {
        *prepared = None; // its memory first
        *prepared = Some(Prepared::new(problem, device)?);
    }
    let Prepared { inputs, grad, expected, bound, .. } = prepared.as_ref().context("no inputs")?;
    let hopper = problem.family.ends_with("_sm90");
    set_kernels(if hopper { Kernels::Native } else { Kernels::Portable });
    tiles::force(Some((problem.family, tile)));
    ensure!(tile == tiles::PORTABLE || covered(problem)?, "the kernels do not cover the problem");
    let error = distance(&result(problem, inputs, grad, true)?, expected)?;
    let clock = Clock::default();
    let seconds = if backward(problem) {
        let (_first, loss) = loss(problem, inputs, grad, true)?;
        clock.time(device, || Ok(loss.backward()?))?.median
    } else {
        clock.time(device, || run(problem, inputs, true))?.median
    };
    Ok(Outcome { seconds, error, bound: *bound })
}

/// Whether Hopper's attention takes the problem with the tile that is forced; else the portable kernels would be timed.
fn covered(problem: &Problem<Work>) -> Result<bool> {
    let (&[head_dim, side], Work::Attention { heads, grid, .. }) = (&problem.shape, &problem.work)
    else {
        return Ok(true);
    };
    if !problem.family.ends_with("_sm90") {
        return Ok(true);
    }
    let by_backward = backward(problem);
    let problem = AttentionProblem {
        batch: BATCH,
        h: *grid,
        w: *grid,
        num_heads: *heads,
        head_dim,
        side_h: side,
        side_w: side,
        softmax_scale: 1.0,
        rel_pos: true,
        dropout: None,
    };
    // Any address that is aligned as candle's tensors are.
    let at = 4096;
    let inputs = Inputs { qkv: at, tables: [at; 2], pad: 0 };
    if by_backward {
        let [out, lse, dout, dqkv, dtables, workspace] = [at; 6];
        let dpad = 0;
        let operands = BackwardOperands { out, lse, dout, dqkv, dtables, dpad, workspace };
        let own =
            rel_pos_attention::sm90::backward::backward(&problem, DType::BF16, &inputs, &operands)?;
        return Ok(own.is_some());
    }
    Ok(rel_pos_attention::sm90::forward::forward(&problem, DType::BF16, &inputs, at, at)?.is_some())
}
