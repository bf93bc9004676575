//! The projections' kernels for Hopper, every instance: the portable ones' cases as far as bulk copies take them, and
//! cases whose blocks make several tiles and fill their rings more than once.

use crate::common::Worst;
use crate::projection::{check_forward, Case, Data, CASES, PLAIN};
use candle_core::{DType, Result};
use candle_sam_lora::launch::projection::{Activation, ForwardOperands};
use candle_sam_lora::launch::projection_sm90::{self as hopper, TILES};
use candle_sam_lora_emulator::Mode;

const TRAINED: Case = Case { p: 0.1, bias: true, lora_bias: true, ..PLAIN };
const LARGE: [Case; 3] = [
    // Several tiles each way, the last ones narrow; several steps of S.
    Case { rows: 130, in_dim: 72, outs: &[200, 40, 264], ranks: &[16, 0, 68], ..TRAINED },
    // More steps than stages, both outputs and a residual.
    Case { in_dim: 392, activation: Activation::Gelu, residual: true, ranks: &[12], ..TRAINED },
    Case { rows: 260, outs: &[328], residual: true, ..TRAINED },
];

/// All cases that bulk copies take, with the tiles and how many multiprocessors there are: small cases take the tiles by
/// turns.
fn cases(dtype: DType, tiles: usize) -> Result<Vec<(Data, usize, u32)>> {
    let mut cases = Vec::new();
    for (index, case) in CASES.into_iter().chain(LARGE).enumerate() {
        let multiple = |sizes: &[usize], of: usize| sizes.iter().all(|size| size % of == 0);
        let widths = multiple(&[case.in_dim, case.offset], 8) && multiple(case.outs, 8);
        if !widths || !multiple(case.ranks, 4) {
            continue;
        }
        for tile in (0..tiles).filter(|tile| index >= CASES.len() || index % tiles == *tile) {
            cases.push((Data::new(case, dtype)?, tile, 1 + (index + tile) as u32 % 2));
        }
    }
    Ok(cases)
}

/// Copies and products late and early, each by itself, for one of the dtypes, which differ in nothing else.
fn modes(dtype: DType) -> Vec<Mode> {
    match dtype {
        DType::F16 => Mode::all().collect(),
        _ => Mode::all_with_products().collect(),
    }
}

#[test]
fn forward() -> Result<()> {
    let mut worst = Worst::default();
    for dtype in [DType::F16, DType::BF16] {
        for (data, tile, multiprocessors) in cases(dtype, TILES.len())? {
            let problem = data.projections();
            let plan = |operands: &ForwardOperands<'_>| {
                let tile = &TILES[tile];
                let launches =
                    hopper::forward_with(tile, &problem, dtype, operands, multiprocessors)?;
                Ok(launches.unwrap_or_else(|| panic!("{}: not covered", data.name)))
            };
            check_forward(&data, &mut worst, &modes(dtype), &[&plan])?;
        }
    }
    worst.check("projection forward on Hopper", 1.0 / 64.0);
    Ok(())
}
