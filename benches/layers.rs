//! Layers, encoder and training step beside the same modules written with candle's own operations.
//!
//! `cargo bench --bench layers`; a filter such as `-- encoder` picks cases. By default encoder and training step see
//! images of 512 x 512, and the global layer's backward a 32 x 32 grid; BENCH_ALL=1 is 1024 x 1024 and all three
//! encoders. Threads follow RAYON_NUM_THREADS, the device CANDLE_SAM_DEVICE.

mod support;

use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use candle_sam_lora::lora::{add_adapter, forward_mixed_batch, LoraConfig};
use candle_sam_lora::nn::{trainable_variables, Mode};
use candle_sam_lora::sam::{SamVisionEncoder, VisionAttention};
use candle_sam_lora::train::{AdamW, AdamWConfig};
use candle_sam_lora::Result;
use criterion::{criterion_group, criterion_main, Criterion};
use support::criterion::{all, bench, group};
use support::models::{self, Adapters, Prompts, FROZEN};
use support::vit::{Vit, VIT_B, VIT_H, VIT_L};
use support::work::Pass;
use support::{composed, device, normal, Rotating};

const LORA: Adapters = Adapters { rank: 16, dropout: 0.1 };
const F32: DType = DType::F32;

fn vits() -> &'static [Vit] {
    if all() {
        &[VIT_B, VIT_L, VIT_H]
    } else {
        &[VIT_B]
    }
}

fn backward(out: &Tensor) -> candle_core::Result<()> {
    out.sqr()?.mean_all()?.backward().map(drop)
}

/// qkv to proj, frozen and with adapters of three ranks.
fn attention_layer(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for vit in vits() {
        for windowed in [true, false] {
            let kind = if windowed { "windowed" } else { "global" };
            let x = Rotating::new(normal(&[1, 64, 64, vit.dim], F32, &device)?)?;
            for rank in [0, 4, 16, 64] {
                let adapters = Adapters { rank, dropout: 0.0 };
                let attn = models::attention(vit, 64, windowed, adapters, F32, &device)?;
                let work = Pass::forward(1, 64, 4).attention_layer(vit, windowed, rank);
                let name = format!("attention_layer/{}/{kind}/64/rank{rank}/forward", vit.name);
                let mut group = group(c, &name, work);
                bench(&mut group, "ours", &device, || attn.forward(x.next(), Mode::Eval).map(drop));
                bench(&mut group, "composed", &device, || {
                    composed::attention(&attn, x.next(), Mode::Eval).map(drop)
                });
                group.finish();
            }
            let grid = if windowed || all() { 64 } else { 32 };
            let x = normal(&[1, grid, grid, vit.dim], F32, &device)?;
            let x = Rotating::new(Var::from_tensor(&x)?.into_inner())?;
            let attn = models::attention(vit, grid, windowed, LORA, F32, &device)?;
            let work = Pass::forward(1, grid, 4).with_backward();
            let work = work.attention_layer(vit, windowed, LORA.rank);
            let name =
                format!("attention_layer/{}/{kind}/{grid}/rank16/forward_backward", vit.name);
            let mut group = group(c, &name, work);
            let mode = Mode::Train { seed: 1 };
            bench(&mut group, "ours", &device, || backward(&attn.forward(x.next(), mode)?));
            bench(&mut group, "composed", &device, || {
                backward(&composed::attention(&attn, x.next(), mode)?)
            });
            group.finish();
        }
    }
    Ok(())
}

/// A whole layer, its norms and MLP included.
fn block(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for vit in vits() {
        let mut config = vit.config(64);
        // One layer of each kind is enough.
        (config.num_hidden_layers, config.global_attn_indexes) = (2, vec![1]);
        let encoder = models::encoder(&config, FROZEN, F32, &device)?;
        let x = Rotating::new(normal(&[1, 64, 64, vit.dim], F32, &device)?)?;
        for (kind, layer) in ["windowed", "global"].into_iter().zip(&encoder.layers) {
            let work = Pass::forward(1, 64, 4).block(vit, kind == "windowed", 0);
            let mut group = group(c, &format!("block/{}/{kind}/64/forward", vit.name), work);
            bench(&mut group, "ours", &device, || layer.forward(x.next(), Mode::Eval).map(drop));
            bench(&mut group, "composed", &device, || {
                composed::block(layer, x.next(), Mode::Eval).map(drop)
            });
            group.finish();
        }
    }
    Ok(())
}

fn encoder(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    let grid = if all() { 64 } else { 32 };
    for vit in vits() {
        let pixels = normal(&[1, 3, 16 * grid, 16 * grid], F32, &device)?;
        let dtypes = if all() { &[F32, DType::BF16, DType::F16][..] } else { &[F32][..] };
        for &dtype in dtypes {
            let ours = models::encoder(&vit.config(grid), FROZEN, dtype, &device)?;
            let work = Pass::forward(1, grid, dtype.size_in_bytes()).encoder(vit, 0);
            let name = format!("encoder/{}/{grid}/{}/forward", vit.name, dtype.as_str());
            let mut group = group(c, &name, work);
            bench(&mut group, "ours", &device, || ours.forward(&pixels, Mode::Eval).map(drop));
            group.finish();
        }
    }
    Ok(())
}

/// Four images of one batch, with one adapter for all, or two or four among them.
fn mixed_batch(c: &mut Criterion) -> Result<()> {
    const NAMES: [&str; 4] = ["default", "b", "c", "d"];
    let device = device()?;
    let grid = if all() { 64 } else { 32 };
    let vit = VIT_B;
    let adapters = Adapters { dropout: 0.0, ..LORA };
    let mut encoder = models::encoder(&vit.config(grid), adapters, F32, &device)?;
    for name in &NAMES[1..] {
        let config = LoraConfig::new(LORA.rank).target_modules(["q", "v"]);
        add_adapter(&mut encoder, name, &config, 1)?;
    }
    let pixels = normal(&[4, 3, 16 * grid, 16 * grid], F32, &device)?;
    let work = Pass::forward(4, grid, 4).encoder(&vit, LORA.rank);
    let mut group = group(c, &format!("mixed_batch/{}/{grid}/rank16/forward", vit.name), work);
    bench(&mut group, "one", &device, || encoder.forward(&pixels, Mode::Eval).map(drop));
    for (label, distinct) in [("by_adapter_1", 1), ("by_adapter_2", 2), ("by_adapter_4", 4)] {
        let names: Vec<&str> = (0..4).map(|image| NAMES[image % distinct]).collect();
        bench(&mut group, label, &device, || {
            let forward = |encoder: &SamVisionEncoder, images: &Tensor| {
                let images = pixels.index_select(&images.to_device(pixels.device())?, 0)?;
                Ok(vec![encoder.forward(&images, Mode::Eval)?])
            };
            Ok(forward_mixed_batch(&mut encoder, &names, forward).map(drop)?)
        });
    }
    group.finish();
    Ok(())
}

/// Forward, backward and AdamW step, LoRA on q and v.
fn training_step(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    let grid = if all() { 64 } else { 32 };
    for vit in vits() {
        let mut config = vit.config(grid);
        if !all() {
            // A quarter of the layers, one of them global: the composed graph takes seconds for each.
            (config.num_hidden_layers, config.global_attn_indexes) = (3, vec![2]);
        }
        let measured = Vit { depth: config.num_hidden_layers, ..*vit };
        let pixels = normal(&[1, 3, 16 * grid, 16 * grid], F32, &device)?;
        let encoder = models::encoder(&config, LORA, F32, &device)?;
        let mut optimizer = AdamW::new(trainable_variables(&encoder)?, AdamWConfig::default())?;
        let mode = Mode::Train { seed: 1 };
        let pass = Pass::forward(1, grid, 4).with_backward();
        let global = config.global_attn_indexes.len();
        let work = pass.encoder_of(&measured, global, LORA.rank);
        let name = format!("training_step/{}/{grid}/{}layers", vit.name, measured.depth);
        let mut group = group(c, &name, work);
        let mut step = |out: Tensor| optimizer.step(&out.sqr()?.mean_all()?.backward()?);
        bench(&mut group, "ours", &device, || step(encoder.forward(&pixels, mode)?));
        // The composed graph of twelve layers at 1024 x 1024 does not fit most machines.
        if !all() {
            bench(&mut group, "composed", &device, || {
                step(composed::encoder(&encoder, &pixels, mode)?)
            });
        }
        group.finish();
    }
    Ok(())
}

/// The mask decoder on a stored embedding, by prompts of one point; 16 of them forward and backward too.
fn mask_decoder(c: &mut Criterion) -> Result<()> {
    let device = device()?;
    for (dtype, count) in [(F32, 1), (F32, 16), (F32, 64), (DType::BF16, 64)] {
        let decoder = models::decoder(dtype, &device)?;
        let prompts = Prompts::new(count, 64, dtype, &device)?;
        let work = Pass::forward(count, 64, dtype.size_in_bytes()).decoder();
        let name = format!("mask_decoder/{}/{count}prompts/forward", dtype.as_str());
        let mut group = group(c, &name, work);
        bench(&mut group, "ours", &device, || prompts.decode(&decoder, Mode::Eval).map(drop));
        group.finish();
    }
    let decoder = models::decoder(F32, &device)?;
    let mut prompts = Prompts::new(16, 64, F32, &device)?;
    prompts.image = Var::from_tensor(&prompts.image)?.into_inner();
    let work = Pass::forward(16, 64, 4).with_backward().decoder();
    let mut group = group(c, "mask_decoder/f32/16prompts/train", work);
    let mode = Mode::Train { seed: 1 };
    bench(&mut group, "ours", &device, || backward(&prompts.decode(&decoder, mode)?));
    group.finish();
    Ok(())
}

fn every_layer(c: &mut Criterion) {
    for run in [attention_layer, block, encoder, mask_decoder, mixed_batch, training_step] {
        if let Err(error) = run(c) {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
}

criterion_group!(benches, every_layer);
criterion_main!(benches);
