//! Every operation beside what one would write with candle's own, forward and backward.
//!
//! `cargo bench --bench ops`; a filter such as `-- windowed` picks cases. The choice by default ends in minutes: ViT-B
//! whole, ViT-L and ViT-H forward, global backward of the composed graph on a 32 x 32 grid. BENCH_ALL=1 is everything
//! at 64 x 64. Threads follow RAYON_NUM_THREADS, the device CANDLE_SAM_DEVICE.

mod support;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_sam_lora::ops::{self, Activation, Dropout, Lora, Projection, RelPosAttention};
use candle_sam_lora::testing::composed;
use criterion::{criterion_group, criterion_main, Criterion};
use support::criterion::{all, bench, group};
use support::vit::{Vit, VIT_B, VIT_H, VIT_L, WINDOW};
use support::work::{Pass, Work};
use support::{normal, Rotating};

const GRID: usize = 64;
const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Setting of every operation's measurement.
struct Setting<'a> {
    vit: Vit,
    dtype: DType,
    /// Whether forward and backward are measured, or the forward alone.
    train: bool,
    device: &'a Device,
}

fn settings(device: &Device) -> Vec<Setting<'_>> {
    let mut settings = Vec::new();
    for vit in [VIT_B, VIT_L, VIT_H] {
        let whole = vit.name == VIT_B.name;
        let dtypes = if whole || all() { &DTYPES[..] } else { &DTYPES[..1] };
        for &dtype in dtypes {
            settings.push(Setting { vit, dtype, train: false, device });
            if all() || whole && dtype == DType::F32 {
                settings.push(Setting { vit, dtype, train: true, device });
            }
        }
    }
    settings
}

impl Setting<'_> {
    fn normal(&self, shape: &[usize]) -> Result<Tensor> {
        normal(shape, self.dtype, self.device)
    }

    /// The operation's input; a variable where the backward is measured.
    fn input(&self, shape: &[usize]) -> Result<Rotating> {
        let x = self.normal(shape)?;
        Rotating::new(if self.train { Var::from_tensor(&x)?.into_inner() } else { x })
    }

    fn pass(&self, grid: usize) -> Pass {
        Pass { backward: self.train, ..Pass::forward(1, grid, self.dtype.size_in_bytes()) }
    }

    /// Measures the two ways to the same output.
    fn compare(
        &self,
        c: &mut Criterion,
        (op, variant): (&str, &str),
        work: Work,
        fused: impl Fn() -> Result<Tensor>,
        composed: impl Fn() -> Result<Tensor>,
    ) {
        let direction = if self.train { "forward_backward" } else { "forward" };
        let name = format!("{op}/{}/{variant}{}/{direction}", self.vit.name, self.dtype.as_str());
        let mut group = group(c, &name, work);
        let ways: [(&str, &dyn Fn() -> Result<Tensor>); 2] =
            [("fused", &fused), ("composed", &composed)];
        for (way, run) in ways {
            bench(&mut group, way, self.device, || match self.train {
                true => backward(&run()?),
                false => run().map(drop),
            });
        }
        group.finish();
    }
}

fn backward(out: &Tensor) -> Result<()> {
    out.sqr()?.mean_all()?.backward().map(drop)
}

fn attention(c: &mut Criterion) -> Result<()> {
    for setting in settings(&device()?) {
        for windowed in [true, false] {
            let vit = setting.vit;
            let grid = if setting.train && !windowed && !all() { GRID / 2 } else { GRID };
            let qkv = setting.input(&[1, grid, grid, 3 * vit.dim])?;
            let side = if windowed { WINDOW } else { grid };
            let table = (setting.normal(&[2 * side - 1, vit.head_dim()])? * 0.1)?;
            let pad = setting.normal(&[3 * vit.dim])?;
            let config = RelPosAttention {
                num_heads: vit.heads,
                softmax_scale: (vit.head_dim() as f64).powf(-0.5),
                rel_pos: Some((&table, &table)),
                window: windowed.then_some(WINDOW),
                pad: Some(&pad),
                dropout: None,
            };
            let kind = if windowed { "windowed" } else { "global" };
            setting.compare(
                c,
                ("rel_pos_attention", &format!("{kind}/{grid}/")),
                setting.pass(grid).attention(&vit, windowed),
                || ops::rel_pos_attention(qkv.next(), &config),
                || Ok(composed::rel_pos_attention(qkv.next(), &config)?.0),
            );
        }
    }
    Ok(())
}

/// q, k, v with adapters on q and v: ranks 0 (frozen), 4, 16, 64.
fn lora_qkv(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for setting in settings(&device) {
        let dim = setting.vit.dim;
        let weight = (setting.normal(&[dim, dim])? * 0.02)?;
        let bias = setting.normal(&[dim])?;
        let x = setting.input(&[GRID * GRID, dim])?;
        for rank in [0, 4, 16, 64] {
            let a = Var::from_tensor(&normal(&[rank.max(1), dim], DType::F32, &device)?)?;
            let b = Var::from_tensor(&normal(&[dim, rank.max(1)], DType::F32, &device)?)?;
            let lora = |stream| {
                let dropout = setting.train.then_some(Dropout { p: 0.1, seed: 1, stream });
                Lora { a: &a, b: &b, b_bias: None, scaling: 2.0, dropout }
            };
            let part = |lora| Projection { weight: &weight, scales: None, bias: Some(&bias), lora };
            let adapted = |stream| part((rank > 0).then(|| lora(stream)));
            let projections = [adapted(1), part(None), adapted(2)];
            setting.compare(
                c,
                ("lora_qkv", &format!("rank{rank}/")),
                setting.pass(GRID).qkv(dim, rank),
                || ops::lora_qkv(x.next(), &projections),
                || composed::lora_qkv(x.next(), &projections),
            );
        }
    }
    Ok(())
}

/// The MLP's two: C -> 4C with GELU, 4C -> C with the residual.
fn lora_linear(c: &mut Criterion) -> Result<()> {
    for setting in settings(&device()?) {
        let dim = setting.vit.dim;
        for (name, input, output) in [("gelu", dim, 4 * dim), ("residual", 4 * dim, dim)] {
            let weight = (setting.normal(&[output, input])? * 0.02)?;
            let bias = setting.normal(&[output])?;
            let projection =
                Projection { weight: &weight, scales: None, bias: Some(&bias), lora: None };
            let residual = setting.normal(&[GRID * GRID, output])?;
            let (activation, residual) = match name {
                "gelu" => (Activation::Gelu, None),
                _ => (Activation::Identity, Some(&residual)),
            };
            let x = setting.input(&[GRID * GRID, input])?;
            setting.compare(
                c,
                ("lora_linear", &format!("{name}/")),
                setting.pass(GRID).linear(input, output),
                || ops::lora_linear(x.next(), &projection, activation, residual),
                || composed::lora_linear(x.next(), &projection, activation, residual),
            );
        }
    }
    Ok(())
}

fn layer_norm(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for setting in settings(&device) {
        let dim = setting.vit.dim;
        let weight = Tensor::ones(dim, setting.dtype, &device)?;
        let bias = setting.normal(&[dim])?;
        let x = setting.input(&[GRID * GRID, dim])?;
        setting.compare(
            c,
            ("layer_norm", ""),
            setting.pass(GRID).layer_norm(dim),
            || ops::layer_norm(x.next(), &weight, &bias, 1e-6),
            || composed::layer_norm(x.next(), &weight, &bias, 1e-6),
        );
    }
    Ok(())
}

/// DoRA and dropout have one form each; measured alone.
fn others(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    let dim = VIT_B.dim;
    let x = Var::from_tensor(&normal(&[GRID * GRID, dim], DType::F32, &device)?)?;
    let weight = (normal(&[dim, dim], DType::F32, &device)? * 0.02)?;
    let (a, b) =
        (normal(&[16, dim], DType::F32, &device)?, normal(&[dim, 16], DType::F32, &device)?);
    let (a, b) = (Var::from_tensor(&a)?, Var::from_tensor(&b)?);
    let magnitude = Var::from_tensor(&Tensor::ones(dim, DType::F32, &device)?)?;
    let lora = Lora { a: &a, b: &b, b_bias: None, scaling: 2.0, dropout: None };
    let projection = Projection { weight: &weight, scales: None, bias: None, lora: Some(lora) };
    let detached = x.as_tensor().detach();
    let forward = Pass::forward(1, GRID, 4);
    let work = |pass: Pass| pass.linear(dim, dim) + pass.lora(dim, dim, 16);
    let mut dora = group(c, "dora_linear/vit_b/f32/forward", work(forward));
    bench(&mut dora, "ours", &device, || {
        ops::dora_linear(&detached, &projection, &magnitude).map(drop)
    });
    dora.finish();
    let mut dora =
        group(c, "dora_linear/vit_b/f32/forward_backward", work(forward.with_backward()));
    bench(&mut dora, "ours", &device, || backward(&ops::dora_linear(&x, &projection, &magnitude)?));
    dora.finish();
    let mut dropout = group(c, "dropout/vit_b/f32/forward", forward.layer_norm(dim));
    bench(&mut dropout, "ours", &device, || {
        ops::dropout(&detached, Dropout { p: 0.1, seed: 1, stream: 1 }).map(drop)
    });
    bench(&mut dropout, "candle_nn", &device, || candle_nn::ops::dropout(&detached, 0.1).map(drop));
    dropout.finish();
    Ok(())
}

fn device() -> Result<Device> {
    support::device().map_err(candle_core::Error::wrap)
}

fn every_op(c: &mut Criterion) {
    for run in [attention, lora_qkv, lora_linear, layer_norm, others] {
        if let Err(error) = run(c) {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
}

criterion_group!(benches, every_op);
criterion_main!(benches);
