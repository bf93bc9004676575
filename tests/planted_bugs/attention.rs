//! The attention's portable kernels: bugs in the staging, which the emulator catches, and in the mathematics.

use crate::attention_case::{gradients_by, Backward, Case, Shapes, GLOBAL, WINDOWED};
use crate::common::values;
use crate::device::{launch_all, Device, Memory};
use crate::harness::*;
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::rel_pos_attention as attention;
use candle_sam_lora::launch::{Gpu, Launch};
use candle_sam_lora::ops;
use std::sync::LazyLock;

const ATTENTION: Subject = Subject {
    name: "attention",
    source: Source::Instances(
        r#"
#include "rel_pos_attention/fwd.cuh"
#include "rel_pos_attention/bwd_query.cuh"
#include "rel_pos_attention/bwd_key.cuh"
using Tile = AttentionTile<float, 16, 16, 2, 4>;
KERNEL(rel_pos_attention_fwd_hd16_cols16_f32, RelPosAttentionFwdParams, 128) { rel_pos_attention_fwd<Tile>(p); }
KERNEL(rel_pos_attention_bwd_query_hd16_cols16_f32, RelPosAttentionBwdQueryParams, 128) { rel_pos_attention_bwd_query<Tile>(p); }
KERNEL(rel_pos_attention_bwd_key_hd16_f32, RelPosAttentionBwdKeyParams, 128) { rel_pos_attention_bwd_key<KeyTile<float, 16, 32>>(p); }
"#,
    ),
    modes: timings,
    run: |device| vec![run(device, 0)],
    right_up_to: RIGHT,
    wrong_above: 1e-3,
};
const SHORT: Subject = Subject { run: |device| vec![run(device, 64)], ..ATTENTION };
const RIGHT: f64 = 1e-5;
/// The forward of two parts: 32 queries a warp, and two stripes of 32 columns.
const PARTS: Subject = Subject {
    name: "attention of two parts",
    source: Source::Instances(
        r#"
#include "rel_pos_attention/fwd.cuh"
KERNEL(rel_pos_attention_fwd_hd64_cols64_f16, RelPosAttentionFwdParams, 128) {
    rel_pos_attention_fwd<AttentionTile<__half, 64, 32, 2, 4>, 2>(p);
}
"#,
    ),
    modes: timings,
    run: |device| vec![run_parts(device)],
    right_up_to: 5e-3,
    wrong_above: 2e-2,
};

/// Two windows, the second hanging over the grid; ten key rows of ten columns are five tiles of two rows.
const SHAPES: Shapes = Shapes { grid: (10, 15), dim: 16, window: Some(10), ..WINDOWED };

/// A case with a gradient of its output, and the right results.
pub struct Expected {
    pub case: Case,
    pub dout: Tensor,
    out: Vec<f64>,
    dqkv: Vec<f64>,
    dtables: Vec<f64>,
}

impl Expected {
    pub fn new(shapes: Shapes, dtype: DType) -> Self {
        Self::make(shapes, dtype).expect("a case that the CPU computes")
    }

    fn make(shapes: Shapes, dtype: DType) -> Result<Self> {
        let case = Case::new(shapes, dtype)?;
        let dout = case.dout(5)?;
        let (out, [dqkv, dtables, _]) =
            gradients_by(&case, DType::F32, &dout, ops::rel_pos_attention)?;
        Ok(Self { case, dout, out: values(&out), dqkv, dtables })
    }

    fn error(&self, got: &Memory, expected: &[f64]) -> f64 {
        error(&got.values(self.case.dtype), expected)
    }

    pub fn error_of_out(&self, got: &Memory) -> f64 {
        self.error(got, &self.out)
    }

    /// The largest error of the gradients of qkv and, if they are trained, of the tables.
    pub fn error_of_gradients(&self, backward: &Backward) -> f64 {
        let [dqkv, dtables, _] = &backward.gradients;
        let error = self.error(dqkv, &self.dqkv);
        match backward.trained[0] {
            true => error.max(self.error(dtables, &self.dtables)),
            false => error,
        }
    }
}

/// The forward with `fewer_bytes` of shared memory less than it asks for; if it is right, the backward.
fn run(device: &Device, fewer_bytes: u32) -> Result<f64> {
    static EXPECTED: LazyLock<Expected> = LazyLock::new(|| Expected::new(SHAPES, DType::F32));
    let (expected, case) = (&*EXPECTED, &EXPECTED.case);
    let (problem, dtype, on_device) = (&case.problem, case.dtype, case.memory());
    let (inputs, outputs) = (on_device.inputs(), case.outputs());
    let [out, lse] = outputs.each_ref().map(Memory::address);
    let forward = attention::forward(problem, dtype, &inputs, out, lse)?;
    let shared_bytes = forward.shared_bytes - fewer_bytes;
    launch_all(device, &[Launch { shared_bytes, ..forward }])?;
    let forward = expected.error_of_out(&outputs[0]);
    if forward > RIGHT {
        return Ok(forward);
    }
    let trained = [false; 2];
    let bytes = attention::workspace_bytes(problem, dtype, trained, &Gpu::A100)?;
    let backward = case.backward(&expected.dout, trained, bytes);
    let operands = backward.operands(&outputs);
    launch_all(device, &attention::backward(problem, dtype, &inputs, &operands, &Gpu::A100)?)?;
    Ok(forward.max(expected.error_of_gradients(&backward)))
}

/// The forward alone; the second of two blocks has queries in its first part only.
fn run_parts(device: &Device) -> Result<f64> {
    const SHAPES: Shapes = Shapes { grid: (3, 64), dim: 64, heads: 1, ..GLOBAL };
    static EXPECTED: LazyLock<Expected> = LazyLock::new(|| Expected::new(SHAPES, DType::F16));
    let (expected, case) = (&*EXPECTED, &EXPECTED.case);
    let (on_device, outputs) = (case.memory(), case.outputs());
    let [out, lse] = outputs.each_ref().map(Memory::address);
    let forward = attention::forward(&case.problem, case.dtype, &on_device.inputs(), out, lse)?;
    launch_all(device, &[forward])?;
    Ok(expected.error_of_out(&outputs[0]))
}

const COMMON: &str = "rel_pos_attention/common.cuh";
const FWD: &str = "rel_pos_attention/fwd.cuh";

#[rustfmt::skip]
pub const TABLE: &[(Subject, &[Bug])] = &[
    (ATTENTION, &[
        UNHARMED,
        Bug { name: "a missing wait", file: COMMON, seen: &[wrong(late)],
              old: "ptx::cp_async_wait_group<1>();", new: "" },
        Bug { name: "no barrier before a tile is read", file: COMMON, seen: &[wrong(late)],
              old: "__syncthreads();  // everybody's copies of this tile have landed", new: "" },
        Bug { name: "no barrier before a stage is refilled", file: FWD, seen: &[wrong(early_unordered)],
              old: "__syncthreads();  // nobody reads this stage any more", new: "" },
        Bug { name: "no barrier before keys take rel_w's place", file: FWD, seen: &[wrong(early_unordered)],
              old: "__syncthreads();  // nobody reads rel_w in the stages any more", new: "" },
        Bug { name: "a shuffle that one lane leaves out", file: FWD, seen: &[reported(&["divergence"])],
              old: "if constexpr (!kLanesVote) new_max[m][half] = quad_max(new_max[m][half]);",
              new: "if (lane != 3) new_max[m][half] = quad_max(new_max[m][half]);" },
        Bug { name: "rel_h looked up by the tile's number", file: FWD, seen: &[wrong(always)],
              old: "rel_h[(m * kQueries + 8 * half) * stride_h + y + r];",
              new: "rel_h[(m * kQueries + 8 * half) * stride_h + y / kRows];" },
        Bug { name: "padded keys left out", file: COMMON, seen: &[wrong(always)],
              old: "return pad != nullptr && key.y < s.side_h && key.x < s.side_w ? pad + column : nullptr;",
              new: "return nullptr;" },
        Bug { name: "a forgotten table term of dq", file: "rel_pos_attention/bwd_query.cuh", seen: &[wrong(always)],
              old: "if (tables.h != nullptr) add_table_terms", new: "if (false) add_table_terms" },
    ]),
    (PARTS, &[
        UNHARMED,
        Bug { name: "rel_h of the first part for all", file: FWD, seen: &[wrong(always)],
              old: "rel_h[(m * kQueries + 8 * half) * stride_h", new: "rel_h[8 * half * stride_h" },
        Bug { name: "rel_w of the first stripe for all", file: FWD, seen: &[wrong(always)],
              old: "this->first_column = x;", new: "this->first_column = 0;" },
        Bug { name: "rel_w of a part read while the next is projected", file: FWD, seen: &[wrong(early_unordered)],
              old: "__syncthreads();  // nobody reads rel_w in the stages any more", new: "" },
        Bug { name: "maxima that lanes keep for themselves", file: FWD, seen: &[wrong(always)],
              old: "if constexpr (kLanesVote) new_max[m][half] = quad_max(new_max[m][half]);", new: "" },
        Bug { name: "a rise of which one lane alone knows", file: FWD, seen: &[reported(&["divergence"])],
              old: "if (ptx::any(rises)) {", new: "if (rises) {" },
    ]),
    (SHORT, &[
        Bug { name: "too little shared memory", seen: &[reported(&["wrote byte"])], ..UNHARMED },
    ]),
];
