//! Launches of SAM's layers, at the sizes of the published models. Every kernel stands with its threads and the dynamic
//! shared memory of a block, the most of all its launches. `scripts/check-kernels.sh` names a file for them in
//! `CANDLE_SAM_LORA_LAUNCHES` and puts them beside the registers; a kernel that is not among them fails there.

#[path = "../build/family.rs"]
mod family;
#[path = "../build/files.rs"]
mod files;

use candle_core::{DType, Error, Result};
use candle_sam_lora::launch::plan::Plan;
use candle_sam_lora::launch::projection::sm90::tiles::Pass;
use candle_sam_lora::launch::projection::tiles::{Tile, TILES};
use candle_sam_lora::launch::projection::{
    self, Activation, BackwardOperands, ForwardOperands, LoraProblem, Problem, ProjectionProblem,
    Small,
};
use candle_sam_lora::launch::rel_pos_attention as attention;
use candle_sam_lora::launch::rel_pos_attention::sm90::backward as attention_bwd_sm90;
use candle_sam_lora::launch::rel_pos_attention::sm90::forward as attention_sm90;
use candle_sam_lora::launch::rel_pos_attention::sm90::windows as windows_sm90;
use candle_sam_lora::launch::{
    adamw, concat, conv_columns, dora, dropout, file_of, layer_norm, multi_head, AdamWRates,
    AdamWStep, AttentionProblem, ConvColumns, Gpu, Launch, LayerNormProblem, MultiHeadProblem,
};
use candle_sam_lora::philox::Dropout;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The address of every operand: nothing is run here.
const AT: u64 = 1 << 20;
/// Shared memory that a block may have on an A100, and on Hopper.
const MOST_SHARED: u32 = 163 << 10;
const MOST_SHARED_HOPPER: u32 = 227 << 10;
/// The device of the published models' numbers.
const GPU: &Gpu = &Gpu::H100;
const DROPOUT: Dropout = Dropout { p: 0.1, seed: 1, stream: 0 };

/// Every layer's launches, forward and backward, all gradients wanted.
fn launches(dtype: DType) -> Result<Vec<Launch>> {
    let mut launches = rows(dtype)?;
    for (grid, side, head_dim) in [
        (64, 64, 64), // ViT-B and ViT-L: the global blocks of an image of 1024 x 1024
        (64, 14, 64), // and the windowed ones
        (64, 64, 80), // ViT-H
        (64, 14, 80),
        (40, 40, 64), // images of 640 x 640
        (40, 40, 80),
        (32, 32, 64), // of 512 x 512
        (32, 32, 80),
        (14, 14, 16), // small models
        (14, 14, 32),
    ] {
        launches.extend(attention_of(grid, side, head_dim, dtype)?);
    }
    for (queries, keys) in [(7, 4096), (4096, 7), (448, 4096)] {
        for head_dim in [16, 32] {
            launches.extend(multi_head_of((queries, keys), head_dim, dtype)?);
        }
    }
    for rank in [16, 64] {
        for tile in TILES {
            launches.extend(projection_of(rank, tile, dtype)?);
        }
    }
    Ok(launches)
}

fn steps(plan: Arc<Plan>) -> Vec<Launch> {
    plan.steps.clone()
}

/// Launches over rows: LayerNorm, dropout, DoRA's norms.
fn rows(dtype: DType) -> Result<Vec<Launch>> {
    let problem = LayerNormProblem { rows: 4096, size: 768, eps: 1e-6 };
    let norm = |pass| layer_norm::plan(&problem, pass, dtype).map(steps);
    let mut launches = norm(layer_norm::Pass::Backward { trained: true, residual: true })?;
    launches.extend(norm(layer_norm::Pass::Forward)?);
    launches.extend(dropout::plan((4096, 768), dtype)?.steps);
    let norm = dora::DoraNorm { out_dim: 768, in_dim: 768, rank: 16, scaling: 1.0 };
    launches.extend(dora::plan(&norm, dtype)?.steps);
    launches.extend(optimizer(dtype)?);
    launches.extend(concat::plan(&[768; 3], dtype)?.steps.clone());
    let neck = ConvColumns { batch: 1, h: 64, w: 64, channels: 256, kernel: 3, stride: 1 };
    for pass in [conv_columns::Pass::Forward, conv_columns::Pass::Backward] {
        launches.extend(conv_columns::plan(&neck, pass, dtype)?.steps);
    }
    Ok(launches)
}

/// The mask decoder's attention: few tokens to an image's, back, and the tokens of many prompts.
fn multi_head_of(
    (queries, keys): (usize, usize),
    head_dim: usize,
    dtype: DType,
) -> Result<Vec<Launch>> {
    use multi_head::Pass;
    let problem = MultiHeadProblem {
        batch: 1,
        q_batch: 1,
        kv_batch: 1,
        queries,
        keys,
        num_heads: 8,
        head_dim,
        softmax_scale: 0.25,
    };
    let mut launches = vec![];
    for pass in [Pass::Forward { saves: true }, Pass::Backward { q: true, kv: true }] {
        launches.extend(multi_head::plan(&problem, pass, dtype, GPU).map(steps)?);
    }
    Ok(launches)
}

/// A step over the adapters of ViT-B.
fn optimizer(dtype: DType) -> Result<Vec<Launch>> {
    let rates = AdamWRates { decay: 1.0, rate: 1e-3 };
    let parameter = adamw::Parameter { size: 12288, dtype, rates };
    let step = AdamWStep {
        beta1_rest: 0.1,
        beta2: 0.999,
        beta2_rest: 0.001,
        root_correction: 1.0,
        eps: 1e-8,
        max_norm: None,
    };
    Ok(adamw::plan(&[parameter; 48], true, &step)?.steps)
}

/// Attention in windows of `side x side` over a grid of `grid x grid` tokens.
fn attention_problem(grid: usize, side: usize, head_dim: usize) -> AttentionProblem {
    AttentionProblem {
        batch: 1,
        h: grid,
        w: grid,
        num_heads: 12,
        head_dim,
        side_h: side,
        side_w: side,
        softmax_scale: 0.125,
        rel_pos: true,
        dropout: None,
    }
}

fn attention_of(grid: usize, side: usize, head_dim: usize, dtype: DType) -> Result<Vec<Launch>> {
    let problem = attention_problem(grid, side, head_dim);
    let inputs = attention::Inputs { qkv: AT, tables: [AT; 2], pad: AT };
    let operands = attention::BackwardOperands {
        out: AT,
        lse: AT,
        dout: AT,
        dqkv: AT,
        dtables: AT,
        dpad: AT,
        workspace: AT,
    };
    let mut launches = attention::backward(&problem, dtype, &inputs, &operands, GPU)?;
    launches.push(attention::forward(&problem, dtype, &inputs, AT, AT)?);
    launches.extend(attention_sm90::forward(&problem, dtype, &inputs, [AT; 2], GPU)?);
    launches.extend(windows_sm90::forward(&problem, dtype, &inputs, [AT; 2], GPU)?);
    let backward = windows_sm90::backward(&problem, dtype, &inputs, &operands, GPU)?;
    launches.extend(backward.unwrap_or_default());
    let trained = attention::BackwardOperands { dpad: 0, ..operands };
    launches.extend(
        attention_bwd_sm90::backward(&problem, dtype, &inputs, &trained, GPU)?.unwrap_or_default(),
    );
    Ok(launches)
}

/// An MLP's first layer with LoRA, of ViT-B.
fn projection_of(rank: usize, tile: &Tile, dtype: DType) -> Result<Vec<Launch>> {
    let lora = LoraProblem { rank, scaling: 1.0, dropout: Some(DROPOUT), bias: true };
    let projections = [ProjectionProblem { out_dim: 3072, bias: true, lora: Some(lora) }];
    let problem = Problem {
        rows: 4096,
        in_dim: 768,
        projections: &projections,
        activation: Activation::Gelu,
    };
    let weights = &[AT][..];
    let operands = ForwardOperands {
        x: AT,
        weights,
        small: Small::Flat(AT),
        residual: AT,
        out: AT,
        low_rank: AT,
        sum: AT,
    };
    let mut launches = projection::forward_with(tile, &problem, dtype, &operands)?;
    for tile in Pass::Forward.tiles() {
        let own = projection::sm90::forward::forward_with(tile, &problem, dtype, &operands, GPU)?;
        launches.extend(own.into_iter().flatten());
    }
    let operands = BackwardOperands {
        x: AT,
        weights,
        small: Small::Flat(AT),
        low_rank: AT,
        sum: AT,
        dout: AT,
        dx: AT,
        dsmall: AT,
        workspace: AT,
    };
    launches.extend(projection::backward_with(tile, &problem, dtype, &operands)?);
    for tile in Pass::BackwardInput.tiles() {
        let own = projection::sm90::backward::backward_with(tile, &problem, dtype, &operands, GPU)?;
        launches.extend(own.into_iter().flatten());
    }
    Ok(launches)
}

/// Launches of a layer's operations for one image if nothing is trained, with or without adapters on all its linears.
fn frozen_layer(window: usize, rank: Option<usize>, gpu: Gpu) -> Result<Vec<String>> {
    const DTYPE: DType = DType::BF16;
    let lora = rank.map(|rank| LoraProblem { rank, scaling: 1.0, dropout: None, bias: false });
    let linear = |in_dim, outs: &[usize], activation| -> Result<Vec<Launch>> {
        let part = |&out_dim: &usize| ProjectionProblem { out_dim, bias: true, lora };
        let projections: Vec<_> = outs.iter().map(part).collect();
        let problem = Problem { rows: 4096, in_dim, projections: &projections, activation };
        let frozen = projection::Parameter { packed: false, typed: true, trained: false };
        let frozen = vec![frozen; 3 * outs.len()];
        let pass = projection::Pass::Forward { residual: true, sum: false };
        projection::plan(&problem, pass, Some(&frozen), DTYPE, &gpu).map(steps)
    };
    let norm = || {
        let problem = LayerNormProblem { rows: 4096, size: 768, eps: 1e-6 };
        layer_norm::plan(&problem, layer_norm::Pass::Forward, DTYPE).map(steps)
    };
    let problem = attention_problem(64, window, 64);
    let given = attention::Given { tables_in_place: true, pad: true };
    let attend = attention::plan(&problem, given, attention::Pass::Forward, DTYPE, &gpu)?;
    let mut launches = norm()?;
    launches.extend(linear(768, &[768; 3], Activation::Identity)?);
    launches.extend(steps(attend));
    launches.extend(linear(768, &[768], Activation::Identity)?);
    launches.extend(norm()?);
    launches.extend(linear(768, &[3072], Activation::Gelu)?);
    launches.extend(linear(3072, &[768], Activation::Identity)?);
    Ok(launches.into_iter().map(|launch| launch.kernel).collect())
}

/// The tests of the operations show that frozen parameters are read where they lie, so that this is all.
#[test]
fn a_frozen_layer_is_seven_kernels_and_one_more_for_each_adapted_linear() -> Result<()> {
    for (window, gpu) in [64, 14].into_iter().flat_map(|w| [(w, Gpu::H100), (w, Gpu::A100)]) {
        let names = frozen_layer(window, None, gpu)?;
        assert_eq!(names.len(), 7, "{names:?}");
        let names = frozen_layer(window, Some(16), gpu)?;
        assert_eq!(names.len(), 11, "{names:?}");
        let thin = names.iter().filter(|name| name.starts_with("low_rank_input_64x16"));
        assert_eq!(thin.count(), 4, "{names:?}");
    }
    Ok(())
}

/// As the driver's back end looks for them; `scripts/kernel_table.py` sees that they are there.
#[test]
fn every_kernel_has_a_file_of_its_name() -> Result<()> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let sources = files::with_extensions(&kernels, &["cu"]).map_err(Error::msg)?;
    let files: Vec<_> = sources.iter().filter_map(|source| family::family(source)).collect();
    assert_eq!(files.len(), sources.len());
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for Launch { kernel, .. } in launches(dtype)? {
            let file = file_of(&kernel, files.iter().map(String::as_str));
            assert!(file.is_some(), "{kernel}: of {files:?}");
        }
    }
    Ok(())
}

#[test]
fn every_launch_fits_its_smallest_device() -> Result<()> {
    let mut blocks = BTreeMap::<String, (u32, u32)>::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for launch in launches(dtype)? {
            let threads = launch.block.iter().product::<u32>();
            assert!(threads.is_multiple_of(32) && threads <= 1024, "{}: {threads}", launch.kernel);
            let (known, shared) = blocks.entry(launch.kernel.clone()).or_insert((threads, 0));
            assert_eq!(*known, threads, "{}: its bounds are compiled in", launch.kernel);
            *shared = launch.shared_bytes.max(*shared);
        }
    }
    let mut table = String::new();
    for (kernel, (threads, shared)) in blocks {
        table += &format!("{kernel}\t{threads}\t{shared}\n");
        let most = if kernel.contains("_sm90_") { MOST_SHARED_HOPPER } else { MOST_SHARED };
        assert!(shared <= most, "{kernel}: {shared} bytes of shared memory");
    }
    if let Some(path) = std::env::var_os("CANDLE_SAM_LORA_LAUNCHES") {
        std::fs::write(path, table)?;
    }
    Ok(())
}
