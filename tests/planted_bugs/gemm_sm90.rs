//! Hopper's staged product and its store through shared memory: `tests/kernels/sm90/gemm_sm90.cu`,
//! `instructions_sm90.cu`.

use crate::common::{random, values};
use crate::device::{launch_all, Device, Memory};
use crate::harness::*;
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::tensor_map::{Element, TensorMap};
use candle_sam_lora::launch::Launch;
use candle_sam_lora::testing::reference;
use candle_sam_lora_emulator::{Mode, Timing};
use std::sync::LazyLock;

const GEMM: &str = "gemm_sm90.cu";
const INSTRUCTIONS: &str = "instructions_sm90.cu";
/// Rows, columns, depth: more than one tile each way, and enough steps to refill a stage.
const SIZES: [usize; 3] = [70, 66, 456];

const PRODUCT: Subject = Subject {
    name: "gemm_sm90",
    source: Source::File("sm90/gemm_sm90.cu"),
    modes: timings_and_products,
    run: |device| vec![run(device)],
    right_up_to: 1e-6, // 8e-5 of results up to 81
    wrong_above: 1e-4,
};
/// Its result is checked in tests/kernels/instructions_sm90.rs; here the reports count.
const STORE: Subject = Subject {
    name: "stmatrix_sm90",
    source: Source::File("sm90/instructions_sm90.cu"),
    run: |device| vec![store(device)],
    ..PRODUCT
};

/// x, w and the right product.
static CASE: LazyLock<([Tensor; 2], Vec<f64>)> = LazyLock::new(|| {
    let [m, n, k] = SIZES;
    let [x, w] = [random(1, (m, k)), random(2, (n, k))]
        .map(|tensor| tensor.to_dtype(DType::BF16).expect("a dtype of candle's"));
    let expected = reference::linear(&values(&x), &values(&w), k);
    ([x, w], expected)
});

fn run(device: &Device) -> Result<f64> {
    let [m, n, k] = SIZES;
    let (inputs, expected) = &*CASE;
    let [x, w] = inputs.each_ref().map(Memory::from_tensor);
    let map = |memory: &Memory, rows: usize| {
        let shape = (rows as u32, k as u32, k as u32);
        TensorMap::matrix(memory.address(), Element::Bits16, shape, (64, 64))
    };
    let y = Memory::for_elements(m * n, DType::F32);
    let launch = Launch {
        kernel: "gemm_sm90_bf16".to_string(),
        grid: [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1],
        block: [256, 1, 1],
        shared_bytes: 50176,
        cluster: 1,
        params: params(2, &[y.address(), pair(m, n), k as u64, 0, 0, 0, 0, 0]),
        tensor_maps: vec![(0, map(&x, m)?), (128, map(&w, n)?)],
        ..Default::default()
    };
    launch_all(device, &[launch])?;
    Ok(error(&y.values(DType::F32), expected))
}

fn store(device: &Device) -> Result<f64> {
    let input = Memory::from_tensor(&random(1, 128).to_dtype(DType::F16)?);
    let output = Memory::for_elements(256, DType::F16);
    let launch = Launch {
        kernel: "stmatrix_sm90".to_string(),
        grid: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 768,
        cluster: 1,
        params: params(0, &[input.address(), output.address()]),
        ..Default::default()
    };
    launch_all(device, &[launch])?;
    Ok(0.0)
}

/// Copies and products at one time and in order: an early release cannot show.
fn in_step(mode: &Mode) -> bool {
    mode.timing == mode.products && (mode.timing == Timing::Early || mode.seed == 0)
}

const WAIT: &str = "ptx::wgmma_wait_group<0>();";

#[rustfmt::skip]
pub const TABLE: &[(Subject, &[Bug])] = &[
    (PRODUCT, &[
        UNHARMED,
        Bug { name: "a stage released before the products have read it", file: GEMM,
              seen: &[caught(early_before_products), right(in_step)],
              old: WAIT, new: "if (step % 2 == 1 || step + 1 == steps) ptx::wgmma_wait_group<0>();" },
        Bug { name: "a missing wait for the products", file: GEMM, seen: &[caught(late_products)],
              old: WAIT, new: "" },
        Bug { name: "the consumers' wrong parity", file: GEMM, seen: &[caught(late)],
              old: "ptx::mbarrier_wait_parity(shared.full[stage], parity);",
              new: "ptx::mbarrier_wait_parity(shared.full[stage], parity ^ 1);" },
        Bug { name: "the producers' wrong parity", file: GEMM,
              seen: &[reported(&["deadlock", "mbarrier.try_wait at gemm_sm90.cu"])],
              old: "shared.empty[stage], parity ^ 1)", new: "shared.empty[stage], parity)" },
        Bug { name: "a missing expect_tx", file: GEMM, seen: &[caught(always)],
              old: "mbarrier_arrive_expect_tx(shared.full[stage], 2 * kTile * kDepth * sizeof(T))",
              new: "mbarrier_arrive(shared.full[stage])" },
        Bug { name: "too few expected bytes", file: GEMM, seen: &[caught(always)],
              old: "2 * kTile * kDepth * sizeof(T)", new: "kTile * kDepth * sizeof(T)" },
        Bug { name: "a descriptor with the wrong swizzle", file: GEMM, seen: &[caught(always)],
              old: "descriptor_k_inner<128>(shared.w[stage])", new: "descriptor_k_inner<64>(shared.w[stage])" },
        Bug { name: "a descriptor with the wrong step", file: GEMM, seen: &[caught(always)],
              old: "w + descriptor_step(32 * k)", new: "w + descriptor_step(64 * k)" },
        Bug { name: "a missing wgmma.fence", file: GEMM, seen: &[reported(&["wgmma without wgmma.fence", GEMM])],
              old: "ptx::wgmma_fence();", new: "" },
        Bug { name: "a missing fence.mbarrier_init", file: GEMM,
              seen: &[reported(&["without fence.mbarrier_init", GEMM])],
              old: "ptx::fence_mbarrier_init();", new: "" },
    ]),
    (STORE, &[
        UNHARMED,
        Bug { name: "a store that no fence precedes", file: INSTRUCTIONS,
              seen: &[reported(&["without fence.proxy.async"])],
              old: "ptx::fence_proxy_async();", new: "" },
        Bug { name: "a block that ends before its store", file: INSTRUCTIONS,
              seen: &[reported(&["ends without waiting for its bulk store"])],
              old: "ptx::cp_async_bulk_wait_group_read<0>();", new: "" },
    ]),
];
