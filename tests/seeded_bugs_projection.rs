//! Bugs planted in copies of the projections' kernels, each of which the emulator must catch.
//!
//! What runs is the true launch code, S and then the output. Unharmed, the result is that of float64 in every mode.

mod common;
#[path = "kernels/device.rs"]
mod device;
#[path = "kernels/planted.rs"]
mod planted;

use candle_core::{DType, Result};
use candle_sam_lora::launch::projection::{
    forward_with, low_rank_len, Activation, ForwardOperands, LoraProblem, Problem,
    ProjectionProblem, Small, Tile,
};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::reference;
use candle_sam_lora_emulator::{Emulator, Mode, Sources, Timing};
use common::{random, values};
use device::{Device, Memory};
use planted::copy_with;
use std::path::{Path, PathBuf};

/// The two instances that run.
const INSTANCES: &str = r#"
#include "low_rank/low_rank.cuh"
#include "projection/fwd.cuh"
using Input = LowRankTile<__nv_bfloat16, 16, 4, 1, false, false>;
using Small = ProjectionTile<__nv_bfloat16, 64, 64, 2, 2, false>;
KERNEL(low_rank_input_64x16_bf16, LowRankParams, LOW_RANK_THREADS) { low_rank<Input>(p); }
KERNEL(projection_fwd_64x64_bf16, ProjectionParams, 128) { projection_fwd<Small>(p); }
"#;

const ROWS: usize = 70;
const IN_DIM: usize = 264;
const OUT_DIM: usize = 72;
const RANK: usize = 16;
const DROPOUT: Dropout = Dropout { p: 0.5, seed: 3, stream: 1 };
/// bfloat16 keeps 8 bits.
const ROUNDING: f64 = 1.0 / 128.0;

/// A folder of the kernels, in which `planted` stands in place of `original` in `file`.
fn kernels_with(name: &str, file: &str, original: &str, planted: &str) -> PathBuf {
    let folder = copy_with(&format!("projection_{name}"), file, original, planted);
    std::fs::write(folder.join("instances.cu"), INSTANCES).unwrap();
    folder
}

/// What the launches came to in each mode: the largest error, infinite where something is NaN, or the report.
fn run(folder: &Path, fewer_bytes: u32) -> Vec<(Mode, Result<f64>)> {
    let sources = Sources::files(folder, vec![folder.join("instances.cu")]);
    let emulator = Emulator::new(&sources, &device::cache()).unwrap_or_else(|e| panic!("{e}"));
    let lora = LoraProblem { rank: RANK, scaling: 1.0, dropout: Some(DROPOUT), bias: false };
    let parts = [ProjectionProblem { out_dim: OUT_DIM, bias: false, lora: Some(lora) }];
    let activation = Activation::Identity;
    let problem = Problem { rows: ROWS, in_dim: IN_DIM, projections: &parts, activation };
    let x = random(1, (ROWS, IN_DIM)).to_dtype(DType::BF16).unwrap();
    let weight = random(2, (OUT_DIM, IN_DIM)).to_dtype(DType::BF16).unwrap();
    let small = random(3, RANK * (IN_DIM + OUT_DIM));
    let (a, b) =
        (values(&small)[..RANK * IN_DIM].to_vec(), values(&small)[RANK * IN_DIM..].to_vec());
    let mask = DROPOUT.mask(ROWS, IN_DIM).into_iter().map(f64::from).collect();
    let lora = reference::Lora { a, b, b_bias: None, scaling: 1.0, mask: Some(mask) };
    let expected = reference::lora_linear(&values(&x), &values(&weight), None, Some(&lora), IN_DIM);
    let [x, weight, small] = [&x, &weight, &small].map(Memory::from_tensor);
    let outcome = |mode: Mode| -> Result<f64> {
        let y = Memory::for_elements(ROWS * OUT_DIM, DType::BF16);
        let s = Memory::for_elements(low_rank_len(&problem), DType::F32);
        let operands = ForwardOperands {
            x: x.address(),
            weights: &[weight.address()],
            small: Small::Flat(small.address()),
            residual: 0,
            out: y.address(),
            low_rank: s.address(),
            sum: 0,
        };
        let mut launches = forward_with(Tile::Small, &problem, DType::BF16, &operands)?;
        launches.iter_mut().for_each(|launch| launch.shared_bytes -= fewer_bytes);
        device::launch_all(&Device { emulator: &emulator, mode }, &launches)?;
        let magnitude = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
        let errors = y.values(DType::BF16).into_iter().zip(&expected).map(|(y, e)| (y - e).abs());
        Ok(errors.fold(0f64, |m, e| if e.is_nan() { f64::INFINITY } else { m.max(e / magnitude) }))
    };
    Mode::all().map(|mode| (mode, outcome(mode))).collect()
}

/// Wrong in every mode that `seen_in` names.
fn assert_wrong(folder: &Path, seen_in: impl Fn(Mode) -> bool) {
    for (mode, outcome) in run(folder, 0) {
        let error = outcome.unwrap();
        println!("{mode:?}: {error:e}");
        if seen_in(mode) {
            assert!(error > ROUNDING, "not seen in {mode:?}: {error:e}");
        }
    }
}

const LANDED: &str = "        __syncthreads();  // this stage has landed, and nobody reads the one before it any more\n";
const WAIT: &str = "        ptx::cp_async_wait_group<kStages - 2>();\n";

#[test]
fn unharmed_it_is_right_in_every_mode() {
    let folder = kernels_with("none", "common/tile.cuh", "#pragma once", "#pragma once");
    for (mode, outcome) in run(&folder, 0) {
        let error = outcome.unwrap();
        assert!(error <= ROUNDING, "{mode:?}: {error:e}");
    }
}

#[test]
fn a_missing_wait_is_seen_when_copies_land_late() {
    for file in ["projection/common.cuh", "low_rank/low_rank.cuh"] {
        let folder = kernels_with(&format!("wait_{}", file.replace('/', "_")), file, WAIT, "");
        assert_wrong(&folder, |mode| mode.timing == Timing::Late);
    }
}

#[test]
fn a_wait_for_one_group_too_few_is_seen_when_copies_land_late() {
    let folder = kernels_with("wait2", "projection/common.cuh", WAIT, &WAIT.replace("- 2", "- 1"));
    assert_wrong(&folder, |mode| mode.timing == Timing::Late);
}

#[test]
fn a_missing_barrier_in_the_loop_is_seen_when_copies_land_late() {
    let folder = kernels_with("barrier", "projection/common.cuh", LANDED, "");
    assert_wrong(&folder, |mode| mode.timing == Timing::Late);
}

/// The order of threads decides whether these show; one that shows them is enough.
#[test]
fn missing_barriers_of_other_kinds_are_seen_in_some_mode() {
    for (name, file, barrier) in [
        ("arrive", "low_rank/low_rank.cuh", LANDED),
        ("mask", "low_rank/low_rank.cuh", "            __syncthreads();  // the mask is on\n"),
        ("reuse", "projection/common.cuh", "    __syncthreads();  // the stages are free\n"),
    ] {
        let outcomes = run(&kernels_with(name, file, barrier, ""), 0);
        let wrong = outcomes.into_iter().filter(|(_, error)| *error.as_ref().unwrap() > ROUNDING);
        assert!(wrong.count() > 0, "{name}: seen in no mode");
    }
}

#[test]
fn too_little_shared_memory_is_reported() {
    let folder = kernels_with("short", "common/tile.cuh", "#pragma once", "#pragma once");
    for (mode, outcome) in run(&folder, 256) {
        let report = outcome.expect_err(&format!("not caught in {mode:?}")).to_string();
        assert!(report.contains("cp.async touches byte"), "{mode:?}: {report}");
    }
}

#[test]
fn a_product_that_one_warp_leaves_out_is_reported() {
    let store = "    accumulators_to_rows<Tile>(shared, acc);";
    let folder = kernels_with(
        "leave",
        "projection/fwd.cuh",
        store,
        &format!("    if (threadIdx.x >= 96) return;\n{store}"),
    );
    for (mode, outcome) in run(&folder, 0) {
        let report = outcome.expect_err(&format!("not caught in {mode:?}")).to_string();
        assert!(
            report.contains("deadlock") && report.contains("__syncthreads"),
            "{mode:?}: {report}"
        );
    }
}
