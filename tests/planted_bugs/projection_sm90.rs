//! The projections' kernels for Hopper, run by the crate's launch code: S and the output, dS and the gradient of x.
//!
//! A bug is seen if it changes a bit of an output. tests/kernels/projection_sm90.rs shows that unharmed outputs are
//! right.

use crate::device::{launch_all, Device, Memory};
use crate::harness::*;
use crate::projection_case::{Case, Data, PLAIN};
use candle_core::{DType, Result};
use candle_sam_lora::launch::projection::sm90::backward::backward_with;
use candle_sam_lora::launch::projection::sm90::forward::forward_with;
use candle_sam_lora::launch::projection::sm90::tiles::{Pass, Tile};
use candle_sam_lora::launch::projection::{workspace_bytes, BackwardOperands};
use candle_sam_lora::launch::Gpu;
use candle_sam_lora_emulator::Mode;
use std::sync::LazyLock;

const BLOCKS: Subject = Subject {
    name: "projection_sm90",
    source: Source::Instances(
        r#"
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
"#,
    ),
    modes: timings_and_products,
    run: |device| run(device, "pingpong_128x192"),
    right_up_to: 0.0,
    wrong_above: 0.0,
};
/// Clusters of two blocks compute the same bits. The cooperative tile has no cluster.
const CLUSTERS: Subject = Subject {
    name: "projection_sm90 clusters",
    run: |device| run(device, "pingpong_128x192_x2"),
    ..BLOCKS
};

/// The outputs: that of the forward, and the gradient of x by ping-pong tiles and by cooperative tiles.
const FORWARD: &[usize] = &[0];
const DX: &[usize] = &[1, 2];
const COOPERATIVE: &[usize] = &[2];
/// Ping-pong tiles of both passes.
const PING_PONG: &[usize] = &[0, 1];

/// Three tiles for each multiprocessor, each with more steps than there are stages. One of the forward's two
/// multiprocessors has the projection with LoRA, the other one the projection without.
const FORWARD_CASE: Case =
    Case { rows: 264, in_dim: 136, outs: &[136, 136], ranks: &[16, 0], ..PLAIN };
const BACKWARD_CASE: Case = Case { outs: &[136], ranks: &[16], ..FORWARD_CASE };

/// How many bytes of each output differ from the unharmed kernels' output.
fn run(device: &Device, tile: &str) -> Outcomes {
    static RIGHT: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| {
        let unharmed = BLOCKS.unharmed("projection_sm90: right");
        let emulator = &unharmed.expect("unharmed kernels compile");
        let mode = Mode::all_with_products().next().expect("a mode");
        let right = outputs(&Device { emulator, mode }, "pingpong_128x192");
        right.map(|output| output.expect("unharmed kernels run"))
    });
    let differ = |got: &[u8], right: &[u8]| got.iter().zip(right).filter(|(a, b)| a != b).count();
    let pairs = outputs(device, tile).into_iter().zip(RIGHT.iter());
    pairs.map(|(got, right)| got.map(|got| differ(&got, right) as f64)).collect()
}

/// The tensors of both cases.
static DATA: LazyLock<[Data; 2]> = LazyLock::new(|| {
    let data = |case| Data::new(case, DType::BF16).expect("tensors");
    [data(FORWARD_CASE), data(BACKWARD_CASE)]
});

fn named(pass: Pass, name: &str) -> &'static Tile {
    pass.tiles().iter().find(|tile| tile.name == name).expect("a tile of this name")
}

/// The output, and the gradient of x twice.
fn outputs(device: &Device, tile: &str) -> [Result<Vec<u8>>; 3] {
    let [forward_data, backward_data] = &*DATA;
    let forward = || {
        let (on_device, outputs) = (forward_data.memory()?, forward_data.outputs());
        let (problem, operands) = (forward_data.projections(), on_device.forward(&outputs));
        let two = Gpu { multiprocessors: 2, ..Gpu::H100 };
        let tile = named(Pass::Forward, tile);
        let launches = forward_with(tile, &problem, DType::BF16, &operands, &two)?;
        launch_all(device, &launches.expect("a tile of this name"))?;
        Ok(outputs[0].bytes().to_vec())
    };
    let backward = |tile: &str| {
        let (data, problem) = (backward_data, backward_data.projections());
        let (on_device, outputs) = (data.memory()?, data.outputs());
        let results = [data.alloc(data.x.elem_count()), Memory::new(0)];
        let workspace = Memory::new(workspace_bytes(&problem, DType::BF16));
        let operands = on_device.backward(&outputs, &results, &workspace);
        let operands = BackwardOperands { low_rank: 0, sum: 0, dsmall: 0, ..operands };
        let one = Gpu { multiprocessors: 1, ..Gpu::H100 };
        let tile = named(Pass::BackwardInput, tile);
        let launches = backward_with(tile, &problem, DType::BF16, &operands, &one)?;
        launch_all(device, &launches.expect("a tile of this name"))?;
        Ok(results[0].bytes().to_vec())
    };
    [forward(), backward(tile), backward("cooperative_128x192")]
}

fn refilled_unordered(mode: &Mode) -> bool {
    early(mode) && late_products(mode) && mode.seed != 0
}

const COMMON: &str = "projection/sm90/common.cuh";
const FWD: &str = "projection/sm90/fwd.cuh";
const BWD_INPUT: &str = "projection/sm90/bwd_input.cuh";
/// Blocks without LoRA wait here; the others have waited for S.
const WAIT_TO_STORE: &str = "ptx::griddepcontrol_wait();\n#pragma unroll";

#[rustfmt::skip]
pub const TABLE: &[(Subject, &[Bug])] = &[
    (BLOCKS, &[
        UNHARMED,
        Bug { name: "a piece overwritten before its store has read it", file: COMMON, seen: &[caught(late)],
              old: "if (threadIdx.x % kWarp == 0) ptx::cp_async_bulk_wait_group_read<0>();", new: "" },
        // The parity then belongs to a phase of another tile.
        Bug { name: "a warpgroup that does not wait for its turn", file: COMMON,
              seen: &[caught(always).of(PING_PONG).at_least(1)],
              old: "if constexpr (Tile::kPingPong) ptx::mbarrier_wait_parity(shared.turn[group], (tiles ^ uint32_t(group) ^ 1) % 2);",
              new: "" },
        Bug { name: "S read without waiting for its kernel", file: FWD,
              seen: &[caught(early_dependents).of(FORWARD), right(late_dependents).of(FORWARD), right(always).of(DX)],
              old: "if (step == work.base) ptx::griddepcontrol_wait();", new: "" },
        Bug { name: "dS read before its kernel has ended", file: BWD_INPUT,
              seen: &[caught(early_dependents).of(DX), right(late_dependents).of(DX), right(always).of(FORWARD)],
              old: "ptx::griddepcontrol_wait(); add_low_rank<Tile>(p.problem, acc, row, corner.x);",
              new: "add_low_rank<Tile>(p.problem, acc, row, corner.x); ptx::griddepcontrol_wait();" },
        Bug { name: "a block that ends without waiting for the kernel before", file: FWD,
              seen: &[reported(&["block (1, 0, 0): ends without griddepcontrol.wait"]).of(FORWARD)],
              old: WAIT_TO_STORE, new: "\n#pragma unroll" },
        Bug { name: "a store before the kernel before has ended", file: FWD,
              seen: &[reported(&["has written before griddepcontrol.wait"]).when(early_dependents).of(FORWARD),
                      computed(late_dependents).of(FORWARD)],
              old: WAIT_TO_STORE,
              new: "struct Late { ~Late() { ptx::griddepcontrol_wait(); } } late;\n#pragma unroll" },
        Bug { name: "a warpgroup that does not pass the other's stages", file: BWD_INPUT,
              seen: &[caught(always).of(DX), right(always).of(FORWARD)],
              old: "at.advance(turn * depth);", new: "at.advance(turn / 2 * depth);" },
        // A lane has four of the depth of a row of dS, but not in the order of two steps of mma.
        Bug { name: "depth in another order than the other operand's", file: BWD_INPUT,
              seen: &[caught(always).of(DX), right(always).of(FORWARD)],
              old: "right[n][2 * s], right[n][2 * s + 1]);", new: "right[n][s], right[n][s + 2]);" },
    ]),
    (CLUSTERS, &[
        UNHARMED,
        Bug { name: "a block that loads the other one's part", file: COMMON,
              seen: &[caught(always).of(PING_PONG), right(always).of(COOPERATIVE)],
              old: "(1 << Tile::kCluster) - 1, x, y + first);", new: "(1 << Tile::kCluster) - 1, x, y);" },
        // The other block may not have read the stage that is overwritten.
        Bug { name: "a stage given back to the own block alone", file: COMMON,
              seen: &[caught(refilled_unordered).of(PING_PONG), right(refilled_unordered).of(COOPERATIVE)],
              old: "ptx::mbarrier_arrive_cluster(empty, lane);", new: "ptx::mbarrier_arrive(empty);" },
        Bug { name: "a block that ends before the other has given back its stages", file: COMMON,
              seen: &[reported(&["has ended"]).of(PING_PONG)],
              old: "i < Tile::kStages; ++i, at.advance()", new: "i < Tile::kStages - 1; ++i, at.advance()" },
    ]),
];
