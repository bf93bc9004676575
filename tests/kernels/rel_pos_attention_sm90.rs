//! The attention's kernels for Hopper: every instance against the f64 reference and, for lse, the portable kernels.

use crate::attention_case::{Case, Shapes, DROPOUT, GLOBAL};
use crate::common::Worst;
use crate::rel_pos_attention::{assert_all_ran, check_hopper_forward};
use candle_core::{DType, Result};
use candle_sam_lora::launch::rel_pos_attention::sm90::forward as attention;
use candle_sam_lora::launch::rel_pos_attention::sm90::tiles::widths;
use candle_sam_lora::launch::rel_pos_attention::Inputs;
use candle_sam_lora_emulator::Mode;
use std::collections::BTreeSet;

/// The smallest case of each kernel, and what only some have to do.
fn shapes(dtype: DType) -> Vec<Shapes> {
    let grids = [(2, 63), (5, 39), (9, 17), (5, 7)];
    let dims = |shapes: Shapes| [64, 80].map(|dim| Shapes { dim, ..shapes });
    let mut all: Vec<Shapes> =
        grids.into_iter().flat_map(|grid| dims(Shapes { grid, ..GLOBAL })).collect();
    if dtype == DType::BF16 {
        all.extend([
            // A window that is the grid.
            Shapes { grid: (14, 14), window: Some(14), pad: false, ..GLOBAL },
            Shapes { grid: (14, 16), ..GLOBAL },
            // The slots of the ring go round.
            Shapes { grid: (8, 64), ..GLOBAL },
            // Several stripes, several blocks; two boxes of a table.
            Shapes { grid: (3, 127), dim: 80, ..GLOBAL },
            Shapes { grid: (6, 80), ..GLOBAL },
            Shapes { grid: (70, 5), heads: 2, ..GLOBAL },
            // Whole windows in a grid.
            Shapes { grid: (15, 30), window: Some(15), heads: 2, batch: 2, pad: false, ..GLOBAL },
        ]);
    } else {
        all.extend([
            Shapes { grid: (6, 9), window: Some(3), pad: false, ..GLOBAL },
            Shapes { rel_pos: false, grid: (3, 40), ..GLOBAL },
            Shapes { dropout: Some(DROPOUT), grid: (4, 61), ..GLOBAL },
            Shapes { dropout: Some(DROPOUT), grid: (5, 40), dim: 80, ..GLOBAL },
            Shapes { grid: (1, 17), ..GLOBAL },
        ]);
    }
    all
}

fn check(case: &Case, worst: &mut Worst, launched: &mut BTreeSet<String>) -> Result<()> {
    let forward = |case: &Case, inputs: &Inputs, to| {
        attention::forward(&case.problem, case.dtype, inputs, to, &case.gpu())
    };
    check_hopper_forward(case, Mode::all_with_products(), &forward, worst, launched)
}

#[test]
fn forward() -> Result<()> {
    let (mut worst, mut launched) = (Worst::default(), BTreeSet::new());
    for dtype in [DType::F16, DType::BF16] {
        for shapes in shapes(dtype) {
            check(&Case::new(shapes, dtype)?, &mut worst, &mut launched)?;
        }
    }
    worst.check("rel_pos_attention forward on sm_90a", 1.0 / 64.0);
    assert_all_ran("fwd", true, &launched)
}

/// As of the portable kernels.
#[test]
fn any_tile_serves_any_problem() -> Result<()> {
    let (mut worst, mut launched) = (Worst::default(), BTreeSet::new());
    for shapes in [Shapes { grid: (3, 20), ..GLOBAL }, Shapes { grid: (2, 64), dim: 80, ..GLOBAL }]
    {
        for cols in widths(shapes.dim) {
            let case = Case { cols: Some(cols), ..Case::new(shapes, DType::BF16)? };
            check(&case, &mut worst, &mut launched)?;
            let kernel = format!("rel_pos_attention_fwd_sm90_hd{}_cols{cols}_bf16", shapes.dim);
            assert!(launched.contains(&kernel), "{kernel} was not run");
        }
    }
    worst.check("rel_pos_attention on Hopper, any tile", 1.0 / 64.0);
    Ok(())
}
