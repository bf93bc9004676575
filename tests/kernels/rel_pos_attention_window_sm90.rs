//! The attention's kernels for windows on Hopper: every instance against the f64 reference, lse against the portable
//! kernels, the gradients against the composed graph's.

use crate::common::Worst;
use crate::device::{emulator, in_every_mode, launch_all, Memory};
use crate::rel_pos_attention::{
    check_backward, check_outputs, Case, Kernels, Shapes, DROPOUT, GLOBAL, WINDOWED,
};
use candle_core::{DType, Result};
use candle_sam_lora::launch::rel_pos_attention as portable;
use candle_sam_lora::launch::rel_pos_attention::sm90::windows as attention;
use candle_sam_lora::launch::Gpu;
use std::cell::RefCell;
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

/// All kernels of a pass must have been among those launched.
fn assert_all_ran(pass: &str, launched: &BTreeSet<String>) -> Result<()> {
    let prefix = format!("rel_pos_attention_window_{pass}_sm90");
    let kernels = emulator().kernels().map_err(candle_core::Error::msg)?;
    let kernels: BTreeSet<String> =
        kernels.into_iter().filter(|k| k.starts_with(&prefix)).collect();
    assert!(!kernels.is_empty() && kernels.is_subset(launched), "{kernels:?}, but {launched:?}");
    Ok(())
}

/// Output and lse in every mode.
fn run_forward(case: &Case, launched: &mut BTreeSet<String>) -> Result<Vec<Memory>> {
    let on_device = case.memory()?;
    let names = RefCell::new(launched);
    Ok(in_every_mode(&case.name, |device| {
        let out = Memory::for_elements(case.qkv.elem_count() / 3, case.dtype);
        let lse =
            Memory::for_elements(portable::lse_elements(&case.problem, case.dtype), DType::F32);
        let to = [out.address(), lse.address()];
        let launch =
            attention::forward(&case.problem, case.dtype, &on_device.inputs(), to, &Gpu::H100)?;
        let launch = launch.unwrap_or_else(|| panic!("{}: not covered", case.name));
        launch_all(device, std::slice::from_ref(&launch))?;
        names.borrow_mut().insert(launch.kernel);
        Ok(vec![out, lse])
    }))
}

fn check_forward(case: &Case, worst: &mut Worst, launched: &mut BTreeSet<String>) -> Result<()> {
    let outputs = run_forward(case, launched)?;
    check_outputs(case, &outputs, worst)
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
    assert_all_ran("fwd", &launched)
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
    assert_all_ran("bwd", &launched)
}
