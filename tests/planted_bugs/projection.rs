//! The projections' portable kernels, run by the crate's launch code: S, then the output.

use crate::common::{random, values};
use crate::device::{launch_all, Device, Memory};
use crate::harness::*;
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::projection::tiles::TILES;
use candle_sam_lora::launch::projection::{
    forward_with, low_rank_len, Activation, ForwardOperands, LoraProblem, Problem,
    ProjectionProblem, Small,
};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::reference;
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

const ROWS: usize = 70;
const IN_DIM: usize = 264;
const OUT_DIM: usize = 72;
const RANK: usize = 16;
const DROPOUT: Dropout = Dropout { p: 0.5, seed: 3, stream: 1 };
/// bfloat16 keeps 8 bits.
const ROUNDING: f64 = 1.0 / 128.0;

/// x, the weight, A and B in one tensor; and the right output.
static CASE: LazyLock<([Tensor; 3], Vec<f64>)> = LazyLock::new(|| {
    let [x, weight] = [random(1, (ROWS, IN_DIM)), random(2, (OUT_DIM, IN_DIM))]
        .map(|tensor| tensor.to_dtype(DType::BF16).expect("a dtype of candle's"));
    let small = random(3, RANK * (IN_DIM + OUT_DIM));
    let mut a = values(&small);
    let b = a.split_off(RANK * IN_DIM);
    let mask = DROPOUT.mask(ROWS, IN_DIM).into_iter().map(f64::from).collect();
    let lora = reference::Lora { a, b, b_bias: None, scaling: 1.0, mask: Some(mask) };
    let expected = reference::lora_linear(&values(&x), &values(&weight), None, Some(&lora), IN_DIM);
    ([x, weight, small], expected)
});

/// The launches get `fewer_bytes` of shared memory less than they ask for.
fn run(device: &Device, fewer_bytes: u32) -> Result<f64> {
    let lora = LoraProblem { rank: RANK, scaling: 1.0, dropout: Some(DROPOUT), bias: false };
    let parts = [ProjectionProblem { out_dim: OUT_DIM, bias: false, lora: Some(lora) }];
    let activation = Activation::Identity;
    let problem = Problem { rows: ROWS, in_dim: IN_DIM, projections: &parts, activation };
    let (inputs, expected) = &*CASE;
    let [x, weight, small] = inputs.each_ref().map(Memory::from_tensor);
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
    let mut launches = forward_with(&TILES[1], &problem, DType::BF16, &operands)?;
    launches.iter_mut().for_each(|launch| launch.shared_bytes -= fewer_bytes);
    launch_all(device, &launches)?;
    Ok(error(&y.values(DType::BF16), expected))
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
