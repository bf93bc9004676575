//! The kernels for attention between two sets of tokens: values and gradients against f64, and what makes blocks share
//! out the columns.

use crate::common::{error, gradients, random, values, Worst};
use crate::device::{bound, in_every_mode, launch_plan, Memory, DTYPES};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::multi_head::{self, Pass};
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::launch::{Gpu, MultiHeadProblem};
use candle_sam_lora::testing::{composed, reference};

const PLAIN: MultiHeadProblem = MultiHeadProblem {
    batch: 1,
    q_batch: 1,
    kv_batch: 1,
    queries: 1,
    keys: 1,
    num_heads: 1,
    head_dim: 16,
    softmax_scale: 0.25,
};
const PAIR: MultiHeadProblem = MultiHeadProblem { batch: 2, q_batch: 2, kv_batch: 2, ..PLAIN };

const CASES: [MultiHeadProblem; 11] = [
    PLAIN,
    MultiHeadProblem { queries: 3, keys: 5, num_heads: 2, ..PAIR },
    // Few queries: blocks share out the keys.
    MultiHeadProblem { queries: 7, keys: 300, num_heads: 2, ..PAIR },
    MultiHeadProblem { queries: 9, keys: 257, head_dim: 32, ..PLAIN },
    // Few keys: in the key pass blocks share out the queries.
    MultiHeadProblem { queries: 300, keys: 7, num_heads: 2, ..PAIR },
    MultiHeadProblem { queries: 70, keys: 17, head_dim: 32, ..PAIR },
    // Keys that all entries share, and queries.
    MultiHeadProblem { batch: 3, q_batch: 3, queries: 25, keys: 140, num_heads: 2, ..PLAIN },
    MultiHeadProblem { batch: 3, kv_batch: 3, queries: 70, keys: 35, num_heads: 2, ..PLAIN },
    // Heads that are no whole tile, in vectors or not.
    MultiHeadProblem { queries: 20, keys: 40, head_dim: 8, num_heads: 3, ..PAIR },
    MultiHeadProblem { queries: 20, keys: 40, head_dim: 6, num_heads: 3, ..PAIR },
    MultiHeadProblem { queries: 130, keys: 67, head_dim: 20, num_heads: 1, ..PLAIN },
];
const TRAINED: Pass = Pass::Backward { q: true, kv: true };

/// A GPU so small that few blocks fill it, and one on which all columns are shared out.
const GPUS: [Gpu; 2] = [Gpu { multiprocessors: 1, ..Gpu::A100 }, Gpu::A100];

struct Case {
    name: String,
    problem: MultiHeadProblem,
    gpu: Gpu,
    dtype: DType,
    inputs: [Tensor; 3],
    grad: Tensor,
}

impl Case {
    /// Keys and values lie around a mean, as projections with a bias do: gradients are small differences then.
    fn new(problem: MultiHeadProblem, gpu: Gpu, dtype: DType) -> Result<Self> {
        let MultiHeadProblem { batch, q_batch, kv_batch, queries, keys, .. } = problem;
        let channels = problem.channels();
        let tensor = |seed, entries, tokens, mean: f64| {
            (random(seed, (entries, tokens, channels)) + mean)?.to_dtype(dtype)
        };
        Ok(Self {
            name: format!("{problem:?} {dtype:?} {} multiprocessors", gpu.multiprocessors),
            problem,
            gpu,
            dtype,
            inputs: [
                tensor(1, q_batch, queries, 0.0)?,
                tensor(2, kv_batch, keys, 1.0)?,
                tensor(3, kv_batch, keys, 1.0)?,
            ],
            grad: tensor(4, batch, queries, 0.0)?,
        })
    }

    fn composed(&self, t: &[Tensor]) -> Result<Tensor> {
        let scale = self.problem.softmax_scale.into();
        composed::multi_head_attention([&t[0], &t[1], &t[2]], self.problem.num_heads, scale)
    }

    /// out, dq, dk, dv of the kernels, the same bits in every mode.
    fn run(&self) -> Vec<Vec<f64>> {
        let Self { problem, gpu, dtype, .. } = self;
        let [q, k, v] = self.inputs.each_ref().map(Memory::from_tensor);
        let grad = Memory::from_tensor(&self.grad);
        let outputs = in_every_mode(&self.name, |device| {
            let plan = |pass| multi_head::plan(problem, pass, *dtype, gpu);
            let [forward, plain] = [true, false].map(|saves| plan(Pass::Forward { saves }));
            let (forward, plain, backward) = (forward?, plain?, plan(TRAINED)?);
            let like = |t: &Tensor| Memory::for_elements(t.elem_count(), *dtype);
            let saved = Memory::for_elements(forward.saved, DType::F32);
            let [out, unsaved] = [0, 1].map(|_| like(&self.grad));
            let [dq, dk, dv] = self.inputs.each_ref().map(like);
            let inputs = [&q, &k, &v].map(Memory::address);
            for (plan, outputs) in
                [(&forward, &[out.address(), saved.address()][..]), (&plain, &[unsaved.address()])]
            {
                let workspace = Memory::new(plan.workspace_bytes);
                let workspace = Some(workspace.address());
                let inputs = &inputs[..];
                let operands = Operands { inputs, outputs, workspace, ..Default::default() };
                launch_plan(device, plan, &operands)?;
            }
            assert!(out.bytes() == unsaved.bytes(), "{}: what is saved changes out", self.name);
            let workspace = Memory::new(backward.workspace_bytes);
            let operands = Operands {
                inputs: &[&q, &k, &v, &out, &saved, &grad].map(Memory::address),
                outputs: &[&dq, &dk, &dv].map(Memory::address),
                workspace: Some(workspace.address()),
                ..Default::default()
            };
            launch_plan(device, &backward, &operands)?;
            Ok(vec![out, dq, dk, dv])
        });
        outputs.iter().map(|output| output.values(*dtype)).collect()
    }
}

/// Output and gradients in f64, by the formulas.
fn truth(p: &MultiHeadProblem, inputs: &[Vec<f64>; 3], grad: &[f64]) -> [Vec<f64>; 4] {
    let (d, channels, scale) = (p.head_dim, p.channels(), f64::from(p.softmax_scale));
    let [q, k, v] = inputs;
    let attention = reference::MultiHead {
        queries: p.queries,
        keys: p.keys,
        num_heads: p.num_heads,
        head_dim: d,
        softmax_scale: scale,
    };
    let out = attention.forward(q, k, v);
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![0.0; x.len()]);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let add = |to: &mut [f64], x: &[f64], factor: f64| {
        to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
    };
    for (row, (out, grad)) in out.chunks(d).zip(grad.chunks(d)).enumerate() {
        let (token, head) = (row / p.num_heads, row % p.num_heads);
        let (entry, query) = (token / p.queries, token % p.queries);
        let of_q = ((entry % p.q_batch) * p.queries + query) * channels + head * d;
        let of_key = |key: usize| ((entry % p.kv_batch) * p.keys + key) * channels + head * d;
        let score = |key: usize| scale * dot(&q[of_q..][..d], &k[of_key(key)..][..d]);
        let scores: Vec<f64> = (0..p.keys).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        for (key, score) in scores.iter().enumerate() {
            let (at, weight) = (of_key(key), (score - max).exp() / sum);
            let of_score = scale * weight * (dot(grad, &v[at..][..d]) - dot(grad, out));
            add(&mut dq[of_q..][..d], &k[at..][..d], of_score);
            add(&mut dk[at..][..d], &q[of_q..][..d], of_score);
            add(&mut dv[at..][..d], grad, weight);
        }
    }
    [out, dq, dk, dv]
}

#[test]
fn values_and_gradients() -> Result<()> {
    let mut worst = Worst::default();
    for dtype in DTYPES {
        for problem in CASES {
            for gpu in GPUS {
                let case = Case::new(problem, gpu, dtype)?;
                let got = case.run();
                let inputs = case.inputs.each_ref().map(values);
                let expected = truth(&problem, &inputs, &values(&case.grad));
                let eager = gradients(&case.inputs, &case.grad, |t| case.composed(t))?;
                let eager: Vec<_> = [eager.0].iter().chain(&eager.1).map(values).collect();
                for (i, what) in ["out", "dq", "dk", "dv"].into_iter().enumerate() {
                    // One key has all the weight: no score has a gradient but rounding.
                    if problem.keys == 1 && [1, 2].contains(&i) {
                        continue;
                    }
                    let (off, eager) =
                        (error(&got[i], &expected[i]), error(&eager[i], &expected[i]));
                    let bound = bound(dtype, eager);
                    let name = &case.name;
                    assert!(off <= bound, "{name} {what}: error {off:e}, eager {eager:e}");
                    worst.note(&format!("{what} {dtype:?}"), name, off);
                }
            }
        }
    }
    worst.check("multi_head", 1.0 / 32.0);
    Ok(())
}

#[test]
fn the_formulas_agree_with_finite_differences() {
    const STEP: f64 = 1e-5;
    let problem =
        MultiHeadProblem { batch: 2, kv_batch: 2, queries: 3, keys: 4, head_dim: 3, ..PLAIN };
    let case = Case::new(problem, GPUS[0], DType::F32).unwrap();
    let (inputs, grad) = (case.inputs.each_ref().map(values), values(&case.grad));
    let [_, expected @ ..] = truth(&problem, &inputs, &grad);
    let loss = |inputs: &[Vec<f64>; 3]| -> f64 {
        truth(&problem, inputs, &grad)[0].iter().zip(&grad).map(|(out, grad)| out * grad).sum()
    };
    for (which, expected) in expected.iter().enumerate() {
        let difference = |i: usize| {
            let mut moved = inputs.clone();
            moved[which][i] += STEP;
            let above = loss(&moved);
            moved[which][i] -= 2.0 * STEP;
            (above - loss(&moved)) / (2.0 * STEP)
        };
        let differences: Vec<f64> = (0..expected.len()).map(difference).collect();
        assert!(error(&differences, expected) < 1e-7, "gradient {which}");
    }
}

/// Scores beyond the range of f16, and all weight on one key.
#[test]
fn large_scores_stay_finite() -> Result<()> {
    let problem = MultiHeadProblem { queries: 5, keys: 200, ..PLAIN };
    for dtype in DTYPES {
        for gpu in GPUS {
            let mut case = Case::new(problem, gpu, dtype)?;
            case.inputs[0] = (&case.inputs[0] * 100.0)?;
            case.inputs[1] = (&case.inputs[1] * 100.0)?;
            let inputs = case.inputs.each_ref().map(values);
            let [expected, ..] = truth(&problem, &inputs, &values(&case.grad));
            let off = error(&case.run()[0], &expected);
            assert!(off <= bound(dtype, 0.0).max(1.0 / 2048.0), "{}: {off:e}", case.name);
        }
    }
    Ok(())
}

#[test]
fn a_nan_reaches_its_rows_alone() -> Result<()> {
    let problem = MultiHeadProblem { queries: 40, keys: 100, num_heads: 2, ..PLAIN };
    let case = Case::new(problem, Gpu::A100, DType::F32)?;
    let mut poisoned = values(&case.inputs[0]);
    // The second head of query 3.
    poisoned[3 * 32 + 20] = f64::NAN;
    let poisoned = Tensor::new(poisoned, case.grad.device())?.to_dtype(DType::F32)?;
    let mut with_nan = Case::new(problem, Gpu::A100, DType::F32)?;
    with_nan.inputs[0] = poisoned.reshape((1, 40, 32))?;
    let (clean, out) = (case.run(), with_nan.run());
    for (index, (clean, out)) in clean[0].iter().zip(&out[0]).enumerate() {
        let poisoned = index / 16 == 2 * 3 + 1;
        assert!(if poisoned { out.is_nan() } else { out == clean }, "element {index}: {out}");
    }
    Ok(())
}
