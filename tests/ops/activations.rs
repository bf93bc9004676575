//! Activations against transformers' `ACT2FN` (tests/fixtures/gen/activations.py), values and gradients, under every
//! name a configuration may have.

use crate::common::{cases, gradients, values, Case};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::ops::{self, Activation, Projection};
use candle_sam_lora::sam::HiddenAct;

fn activation(name: &str) -> Activation {
    let act: HiddenAct = serde_json::from_value(name.into()).unwrap();
    assert_eq!(serde_json::to_value(act).unwrap(), name);
    act.into()
}

/// The largest error, relative to the values where these are large.
fn error(got: &Tensor, expected: &Tensor) -> f64 {
    let pairs = values(got).into_iter().zip(values(expected));
    pairs.map(|(got, want)| (got - want).abs() / want.abs().max(1.0)).fold(0.0, f64::max)
}

/// Every dtype's error is at most twice that of PyTorch, or one rounding of the result where PyTorch has less.
fn compare(case: &Case, dtype: DType, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let (suffix, unit) = match dtype {
        DType::F32 => ("_f32", f64::from(f32::EPSILON)),
        _ => ("_bf16", 2f64.powi(-8)),
    };
    let x = case.tensor("x").to_dtype(dtype)?;
    let grad_out = case.tensor("grad_out").to_dtype(dtype)?;
    let (out, grads) = gradients(&[x], &grad_out, |t| f(&t[0]))?;
    for (name, got) in [("out", &out), ("grad_x", &grads[0])] {
        assert_eq!(got.dtype(), dtype);
        let expected = case.tensor(name);
        let ours = error(got, &expected);
        let theirs = error(&case.tensor(&format!("{name}{suffix}")), &expected);
        println!("{} {dtype:?} {name}: {ours:.2e}, PyTorch {theirs:.2e}", case.name);
        assert!(
            ours <= (2.0 * theirs).max(unit),
            "{} {dtype:?} {name}: {ours:e}, {theirs:e}",
            case.name
        );
    }
    Ok(())
}

#[test]
fn values_and_gradients_equal_transformers() -> Result<()> {
    let cases = cases("ops/activations.safetensors");
    assert_eq!(cases.len(), 21);
    for case in cases {
        for dtype in [DType::F32, DType::BF16] {
            compare(&case, dtype, |x| activation(&case.name).apply(x))?;
        }
    }
    Ok(())
}

/// Behind a projection that changes nothing, on the fused path where there is one.
#[test]
fn a_projection_applies_every_activation() -> Result<()> {
    for case in cases("ops/activations.safetensors") {
        for dtype in [DType::F32, DType::BF16] {
            let weight = Tensor::ones((1, 1), dtype, &candle_core::Device::Cpu)?;
            let projection = Projection { weight: &weight, scales: None, bias: None, lora: None };
            let run = |x: &Tensor, residual: Option<&Tensor>| {
                ops::lora_linear(&x.unsqueeze(1)?, &projection, activation(&case.name), residual)
            };
            compare(&case, dtype, |x| run(x, None)?.squeeze(1))?;
            let x = case.tensor("x").to_dtype(dtype)?;
            let sum = run(&x, Some(&x.unsqueeze(1)?))?.squeeze(1)?;
            let parts = (activation(&case.name).apply(&x)? + &x)?;
            // Fused, the sum is rounded once; composed, twice.
            let unit =
                if dtype == DType::F32 { 4.0 * f64::from(f32::EPSILON) } else { 2f64.powi(-7) };
            assert!(error(&sum, &parts) <= unit, "{} {dtype:?}", case.name);
        }
    }
    Ok(())
}

#[test]
fn unknown_activations_are_refused() {
    for name in ["prelu", "xielu", "sqrtsoftplus", "GELU", "gelu10"] {
        let message = serde_json::from_value::<HiddenAct>(name.into()).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("gelu_pytorch_tanh"), "{message}");
    }
}
