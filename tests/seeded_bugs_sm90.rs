//! Bugs of Hopper's kind planted in copies of `tests/kernels/sm90/gemm_sm90.cu` and `instructions_sm90.cu`, and of the
//! attention's backward, one at a time, each of which the emulator must catch. Unharmed, they are right in every mode of
//! copies and products.

#[path = "seeded_bugs_sm90/attention_bwd.rs"]
mod attention_bwd;
#[path = "seeded_bugs_sm90/clusters.rs"]
mod clusters;
mod common;
#[path = "kernels/device.rs"]
mod device;
#[path = "kernels/planted.rs"]
mod planted;
#[path = "seeded_bugs_sm90/windows.rs"]
mod windows;

use candle_core::DType;
use candle_sam_lora::launch::tensor_map::{Element, TensorMap};
use candle_sam_lora_emulator::{Emulator, Launch, Mode, Sources, Timing};
use common::{random, values};
use device::{encode, Memory};
use planted::copy_with;

const GEMM: &str = "gemm_sm90.cu";
const INSTRUCTIONS: &str = "instructions_sm90.cu";
/// Rows, columns, depth: more than one tile each way, and enough steps to refill a stage.
const SIZES: [usize; 3] = [70, 66, 456];

/// The kernels of `file`, one of `tests/kernels/sm90`, where `planted` stands in place of `original`.
fn emulator(name: &str, file: &str, original: &str, planted: &str) -> Emulator {
    let source = format!("tests/kernels/sm90/{file}");
    let folder = copy_with(&format!("sm90_{name}"), &source, original, planted);
    let sources = Sources::files(&folder, vec![folder.join(file)]);
    Emulator::new(&sources, &device::cache()).unwrap_or_else(|e| panic!("{e}"))
}

/// What the launches came to in each mode: the largest error, infinite where something is NaN, or the report.
type Outcomes = Vec<(Mode, Result<f64, String>)>;

fn run(name: &str, original: &str, planted: &str) -> Outcomes {
    let emulator = emulator(name, GEMM, original, planted);
    let [m, n, k] = SIZES;
    let (x, w) = (random(1, (m, k)), random(2, (n, k)));
    let [x, w] = [x, w].map(|t| t.to_dtype(DType::BF16).unwrap());
    let expected = candle_sam_lora::testing::reference::linear(&values(&x), &values(&w), k);
    let [x, w] = [x, w].map(|t| Memory::from_tensor(&t));
    let map = |memory: &Memory, rows: usize| {
        let shape = (rows as u32, k as u32, k as u32);
        let map = TensorMap::matrix(memory.address(), Element::Bits16, shape, (64, 64)).unwrap();
        encode(&map).unwrap()
    };
    let outcome = |mode: Mode| {
        let y = Memory::for_elements(m * n, DType::F32);
        let mut params = [map(&x, m), map(&w, n)].concat();
        for word in [y.address(), m as u64 | (n as u64) << 32, k as u64, 0, 0, 0, 0, 0] {
            params.extend(word.to_ne_bytes());
        }
        let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1];
        let launch = Launch {
            kernel: "gemm_sm90_bf16",
            grid,
            block: [256, 1, 1],
            shared_bytes: 50176,
            cluster: 1,
            params: &params,
            begins_early: false,
        };
        // SAFETY: the memory lives, and is as long as the sizes say.
        unsafe { emulator.launch(&launch, mode) }?;
        let errors = y.values(DType::F32).into_iter().zip(&expected).map(|(y, e)| (y - e).abs());
        Ok(errors.fold(0f64, |m, e| if e.is_nan() { f64::INFINITY } else { m.max(e) }))
    };
    Mode::all_with_products().map(|mode| (mode, outcome(mode))).collect()
}

const TOLERANCE: f64 = 1e-4;

/// Wrong or reported in all modes that `seen_in` names.
fn assert_seen(outcomes: &Outcomes, seen_in: impl Fn(&Mode) -> bool) {
    for (mode, outcome) in outcomes {
        println!("{mode:?}: {outcome:?}");
        let wrong = outcome.as_ref().map_or(true, |error| *error > TOLERANCE);
        assert!(wrong || !seen_in(mode), "not seen in {mode:?}");
    }
}

fn assert_reported(outcomes: &Outcomes, words: &[&str]) {
    for (mode, outcome) in outcomes {
        let report = outcome.as_ref().expect_err(&format!("not caught in {mode:?}"));
        for word in words {
            assert!(report.contains(word), "{mode:?}: {report}\nlacks {word:?}");
        }
    }
}

const WAIT: &str = "            ptx::wgmma_wait_group<0>();\n";

#[test]
fn unharmed_it_is_right_in_every_mode() {
    for (mode, outcome) in run("none", WAIT, WAIT) {
        let error = outcome.unwrap();
        assert!(error < TOLERANCE, "{mode:?}: {error:e}");
    }
}

/// Invisible with everything early, and with everything late and in order.
#[test]
fn a_stage_released_before_the_products_have_read_it_is_seen_when_copies_are_early_and_products_late(
) {
    let planted =
        "            if (step % 2 == 1 || step + 1 == steps) ptx::wgmma_wait_group<0>();\n";
    let outcomes = run("release", WAIT, planted);
    assert_seen(&outcomes, |mode| (mode.timing, mode.products) == (Timing::Early, Timing::Late));
    for (mode, outcome) in &outcomes {
        if mode.timing == mode.products && (mode.timing == Timing::Early || mode.seed == 0) {
            assert!(outcome.as_ref().is_ok_and(|error| *error < TOLERANCE), "{mode:?}");
        }
    }
}

#[test]
fn a_missing_wait_for_the_products_is_seen_when_they_are_late() {
    assert_seen(&run("wait", WAIT, ""), |mode| mode.products == Timing::Late);
}

#[test]
fn the_consumers_wrong_parity_is_seen_when_copies_are_late() {
    let wait = "ptx::mbarrier_wait_parity(shared.full[stage], parity);";
    let outcomes = run("parity", wait, &wait.replace("parity);", "parity ^ 1);"));
    assert_seen(&outcomes, |mode| mode.timing == Timing::Late);
}

#[test]
fn the_producers_wrong_parity_is_a_deadlock() {
    let outcomes =
        run("deadlock", "shared.empty[stage], parity ^ 1)", "shared.empty[stage], parity)");
    assert_reported(&outcomes, &["deadlock", "mbarrier.try_wait at gemm_sm90.cu"]);
}

#[test]
fn a_missing_expect_tx_is_seen() {
    let expect = "mbarrier_arrive_expect_tx(shared.full[stage], 2 * kTile * kDepth * sizeof(T))";
    assert_seen(&run("expect", expect, "mbarrier_arrive(shared.full[stage])"), |_| true);
}

#[test]
fn too_few_expected_bytes_are_seen() {
    assert_seen(
        &run("bytes", "2 * kTile * kDepth * sizeof(T)", "kTile * kDepth * sizeof(T)"),
        |_| true,
    );
}

#[test]
fn a_descriptor_with_the_wrong_swizzle_or_the_wrong_step_is_seen() {
    let w = "descriptor_k_inner<128>(shared.w[stage])";
    assert_seen(&run("swizzle", w, &w.replace("128", "64")), |_| true);
    let outcomes = run("step", "w + descriptor_step(32 * k)", "w + descriptor_step(64 * k)");
    assert_seen(&outcomes, |_| true);
}

#[test]
fn missing_fences_are_reported() {
    let fence = "            ptx::wgmma_fence();\n";
    assert_reported(&run("fence", fence, ""), &["wgmma without wgmma.fence", GEMM]);
    let outcomes = run("init", "        ptx::fence_mbarrier_init();\n", "");
    assert_reported(&outcomes, &["without fence.mbarrier_init", GEMM]);
}

/// Runs the store of instructions_sm90.cu; the report.
fn run_store(name: &str, original: &str, planted: &str) -> Vec<(Mode, Result<(), String>)> {
    let emulator = emulator(name, INSTRUCTIONS, original, planted);
    let input = Memory::from_tensor(&random(1, 128).to_dtype(DType::F16).unwrap());
    let output = Memory::for_elements(256, DType::F16);
    let params: Vec<u8> =
        [input.address(), output.address()].iter().flat_map(|a| a.to_ne_bytes()).collect();
    let launch = Launch {
        kernel: "stmatrix_sm90",
        grid: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 768,
        cluster: 1,
        params: &params,
        begins_early: false,
    };
    // SAFETY: the memory lives, and is as long as the kernel says.
    let run = |mode| unsafe { emulator.launch(&launch, mode) };
    Mode::all_with_products().map(|mode| (mode, run(mode))).collect()
}

#[test]
fn a_store_of_what_was_not_fenced_is_reported() {
    for (mode, outcome) in run_store("proxy", "    ptx::fence_proxy_async();\n", "") {
        let report = outcome.expect_err(&format!("not caught in {mode:?}"));
        assert!(report.contains("without fence.proxy.async"), "{mode:?}: {report}");
    }
}

#[test]
fn a_block_that_ends_before_its_store_is_reported() {
    for (mode, outcome) in
        run_store("leave", "        ptx::cp_async_bulk_wait_group_read<0>();\n", "")
    {
        let report = outcome.expect_err(&format!("not caught in {mode:?}"));
        assert!(report.contains("ends without waiting for its bulk store"), "{mode:?}: {report}");
    }
}
