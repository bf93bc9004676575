//! Bugs planted in a copy of the attention's kernels, one at a time: in its staging, which the emulator must catch, and
//! in its mathematics, which must show in the result. Unharmed, it is right in every mode.

mod common;
#[path = "kernels/device.rs"]
mod device;
#[path = "kernels/planted.rs"]
mod planted;

use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::rel_pos_attention::{self as attention, BackwardOperands, Inputs};
use candle_sam_lora::launch::{AttentionProblem, Gpu, Launch};
use candle_sam_lora::ops::{self, RelPosAttention};
use candle_sam_lora_emulator::{Emulator, Mode, Sources, Timing};
use common::{error, gradients, random, values};
use device::{cache, launch_all, Device, Memory};
use planted::copy_with;
use std::path::{Path, PathBuf};

const FWD: &str = "rel_pos_attention/fwd.cuh";
const QUERY: &str = "rel_pos_attention/bwd_query.cuh";
const SHARED: &str = "rel_pos_attention/common.cuh";

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

/// An instance a pass.
const INSTANCES: &str = "#include \"rel_pos_attention/fwd.cuh\"\n\
    #include \"rel_pos_attention/bwd_query.cuh\"\n\
    #include \"rel_pos_attention/bwd_key.cuh\"\n\
    using Tile = AttentionTile<float, 16, 16, 2, 4>;\n\
    KERNEL(rel_pos_attention_fwd_hd16_cols16_f32, RelPosAttentionFwdParams, 128) { rel_pos_attention_fwd<Tile>(p); }\n\
    KERNEL(rel_pos_attention_bwd_query_hd16_cols16_f32, RelPosAttentionBwdQueryParams, 128) { rel_pos_attention_bwd_query<Tile>(p); }\n\
    KERNEL(rel_pos_attention_bwd_key_hd16_f32, RelPosAttentionBwdKeyParams, 128) { rel_pos_attention_bwd_key<KeyTile<float, 16, 32>>(p); }\n";

/// A folder of the kernels, where `planted` stands in place of `original`.
fn kernels_with(name: &str, file: &str, original: &str, planted: &str) -> PathBuf {
    let folder = copy_with(&format!("attention_{name}"), file, original, planted);
    std::fs::write(folder.join("attention.cu"), INSTANCES).unwrap();
    folder
}

/// The launches' errors in each mode, infinite where something is NaN, or the report.
type Outcomes = Vec<(Mode, std::result::Result<f64, String>)>;

/// The case's tensors, and what is right.
struct Case {
    qkv: Tensor,
    tables: [Tensor; 2],
    pad: Tensor,
    dout: Tensor,
    out: Vec<f64>,
    dqkv: Vec<f64>,
}

fn case() -> Case {
    let qkv = random(1, (1, PROBLEM.h, PROBLEM.w, 48));
    let tables = [random(2, (19, 16)), random(3, (19, 16))].map(|t| (t * 0.3).unwrap());
    let (pad, dout) = (random(4, 48), random(5, (1, PROBLEM.h, PROBLEM.w, 16)));
    let (out, grads) = gradients(std::slice::from_ref(&qkv), &dout, |t| {
        let config = RelPosAttention {
            num_heads: 1,
            softmax_scale: PROBLEM.softmax_scale.into(),
            rel_pos: Some((&tables[0], &tables[1])),
            window: Some(PROBLEM.side_h),
            pad: Some(&pad),
            dropout: None,
        };
        ops::rel_pos_attention(&t[0], &config)
    })
    .unwrap();
    let (out, dqkv) = (values(&out), values(&grads[0]));
    Case { qkv, tables, pad, dout, out, dqkv }
}

fn worst(got: &[f64], expected: &[f64]) -> f64 {
    if got.iter().all(|x| x.is_finite()) {
        error(got, expected)
    } else {
        f64::INFINITY
    }
}

/// Forward, and backward if that went well; `change` may alter the forward's launch.
fn run(folder: &Path, change: impl Fn(Launch) -> Launch) -> Outcomes {
    let sources = Sources::files(folder, vec![folder.join("attention.cu")]);
    let emulator = Emulator::new(&sources, &cache()).unwrap();
    let case = case();
    let [qkv, pad, dout] = [&case.qkv, &case.pad, &case.dout].map(Memory::from_tensor);
    let tables = case.tables.each_ref().map(Memory::from_tensor);
    let inputs = Inputs {
        qkv: qkv.address(),
        tables: tables.each_ref().map(Memory::address),
        pad: pad.address(),
    };
    let in_mode = |mode| -> Result<f64> {
        let device = Device { emulator: &emulator, mode };
        let out = Memory::for_elements(case.out.len(), DType::F32);
        let lse = Memory::for_elements(attention::lse_elements(&PROBLEM, DType::F32), DType::F32);
        let launch =
            attention::forward(&PROBLEM, DType::F32, &inputs, out.address(), lse.address())?;
        launch_all(&device, &[change(launch)])?;
        let forward = worst(&out.values(DType::F32), &case.out);
        if forward > 1e-5 {
            return Ok(forward);
        }
        let dqkv = Memory::for_elements(case.dqkv.len(), DType::F32);
        let bytes = attention::workspace_bytes(&PROBLEM, DType::F32, [false; 2], &Gpu::A100)?;
        let workspace = Memory::new(bytes);
        let operands = BackwardOperands {
            out: out.address(),
            lse: lse.address(),
            dout: dout.address(),
            dqkv: dqkv.address(),
            dtables: 0,
            dpad: 0,
            workspace: workspace.address(),
        };
        let launches = attention::backward(&PROBLEM, DType::F32, &inputs, &operands, &Gpu::A100)?;
        launch_all(&device, &launches)?;
        Ok(forward.max(worst(&dqkv.values(DType::F32), &case.dqkv)))
    };
    Mode::all().map(|mode| (mode, in_mode(mode).map_err(|e| e.to_string()))).collect()
}

fn plant(name: &str, file: &str, original: &str, planted: &str) -> Outcomes {
    run(&kernels_with(name, file, original, planted), |launch| launch)
}

/// The modes that `which` picks must all show the bug in the result.
fn assert_seen(outcomes: &Outcomes, which: impl Fn(&Mode) -> bool) {
    for (mode, outcome) in outcomes.iter().filter(|(mode, _)| which(mode)) {
        let error = outcome.clone().unwrap();
        println!("{mode:?}: {error:e}");
        assert!(error > 1e-3, "not seen in {mode:?}: {error:e}");
    }
}

#[test]
fn unharmed_it_is_right_in_every_mode() {
    for (mode, outcome) in plant("none", FWD, "#pragma once", "#pragma once") {
        assert!(outcome.clone().unwrap() < 1e-5, "{mode:?}: {outcome:?}");
    }
}

#[test]
fn a_missing_wait_is_seen_when_copies_land_late() {
    let outcomes = plant("wait", SHARED, "ptx::cp_async_wait_group<1>();", "");
    assert_seen(&outcomes, |mode| mode.timing == Timing::Late);
}

#[test]
fn a_missing_barrier_before_a_tile_is_read_is_seen_when_copies_land_late() {
    let barrier = "__syncthreads();  // everybody's copies of this tile have landed";
    let outcomes = plant("arrive", SHARED, barrier, "");
    assert_seen(&outcomes, |mode| mode.timing == Timing::Late);
}

#[test]
fn a_missing_barrier_before_a_stage_is_refilled_is_seen_when_copies_land_early() {
    let barrier = "__syncthreads();  // nobody reads this stage any more";
    let outcomes = plant("refill", FWD, barrier, "");
    assert_seen(&outcomes, |mode| mode.timing == Timing::Early && mode.seed != 0);
}

#[test]
fn too_little_shared_memory_is_reported() {
    let folder = kernels_with("short", FWD, "#pragma once", "#pragma once");
    let short = |launch: Launch| Launch { shared_bytes: launch.shared_bytes - 64, ..launch };
    for (mode, outcome) in run(&folder, short) {
        let report = outcome.expect_err(&format!("not caught in {mode:?}"));
        assert!(report.contains("wrote byte"), "{mode:?}: {report}");
    }
}

#[test]
fn a_shuffle_that_one_lane_leaves_out_is_reported() {
    let shuffle = "new_max = quad_max(new_max);";
    for (mode, outcome) in plant("diverge", FWD, shuffle, &format!("if (lane != 3) {shuffle}")) {
        let report = outcome.expect_err(&format!("not caught in {mode:?}"));
        assert!(report.contains("divergence"), "{mode:?}: {report}");
    }
}

#[test]
fn rel_h_looked_up_by_the_tile_s_number_is_seen() {
    let planted = "bias_h[r] = rel_h[8 * half * bias.stride_h + tile % tiles.of_stripe];";
    let original = "bias_h[r] = rel_h[8 * half * bias.stride_h + y + r];";
    assert_seen(&plant("tile_number", FWD, original, planted), |_| true);
}

#[test]
fn padded_keys_left_out_are_seen() {
    let original =
        "return pad != nullptr && key.y < s.side_h && key.x < s.side_w ? pad + column : nullptr;";
    assert_seen(&plant("pad", SHARED, original, "return nullptr;"), |_| true);
}

#[test]
fn a_forgotten_table_term_of_dq_is_seen() {
    let original = "if (tables.h != nullptr) add_table_terms";
    assert_seen(&plant("dq", QUERY, original, "if (false) add_table_terms"), |_| true);
}
