//! The kernels' self-test: right kernels pass; wrong ones, which the driver's stand-in plants, are named and replaced,
//! and no other family is.

use crate::common::{error, gradients, random, values};
use crate::driver_calls::calls;
use crate::graph::capture;
use crate::trial;
use candle_core::{bail, DType, Device, Error, Result, Tensor};
use candle_sam_lora::cuda::{self, Choice, Family, Kernels};
use candle_sam_lora::launch::projection::sm90::tiles::{Pass, Tile};
use candle_sam_lora::launch::rel_pos_attention::sm90::tiles::widths;
use candle_sam_lora::ops::{self, Activation, Projection, RelPosAttention};
use libtest_mimic::Trial;
use std::process::Command;

/// In the environment of a process that is to be wrong: the name of its fault.
const FAULT: &str = "SELF_TEST_FAULT";
const CHILD: &str = "self_test with a planted fault";

/// A planted fault and its consequences.
struct Fault {
    name: &'static str,
    /// Prefixes of the wrong kernels' names.
    kernels: &'static str,
    /// The line on stderr; empty if there is none.
    told: &'static [&'static str],
    test: fn(&Device) -> Result<()>,
}

const FAULTS: [Fault; 5] = [
    Fault {
        name: "key pass",
        kernels: "rel_pos_attention_bwd_key_sm90_hd64_cols64_f16",
        told: &["global attention hd64 in f16", "5x64 dk", "5x64 dv", "portable kernels take"],
        test: a_wrong_key_pass_is_replaced,
    },
    Fault {
        name: "projection",
        kernels: "projection_fwd_sm90_pingpong_128x192_x2_f16",
        told: &["projection in f16", "qkv pingpong_128x192_x2 out", "portable kernels take"],
        test: a_wrong_projection_is_replaced,
    },
    Fault {
        name: "both",
        kernels: "rel_pos_attention_window_fwd_sm90_hd64_f16,rel_pos_attention_fwd_hd64_cols16_f16",
        told: &["window attention hd64 in f16", "portable kernels: 16x20", "composed graph takes"],
        test: wrong_portable_kernels_are_replaced_too,
    },
    Fault {
        name: "untested",
        kernels: "rel_pos_attention_window_fwd_sm90_hd64_f16",
        told: &[],
        test: without_the_test_a_fault_is_not_seen,
    },
    Fault { name: "none, captured", kernels: "", told: &[], test: a_capture_is_not_interrupted },
];

pub fn trials() -> Vec<Trial> {
    let emulated = calls("").is_some();
    let mut trials = vec![trial("self_test report".to_string(), right_kernels_pass)];
    for fault in &FAULTS {
        let name = format!("self_test fault: {}", fault.name);
        trials.push(trial(name, |d| in_a_process(fault, d)).with_ignored_flag(!emulated));
    }
    trials.push(trial(CHILD.to_string(), planted).with_ignored_flag(true));
    trials
}

fn right_kernels_pass(device: &Device) -> Result<()> {
    let report = cuda::self_test_report(device)?;
    println!("{report}");
    assert!(report.passed(), "\n{report}");
    let implementations = cuda::available_kernels(device).len();
    assert_eq!(report.rows.len(), Family::ALL.len() * Family::DTYPES.len() * implementations);
    assert!(report.compiler.starts_with("nvcc "), "{}", report.compiler);
    if implementations == 2 {
        assert_eq!([0, 1].map(|i| report.rows[i].kernels), [Choice::Native, Choice::Portable]);
        // A kernel that no test launches is none that a test trusts.
        for kernel in native_kernels() {
            assert_ne!(calls(&kernel), Some(0), "{kernel} was not tested");
        }
    }
    Ok(())
}

/// The native kernels that problems may get.
fn native_kernels() -> Vec<String> {
    let mut names = Vec::new();
    for head_dim in [64, 80] {
        for pass in ["fwd", "bwd_query", "bwd_key"] {
            for cols in widths(head_dim) {
                names.push(format!("rel_pos_attention_{pass}_sm90_hd{head_dim}_cols{cols}"));
            }
        }
        for pass in ["fwd", "bwd"] {
            names.push(format!("rel_pos_attention_window_{pass}_sm90_hd{head_dim}"));
        }
    }
    for pass in Pass::ALL {
        let name = |tile: &Tile| format!("{}_{}", pass.kernel(), tile.name);
        names.extend(pass.tiles_in_use(true).map(name));
    }
    let typed = |dtype: &DType| {
        names.iter().map(|name| format!("{name}_{}", dtype.as_str())).collect::<Vec<_>>()
    };
    Family::DTYPES.iter().flat_map(typed).collect()
}

/// A fault is planted in a process of its own: what its self-tests find holds as long as it runs.
fn in_a_process(fault: &Fault, device: &Device) -> Result<()> {
    if cuda::available_kernels(device).len() < 2 {
        return Ok(()); // no native kernels
    }
    let output = Command::new(std::env::current_exe()?)
        .args(["--exact", "--ignored", CHILD])
        .env(FAULT, fault.name)
        .env("EMULATED_FAULT", fault.kernels)
        .output()?;
    let log =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    let [stdout, stderr] = &log;
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}\n{stderr}");
    let lines = stderr.lines().filter(|line| line.starts_with("candle-sam-lora: self-test:"));
    let lines: Vec<_> = lines.collect();
    println!("{lines:?}");
    assert_eq!(lines.len(), usize::from(!fault.told.is_empty()), "{stderr}");
    for line in lines {
        for part in fault.told.iter().chain(&["(kernels compiled by nvcc "]) {
            assert!(line.contains(part), "{line}\nlacks {part:?}");
        }
    }
    Ok(())
}

fn planted(device: &Device) -> Result<()> {
    let name = std::env::var(FAULT).map_err(Error::wrap)?;
    match FAULTS.iter().find(|fault| fault.name == name) {
        Some(fault) => {
            cuda::self_test(true);
            (fault.test)(device)
        }
        None => bail!("there is no fault {name:?}"),
    }
}

/// The launches of kernels of one dtype that a piece of work makes: each prefix' number.
fn launches<const N: usize>(
    prefixes: [&str; N],
    work: impl FnOnce() -> Result<()>,
) -> Result<[u64; N]> {
    let count = || prefixes.map(|prefix| calls(prefix).unwrap_or_default());
    let before = count();
    work()?;
    let after = count();
    Ok(std::array::from_fn(|i| after[i] - before[i]))
}

/// Attention in f16 on a grid, global or in windows: inputs, and the operation on any device.
struct Attention {
    inputs: Vec<Tensor>,
    window: Option<usize>,
}

impl Attention {
    fn new((h, w): (usize, usize), window: Option<usize>) -> Result<Self> {
        let (side_h, side_w) = window.map_or((h, w), |side| (side, side));
        let mut inputs = vec![
            random(1, (1, h, w, 192)),
            (random(2, (2 * side_h - 1, 64)) * 0.3)?,
            (random(3, (2 * side_w - 1, 64)) * 0.3)?,
        ];
        if window.is_some() {
            inputs.push(random(4, 192));
        }
        Ok(Self { inputs, window })
    }

    fn run(&self, t: &[Tensor]) -> Result<Tensor> {
        let config = RelPosAttention {
            num_heads: 1,
            softmax_scale: 0.125,
            rel_pos: Some((&t[1], &t[2])),
            window: self.window,
            pad: t.get(3),
            dropout: None,
        };
        ops::rel_pos_attention(&t[0], &config)
    }

    /// Output and gradients on the device in f16, and their largest error.
    fn error(&self, device: &Device) -> Result<f64> {
        largest_error(&self.inputs, |t| self.run(t), device)
    }
}

/// The largest error of output and gradients in f16 on the device, from those in f32 on the CPU.
fn largest_error(
    inputs: &[Tensor],
    run: impl Fn(&[Tensor]) -> Result<Tensor>,
    device: &Device,
) -> Result<f64> {
    let host = inputs.iter().map(|t| t.to_dtype(DType::F16)).collect::<Result<Vec<_>>>()?;
    let on = |device: &Device, dtype| -> Result<Vec<Vec<f64>>> {
        let to = |t: &Tensor| t.to_dtype(dtype)?.to_device(device);
        let inputs = host.iter().map(to).collect::<Result<Vec<_>>>()?;
        let grad = to(&random(9, run(&inputs)?.shape()).to_dtype(DType::F16)?)?;
        let (out, grads) = gradients(&inputs, &grad, &run)?;
        Ok(std::iter::once(&out).chain(&grads).map(values).collect())
    };
    let (got, expected) = (on(device, DType::F16)?, on(&Device::Cpu, DType::F32)?);
    Ok(got.iter().zip(&expected).map(|(got, expected)| error(got, expected)).fold(0.0, f64::max))
}

/// Some roundings of f16; a flipped bit makes ten times as much.
const RIGHT: f64 = 4e-3;

fn a_wrong_key_pass_is_replaced(device: &Device) -> Result<()> {
    let (global, windows) = (Attention::new((2, 64), None)?, Attention::new((9, 12), Some(7))?);
    // The first use finds it; from then on the portable kernels run, forward and backward.
    assert!(global.error(device)? < RIGHT, "{}", global.error(device)?);
    let native = ["rel_pos_attention_fwd_sm90", "rel_pos_attention_bwd_key_sm90"];
    let portable = ["rel_pos_attention_fwd_hd64", "rel_pos_attention_bwd_key_hd64"];
    let kernels = [native, portable].concat();
    let kernels: [&str; 4] = kernels.try_into().map_err(|_| Error::msg("four kernels"))?;
    let launched = launches(kernels, || global.error(device).map(|_| ()))?;
    assert_eq!(launched, [0, 0, 2, 1]);
    // The windows' kernels are right, and used; so are the global ones in another dtype.
    assert!(windows.error(device)? < RIGHT);
    let kernels = ["rel_pos_attention_window_fwd_sm90", "rel_pos_attention_window_bwd_sm90"];
    assert_eq!(launches(kernels, || windows.error(device).map(|_| ()))?, [2, 1]);
    let to_bf16 = |t: &Tensor| t.to_dtype(DType::BF16)?.to_device(device);
    let inputs = global.inputs.iter().map(to_bf16).collect::<Result<Vec<_>>>()?;
    global.run(&inputs)?;
    assert_eq!(launches([native[0]], || global.run(&inputs).map(|_| ()))?, [1]);
    Ok(())
}

fn a_wrong_projection_is_replaced(device: &Device) -> Result<()> {
    let weight = (random(9, (1152, 64)) * 0.125)?;
    let run = |t: &[Tensor]| {
        let weight =
            weight.to_dtype(DType::F16)?.to_dtype(t[0].dtype())?.to_device(t[0].device())?;
        let part = Projection { weight: &weight, scales: None, bias: Some(&t[1]), lora: None };
        ops::lora_linear(&t[0], &part, Activation::Identity, None)
    };
    let inputs = [random(1, (1793, 64)), random(2, 1152)];
    let error = largest_error(&inputs, run, device)?;
    assert!(error < RIGHT, "{error}");
    let kernels = ["projection_fwd_sm90", "projection_fwd_1", "projection_bwd_input_sm90"];
    let launched = launches(kernels, || largest_error(&inputs, run, device).map(|_| ()))?;
    assert_eq!(launched, [0, 2, 0]);
    Ok(())
}

fn wrong_portable_kernels_are_replaced_too(device: &Device) -> Result<()> {
    let windows = Attention::new((9, 12), Some(7))?;
    assert!(windows.error(device)? < RIGHT, "{}", windows.error(device)?);
    let launched = launches(["rel_pos_attention"], || windows.error(device).map(|_| ()))?;
    assert_eq!(launched, [0], "the composed graph launches no kernel of this crate");
    Ok(())
}

fn without_the_test_a_fault_is_not_seen(device: &Device) -> Result<()> {
    let windows = Attention::new((9, 12), Some(7))?;
    cuda::self_test(false);
    assert!(windows.error(device)? > 10.0 * RIGHT);
    // Asked for the portable kernels, an operation tests nothing either.
    cuda::self_test(true);
    cuda::set_kernels(Kernels::Portable);
    assert!(windows.error(device)? < RIGHT);
    Ok(())
}

fn a_capture_is_not_interrupted(device: &Device) -> Result<()> {
    let windows = Attention::new((9, 12), Some(7))?;
    let to = |t: &Tensor| t.to_dtype(DType::F16)?.to_device(device);
    let inputs = windows.inputs.iter().map(to).collect::<Result<Vec<_>>>()?;
    let kernels = ["rel_pos_attention_window_fwd_sm90", "rel_pos_attention_fwd_hd64"];
    let launched = launches(kernels, || {
        let (out, graph) = capture(device, || windows.run(&inputs))?;
        assert!(graph.is_some());
        drop(out);
        Ok(())
    })?;
    // Nothing was tested yet, and nothing could be: the portable kernel alone is in the graph.
    assert_eq!(launched, [0, 1]);
    let [native, portable] = launches(kernels, || windows.run(&inputs).map(|_| ()))?;
    assert!(native > 1 && portable == 0, "tested, then used: {native} {portable}");
    Ok(())
}
