//! The operations beside what one would write with candle's own, at the shapes of SAM ViT-B.
//!
//! `cargo bench --bench ops`; a filter such as `-- windowed` picks cases. Threads follow RAYON_NUM_THREADS.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_sam_lora::ops::{self, composed, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use criterion::{criterion_group, criterion_main, Criterion};

const DIM: usize = 768;
const HEADS: usize = 12;
const HEAD_DIM: usize = 64;
const GRID: usize = 64;

fn normal(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1f32, shape, &Device::Cpu)
}

fn attention(c: &mut Criterion) -> Result<()> {
    for (name, window) in [("windowed", Some(14)), ("global", None)] {
        let qkv = normal(&[1, GRID, GRID, 3 * DIM])?;
        let pad = normal(&[3 * DIM])?;
        let rows = 2 * window.unwrap_or(GRID) - 1;
        let table = (normal(&[rows, HEAD_DIM])? * 0.1)?;
        let config = RelPosAttention {
            num_heads: HEADS,
            softmax_scale: 0.125,
            rel_pos: Some((&table, &table)),
            window,
            pad: Some(&pad),
            dropout: None,
        };
        let mut group = c.benchmark_group(format!("rel_pos_attention/{name}"));
        group.sample_size(10);
        group.bench_function("forward/fused", |b| b.iter(|| ops::rel_pos_attention(&qkv, &config)));
        group.bench_function("forward/composed", |b| {
            b.iter(|| composed::rel_pos_attention(&qkv, &config))
        });
        let trained = Var::from_tensor(&qkv)?;
        group.bench_function("forward_backward/fused", |b| {
            b.iter(|| ops::rel_pos_attention(&trained, &config)?.sum_all()?.backward())
        });
        if window.is_some() {
            group.bench_function("forward_backward/composed", |b| {
                b.iter(|| composed::rel_pos_attention(&trained, &config)?.0.sum_all()?.backward())
            });
        }
        group.finish();
    }
    Ok(())
}

fn projections(c: &mut Criterion) -> Result<()> {
    let x = Var::from_tensor(&normal(&[GRID * GRID, DIM])?)?;
    let (weight, bias) = (normal(&[DIM, DIM])?, normal(&[DIM])?);
    let (a, b) = (Var::from_tensor(&normal(&[16, DIM])?)?, Var::from_tensor(&normal(&[DIM, 16])?)?);
    let lora = |stream| {
        let dropout = Some(Dropout { p: 0.1, seed: 1, stream });
        Some(Lora { a: &a, b: &b, b_bias: None, scaling: 2.0, dropout })
    };
    let base = Projection { weight: &weight, bias: Some(&bias), lora: None };
    let adapted =
        [Projection { lora: lora(1), ..base }, base, Projection { lora: lora(2), ..base }];
    let plain = [base; 3];
    let detached = x.as_tensor().detach();
    let mut group = c.benchmark_group("lora_qkv");
    group.sample_size(10);
    group.bench_function("forward/base", |b| b.iter(|| ops::lora_qkv(&detached, &plain)));
    group.bench_function("forward/fused", |b| b.iter(|| ops::lora_qkv(&detached, &adapted)));
    group
        .bench_function("forward/composed", |b| b.iter(|| composed::lora_qkv(&detached, &adapted)));
    group.bench_function("forward_backward/fused", |b| {
        b.iter(|| ops::lora_qkv(&x, &adapted)?.sum_all()?.backward())
    });
    group.bench_function("forward_backward/composed", |b| {
        b.iter(|| composed::lora_qkv(&x, &adapted)?.sum_all()?.backward())
    });
    group.finish();
    Ok(())
}

fn layer_norm(c: &mut Criterion) -> Result<()> {
    let x = normal(&[GRID * GRID, DIM])?;
    let (weight, bias) = (Tensor::ones(DIM, DType::F32, &Device::Cpu)?, normal(&[DIM])?);
    let mut group = c.benchmark_group("layer_norm");
    group.sample_size(20);
    group.bench_function("fused", |b| b.iter(|| ops::layer_norm(&x, &weight, &bias, 1e-6)));
    group.bench_function("composed", |b| b.iter(|| composed::layer_norm(&x, &weight, &bias, 1e-6)));
    group.finish();
    Ok(())
}

fn all(c: &mut Criterion) {
    for bench in [attention, projections, layer_norm] {
        if let Err(error) = bench(c) {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
