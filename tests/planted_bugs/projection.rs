//! The projections' portable kernels, run by the crate's launch code: S, then the output.

use crate::device::{launch_all, Device};
use crate::harness::*;
use crate::projection_case::{Case, Data, PLAIN};
use candle_core::{DType, Result};
use candle_sam_lora::launch::projection::forward_with;
use candle_sam_lora::launch::projection::tiles::TILES;
use std::sync::LazyLock;

const PROJECTION: Subject = Subject {
    name: "projection",
    source: Source::Instances(
        r#"
#include "low_rank/low_rank.cuh"
#include "projection/fwd.cuh"
using Input = LowRankTile<__nv_bfloat16, 16, 4, 1, false, false>;
using Small = ProjectionTile<__nv_bfloat16, 64, 64, 2, 2, false>;
KERNEL(low_rank_input_64x16_bf16, LowRankParams, LOW_RANK_THREADS) { low_rank<Input>(p); }
KERNEL(projection_fwd_64x64_bf16, ProjectionParams, 128) { projection_fwd<Small>(p); }
"#,
    ),
    modes: timings,
    run: |device| vec![run(device, 0)],
    right_up_to: ROUNDING,
    wrong_above: ROUNDING,
};
const SHORT: Subject = Subject { run: |device| vec![run(device, 256)], ..PROJECTION };

const CASE: Case = Case { in_dim: 264, ranks: &[16], p: 0.5, ..PLAIN };
/// bfloat16 keeps 8 bits.
const ROUNDING: f64 = 1.0 / 128.0;

/// The launches get `fewer_bytes` of shared memory less than they ask for.
fn run(device: &Device, fewer_bytes: u32) -> Result<f64> {
    static RIGHT: LazyLock<(Data, Vec<f64>)> = LazyLock::new(|| {
        let data = Data::new(CASE, DType::BF16).expect("a case that the CPU computes");
        let expected = data.reference_sum();
        (data, expected)
    });
    let (data, expected) = &*RIGHT;
    let (on_device, outputs) = (data.memory()?, data.outputs());
    let operands = on_device.forward(&outputs);
    let mut launches = forward_with(&TILES[1], &data.projections(), data.dtype, &operands)?;
    launches.iter_mut().for_each(|launch| launch.shared_bytes -= fewer_bytes);
    launch_all(device, &launches)?;
    Ok(error(&data.read(&outputs[0]), expected))
}

const TILE: &str = "projection/common.cuh";
const LOW_RANK: &str = "low_rank/low_rank.cuh";
const WAIT: &str = "ptx::cp_async_wait_group<kStages - 2>();";
const LANDED: &str =
    "__syncthreads();  // this stage has landed, and nobody reads the one before it any more";

#[rustfmt::skip]
pub const TABLE: &[(Subject, &[Bug])] = &[
    (PROJECTION, &[
        UNHARMED,
        Bug { name: "a missing wait", file: TILE, seen: &[wrong(late), computed(always)],
              old: WAIT, new: "" },
        Bug { name: "a missing wait for S", file: LOW_RANK, seen: &[wrong(late), computed(always)],
              old: WAIT, new: "" },
        Bug { name: "a wait for one group too few", file: TILE, seen: &[wrong(late), computed(always)],
              old: WAIT, new: "ptx::cp_async_wait_group<kStages - 1>();" },
        Bug { name: "no barrier in the loop", file: TILE, seen: &[wrong(late), computed(always)],
              old: LANDED, new: "" },
        Bug { name: "no barrier in the loop of S", file: LOW_RANK,
              seen: &[wrong(always).at_least(1), computed(always)],
              old: LANDED, new: "" },
        Bug { name: "no barrier after the mask", file: LOW_RANK, seen: &[wrong(always).at_least(1), computed(always)],
              old: "__syncthreads();  // the mask is on", new: "" },
        Bug { name: "no barrier before stages are used again", file: TILE,
              seen: &[wrong(always).at_least(1), computed(always)],
              old: "__syncthreads();  // the stages are free", new: "" },
        Bug { name: "a product that one warp leaves out", file: "projection/fwd.cuh",
              seen: &[reported(&["deadlock", "__syncthreads"])],
              old: "accumulators_to_rows<Tile>(shared, acc);",
              new: "if (threadIdx.x >= 96) return; accumulators_to_rows<Tile>(shared, acc);" },
    ]),
    (SHORT, &[
        Bug { name: "too little shared memory", seen: &[reported(&["cp.async touches byte"])], ..UNHARMED },
    ]),
];
