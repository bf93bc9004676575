//! The attention at its limits, against PyTorch in f32: a saturated softmax, and values that are not finite.

use crate::common::limits::{self, NotFinite, Rule, Saturated};
use crate::common::{gradients, values};
use candle_core::{DType, Device, Result, Tensor};
use candle_sam_lora::ops::{self, RelPosAttention};
use candle_sam_lora::testing::composed;

/// A path through the operation: its name, and what computes it.
type Path = (&'static str, fn(&Tensor, &RelPosAttention<'_>) -> Result<Tensor>);
const FUSED: Path = ("fused", ops::rel_pos_attention);
const COMPOSED: Path = ("composed", |qkv, config| Ok(composed::rel_pos_attention(qkv, config)?.0));

/// Output and gradients of the inputs that are there, by name.
fn run(
    (_, path): Path,
    inputs: &limits::Inputs,
    settings: &limits::Settings,
) -> Result<Vec<(String, Tensor)>> {
    let (out, grads) = gradients(&inputs.tensors(), &inputs.grad_out, |t| {
        let config = RelPosAttention {
            num_heads: settings.num_heads,
            softmax_scale: settings.softmax_scale,
            rel_pos: Some((&t[1], &t[2])),
            window: settings.window,
            pad: t.get(3),
            dropout: None,
        };
        path(&t[0], &config)
    })?;
    let grads = limits::NAMES.iter().map(|name| format!("grad_{name}")).zip(grads);
    Ok([("out".to_string(), out)].into_iter().chain(grads).collect())
}

/// At any size of the logits, noise in the gradients is at most four times PyTorch's.
#[test]
fn saturated_gradients_are_as_exact_as_pytorch() -> Result<()> {
    let mut failures = Vec::new();
    for case in Saturated::all()? {
        println!("{:<28} {:<15} {:>9} {:>9} {:>9}", case.name, "", "largest", "PyTorch", "here");
        for (name, got) in run(FUSED, &case.inputs, &case.settings)? {
            let row = case.compare(&name, &values(&got));
            println!("{:<28} {row}", "");
            failures.extend(row.failed(4.0).then(|| format!("{} {row}", case.name)));
        }
    }
    assert!(failures.is_empty(), "more than four times PyTorch's error:\n{}", failures.join("\n"));
    Ok(())
}

/// Values that are not finite reach the elements that they reach in PyTorch, and no others.
fn check_not_finite(path: Path, rule: Rule) -> Result<()> {
    let mut failures = Vec::new();
    for case in NotFinite::all()? {
        for (name, got) in run(path, &case.inputs, &case.settings)? {
            if let Some(difference) = case.difference(&name, &values(&got), 1e-5, rule) {
                failures.push(format!("{} {}: {name}: {difference}", path.0, case.name));
            }
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    Ok(())
}

#[test]
fn not_finite_spreads_as_in_pytorch() -> Result<()> {
    check_not_finite(FUSED, Rule::Exact)
}

#[test]
fn not_finite_spreads_as_in_pytorch_when_composed() -> Result<()> {
    check_not_finite(COMPOSED, Rule::FiniteWithPadding)
}

/// A scale of zero leaves the tables alone to decide, a negative one turns the order round; both as the graph has it.
#[test]
fn any_finite_scale_is_as_composed() -> Result<()> {
    let case =
        Saturated::all()?.into_iter().find(|case| case.name == "window_80_logits_10").unwrap();
    for softmax_scale in [0.0, -0.3, 1e-30] {
        let settings = limits::Settings { softmax_scale, ..case.settings };
        let fused = run(FUSED, &case.inputs, &settings)?;
        for ((name, got), (_, expected)) in
            fused.iter().zip(run(COMPOSED, &case.inputs, &settings)?)
        {
            let (got, expected) = (values(got), values(&expected));
            let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
            let error = got.iter().zip(&expected).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(error <= 3e-4 * largest, "{softmax_scale} {name}: {error:e} of {largest:e}");
        }
    }
    Ok(())
}

/// Equal scores share their weight equally, however large they are; one key takes all of it.
#[test]
fn equal_scores_share_equally() -> Result<()> {
    for (tokens, score) in [(1, 1e4f32), (7, 1e4), (40, -1e4), (640, 3e8)] {
        let q = Tensor::full(score, (1, 1, tokens, 1), &Device::Cpu)?;
        let k = Tensor::ones((1, 1, tokens, 1), DType::F32, &Device::Cpu)?;
        let v = Tensor::arange(0f32, tokens as f32, &Device::Cpu)?.reshape((1, 1, tokens, 1))?;
        let config = RelPosAttention {
            num_heads: 1,
            softmax_scale: 1.0,
            rel_pos: None,
            window: None,
            pad: None,
            dropout: None,
        };
        let out = ops::rel_pos_attention(&Tensor::cat(&[q, k, v], 3)?, &config)?;
        let mean = (tokens as f64 - 1.0) / 2.0;
        let close = values(&out).iter().all(|x| (x - mean).abs() <= 1e-6 * mean);
        assert!(close, "{tokens} keys of score {score}: {out}, expected {mean}");
    }
    Ok(())
}
