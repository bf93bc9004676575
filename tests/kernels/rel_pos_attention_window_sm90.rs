//! The attention's kernels for windows on Hopper: every instance against the f64 reference, lse against the portable
//! kernels, the gradients against the composed graph's.

use crate::attention_case::{Case, Shapes, DROPOUT, GLOBAL, WINDOWED};
use crate::common::Worst;
use crate::rel_pos_attention::{assert_all_ran, check_backward, check_hopper_forward, Kernels};
use candle_core::{DType, Result};
use candle_sam_lora::launch::rel_pos_attention::sm90::windows as attention;
use candle_sam_lora::launch::rel_pos_attention::Inputs;
use candle_sam_lora::launch::Gpu;
use candle_sam_lora_emulator::Mode;
use std::collections::BTreeSet;

/// The smallest case of each kernel, and what only some have to do.
fn shapes(dtype: DType) -> Vec<Shapes> {
    let mut all = vec![WINDOWED, Shapes { dim: 80, ..WINDOWED }];
    if dtype == DType::BF16 {
        all.extend([
            // SAM's window, hanging over the grid on both sides; heads of both dimensions.
            Shapes { grid: (16, 17), window: Some(14), heads: 2, ..WINDOWED },
            Shapes { grid: (14, 14), window: Some(14), dim: 80, pad: false, ..WINDOWED },
            // More heads of windows than blocks: they take turns.
            Shapes { grid: (24, 24), heads: 2, window: Some(2), pad: false, ..WINDOWED },
        ]);
    } else {
        all.extend([
            Shapes { pad: false, ..WINDOWED },
            Shapes { rel_pos: false, ..WINDOWED },
            Shapes { dropout: Some(DROPOUT), heads: 2, batch: 2, ..WINDOWED },
            // Not square; no window but the grid; one token.
            Shapes { grid: (3, 14), ..GLOBAL },
            Shapes { grid: (13, 1), ..GLOBAL },
            Shapes { grid: (1, 1), ..GLOBAL },
        ]);
    }
    all
}

fn check_forward(case: &Case, worst: &mut Worst, launched: &mut BTreeSet<String>) -> Result<()> {
    let forward = |case: &Case, inputs: &Inputs, to| {
        attention::forward(&case.problem, case.dtype, inputs, to, &Gpu::H100)
    };
    check_hopper_forward(case, Mode::all(), &forward, worst, launched)
}

#[test]
fn forward() -> Result<()> {
    let (mut worst, mut launched) = (Worst::default(), BTreeSet::new());
    for dtype in [DType::F16, DType::BF16] {
        for shapes in shapes(dtype) {
            check_forward(&Case::new(shapes, dtype)?, &mut worst, &mut launched)?;
        }
    }
    worst.check("rel_pos_attention forward in windows on sm_90a", 1.0 / 64.0);
    assert_all_ran("window_fwd", true, &launched)
}

#[test]
fn backward() -> Result<()> {
    let (mut worst, mut launched) = (Worst::default(), BTreeSet::new());
    for dtype in [DType::F16, DType::BF16] {
        for (index, shapes) in shapes(dtype).into_iter().enumerate() {
            let case = Case::new(shapes, dtype)?;
            check_backward(Kernels::HopperWindows, &case, index == 0, &mut worst, &mut launched)?;
        }
    }
    worst.check("rel_pos_attention backward in windows on sm_90a", 1.0 / 16.0);
    assert_all_ran("window_bwd", true, &launched)
}
