//! The attention's backward for Hopper: the gradients by every instance, against the composed graph in f32.

use crate::attention_case::{Case, Shapes, DROPOUT, GLOBAL};
use crate::common::Worst;
use crate::rel_pos_attention::{assert_all_ran, check_backward, Kernels};
use candle_core::{DType, Result};
use candle_sam_lora::launch::rel_pos_attention::sm90::tiles::widths;
use std::collections::BTreeSet;

/// The smallest case of each kernel, and what only some have to do; with whether to freeze the tables too.
fn shapes(dtype: DType) -> Vec<(Shapes, bool)> {
    // The last has four blocks of queries, for two parts of the tables' gradients.
    let grids = [(2, 63), (4, 39), (9, 17)];
    let dims = |grid| [64, 80].map(|dim| (Shapes { dim, grid, ..GLOBAL }, false));
    let mut all: Vec<_> = grids.into_iter().flat_map(dims).collect();
    if dtype == DType::BF16 {
        all.extend([
            (Shapes { batch: 2, heads: 2, ..GLOBAL }, true),
            // The stages and slots go round.
            (Shapes { grid: (6, 64), ..GLOBAL }, false),
            // Several stripes, several blocks; two boxes of a table.
            (Shapes { grid: (2, 126), dim: 80, ..GLOBAL }, false),
            (Shapes { grid: (67, 3), ..GLOBAL }, false),
        ]);
    } else {
        all.extend([
            (Shapes { dropout: Some(DROPOUT), grid: (3, 61), ..GLOBAL }, false),
            (Shapes { dropout: Some(DROPOUT), grid: (4, 40), dim: 80, ..GLOBAL }, false),
            (Shapes { dropout: Some(DROPOUT), grid: (5, 33), heads: 2, ..GLOBAL }, false),
            (Shapes { rel_pos: false, grid: (3, 40), ..GLOBAL }, false),
            (Shapes { grid: (1, 1), ..GLOBAL }, false),
        ]);
    }
    all
}

/// Runs every case; each kernel of a pass must be among those launched.
fn check_all(kernels: Kernels, pass: &str, title: &str) -> Result<()> {
    let (mut worst, mut launched) = (Worst::default(), BTreeSet::new());
    for dtype in [DType::F16, DType::BF16] {
        for (shapes, frozen) in shapes(dtype) {
            let case = Case::new(shapes, dtype)?;
            check_backward(kernels, &case, frozen, &mut worst, &mut launched)?;
        }
    }
    worst.check(title, 1.0 / 16.0);
    assert_all_ran(pass, true, &launched)
}

#[test]
fn backward() -> Result<()> {
    check_all(Kernels::Hopper, "bwd", "rel_pos_attention backward on sm_90a")
}

/// The key pass has two forms: which one a GPU runs depends on the compiler. A default build of the emulator has the
/// one with keys in registers, which `backward` runs.
#[test]
fn backward_with_keys_in_shared_memory() -> Result<()> {
    let title = "rel_pos_attention backward on sm_90a, keys in shared memory";
    check_all(Kernels::HopperKeysInSharedMemory, "bwd_key", title)
}

/// As of the portable kernels.
#[test]
fn any_tile_serves_any_problem() -> Result<()> {
    let (mut worst, mut launched) = (Worst::default(), BTreeSet::new());
    for cols in widths(GLOBAL.dim) {
        let shapes = Shapes { grid: (3, 20), ..GLOBAL };
        let case = Case { cols: Some(cols), ..Case::new(shapes, DType::BF16)? };
        check_backward(Kernels::Hopper, &case, false, &mut worst, &mut launched)?;
        for pass in ["query", "key"] {
            let kernel = format!("rel_pos_attention_bwd_{pass}_sm90_hd64_cols{cols}_bf16");
            assert!(launched.contains(&kernel), "{kernel} was not run");
        }
    }
    worst.check("rel_pos_attention backward on Hopper, any tile", 1.0 / 16.0);
    Ok(())
}
