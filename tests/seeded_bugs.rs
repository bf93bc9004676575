//! Bugs planted in a copy of a kernel, one at a time, each of which the emulator must catch.
//!
//! The kernel is the staged product of `tests/kernels/gemm.cu`. Unharmed, it is right in every mode.

#[path = "kernels/planted.rs"]
mod planted;

use candle_sam_lora_emulator::{Emulator, Launch, Mode, Sources, Timing};
use planted::copy_with;
use std::path::{Path, PathBuf};

const KERNEL: &str = "gemm.cu";
const FILE: &str = "tests/kernels/gemm.cu";
const SHARED_BYTES: u32 = 20480;
/// Rows, columns, depth: more than one tile each way, and enough steps to refill a stage.
const SIZES: [usize; 3] = [70, 66, 136];

/// What the launches came to in each mode: the largest error, infinite where something is NaN, or the report.
type Outcomes = Vec<(Mode, Result<f64, String>)>;

fn run(folder: &Path, shared_bytes: u32) -> Outcomes {
    let sources = Sources::files(folder, vec![folder.join(KERNEL)]);
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let emulator = Emulator::new(&sources, &cache).unwrap_or_else(|e| panic!("{e}"));
    let [m, n, k] = SIZES;
    let integers = |count: usize, seed: usize| -> Vec<half::bf16> {
        (0..count)
            .map(|i| half::bf16::from_f32(((i * 7 + i / 13 + seed) % 9) as f32 - 4.0))
            .collect()
    };
    // A multiple of 16 bytes, and aligned to as many: cp.async reads vectors.
    let aligned = |values: &[half::bf16]| -> Vec<u128> {
        bytemuck::pod_collect_to_vec::<u16, u128>(
            &values.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        )
    };
    let (x, w) = (integers(m * k, 0), integers(n * k, 5));
    let (x_memory, w_memory) = (aligned(&x), aligned(&w));
    Mode::all()
        .map(|mode| {
            let mut y = vec![f32::NAN; m * n];
            let params = (
                [x_memory.as_ptr() as u64, w_memory.as_ptr() as u64, y.as_mut_ptr() as u64],
                [m as u32, n as u32, k as u32, 0],
            );
            let mut bytes = bytemuck::bytes_of(&params.0).to_vec();
            bytes.extend_from_slice(bytemuck::bytes_of(&params.1));
            let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1];
            let (kernel, block, params) = ("gemm_bf16", [128, 1, 1], &bytes);
            let launch = Launch {
                kernel,
                grid,
                block,
                shared_bytes,
                cluster: 1,
                params,
                begins_early: false,
            };
            // SAFETY: the vectors live, and are as long as the sizes say.
            let status = unsafe { emulator.launch(&launch, mode) };
            let error = || {
                let mut worst = 0f64;
                for (i, y) in y.iter().enumerate() {
                    let pairs = x[i / n * k..][..k].iter().zip(&w[i % n * k..][..k]);
                    let exact: f64 = pairs.map(|(x, w)| x.to_f64() * w.to_f64()).sum();
                    let error = (f64::from(*y) - exact).abs();
                    worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
                }
                worst
            };
            (mode, status.map(|()| error()))
        })
        .collect()
}

/// A command `env` whose process has its addresses where they would be without chance, if the system allows that: where it
/// scatters them widely, sanitizers of older compilers find their place taken, now and then.
fn with_fixed_addresses() -> std::process::Command {
    let fixed = ["setarch", std::env::consts::ARCH, "--addr-no-randomize"];
    let command = |program: &[&str]| {
        let mut command = std::process::Command::new(program[0]);
        command.args(&program[1..]);
        command
    };
    match command(&fixed).arg("true").output() {
        Ok(output) if output.status.success() => command(&[&fixed[..], &["env"]].concat()),
        _ => command(&["env"]),
    }
}

/// Runs one of the tests below as a process of its own, in which a sanitizer watches; what it said, or none if the
/// compiler lacks it.
fn under_sanitizer(kind: &str, runtime: &str, test: &str) -> Option<String> {
    let cxx = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
    let mut command = std::process::Command::new(cxx);
    let output = command.arg(format!("-print-file-name={runtime}")).output().unwrap();
    let library = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    if !library.is_absolute() || !library.exists() {
        println!("skipped: the C++ compiler has no {runtime}");
        return None;
    }
    let output = with_fixed_addresses()
        .arg(format!("LD_PRELOAD={}", library.display()))
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture"])
        .env("EMULATOR_SANITIZE", kind)
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("TSAN_OPTIONS", "halt_on_error=1:ignore_noninstrumented_modules=1")
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "not caught: {report}");
    Some(report)
}

/// All modes' reports must hold every one of `words`.
fn assert_reported(outcomes: &Outcomes, words: &[&str]) {
    for (mode, outcome) in outcomes {
        let report = outcome.as_ref().expect_err(&format!("not caught in {mode:?}"));
        println!("{mode:?}: {report}");
        for word in words {
            assert!(report.contains(word), "{mode:?}: {report}\nlacks {word:?}");
        }
    }
}

/// The line on which `text` stands, as reports give it.
fn line_of(folder: &Path, text: &str) -> String {
    let source = std::fs::read_to_string(folder.join(KERNEL)).unwrap();
    let start = planted::places(&source, text)[0].start;
    format!("{KERNEL}:{}", source[..start].lines().count())
}

#[test]
fn unharmed_it_is_right_in_every_mode() {
    let folder = copy_with("gemm_none", FILE, "constexpr int kTile", "constexpr int kTile");
    for (mode, outcome) in run(&folder, SHARED_BYTES) {
        assert_eq!(outcome, Ok(0.0), "{mode:?}");
    }
}

#[test]
fn a_missing_wait_is_seen_when_copies_land_late() {
    let folder = copy_with("gemm_wait", FILE, "ptx::cp_async_wait_group<1>();", "");
    for (mode, outcome) in run(&folder, SHARED_BYTES) {
        let error = outcome.unwrap();
        match mode.timing {
            Timing::Late => assert!(error.is_infinite(), "{mode:?}: {error}"),
            Timing::Early => assert_eq!(error, 0.0, "{mode:?}"),
        }
    }
}

#[test]
fn a_wait_for_one_group_too_few_is_seen_when_copies_land_late() {
    let folder = copy_with("gemm_wait2", FILE, "cp_async_wait_group<1>", "cp_async_wait_group<2>");
    for (mode, outcome) in run(&folder, SHARED_BYTES) {
        let error = outcome.unwrap();
        assert_eq!(error > 0.0, mode.timing == Timing::Late, "{mode:?}: {error}");
    }
}

#[test]
fn a_missing_barrier_before_a_stage_is_refilled_is_seen_when_copies_land_early() {
    let barrier = "__syncthreads();  // nobody reads this stage any more";
    let folder = copy_with("gemm_refill", FILE, barrier, "");
    let outcomes = run(&folder, SHARED_BYTES);
    let early = outcomes.iter().filter(|(mode, _)| mode.timing == Timing::Early && mode.seed != 0);
    for (mode, outcome) in early {
        let error = outcome.clone().unwrap();
        assert!(error > 0.0, "{mode:?}");
    }
}

#[test]
fn a_missing_barrier_before_a_stage_is_read_is_seen_when_copies_land_late() {
    let barrier = "__syncthreads();  // everybody's copies have landed";
    let folder = copy_with("gemm_arrive", FILE, barrier, "");
    let outcomes = run(&folder, SHARED_BYTES);
    let late = outcomes.iter().filter(|(mode, _)| mode.timing == Timing::Late);
    for (mode, outcome) in late {
        let error = outcome.clone().unwrap();
        assert!(error.is_infinite(), "{mode:?}: {error}");
    }
}

#[test]
fn too_little_shared_memory_is_reported_with_its_line() {
    let folder = copy_with("gemm_short", FILE, "constexpr int kTile", "constexpr int kTile");
    let outcomes = run(&folder, SHARED_BYTES - 64);
    let line = line_of(&folder, "ptx::cp_async<16>(&tile");
    assert_reported(&outcomes, &["cp.async touches byte", "of 20416 bytes", &line]);
}

#[test]
fn a_write_past_shared_memory_is_reported() {
    let load = "load_tile(shared.x[0], x, m0, p.m, 0, p.k);";
    let write = format!("if (threadIdx.x == 7) memset(&shared + 1, 0, 1);\n    {load}");
    let folder = copy_with("gemm_overrun", FILE, load, &write);
    assert_reported(&run(&folder, SHARED_BYTES), &["wrote byte 20480 of 20480"]);
}

#[test]
fn a_collective_that_one_lane_leaves_out_is_reported() {
    let load = "ptx::ldmatrix_x4(a, &shared.x";
    let folder = copy_with("gemm_diverge", FILE, load, &format!("if (lane != 3) {load}"));
    let line = line_of(&folder, load);
    assert_reported(&run(&folder, SHARED_BYTES), &["divergence", "ldmatrix.x4", &line]);
}

#[test]
fn a_barrier_that_a_warp_does_not_reach_is_reported() {
    let steps = "for (uint32_t step = 0;";
    let folder =
        copy_with("gemm_leave", FILE, steps, &format!("if (warp == 2) return;\n    {steps}"));
    let line = line_of(&folder, "// everybody's copies have landed");
    let ended = "threads 64-95 have ended";
    assert_reported(&run(&folder, SHARED_BYTES), &["deadlock", ended, "__syncthreads", &line]);
}

#[test]
#[ignore = "ends the process: run by the test that follows"]
fn a_read_past_a_tensor() {
    let valid = "valid ? from + uint64_t(row0 + row) * k + k0 + col : from, valid);";
    let folder =
        copy_with("gemm_asan", FILE, valid, &valid.replace(", valid)", " + rows * k, true)"));
    run(&folder, SHARED_BYTES);
}

#[test]
fn a_read_past_a_tensor_is_seen_by_address_sanitizer() {
    if let Some(report) = under_sanitizer("address", "libasan.so", "a_read_past_a_tensor") {
        assert!(report.contains("AddressSanitizer: heap-buffer-overflow"), "{report}");
        assert!(report.contains(KERNEL), "{report}");
    }
}

#[test]
#[ignore = "ends the process: run by the test that follows"]
fn a_race_for_a_stage() {
    let barrier = "__syncthreads();  // nobody reads this stage any more";
    run(&copy_with("gemm_tsan", FILE, barrier, ""), SHARED_BYTES);
}

#[test]
fn a_race_for_a_stage_is_seen_by_thread_sanitizer() {
    if let Some(report) = under_sanitizer("thread", "libtsan.so", "a_race_for_a_stage") {
        assert!(report.contains("ThreadSanitizer: data race"), "{report}");
        assert!(report.contains(KERNEL), "{report}");
    }
}
