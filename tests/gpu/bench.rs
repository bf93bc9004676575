//! Timings at the sizes of SAM ViT-B, of the operation and of the composed graph: the same names as in
//! scripts/gpu/peers.py, which times PyTorch.

use crate::common::random;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_sam_lora::ops::{self, composed, Lora, Projection, RelPosAttention};
use libtest_mimic::{Failed, Measurement, Trial};
use std::time::Instant;

type Forward = Box<dyn Fn() -> Result<Tensor>>;

/// What is timed: the operation's forward, from inputs on the device that want gradients.
struct Bench {
    name: &'static str,
    make: fn(&Device, bool) -> Result<Forward>,
}

const BENCHES: [Bench; 4] = [
    Bench { name: "layer_norm 4096x768", make: layer_norm },
    Bench { name: "lora_qkv 4096x768 r16", make: lora_qkv },
    Bench { name: "attention global 64x64 12x64", make: |d, fused| attention(d, fused, None) },
    Bench { name: "attention window 14 12x64", make: |d, fused| attention(d, fused, Some(14)) },
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for bench in BENCHES {
        for (path, fused) in [("fused", true), ("composed", false)] {
            for (pass, backward) in [("forward", false), ("forward+backward", true)] {
                let name = format!("{} bf16 {path} {pass}", bench.name);
                trials.push(Trial::bench(name, move |test_mode| {
                    if test_mode {
                        return Ok(None);
                    }
                    time(bench.make, fused, backward).map(Some).map_err(Failed::from)
                }));
            }
        }
    }
    trials
}

/// The median of runs, each waited for, and the spread around it.
fn time(
    make: fn(&Device, bool) -> Result<Forward>,
    fused: bool,
    backward: bool,
) -> Result<Measurement> {
    const WARM_UP: usize = 5;
    const RUNS: usize = 30;
    let device = Device::new_cuda(0)?;
    let forward = make(&device, fused)?;
    let mut times = Vec::new();
    for run in 0..WARM_UP + RUNS {
        device.synchronize()?;
        let start = Instant::now();
        let out = forward()?;
        if backward {
            out.sum_all()?.backward()?;
        }
        device.synchronize()?;
        if run >= WARM_UP {
            times.push(start.elapsed().as_nanos() as u64);
        }
    }
    times.sort_unstable();
    let spread = times[RUNS - 1 - RUNS / 10] - times[RUNS / 10];
    Ok(Measurement { avg: times[RUNS / 2], variance: spread })
}

fn tensor(seed: u64, shape: &[usize], scale: f64, device: &Device) -> Result<Tensor> {
    (random(seed, shape) * scale)?.to_dtype(DType::BF16)?.to_device(device)
}

fn variable(seed: u64, shape: &[usize], scale: f64, device: &Device) -> Result<Tensor> {
    Ok(Var::from_tensor(&tensor(seed, shape, scale, device)?)?.into_inner())
}

fn layer_norm(device: &Device, fused: bool) -> Result<Forward> {
    let x = variable(1, &[4096, 768], 1.0, device)?;
    let (weight, bias) = (tensor(2, &[768], 1.0, device)?, tensor(3, &[768], 1.0, device)?);
    let op = if fused { ops::layer_norm } else { composed::layer_norm };
    Ok(Box::new(move || op(&x, &weight, &bias, 1e-6)))
}

fn lora_qkv(device: &Device, fused: bool) -> Result<Forward> {
    let x = variable(1, &[4096, 768], 1.0, device)?;
    let weights = [2, 3, 4].map(|seed| tensor(seed, &[768, 768], 0.04, device));
    let biases = [5, 6, 7].map(|seed| tensor(seed, &[768], 1.0, device));
    let a = [8, 9].map(|seed| variable(seed, &[16, 768], 0.04, device));
    let b = [10, 11].map(|seed| variable(seed, &[768, 16], 0.04, device));
    let collect = |tensors: Vec<Result<Tensor>>| tensors.into_iter().collect::<Result<Vec<_>>>();
    let (weights, biases) = (collect(weights.into())?, collect(biases.into())?);
    let (a, b) = (collect(a.into())?, collect(b.into())?);
    Ok(Box::new(move || {
        let lora =
            |i: usize| Some(Lora { a: &a[i], b: &b[i], b_bias: None, scaling: 1.0, dropout: None });
        let projection =
            |i: usize, lora| Projection { weight: &weights[i], bias: Some(&biases[i]), lora };
        let projections = [projection(0, lora(0)), projection(1, None), projection(2, lora(1))];
        if fused {
            ops::lora_qkv(&x, &projections)
        } else {
            composed::lora_qkv(&x, &projections)
        }
    }))
}

fn attention(device: &Device, fused: bool, window: Option<usize>) -> Result<Forward> {
    let rows = 2 * window.unwrap_or(64) - 1;
    let qkv = variable(1, &[1, 64, 64, 3 * 768], 1.0, device)?;
    let (h, w) = (variable(2, &[rows, 64], 0.3, device)?, variable(3, &[rows, 64], 0.3, device)?);
    let pad = tensor(4, &[3 * 768], 1.0, device)?;
    Ok(Box::new(move || {
        let config = RelPosAttention {
            num_heads: 12,
            softmax_scale: 0.125,
            rel_pos: Some((&h, &w)),
            window,
            pad: Some(&pad),
            dropout: None,
        };
        if fused {
            ops::rel_pos_attention(&qkv, &config)
        } else {
            Ok(composed::rel_pos_attention(&qkv, &config)?.0)
        }
    }))
}
