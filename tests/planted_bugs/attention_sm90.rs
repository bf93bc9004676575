//! The attention's kernels for Hopper: the passes of its backward, and the kernels for windows.

use crate::attention::Expected;
use crate::attention_case::{forward_on, Shapes, GLOBAL, WINDOWED};
use crate::device::{emulator, launch_all, Device, Memory};
use crate::harness::*;
use candle_core::{DType, Result};
use candle_sam_lora::launch::rel_pos_attention::sm90::{backward, windows};
use candle_sam_lora::launch::{rel_pos_attention as portable, Gpu, Launch};
use candle_sam_lora_emulator::{Mode, Timing};
use std::sync::LazyLock;

const DTYPE: DType = DType::F16;

/// Five steps of queries for four stages. The last of three blocks of queries has two rows too many, and in each block
/// eight rows of the panel are no query's.
const STREAMED: Shapes = Shapes { grid: (7, 40), ..GLOBAL };
/// Two windows for one block, the second hanging over the grid.
const HANGING: Shapes = Shapes { grid: (5, 8), ..WINDOWED };

const QUERY: Subject = Subject {
    name: "attention_sm90 query pass",
    source: Source::Instances(
        r#"
#include "rel_pos_attention/sm90/bwd_query.cuh"
KERNEL(rel_pos_attention_bwd_query_sm90_hd64_cols40_f16, RelPosAttentionBwdQuerySm90Params, 384, 1) {
    rel_pos_attention_bwd_query_sm90<StreamTile<__half, 64, 40, 2, 1, 5, 2>>(p);
}
"#,
    ),
    modes: timings_and_products,
    run: |device| vec![run_pass(device, 0)],
    right_up_to: 1e-2,
    wrong_above: 1e-2,
};
const KEY: Subject = Subject {
    name: "attention_sm90 key pass",
    source: Source::Instances(
        r#"
#include "rel_pos_attention/sm90/bwd_key.cuh"
KERNEL(rel_pos_attention_bwd_key_sm90_hd64_cols40_f16, RelPosAttentionBwdKeySm90Params, 384, 1) {
    rel_pos_attention_bwd_key_sm90<KeyBlock<__half, 64, 40, true>>(p);
}
"#,
    ),
    run: |device| vec![run_pass(device, 1)],
    ..QUERY
};
const WINDOWS: Subject = Subject {
    name: "attention_sm90 windows",
    source: Source::Instances(
        r#"
#include "rel_pos_attention/sm90/window_fwd.cuh"
#include "rel_pos_attention/sm90/window_bwd.cuh"
using Tile = WindowTile<__half, 64>;
KERNEL(rel_pos_attention_window_fwd_sm90_hd64_f16, RelPosAttentionWindowFwdParams, 448) { rel_pos_attention_window_fwd_sm90<Tile>(p); }
KERNEL(rel_pos_attention_window_bwd_sm90_hd64_f16, RelPosAttentionWindowBwdParams, 448) { rel_pos_attention_window_bwd_sm90<Tile>(p); }
"#,
    ),
    modes: timings,
    run: |device| vec![run_windows(device)],
    right_up_to: 0.02,
    wrong_above: 0.02,
};
/// A race: the order of the threads decides whether it shows.
const ORDERS: Subject = Subject { modes: orders, ..WINDOWS };

fn orders() -> Vec<Mode> {
    let (late, dependents) = (Timing::Late, Timing::Early);
    (1..=8).map(|seed| Mode { timing: late, products: late, dependents, seed }).collect()
}

/// The backward, whose launch `pass` alone runs on the device; the other launches run unharmed kernels.
fn run_pass(device: &Device, pass: usize) -> Result<f64> {
    static EXPECTED: LazyLock<Expected> = LazyLock::new(|| Expected::new(STREAMED, DTYPE));
    let (expected, case) = (&*EXPECTED, &EXPECTED.case);
    let unharmed = Device { emulator: emulator(), mode: device.mode };
    let on_device = case.memory();
    let forward = forward_on(&unharmed, case, &on_device)?;
    let (problem, inputs, trained) = (&case.problem, on_device.inputs(), [true, false]);
    let bytes = portable::workspace_bytes(problem, DTYPE, trained, &Gpu::A100)?;
    let backward = case.backward(&expected.dout, trained, bytes);
    let operands = backward.operands(&forward);
    let launches = backward::backward(problem, DTYPE, &inputs, &operands, &Gpu::H100)?;
    for (index, launch) in launches.expect("covered").iter().enumerate() {
        let device = if index == pass { device } else { &unharmed };
        launch_all(device, std::slice::from_ref(launch))?;
    }
    Ok(expected.error_of_gradients(&backward))
}

/// Forward and backward, of one block each.
fn run_windows(device: &Device) -> Result<f64> {
    static EXPECTED: LazyLock<Expected> = LazyLock::new(|| Expected::new(HANGING, DTYPE));
    let (expected, case) = (&*EXPECTED, &EXPECTED.case);
    let (problem, on_device, outputs) = (&case.problem, case.memory(), case.outputs());
    let (inputs, to) = (on_device.inputs(), outputs.each_ref().map(Memory::address));
    let trained = [false; 2];
    let bytes = portable::workspace_bytes(problem, DTYPE, trained, &Gpu::A100)?;
    let backward = case.backward(&expected.dout, trained, bytes);
    let operands = backward.operands(&outputs);
    let forward = windows::forward(problem, DTYPE, &inputs, to, &Gpu::H100)?.expect("covered");
    let launches = windows::backward(problem, DTYPE, &inputs, &operands, &Gpu::H100)?;
    let launches = [forward].into_iter().chain(launches.expect("covered"));
    let launches: Vec<_> = launches.map(|launch| Launch { grid: [1; 3], ..launch }).collect();
    launch_all(device, &launches)?;
    Ok(expected.error_of_out(&outputs[0]).max(expected.error_of_gradients(&backward)))
}

const QUERY_FILE: &str = "rel_pos_attention/sm90/bwd_query.cuh";
const WINDOW_FWD: &str = "rel_pos_attention/sm90/window_fwd.cuh";
const WINDOW_BWD: &str = "rel_pos_attention/sm90/window_bwd.cuh";

#[rustfmt::skip]
pub const TABLE: &[(Subject, &[Bug])] = &[
    (QUERY, &[
        UNHARMED,
        Bug { name: "keys given back before the product with them", file: QUERY_FILE,
              seen: &[caught(early_before_products)],
              old: "if (tile > 0) ring.release(ring.next - 4);",
              new: "if (tile + 1 < work.tiles) ring.release(ring.next - 2);" },
        Bug { name: "rows of no query that are not zero", file: QUERY_FILE, seen: &[caught(always)],
              old: "if constexpr (kLoaded < Tile::kQueries) {", new: "if constexpr (false) {" },
    ]),
    (KEY, &[
        UNHARMED,
        Bug { name: "queries given back before the products with them", file: "rel_pos_attention/sm90/bwd_key.cuh",
              seen: &[caught(early_before_products)],
              old: "if (step > 0 && lane == 0) ptx::mbarrier_arrive(shared.empty[(step - 1) % Block::kStages]);",
              new: "if (lane == 0) ptx::mbarrier_arrive(shared.empty[step % Block::kStages]);" },
    ]),
    (WINDOWS, &[
        UNHARMED,
        Bug { name: "a wait that leaves the rows in flight", file: WINDOW_FWD, seen: &[wrong(late), computed(always)],
              old: "ptx::cp_async_wait_group<0>();", new: "ptx::cp_async_wait_group<1>();" },
        Bug { name: "rows loaded over rows that are being read", file: WINDOW_FWD,
              seen: &[wrong(early), computed(always)],
              old: "shared.stages[(step + 1) % 2]", new: "shared.stages[step % 2]" },
        Bug { name: "keys behind the end of a row that count", file: WINDOW_BWD, seen: &[wrong(always)],
              old: "key < s.side_w ? shared.biases[1][row][key] : -INFINITY",
              new: "shared.biases[1][row][min(key, s.side_w - 1)]" },
    ]),
    (ORDERS, &[
        Bug { name: "no barrier before dS is read", file: WINDOW_BWD,
              seen: &[wrong(always).at_least(2), computed(always)],
              old: "__syncthreads();  // dS is there; biases and dO are not read any more", new: "" },
    ]),
];
