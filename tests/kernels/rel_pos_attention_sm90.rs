//! The attention's kernels for Hopper: every instance against the f64 reference and, for lse, the portable kernels.

use crate::common::Worst;
use crate::device::{emulator, launch_all, Device, Memory};
use crate::rel_pos_attention::{assert_all_ran, check_outputs, Case, Shapes, DROPOUT, GLOBAL};
use candle_core::{DType, Result};
use candle_sam_lora::launch::rel_pos_attention as portable;
use candle_sam_lora::launch::rel_pos_attention::sm90::forward as attention;
use candle_sam_lora::launch::rel_pos_attention::sm90::tiles::widths;
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

/// Output and lse in every mode, the same bits in all.
fn run(case: &Case, launched: &mut BTreeSet<String>) -> Result<Vec<Memory>> {
    let on_device = case.memory()?;
    let mut first: Option<Vec<Memory>> = None;
    for mode in Mode::all_with_products() {
        let device = Device { emulator: emulator(), mode };
        let out = Memory::for_elements(case.qkv.elem_count() / 3, case.dtype);
        let lse =
            Memory::for_elements(portable::lse_elements(&case.problem, case.dtype), DType::F32);
        let outputs = [out.address(), lse.address()];
        let inputs = on_device.inputs();
        let launch = attention::forward(&case.problem, case.dtype, &inputs, outputs, &case.gpu())?;
        let launch = launch.unwrap_or_else(|| panic!("{}: not covered", case.name));
        launch_all(&device, std::slice::from_ref(&launch))
            .map_err(|e| e.context(format!("{} {mode:?}", case.name)))?;
        launched.insert(launch.kernel);
        let outputs = vec![out, lse];
        match &first {
            None => first = Some(outputs),
            Some(first) => {
                for (a, b) in first.iter().zip(&outputs) {
                    assert!(a.bytes() == b.bytes(), "{} differs in {mode:?}", case.name);
                }
            }
        }
    }
    Ok(first.unwrap())
}

fn check(case: &Case, worst: &mut Worst, launched: &mut BTreeSet<String>) -> Result<()> {
    let outputs = run(case, launched)?;
    check_outputs(case, &outputs, worst)
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
