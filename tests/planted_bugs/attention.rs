//! The attention's portable kernels: bugs in the staging, which the emulator catches, and in the mathematics.

use crate::common::{gradients, random, values};
use crate::device::{launch_all, Device, Memory};
use crate::harness::*;
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::rel_pos_attention::{self as attention, BackwardOperands, Inputs};
use candle_sam_lora::launch::{AttentionProblem, Gpu, Launch};
use candle_sam_lora::ops::{self, RelPosAttention};
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

/// Two windows, the second hanging over the grid; ten key rows of ten columns are five tiles of two rows.
const PROBLEM: AttentionProblem = AttentionProblem {
    batch: 1,
    h: 10,
    w: 15,
    num_heads: 1,
    head_dim: 16,
    side_h: 10,
    side_w: 10,
    softmax_scale: 0.25,
    rel_pos: true,
    dropout: None,
};

/// Inputs of a problem with one image and one head, and the right results. Windows have a pad.
pub struct Case {
    problem: AttentionProblem,
    dtype: DType,
    qkv: Tensor,
    tables: [Tensor; 2],
    pad: Tensor,
    dout: Tensor,
    pub out: Vec<f64>,
    pub dqkv: Vec<f64>,
    pub dtables: Vec<f64>,
}

impl Case {
    pub fn new(problem: AttentionProblem, dtype: DType) -> Self {
        Self::make(problem, dtype).expect("a case that the CPU computes")
    }

    fn make(problem: AttentionProblem, dtype: DType) -> Result<Self> {
        let p = &problem;
        let dim = p.head_dim;
        let table = |seed, side: usize| (random(seed, (2 * side - 1, dim)) * 0.3)?.to_dtype(dtype);
        let qkv = random(1, (1, p.h, p.w, 3 * dim)).to_dtype(dtype)?;
        let tables = [table(2, p.side_h)?, table(3, p.side_w)?];
        let pad = random(4, 3 * dim).to_dtype(dtype)?;
        let dout = random(5, (1, p.h, p.w, dim)).to_dtype(dtype)?;
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let (wide_pad, windows) = (wide(&pad)?, (p.side_h, p.side_w) != (p.h, p.w));
        let inputs = [wide(&qkv)?, wide(&tables[0])?, wide(&tables[1])?];
        let (out, grads) = gradients(&inputs, &wide(&dout)?, |inputs| {
            let config = RelPosAttention {
                num_heads: 1,
                softmax_scale: p.softmax_scale.into(),
                rel_pos: Some((&inputs[1], &inputs[2])),
                window: windows.then_some(p.side_h),
                pad: windows.then_some(&wide_pad),
                dropout: None,
            };
            ops::rel_pos_attention(&inputs[0], &config)
        })?;
        let [dqkv, dh, dw] = [0, 1, 2].map(|i| values(&grads[i]));
        let (out, dtables) = (values(&out), [dh, dw].concat());
        Ok(Self { problem, dtype, qkv, tables, pad, dout, out, dqkv, dtables })
    }

    /// The case in the device's memory. The tables have a gradient if `dtables`.
    pub fn buffers(&self, dtables: bool) -> Result<Buffers> {
        let Self { problem, dtype, qkv, tables: [h, w], pad, dout, .. } = self;
        let [qkv, h, w, pad, dout] = [qkv, h, w, pad, dout].map(Memory::from_tensor);
        let results = |expected: &Vec<f64>| Memory::for_elements(expected.len(), *dtype);
        let lse = Memory::for_elements(attention::lse_elements(problem, *dtype), DType::F32);
        let bytes = attention::workspace_bytes(problem, *dtype, [dtables, false], &Gpu::A100)?;
        Ok(Buffers {
            inputs: [qkv, h, w, pad, dout],
            out: results(&self.out),
            lse,
            dqkv: results(&self.dqkv),
            dtables: dtables.then(|| results(&self.dtables)),
            workspace: Memory::new(bytes),
        })
    }

    /// The error of one of the results.
    pub fn error(&self, got: &Memory, expected: &[f64]) -> f64 {
        error(&got.values(self.dtype), expected)
    }
}

pub struct Buffers {
    inputs: [Memory; 5],
    pub out: Memory,
    pub lse: Memory,
    pub dqkv: Memory,
    pub dtables: Option<Memory>,
    workspace: Memory,
}

impl Buffers {
    pub fn inputs(&self) -> Inputs {
        let [qkv, h, w, pad, _] = self.inputs.each_ref().map(Memory::address);
        Inputs { qkv, tables: [h, w], pad }
    }

    pub fn operands(&self) -> BackwardOperands {
        BackwardOperands {
            out: self.out.address(),
            lse: self.lse.address(),
            dout: self.inputs[4].address(),
            dqkv: self.dqkv.address(),
            dtables: self.dtables.as_ref().map_or(0, Memory::address),
            dpad: 0,
            workspace: self.workspace.address(),
        }
    }
}

/// The forward with `fewer_bytes` of shared memory less than it asks for; if it is right, the backward.
fn run(device: &Device, fewer_bytes: u32) -> Result<f64> {
    static CASE: LazyLock<Case> = LazyLock::new(|| Case::new(PROBLEM, DType::F32));
    let case = &*CASE;
    let buffers = case.buffers(false)?;
    let (inputs, out, lse) = (buffers.inputs(), buffers.out.address(), buffers.lse.address());
    let forward = attention::forward(&PROBLEM, DType::F32, &inputs, out, lse)?;
    let shared_bytes = forward.shared_bytes - fewer_bytes;
    launch_all(device, &[Launch { shared_bytes, ..forward }])?;
    let forward = case.error(&buffers.out, &case.out);
    if forward > RIGHT {
        return Ok(forward);
    }
    let backward =
        attention::backward(&PROBLEM, DType::F32, &inputs, &buffers.operands(), &Gpu::A100)?;
    launch_all(device, &backward)?;
    Ok(forward.max(case.error(&buffers.dqkv, &case.dqkv)))
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
        Bug { name: "a shuffle that one lane leaves out", file: FWD, seen: &[reported(&["divergence"])],
              old: "new_max = quad_max(new_max);", new: "if (lane != 3) new_max = quad_max(new_max);" },
        Bug { name: "rel_h looked up by the tile's number", file: FWD, seen: &[wrong(always)],
              old: "bias_h[r] = rel_h[8 * half * bias.stride_h + y + r];",
              new: "bias_h[r] = rel_h[8 * half * bias.stride_h + tile % tiles.of_stripe];" },
        Bug { name: "padded keys left out", file: COMMON, seen: &[wrong(always)],
              old: "return pad != nullptr && key.y < s.side_h && key.x < s.side_w ? pad + column : nullptr;",
              new: "return nullptr;" },
        Bug { name: "a forgotten table term of dq", file: "rel_pos_attention/bwd_query.cuh", seen: &[wrong(always)],
              old: "if (tables.h != nullptr) add_table_terms", new: "if (false) add_table_terms" },
    ]),
    (SHORT, &[
        Bug { name: "too little shared memory", seen: &[reported(&["wrote byte"])], ..UNHARMED },
    ]),
];
