//! Every operation beside what one would write with candle's own, forward and backward.
//!
//! `cargo bench --bench ops`; a filter such as `-- windowed` picks cases. The choice by default ends in minutes:
//! ViT-B whole, ViT-L and ViT-H forward, global backward of the composed graph on a 32 x 32 grid; BENCH_ALL=1 is everything at
//! 64 x 64. Threads follow RAYON_NUM_THREADS, the device CANDLE_SAM_DEVICE.

mod support;

use candle_core::{DType, Result, Tensor, Var};
use candle_sam_lora::ops::{self, composed, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use criterion::{criterion_group, criterion_main, Criterion};
use support::criterion::{all, bench, group};
use support::models::{Vit, VIT_B, VIT_H, VIT_L, WINDOW};
use support::work::Pass;
use support::{normal, Rotating};

const GRID: usize = 64;
const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Models, dtypes and whether the backward is measured too.
fn choice() -> Vec<(Vit, DType, bool)> {
    let mut choice: Vec<_> =
        DTYPES.map(|dtype| (VIT_B, dtype, dtype == DType::F32 || all())).into();
    for vit in [VIT_L, VIT_H] {
        let dtypes = if all() { &DTYPES[..] } else { &DTYPES[..1] };
        choice.extend(dtypes.iter().map(|&dtype| (vit, dtype, all())));
    }
    choice
}

fn backward(out: &Tensor) -> Result<()> {
    out.sqr()?.mean_all()?.backward().map(drop)
}

fn attention(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for (vit, dtype, with_backward) in choice() {
        for windowed in [true, false] {
            for train in [false, true] {
                if train && !with_backward {
                    continue;
                }
                let grid = if train && !windowed && !all() { GRID / 2 } else { GRID };
                let mut qkv = normal(&[1, grid, grid, 3 * vit.dim], dtype, &device)?;
                if train {
                    qkv = Var::from_tensor(&qkv)?.into_inner();
                }
                let qkv = Rotating::new(qkv)?;
                let side = if windowed { WINDOW } else { grid };
                let table = (normal(&[2 * side - 1, vit.head_dim()], dtype, &device)? * 0.1)?;
                let pad = normal(&[3 * vit.dim], dtype, &device)?;
                let config = RelPosAttention {
                    num_heads: vit.heads,
                    softmax_scale: (vit.head_dim() as f64).powf(-0.5),
                    rel_pos: Some((&table, &table)),
                    window: windowed.then_some(WINDOW),
                    pad: Some(&pad),
                    dropout: None,
                };
                let pass =
                    Pass { backward: train, ..Pass::forward(1, grid, dtype.size_in_bytes()) };
                let kind = if windowed { "windowed" } else { "global" };
                let name = format!(
                    "rel_pos_attention/{}/{kind}/{grid}/{}/{}",
                    vit.name,
                    dtype.as_str(),
                    direction(train)
                );
                let mut group = group(c, &name, pass.attention(&vit, windowed));
                bench(&mut group, "fused", &device, || {
                    let out = ops::rel_pos_attention(qkv.next(), &config)?;
                    if train {
                        backward(&out)
                    } else {
                        Ok(())
                    }
                });
                bench(&mut group, "composed", &device, || {
                    let (out, _) = composed::rel_pos_attention(qkv.next(), &config)?;
                    if train {
                        backward(&out)
                    } else {
                        Ok(())
                    }
                });
                group.finish();
            }
        }
    }
    Ok(())
}

/// q, k, v with adapters on q and v: ranks 0 (frozen), 4, 16, 64.
fn lora_qkv(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for (vit, dtype, with_backward) in choice() {
        let dim = vit.dim;
        let weight = (normal(&[dim, dim], dtype, &device)? * 0.02)?;
        let bias = normal(&[dim], dtype, &device)?;
        let x = normal(&[GRID * GRID, dim], dtype, &device)?;
        let (frozen_x, trained_x) =
            (Rotating::new(x.clone())?, Rotating::new(Var::from_tensor(&x)?.into_inner())?);
        for rank in [0, 4, 16, 64] {
            let a = Var::from_tensor(&normal(&[rank.max(1), dim], DType::F32, &device)?)?;
            let b = Var::from_tensor(&normal(&[dim, rank.max(1)], DType::F32, &device)?)?;
            for train in [false, true] {
                if train && !with_backward {
                    continue;
                }
                let lora = |stream| {
                    let dropout = train.then_some(Dropout { p: 0.1, seed: 1, stream });
                    Lora { a: &a, b: &b, b_bias: None, scaling: 2.0, dropout }
                };
                let part = |lora| Projection { weight: &weight, bias: Some(&bias), lora };
                let adapted = |stream| part((rank > 0).then(|| lora(stream)));
                let projections = [adapted(1), part(None), adapted(2)];
                let x = if train { &trained_x } else { &frozen_x };
                let pass =
                    Pass { backward: train, ..Pass::forward(1, GRID, dtype.size_in_bytes()) };
                let name = format!(
                    "lora_qkv/{}/rank{rank}/{}/{}",
                    vit.name,
                    dtype.as_str(),
                    direction(train)
                );
                let mut group = group(c, &name, pass.qkv(dim, rank));
                bench(&mut group, "fused", &device, || {
                    let out = ops::lora_qkv(x.next(), &projections)?;
                    if train {
                        backward(&out)
                    } else {
                        Ok(())
                    }
                });
                bench(&mut group, "composed", &device, || {
                    let out = composed::lora_qkv(x.next(), &projections)?;
                    if train {
                        backward(&out)
                    } else {
                        Ok(())
                    }
                });
                group.finish();
            }
        }
    }
    Ok(())
}

/// The MLP's two: C -> 4C with GELU, 4C -> C with the residual.
fn lora_linear(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for (vit, dtype, with_backward) in choice() {
        for (name, input, output) in
            [("gelu", vit.dim, 4 * vit.dim), ("residual", 4 * vit.dim, vit.dim)]
        {
            let weight = (normal(&[output, input], dtype, &device)? * 0.02)?;
            let bias = normal(&[output], dtype, &device)?;
            let projection = Projection { weight: &weight, bias: Some(&bias), lora: None };
            let residual = normal(&[GRID * GRID, output], dtype, &device)?;
            let (activation, residual) = match name {
                "gelu" => (Activation::Gelu, None),
                _ => (Activation::None, Some(&residual)),
            };
            for train in [false, true] {
                if train && !with_backward {
                    continue;
                }
                let mut x = normal(&[GRID * GRID, input], dtype, &device)?;
                if train {
                    x = Var::from_tensor(&x)?.into_inner();
                }
                let x = Rotating::new(x)?;
                let pass =
                    Pass { backward: train, ..Pass::forward(1, GRID, dtype.size_in_bytes()) };
                let name = format!(
                    "lora_linear/{}/{name}/{}/{}",
                    vit.name,
                    dtype.as_str(),
                    direction(train)
                );
                let mut group = group(c, &name, pass.linear(input, output));
                for (name, run) in
                    [("fused", ops::lora_linear as LoraLinear), ("composed", composed::lora_linear)]
                {
                    bench(&mut group, name, &device, || {
                        let out = run(x.next(), &projection, activation, residual)?;
                        if train {
                            backward(&out)
                        } else {
                            Ok(())
                        }
                    });
                }
                group.finish();
            }
        }
    }
    Ok(())
}

type LoraLinear =
    fn(&Tensor, &Projection<'_>, Activation, Option<&Tensor>) -> candle_core::Result<Tensor>;

fn layer_norm(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for (vit, dtype, with_backward) in choice() {
        let weight = Tensor::ones(vit.dim, dtype, &device)?;
        let bias = normal(&[vit.dim], dtype, &device)?;
        for train in [false, true] {
            if train && !with_backward {
                continue;
            }
            let mut x = normal(&[GRID * GRID, vit.dim], dtype, &device)?;
            if train {
                x = Var::from_tensor(&x)?.into_inner();
            }
            let x = Rotating::new(x)?;
            let pass = Pass { backward: train, ..Pass::forward(1, GRID, dtype.size_in_bytes()) };
            let name = format!("layer_norm/{}/{}/{}", vit.name, dtype.as_str(), direction(train));
            let mut group = group(c, &name, pass.layer_norm(vit.dim));
            for (name, run) in
                [("fused", ops::layer_norm as LayerNorm), ("composed", composed::layer_norm)]
            {
                bench(&mut group, name, &device, || {
                    let out = run(x.next(), &weight, &bias, 1e-6)?;
                    if train {
                        backward(&out)
                    } else {
                        Ok(())
                    }
                });
            }
            group.finish();
        }
    }
    Ok(())
}

type LayerNorm = fn(&Tensor, &Tensor, &Tensor, f64) -> candle_core::Result<Tensor>;

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
    let projection = Projection { weight: &weight, bias: None, lora: Some(lora) };
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

fn direction(train: bool) -> &'static str {
    if train {
        "forward_backward"
    } else {
        "forward"
    }
}

fn device() -> Result<candle_core::Device> {
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
