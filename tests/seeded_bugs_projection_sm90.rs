//! Bugs planted in copies of the projections' kernels for Hopper, each of which the emulator must catch.
//!
//! What runs is the true launch code: S and then the output, dS and then the gradient of x, by a ping-pong's tiles and a cooperative one.
//! Unharmed, all are those of float64 in every mode, which tests/kernels/projection_sm90.rs shows.

mod common;
#[path = "kernels/device.rs"]
mod device;
#[path = "kernels/planted.rs"]
mod planted;

use candle_core::{DType, Result};
use candle_sam_lora::launch::projection::sm90::backward::backward_with;
use candle_sam_lora::launch::projection::sm90::forward::forward_with;
use candle_sam_lora::launch::projection::sm90::tiles::{Pass, Tile};
use candle_sam_lora::launch::projection::{
    low_rank_len, workspace_bytes, Activation, BackwardOperands, ForwardOperands, LoraProblem,
    Problem, ProjectionProblem, Small,
};
use candle_sam_lora::launch::Gpu;
use candle_sam_lora_emulator::{Emulator, Mode, Sources, Timing};
use common::random;
use device::{launch_all, Device, Memory};
use planted::copy_with;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The instances that run.
const INSTANCES: &str = r#"
#include "low_rank/low_rank.cuh"
#include "projection/sm90/bwd_input.cuh"
#include "projection/sm90/fwd.cuh"
using T = __nv_bfloat16;
using Input = LowRankTile<T, 16, 4, 1, false, false>;
using Grad = LowRankTile<T, 16, 4, 1, false, true>;
using PingPong = ProjectionTileSm90<T, 128, 192, 4, true>;
using Cooperative = ProjectionTileSm90<T, 128, 192, 5, false>;
using Cluster = ProjectionTileSm90<T, 128, 192, 4, true, 2>;
KERNEL(low_rank_input_64x16_bf16, LowRankParams, LOW_RANK_THREADS) { low_rank<Input>(p); }
KERNEL(low_rank_grad_64x16_bf16, LowRankParams, LOW_RANK_THREADS) { low_rank<Grad>(p); }
KERNEL(projection_fwd_sm90_pingpong_128x192_bf16, ProjectionFwdSm90Params, PROJECTION_SM90_THREADS, 1) { projection_fwd_sm90<PingPong>(p); }
KERNEL(projection_bwd_input_sm90_pingpong_128x192_bf16, ProjectionBwdInputSm90Params, PROJECTION_SM90_THREADS, 1) {
    projection_bwd_input_sm90<PingPong>(p);
}
KERNEL(projection_fwd_sm90_pingpong_128x192_x2_bf16, ProjectionFwdSm90Params, PROJECTION_SM90_THREADS, 1) { projection_fwd_sm90<Cluster>(p); }
KERNEL(projection_bwd_input_sm90_pingpong_128x192_x2_bf16, ProjectionBwdInputSm90Params, PROJECTION_SM90_THREADS, 1) {
    projection_bwd_input_sm90<Cluster>(p);
}
KERNEL(projection_bwd_input_sm90_cooperative_128x192_bf16, ProjectionBwdInputSm90Params, PROJECTION_SM90_THREADS, 1) {
    projection_bwd_input_sm90<Cooperative>(p);
}
"#;
const BLOCKS: &str = "pingpong_128x192";
/// Of the same bits.
const CLUSTERS: &str = "pingpong_128x192_x2";

/// Three tiles for each multiprocessor, of more steps than there are stages. Of the forward's two, one has the projection
/// with LoRA, the other one that without.
const ROWS: usize = 264;
const IN_DIM: usize = 136;
const OUT_DIM: usize = 136;
const RANK: usize = 16;

/// A folder of the kernels, in which `planted` stands in place of `original` in `file`.
fn kernels_with(name: &str, file: &str, original: &str, planted: &str) -> PathBuf {
    let folder = copy_with(&format!("projection_sm90_{name}"), file, original, planted);
    std::fs::write(folder.join("instances.cu"), INSTANCES).unwrap();
    folder
}

fn named(pass: Pass, name: &str) -> &'static Tile {
    pass.tiles().iter().find(|tile| tile.name == name).unwrap()
}

/// The outputs of both kernels in each mode, or the reports.
type Outcomes = Vec<(Mode, [Result<Vec<u8>>; 3])>;

fn run(folder: &Path, tile: &str) -> Outcomes {
    let sources = Sources::files(folder, vec![folder.join("instances.cu")]);
    let emulator = Emulator::new(&sources, &device::cache()).unwrap_or_else(|e| panic!("{e}"));
    let lora = LoraProblem { rank: RANK, scaling: 1.0, dropout: None, bias: false };
    let part = |lora| ProjectionProblem { out_dim: OUT_DIM, bias: false, lora };
    let parts = [part(Some(lora)), part(None)];
    let problem = |projections| Problem {
        rows: ROWS,
        in_dim: IN_DIM,
        projections,
        activation: Activation::Identity,
    };
    let bf16 = |seed, rows, cols| {
        Memory::from_tensor(&random(seed, (rows, cols)).to_dtype(DType::BF16).unwrap())
    };
    let [x, weight, grad] =
        [bf16(1, ROWS, IN_DIM), bf16(2, OUT_DIM, IN_DIM), bf16(4, ROWS, OUT_DIM)];
    let small = Memory::from_tensor(&random(3, RANK * (IN_DIM + OUT_DIM)));
    let forward = |mode: Mode| {
        let problem = problem(&parts);
        let y = Memory::for_elements(2 * ROWS * OUT_DIM, DType::BF16);
        let s = Memory::for_elements(low_rank_len(&problem), DType::F32);
        let operands = ForwardOperands {
            x: x.address(),
            weights: &[weight.address(); 2],
            small: Small::Flat(small.address()),
            residual: 0,
            out: y.address(),
            low_rank: s.address(),
            sum: 0,
        };
        let two = Gpu { multiprocessors: 2, ..Gpu::H100 };
        let tile = named(Pass::Forward, tile);
        let launches = forward_with(tile, &problem, DType::BF16, &operands, &two)?;
        launch_all(&Device { emulator: &emulator, mode }, &launches.unwrap())?;
        Ok(y.bytes().to_vec())
    };
    let backward = |tile: &str, mode: Mode| {
        let one = Gpu { multiprocessors: 1, ..Gpu::H100 };
        let problem = problem(&parts[..1]);
        let dx = Memory::for_elements(ROWS * IN_DIM, DType::BF16);
        let workspace = Memory::new(workspace_bytes(&problem, DType::BF16));
        let operands = BackwardOperands {
            x: x.address(),
            weights: &[weight.address()],
            small: Small::Flat(small.address()),
            low_rank: 0,
            sum: 0,
            dout: grad.address(),
            dx: dx.address(),
            dsmall: 0,
            workspace: workspace.address(),
        };
        let tile = named(Pass::BackwardInput, tile);
        let launches = backward_with(tile, &problem, DType::BF16, &operands, &one)?;
        launch_all(&Device { emulator: &emulator, mode }, &launches.unwrap())?;
        Ok(dx.bytes().to_vec())
    };
    let kernels =
        |mode: Mode| [forward(mode), backward(tile, mode), backward("cooperative_128x192", mode)];
    Mode::all_with_products().map(|mode| (mode, kernels(mode))).collect()
}

/// In which modes a planted bug changes the bits of each output, or is reported.
fn seen(name: &str, file: &str, original: &str, planted: &str) -> Vec<(Mode, [bool; 3])> {
    differences(&run(&kernels_with(name, file, original, planted), BLOCKS))
}

fn differences(harmed: &Outcomes) -> Vec<(Mode, [bool; 3])> {
    static RIGHT: OnceLock<Outcomes> = OnceLock::new();
    let folder = || kernels_with("none", "projection/common.cuh", "#pragma once", "#pragma once");
    let right = RIGHT.get_or_init(|| run(&folder(), BLOCKS));
    let differ = |right: &Result<Vec<u8>>, harmed: &Result<Vec<u8>>| {
        harmed.as_ref().map_or(true, |harmed| harmed != right.as_ref().unwrap())
    };
    let pairs = right.iter().zip(harmed);
    pairs.map(|((mode, r), (_, h))| (*mode, [0, 1, 2].map(|i| differ(&r[i], &h[i])))).collect()
}

#[test]
fn a_piece_written_over_before_its_store_has_read_it_is_seen_when_copies_are_late() {
    let wait = "    if (threadIdx.x % kWarp == 0) ptx::cp_async_bulk_wait_group_read<0>();\n";
    for (mode, seen) in seen("pieces", "projection/sm90/common.cuh", wait, "") {
        assert!(
            seen == [true; 3] || mode.timing == Timing::Early,
            "not seen in {mode:?}: {seen:?}"
        );
    }
}

/// Its parity then tells a warpgroup of a phase that is not its tile's.
#[test]
fn a_warpgroup_that_does_not_wait_for_its_turn_is_seen() {
    let wait = "if constexpr (Tile::kPingPong) ptx::mbarrier_wait_parity(shared.turn[group], (tiles ^ uint32_t(group) ^ 1) % 2);";
    let seen = seen("turn", "projection/sm90/common.cuh", wait, "");
    for kernel in [0, 1] {
        assert!(seen.iter().any(|(_, seen)| seen[kernel]), "{kernel}: {seen:?}");
    }
}

const WAIT_FOR_S: &str = "            if (step == work.base) ptx::griddepcontrol_wait();\n";
const WAIT_TO_STORE: &str = "    ptx::griddepcontrol_wait();\n#pragma unroll\n";

#[test]
fn s_read_without_waiting_for_its_kernel_is_seen_when_dependents_begin_early() {
    for (mode, seen) in seen("s", "projection/sm90/fwd.cuh", WAIT_FOR_S, "") {
        assert_eq!(seen, [mode.dependents == Timing::Early, false, false], "{mode:?}");
    }
}

#[test]
fn ds_read_before_its_kernel_has_ended_is_seen_when_dependents_begin_early() {
    let wait = "        ptx::griddepcontrol_wait();\n";
    let product = "        add_low_rank<Tile>(p.problem, acc, row, corner.x);\n";
    let (original, planted) = ([wait, product].concat(), [product, wait].concat());
    for (mode, seen) in seen("ds", "projection/sm90/bwd_input.cuh", &original, &planted) {
        let early = mode.dependents == Timing::Early;
        assert_eq!(seen, [false, early, early], "{mode:?}");
    }
}

/// The reports of the forward, planted where it waits to store; of its blocks that is the one without LoRA, as the other
/// waits for S.
fn report(name: &str, planted: &str) -> Vec<(Mode, Result<Vec<u8>>)> {
    let folder = kernels_with(name, "projection/sm90/fwd.cuh", WAIT_TO_STORE, planted);
    run(&folder, BLOCKS).into_iter().map(|(mode, [forward, ..])| (mode, forward)).collect()
}

#[test]
fn a_block_that_ends_without_waiting_for_the_kernel_before_is_reported() {
    for (mode, forward) in report("end", "#pragma unroll\n") {
        let report = forward.expect_err(&format!("not caught in {mode:?}")).to_string();
        let expected = "block (1, 0, 0): ends without griddepcontrol.wait";
        assert!(report.contains(expected), "{mode:?}: {report}");
    }
}

#[test]
fn what_is_written_before_the_kernel_before_has_ended_is_reported_when_dependents_begin_early() {
    let late = "    struct Late {\n        ~Late() { ptx::griddepcontrol_wait(); }\n    } late;\n#pragma unroll\n";
    for (mode, forward) in report("write", late) {
        assert_eq!(forward.is_err(), mode.dependents == Timing::Early, "{mode:?}");
        if let Err(report) = forward {
            let report = report.to_string();
            assert!(report.contains("has written before griddepcontrol.wait"), "{report}");
        }
    }
}

#[test]
fn a_warpgroup_that_does_not_pass_the_other_s_stages_is_seen() {
    let file = "projection/sm90/bwd_input.cuh";
    let seen = seen("stages", file, "at.advance(turn * depth);", "at.advance(turn / 2 * depth);");
    assert!(seen.iter().all(|(_, seen)| *seen == [false, true, true]), "{seen:?}");
}

/// The lane's share of a row of dS is four of depth, but not those that two steps of mma would take in their order.
#[test]
fn depth_in_another_order_than_the_other_operand_s_is_seen() {
    let right = "right[n][2 * s], right[n][2 * s + 1]);";
    let planted = "right[n][s], right[n][s + 2]);";
    let seen = seen("depth", "projection/sm90/bwd_input.cuh", right, planted);
    assert!(seen.iter().all(|(_, seen)| *seen == [false, true, true]), "{seen:?}");
}

/// What clusters make of a change in the kernels' common part; the last of the three has none.
fn in_clusters(name: &str, original: &str, planted: &str) -> Outcomes {
    run(&kernels_with(name, "projection/sm90/common.cuh", original, planted), CLUSTERS)
}

const LOAD: &str = "(1 << Tile::kCluster) - 1, x, y + first);";

#[test]
fn a_block_of_a_cluster_that_loads_the_other_one_s_part_is_seen() {
    let unharmed = differences(&in_clusters("clusters", LOAD, LOAD));
    assert!(unharmed.iter().all(|(_, seen)| *seen == [false; 3]), "{unharmed:?}");
    let seen = differences(&in_clusters("part", LOAD, &LOAD.replace("y + first", "y")));
    assert!(seen.iter().all(|(_, seen)| *seen == [true, true, false]), "{seen:?}");
}

/// The other block may not have read what is written over there.
#[test]
fn a_stage_given_back_to_the_own_block_alone_is_seen_when_copies_are_early_and_products_late() {
    let give_back = "ptx::mbarrier_arrive_cluster(empty, lane);";
    let seen = differences(&in_clusters("own", give_back, "ptx::mbarrier_arrive(empty);"));
    let refilled = |mode: &Mode| mode.timing == Timing::Early && mode.products == Timing::Late;
    let mut modes = seen.iter().filter(|(mode, _)| refilled(mode) && mode.seed != 0);
    assert!(modes.all(|(_, seen)| *seen == [true, true, false]), "{seen:?}");
}

#[test]
fn a_block_that_ends_before_the_other_one_has_given_back_its_stages_is_reported() {
    let (all, but_one) =
        ("i < Tile::kStages; ++i, at.advance()", "i < Tile::kStages - 1; ++i, at.advance()");
    for (mode, outputs) in in_clusters("leave", all, but_one) {
        for output in outputs.into_iter().take(2) {
            let report = output.expect_err(&format!("not caught in {mode:?}")).to_string();
            assert!(report.contains("has ended"), "{mode:?}: {report}");
        }
    }
}
