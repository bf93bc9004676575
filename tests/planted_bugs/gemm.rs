//! The staged product of `tests/kernels/gemm.cu`: copies by `cp.async`, barriers, collectives.

use crate::common::values;
use crate::device::{launch_all, Device, Memory};
use crate::harness::*;
use crate::sanitizer::{ADDRESS, THREAD};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::Launch;
use candle_sam_lora::testing::reference;
use std::sync::LazyLock;

const FILE: &str = "gemm.cu";
const SHARED_BYTES: u32 = 20480;
/// Rows, columns, depth: more than one tile each way, and enough steps to refill a stage.
const SIZES: [usize; 3] = [70, 66, 136];

const GEMM: Subject = Subject {
    name: "gemm",
    source: Source::File(FILE),
    modes: timings,
    run: |device| vec![run(device, SHARED_BYTES)],
    right_up_to: 0.0,
    wrong_above: 0.0,
};
const SHORT: Subject = Subject { run: |device| vec![run(device, SHARED_BYTES - 64)], ..GEMM };

/// x, w and the right product.
static CASE: LazyLock<([Tensor; 2], Vec<f64>)> = LazyLock::new(|| {
    let [m, n, k] = SIZES;
    let [x, w] = [(m, 0), (n, 5)].map(|(rows, seed)| {
        let integer = |i: usize| ((i * 7 + i / 13 + seed) % 9) as f32 - 4.0;
        let data: Vec<f32> = (0..rows * k).map(integer).collect();
        let tensor = Tensor::from_vec(data, (rows, k), &candle_core::Device::Cpu);
        tensor.and_then(|tensor| tensor.to_dtype(DType::BF16)).expect("integers")
    });
    let expected = reference::linear(&values(&x), &values(&w), k);
    ([x, w], expected)
});

fn run(device: &Device, shared_bytes: u32) -> Result<f64> {
    let [m, n, k] = SIZES;
    let (inputs, expected) = &*CASE;
    let [x, w] = inputs.each_ref().map(Memory::from_tensor);
    let y = Memory::for_elements(m * n, DType::F32);
    let launch = Launch {
        kernel: "gemm_bf16".to_string(),
        grid: [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1],
        block: [128, 1, 1],
        shared_bytes,
        cluster: 1,
        params: params(0, &[x.address(), w.address(), y.address(), pair(m, n), pair(k, 0)]),
        ..Default::default()
    };
    launch_all(device, &[launch])?;
    Ok(error(&y.values(DType::F32), expected))
}

const LANDED: &str = "__syncthreads();  // everybody's copies have landed";
const FREE: &str = "__syncthreads();  // nobody reads this stage any more";

#[rustfmt::skip]
pub const TABLE: &[(Subject, &[Bug])] = &[
    (GEMM, &[
        UNHARMED,
        Bug { name: "a missing wait", file: FILE, seen: &[not_a_number(late), right(early)],
              old: "ptx::cp_async_wait_group<1>();", new: "" },
        Bug { name: "a wait for one group too few", file: FILE, seen: &[wrong(late), right(early)],
              old: "cp_async_wait_group<1>", new: "cp_async_wait_group<2>" },
        Bug { name: "no barrier before a stage is refilled", file: FILE, seen: &[wrong(early_unordered)],
              old: FREE, new: "" },
        Bug { name: "no barrier before a stage is read", file: FILE, seen: &[not_a_number(late)],
              old: LANDED, new: "" },
        Bug { name: "a write past shared memory", file: FILE, seen: &[reported(&["wrote byte 20480 of 20480"])],
              old: "load_tile(shared.x[0], x, m0, p.m, 0, p.k);",
              new: "if (threadIdx.x == 7) memset(&shared + 1, 0, 1); load_tile(shared.x[0], x, m0, p.m, 0, p.k);" },
        Bug { name: "a collective that one lane leaves out", file: FILE,
              seen: &[reported(&["divergence", "ldmatrix.x4"]).at_line_of("ptx::ldmatrix_x4(a, &shared.x")],
              old: "ptx::ldmatrix_x4(a, &shared.x", new: "if (lane != 3) ptx::ldmatrix_x4(a, &shared.x" },
        Bug { name: "a barrier that a warp does not reach", file: FILE,
              seen: &[reported(&["deadlock", "threads 64-95 have ended", "__syncthreads"]).at_line_of(LANDED)],
              old: "for (uint32_t step = 0;", new: "if (warp == 2) return; for (uint32_t step = 0;" },
        Bug { name: "a read past a tensor", file: FILE, seen: &[sanitized(&ADDRESS)],
              old: "valid ? from + uint64_t(row0 + row) * k + k0 + col : from, valid);",
              new: "valid ? from + uint64_t(row0 + row) * k + k0 + col : from + rows * k, true);" },
        Bug { name: "a race for a stage", file: FILE, seen: &[sanitized(&THREAD)],
              old: FREE, new: "" },
    ]),
    (SHORT, &[
        Bug { name: "too little shared memory",
              seen: &[reported(&["cp.async touches byte", "of 20416 bytes"]).at_line_of("ptx::cp_async<16>(&tile")],
              ..UNHARMED },
    ]),
];
