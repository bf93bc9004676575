//! The projections' kernels for Hopper, every instance. The portable ones' cases run as far as bulk copies take them.
//! In other cases blocks make several tiles and fill their rings more than once.

use crate::common::Worst;
use crate::projection::{check_backward, check_forward, CASES};
use crate::projection_case::{Case, Data, PLAIN};
use candle_core::{DType, Result};
use candle_sam_lora::launch::projection::sm90::backward as hopper_bwd;
use candle_sam_lora::launch::projection::sm90::forward as hopper;
use candle_sam_lora::launch::projection::sm90::tiles::{Pass, Tile};
use candle_sam_lora::launch::projection::{Activation, BackwardOperands, ForwardOperands};
use candle_sam_lora::launch::Gpu;
use candle_sam_lora_emulator::Mode;

const TRAINED: Case = Case { p: 0.1, bias: true, lora_bias: true, ..PLAIN };
const LARGE: [Case; 3] = [
    // Several tiles each way, the last ones narrow; several steps of S.
    Case { rows: 130, in_dim: 72, outs: &[200, 40, 264], ranks: &[16, 0, 68], ..TRAINED },
    // More steps than stages, both outputs and a residual.
    Case { in_dim: 392, activation: Activation::Gelu, residual: true, ranks: &[12], ..TRAINED },
    Case { rows: 260, outs: &[328], residual: true, ..TRAINED },
];

/// Three tiles, one below the other: of two clusters' blocks, one has none.
const IN_CLUSTERS: Case =
    Case { rows: 260, in_dim: 200, outs: &[72, 40], ranks: &[16, 0], residual: true, ..TRAINED };

/// The low-rank products of the gradient of x, for every tile. Ranks are less and more than the sixteen that are
/// multiplied at once, of one to three projections. Tiles end within 32 columns and 16 rows.
const LOW_RANKS: [Case; 3] = [
    Case { rows: 133, in_dim: 200, outs: &[40, 24, 8], ranks: &[1, 16, 4], p: 0.3, ..PLAIN },
    Case { rows: 133, outs: &[72, 40], ranks: &[33, 64], p: 0.1, ..PLAIN },
    Case { rows: 133, in_dim: 200, outs: &[136, 40, 8], ranks: &[16, 0, 5], ..PLAIN },
];
/// b of more and of less than f16 has.
const RANGES: [Case; 2] =
    [Case { ranks: &[16], b_scale: 1e6, ..PLAIN }, Case { ranks: &[4], b_scale: 1e-7, ..PLAIN }];

/// A case as it is run.
struct Run {
    data: Data,
    tile: &'static Tile,
    multiprocessors: u32,
    modes: Vec<Mode>,
}

/// All cases that bulk copies take, with the tiles, which they take by turns, f16 the ones that bf16 does not. In bf16
/// those of `every_tile` with all that blocks make by themselves, and what clusters are to be tried with. Ranks are to
/// be multiples of `rank`.
fn cases(
    dtype: DType,
    tiles: &'static [Tile],
    rank: usize,
    every_tile: &[Case],
) -> Result<Vec<Run>> {
    // Copies and products late and early each by itself, for one of the dtypes, which differ in nothing else.
    let all = || Mode::all_with_products().collect();
    let few = || Mode::all().collect::<Vec<_>>();
    let mut cases = Vec::new();
    for (index, case) in CASES.into_iter().chain(LARGE).enumerate() {
        let multiple = |sizes: &[usize], of: usize| sizes.iter().all(|size| size % of == 0);
        let widths = multiple(&[case.in_dim, case.offset], 8) && multiple(case.outs, 8);
        if !widths || !multiple(case.ranks, rank) {
            continue;
        }
        let tile = &tiles[(index + usize::from(dtype == DType::F16)) % tiles.len()];
        let modes = if dtype == DType::F16 { few() } else { all() };
        let (data, multiprocessors) = (Data::new(case, dtype)?, 1 + index as u32 / 2 % 2);
        cases.push(Run { data, tile, multiprocessors, modes });
    }
    for tile in tiles.iter().filter(|_| dtype == DType::BF16) {
        if tile.cluster > 1 {
            let data = Data::new(IN_CLUSTERS, dtype)?;
            cases.push(Run { data, tile, multiprocessors: 4, modes: all() });
            continue;
        }
        for case in every_tile {
            let data = Data::new(*case, dtype)?;
            cases.push(Run { data, tile, multiprocessors: 1, modes: few() });
        }
    }
    Ok(cases)
}

#[test]
fn forward() -> Result<()> {
    let mut worst = Worst::default();
    for dtype in [DType::F16, DType::BF16] {
        for Run { data, tile, multiprocessors, modes } in
            cases(dtype, Pass::Forward.tiles(), 4, &[])?
        {
            let problem = data.projections();
            let gpu = Gpu { multiprocessors, ..Gpu::H100 };
            let plan = |operands: &ForwardOperands<'_>| {
                let launches = hopper::forward_with(tile, &problem, dtype, operands, &gpu)?;
                Ok(launches.unwrap_or_else(|| panic!("{}: not covered", data.name)))
            };
            check_forward(&data, &mut worst, &modes, &[&plan])?;
        }
    }
    worst.check("projection forward on Hopper", 1.0 / 64.0);
    Ok(())
}

#[test]
fn backward() -> Result<()> {
    let mut worst = Worst::default();
    for dtype in [DType::F16, DType::BF16] {
        let mut cases = cases(dtype, Pass::BackwardInput.tiles(), 1, &LOW_RANKS)?;
        for case in RANGES.into_iter().filter(|_| dtype == DType::F16) {
            let narrow = |tile: &&Tile| tile.name == "cooperative_128x192";
            let tile = Pass::BackwardInput.tiles().iter().find(narrow).expect("a tile");
            let data = Data::new(case, dtype)?;
            cases.push(Run { data, tile, multiprocessors: 1, modes: Mode::all().collect() });
        }
        for Run { data, tile, multiprocessors, modes } in cases {
            let problem = data.projections();
            let gpu = Gpu { multiprocessors, ..Gpu::H100 };
            let plan = |operands: &BackwardOperands<'_>| {
                let launches = hopper_bwd::backward_with(tile, &problem, dtype, operands, &gpu)?;
                Ok(launches.unwrap_or_else(|| panic!("{}: not covered", data.name)))
            };
            check_backward(&data, &mut worst, &modes, &[&plan])?;
        }
    }
    worst.check("projection backward on Hopper", 1.0 / 64.0);
    Ok(())
}
