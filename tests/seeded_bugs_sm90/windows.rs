//! Bugs planted in copies of the attention's kernels for windows, one at a time. Unharmed, they are right in every mode
//! (`tests/kernels/rel_pos_attention_window_sm90.rs`).

use crate::common::{error, gradients, random, values};
use crate::device::{cache, launch_all, Device, Memory};
use crate::planted::copy_with;
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::rel_pos_attention::sm90::windows;
use candle_sam_lora::launch::rel_pos_attention::{lse_elements, BackwardOperands, Inputs};
use candle_sam_lora::launch::{AttentionProblem, Gpu, Launch};
use candle_sam_lora::ops::{self, RelPosAttention};
use candle_sam_lora_emulator::{Emulator, Mode, Sources, Timing};

const FWD: &str = "rel_pos_attention/sm90/window_fwd.cuh";
const BWD: &str = "rel_pos_attention/sm90/window_bwd.cuh";
const INSTANCES: &str = "#include \"rel_pos_attention/sm90/window_fwd.cuh\"\n\
    #include \"rel_pos_attention/sm90/window_bwd.cuh\"\n\
    using Tile = WindowTile<__half, 64>;\n\
    KERNEL(rel_pos_attention_window_fwd_sm90_hd64_f16, RelPosAttentionWindowFwdParams, 448) { rel_pos_attention_window_fwd_sm90<Tile>(p); }\n\
    KERNEL(rel_pos_attention_window_bwd_sm90_hd64_f16, RelPosAttentionWindowBwdParams, 448) { rel_pos_attention_window_bwd_sm90<Tile>(p); }\n";

/// Two windows for one block, the second hanging over the grid.
const PROBLEM: AttentionProblem = AttentionProblem {
    batch: 1,
    h: 5,
    w: 8,
    num_heads: 1,
    head_dim: 64,
    side_h: 5,
    side_w: 5,
    softmax_scale: 0.125,
    rel_pos: true,
    dropout: None,
};

/// The larger error of output and dqkv, infinite where something is NaN.
fn run(device: &Device) -> Result<f64> {
    let (p, dtype) = (&PROBLEM, DType::F16);
    let half = |seed, shape: &[usize]| random(seed, shape).to_dtype(dtype);
    let qkv = half(1, &[1, p.h, p.w, 192])?;
    let dout = half(5, &[1, p.h, p.w, 64])?;
    let small = [half(2, &[9, 64])?, half(3, &[9, 64])?, half(4, &[192])?];
    let [h, w, pad] = [0, 1, 2].map(|i| small[i].to_dtype(DType::F32).unwrap());
    let inputs = [qkv.to_dtype(DType::F32)?];
    let (out, grads) = gradients(&inputs, &dout.to_dtype(DType::F32)?, |t| {
        let config = RelPosAttention {
            num_heads: 1,
            softmax_scale: p.softmax_scale.into(),
            rel_pos: Some((&h, &w)),
            window: Some(p.side_h),
            pad: Some(&pad),
            dropout: None,
        };
        ops::rel_pos_attention(&t[0], &config)
    })?;

    let [qkv, dout] = [&qkv, &dout].map(Memory::from_tensor);
    let [h, w, pad] = [0, 1, 2].map(|i| Memory::from_tensor(&small[i]));
    let tables = [h.address(), w.address()];
    let inputs = Inputs { qkv: qkv.address(), tables, pad: pad.address() };
    let [to, dqkv] = [&out, &grads[0]].map(|t| Memory::for_elements(t.elem_count(), dtype));
    let lse = Memory::for_elements(lse_elements(p, dtype), DType::F32);
    let one_block = |launch: Launch| Launch { grid: [1; 3], ..launch };
    let forward = windows::forward(p, dtype, &inputs, [to.address(), lse.address()], &Gpu::H100)?;
    let operands = BackwardOperands {
        out: to.address(),
        lse: lse.address(),
        dout: dout.address(),
        dqkv: dqkv.address(),
        dtables: 0,
        dpad: 0,
        workspace: 0,
    };
    let mut launches =
        windows::backward(p, dtype, &inputs, &operands, &Gpu::H100)?.expect("covered");
    launches.insert(0, forward.expect("covered"));
    launch_all(device, &launches.into_iter().map(one_block).collect::<Vec<_>>())?;
    let error = |got: Memory, expected: &Tensor| {
        let got = got.values(dtype);
        let finite = got.iter().all(|x| x.is_finite());
        if finite {
            error(&got, &values(expected))
        } else {
            f64::INFINITY
        }
    };
    Ok(error(to, &out).max(error(dqkv, &grads[0])))
}

/// The kernels with `planted` in place of `original`.
fn with_bug(name: &str, file: &str, original: &str, planted: &str) -> Emulator {
    let folder = copy_with(name, file, original, planted);
    let instances = folder.join("windows.cu");
    std::fs::write(&instances, INSTANCES).unwrap();
    let sources = Sources::files(folder, vec![instances]);
    Emulator::new(&sources, &cache()).unwrap_or_else(|e| panic!("{e}"))
}

/// The bug must show in the modes that `seen_in` picks.
fn assert_seen(name: &str, file: &str, original: &str, planted: &str, seen_in: fn(&Mode) -> bool) {
    let emulator = with_bug(name, file, original, planted);
    for mode in Mode::all() {
        let error = run(&Device { emulator: &emulator, mode }).unwrap();
        println!("{mode:?}: {error:e}");
        assert!(error > 0.02 || !seen_in(&mode), "not seen in {mode:?}: {error:e}");
    }
}

#[test]
fn a_wait_that_leaves_the_rows_in_flight_is_seen_when_copies_are_late() {
    let (wait, leaves) = ("ptx::cp_async_wait_group<0>();", "ptx::cp_async_wait_group<1>();");
    assert_seen("window_wait", FWD, wait, leaves, |mode| mode.timing == Timing::Late);
}

#[test]
fn rows_loaded_over_ones_that_are_read_are_seen_when_copies_are_early() {
    let (ahead, here) = ("shared.stages[(step + 1) % 2]", "shared.stages[step % 2]");
    assert_seen("window_ahead", FWD, ahead, here, |mode| mode.timing == Timing::Early);
}

#[test]
fn a_missing_barrier_before_ds_is_read_is_seen() {
    let barrier = "        __syncthreads();  // dS is there; biases and dO are not read any more\n";
    let emulator = with_bug("window_ds", BWD, barrier, "");
    // A race: whether an order of the threads shows it is chance.
    let first = Mode::all().next().unwrap();
    let errors = (1..=8)
        .map(|seed| run(&Device { emulator: &emulator, mode: Mode { seed, ..first } }).unwrap());
    let errors: Vec<f64> = errors.collect();
    let seen = errors.iter().filter(|&&error| error > 0.02).count();
    assert!(seen >= 2, "seen in {seen} of {} orders: {errors:?}", errors.len());
}

#[test]
fn keys_behind_the_end_of_a_row_that_count_are_seen() {
    let original = "key < s.side_w ? shared.biases[1][row][key] : -INFINITY";
    assert_seen(
        "window_behind",
        BWD,
        original,
        "shared.biases[1][row][min(key, s.side_w - 1)]",
        |_| true,
    );
}
