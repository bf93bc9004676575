//! Bugs planted in copies of the attention's backward, each in one of its passes; the other one is as it should be.

use super::common::{error, gradients, random, values};
use super::device::{cache, emulator, launch_all, Device, Memory};
use super::planted::copy_with;
use super::Outcomes;
use candle_core::{DType, Result};
use candle_sam_lora::launch::rel_pos_attention::{self as portable, BackwardOperands, Inputs};
use candle_sam_lora::launch::{
    rel_pos_attention::sm90::backward as attention, AttentionProblem, Gpu, Launch,
};
use candle_sam_lora::ops::{self, RelPosAttention};
use candle_sam_lora_emulator::{Emulator, Mode, Sources, Timing};

/// Five steps of queries, for four stages; the last of three blocks of queries has two rows too many, and in each of them
/// eight rows of the panel are no query's.
const PROBLEM: AttentionProblem = AttentionProblem {
    batch: 1,
    h: 7,
    w: 40,
    num_heads: 1,
    head_dim: 64,
    side_h: 7,
    side_w: 40,
    softmax_scale: 0.125,
    rel_pos: true,
    dropout: None,
};
const DTYPE: DType = DType::F16;

/// A pass: where its launch stands, its template's file, and an instance for the case.
struct Pass {
    index: usize,
    file: &'static str,
    instance: &'static str,
}

const QUERY: Pass = Pass {
    index: 0,
    file: "rel_pos_attention/sm90/bwd_query.cuh",
    instance: "KERNEL(rel_pos_attention_bwd_query_sm90_hd64_cols40_f16, RelPosAttentionBwdQuerySm90Params, 384, 1) {\n\
        rel_pos_attention_bwd_query_sm90<StreamTile<__half, 64, 40, 2, 1, 5>>(p);\n}\n",
};
const KEY: Pass = Pass {
    index: 1,
    file: "rel_pos_attention/sm90/bwd_key.cuh",
    instance: "KERNEL(rel_pos_attention_bwd_key_sm90_hd64_cols40_f16, RelPosAttentionBwdKeySm90Params, 384, 1) {\n\
        rel_pos_attention_bwd_key_sm90<KeyBlock<__half, 64, 40, true>>(p);\n}\n",
};

/// The gradients' largest error in each mode, infinite where something is NaN, or the report.
fn run(name: &str, pass: &Pass, original: &str, planted: &str) -> Outcomes {
    let folder = copy_with(&format!("attention_bwd_{name}"), pass.file, original, planted);
    let text = format!("#include \"{}\"\n{}", pass.file, pass.instance);
    std::fs::write(folder.join("pass.cu"), text).unwrap();
    let sources = Sources::files(&folder, vec![folder.join("pass.cu")]);
    let with_bug = Emulator::new(&sources, &cache()).unwrap();

    let p = &PROBLEM;
    let tensor = |seed, shape: &[usize]| random(seed, shape).to_dtype(DTYPE).unwrap();
    let qkv = tensor(1, &[1, p.h, p.w, 3 * 64]);
    let [h, w] = [tensor(2, &[2 * p.h - 1, 64]), tensor(3, &[2 * p.w - 1, 64])]
        .map(|table| (table * 0.3).unwrap());
    let dout = tensor(4, &[1, p.h, p.w, 64]);
    let inputs = [&qkv, &h, &w].map(|t| t.to_dtype(DType::F32).unwrap());
    let (_, grads) = gradients(&inputs, &dout.to_dtype(DType::F32).unwrap(), |t| {
        let config = RelPosAttention {
            num_heads: 1,
            softmax_scale: p.softmax_scale.into(),
            rel_pos: Some((&t[1], &t[2])),
            window: None,
            pad: None,
            dropout: None,
        };
        ops::rel_pos_attention(&t[0], &config)
    })
    .unwrap();
    let [dqkv, dh, dw] = [0, 1, 2].map(|i| values(&grads[i]));
    let expected = [dqkv, [dh, dw].concat()];

    let [qkv, dout, h, w] = [qkv, dout, h, w].map(|t| Memory::from_tensor(&t));
    let tables = [h.address(), w.address()];
    let inputs = Inputs { qkv: qkv.address(), tables, pad: 0 };
    let in_mode = |mode| -> Result<f64> {
        let [good, bad] = [emulator(), &with_bug].map(|emulator| Device { emulator, mode });
        let out = Memory::for_elements(p.tokens() * 64, DTYPE);
        let lse = Memory::for_elements(portable::lse_elements(p, DTYPE), DType::F32);
        let forward = portable::forward(p, DTYPE, &inputs, out.address(), lse.address())?;
        launch_all(&good, &[forward])?;
        let [dqkv, dtables] = expected.each_ref().map(|e| Memory::for_elements(e.len(), DTYPE));
        let gpu = &Gpu::H100;
        let workspace = Memory::new(portable::workspace_bytes(p, DTYPE, [true, false], gpu)?);
        let operands = BackwardOperands {
            out: out.address(),
            lse: lse.address(),
            dout: dout.address(),
            dqkv: dqkv.address(),
            dtables: dtables.address(),
            dpad: 0,
            workspace: workspace.address(),
        };
        let launches = attention::backward(p, DTYPE, &inputs, &operands, gpu)?;
        let launches: Vec<Launch> = launches.unwrap();
        for (index, launch) in launches.iter().enumerate() {
            let device = if index == pass.index { &bad } else { &good };
            launch_all(device, std::slice::from_ref(launch))?;
        }
        let errors = [dqkv, dtables].into_iter().zip(&expected).map(|(got, expected)| {
            let got = got.values(DTYPE);
            match got.iter().all(|x| x.is_finite()) {
                true => error(&got, expected),
                false => f64::INFINITY,
            }
        });
        Ok(errors.fold(0f64, f64::max))
    };
    Mode::all_with_products().map(|mode| (mode, in_mode(mode).map_err(|e| e.to_string()))).collect()
}

/// Reported, or an error that no rounding makes.
fn wrong(outcome: &std::result::Result<f64, String>) -> bool {
    outcome.as_ref().map_or(true, |error| *error > 1e-2)
}

/// Wrong in all modes that `which` picks.
fn assert_seen(outcomes: &Outcomes, which: impl Fn(&Mode) -> bool) {
    for (mode, outcome) in outcomes.iter().filter(|(mode, _)| which(mode)) {
        assert!(wrong(outcome), "not seen in {mode:?}: {outcome:?}");
    }
}

#[test]
fn unharmed_it_is_right_in_every_mode() {
    for (name, pass) in [("query", QUERY), ("key", KEY)] {
        for (mode, outcome) in run(name, &pass, "#pragma once", "#pragma once") {
            assert!(!wrong(&outcome), "{name}, {mode:?}: {outcome:?}");
        }
    }
}

#[test]
fn queries_given_back_before_the_products_with_them_are_seen_when_copies_are_early() {
    let original = "if (step > 0 && lane == 0) ptx::mbarrier_arrive(shared.empty[(step - 1) % Block::kStages]);";
    let planted = "if (lane == 0) ptx::mbarrier_arrive(shared.empty[step % Block::kStages]);";
    let outcomes = run("release", &KEY, original, planted);
    assert_seen(&outcomes, |mode| (mode.timing, mode.products) == (Timing::Early, Timing::Late));
}

#[test]
fn keys_given_back_before_the_product_with_them_are_seen_when_copies_are_early() {
    let original = "if (tile > 0) ring.release(ring.next - 4);";
    let planted = "if (tile + 1 < work.tiles) ring.release(ring.next - 2);";
    let outcomes = run("keys", &QUERY, original, planted);
    assert_seen(&outcomes, |mode| (mode.timing, mode.products) == (Timing::Early, Timing::Late));
}

#[test]
fn rows_of_no_query_that_are_not_zero_are_seen() {
    let original = "if constexpr (kLoaded < Tile::kQueries) {";
    assert_seen(&run("zeros", &QUERY, original, "if constexpr (false) {"), |_| true);
}
