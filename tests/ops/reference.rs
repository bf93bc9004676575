//! Every operation against the naive f64 reference: values, finite differences of the reference for every gradient,
//! the composed candle graph, half precision, strides, threads.

use crate::common::cases::{all, assert_any_strides, dora, INSTRUCTIONS};
use crate::common::{error, gradients, random, tensor_error, values, Worst};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::ops::{self, Activation, Projection};

#[test]
fn values_agree_with_the_reference() -> Result<()> {
    let mut worst = Worst::default();
    for op in all().into_iter().chain(dora()) {
        let inputs: Vec<_> = op.inputs.iter().map(values).collect();
        let expected = (op.reference)(&inputs);
        let kind = op.name.split(' ').next().unwrap_or_default().to_string();
        worst.note(&kind, &op.name, error(&values(&(op.fused)(&op.inputs)?), &expected));
        let composed = error(&values(&(op.composed)(&op.inputs)?), &expected);
        worst.note(&format!("{kind} composed"), &op.name, composed);
    }
    worst.check("f32 against the f64 reference", 3e-6);
    Ok(())
}

#[test]
fn gradients_agree_with_finite_differences_of_the_reference() -> Result<()> {
    const STEP: f64 = 1e-5;
    let mut worst = Worst::default();
    for op in all() {
        let out = (op.fused)(&op.inputs)?;
        let grad_out = random(77, out.shape());
        let (_, grads) = gradients(&op.inputs, &grad_out, &op.fused)?;
        let weights = values(&grad_out);
        let inputs: Vec<_> = op.inputs.iter().map(values).collect();
        let loss = |inputs: &[Vec<f64>]| -> f64 {
            (op.reference)(inputs).iter().zip(&weights).map(|(y, g)| y * g).sum()
        };
        for (index, grad) in grads.iter().enumerate() {
            let grad = values(grad);
            // Up to 24 elements of each input, spread over it.
            let step = grad.len().div_ceil(24);
            let (mut got, mut expected) = (Vec::new(), Vec::new());
            for element in (0..grad.len()).step_by(step) {
                let mut moved = inputs.clone();
                moved[index][element] += STEP;
                let above = loss(&moved);
                moved[index][element] -= 2.0 * STEP;
                expected.push((above - loss(&moved)) / (2.0 * STEP));
                got.push(grad[element]);
            }
            let kind = op.name.split(' ').next().unwrap_or_default();
            let what = format!("{kind} input {index}");
            worst.note(&what, &op.name, error(&got, &expected));
        }
    }
    // Central differences in f64 are good to about 1e-9; the rest is f32 rounding of the operation.
    worst.check("gradients against finite differences", 1e-5);
    Ok(())
}

#[test]
fn gradients_agree_with_the_composed_graph() -> Result<()> {
    let mut worst = Worst::default();
    for op in all().into_iter().chain(dora()) {
        let grad_out = random(78, (op.fused)(&op.inputs)?.shape());
        let (out, fused) = gradients(&op.inputs, &grad_out, &op.fused)?;
        let (expected, composed) = gradients(&op.inputs, &grad_out, &op.composed)?;
        worst.note("out", &op.name, tensor_error(&out, &expected));
        for (fused, composed) in fused.iter().zip(&composed) {
            worst.note("gradients", &op.name, tensor_error(fused, composed));
        }
    }
    worst.check("fused against composed", 1e-5);
    Ok(())
}

/// In f16 and bf16 the operation may be at most twice as far from the truth as the composed graph in that dtype. That
/// graph sums in f32 too. Sums over thousands of rows have PyTorch's errors as their bounds, in `row_sums.rs`.
#[test]
fn half_precision_is_no_worse_than_twice_the_eager_error() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let epsilon = if dtype == DType::F16 { 1.0 / 1024.0 } else { 1.0 / 128.0 };
        for op in all().into_iter().chain(dora()) {
            let inputs: Vec<Tensor> =
                op.inputs.iter().map(|t| t.to_dtype(dtype)).collect::<Result<_>>()?;
            let exact: Vec<_> = inputs.iter().map(values).collect();
            let expected = (op.reference)(&exact);
            let out = (op.fused)(&inputs)?;
            assert_eq!(out.dtype(), dtype, "{}", op.name);
            let fused = error(&values(&out), &expected);
            let eager = error(&values(&(op.composed)(&inputs)?), &expected);
            // One rounding of the output is always allowed: the eager graph may be exact by luck.
            let bound = (2.0 * eager).max(0.5 * epsilon);
            assert!(fused <= bound, "{} {dtype:?}: {fused:e}, eager {eager:e}", op.name);

            let grad_out = random(79, out.shape()).to_dtype(dtype)?;
            let (_, grads) = gradients(&inputs, &grad_out, &op.fused)?;
            let (_, eager) = gradients(&inputs, &grad_out, &op.composed)?;
            let wide: Vec<Tensor> =
                inputs.iter().map(|t| t.to_dtype(DType::F32)).collect::<Result<_>>()?;
            let (_, truth) = gradients(&wide, &grad_out.to_dtype(DType::F32)?, &op.composed)?;
            for (index, ((grad, eager), truth)) in grads.iter().zip(&eager).zip(&truth).enumerate()
            {
                assert_eq!(grad.dtype(), dtype, "{} gradient {index}", op.name);
                let (fused, eager) = (tensor_error(grad, truth), tensor_error(eager, truth));
                // The forward's rounded output enters the attention's backward: one more rounding.
                let bound = (2.0 * eager).max(epsilon);
                let name = &op.name;
                assert!(
                    fused <= bound,
                    "{name} {dtype:?} grad {index}: {fused:e}, eager {eager:e}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn any_strides_give_the_same_bits() -> Result<()> {
    for op in all() {
        assert_any_strides(&op, &op.inputs)?;
    }
    Ok(())
}

#[test]
fn broadcast_inputs_and_gradients() -> Result<()> {
    // One row repeated by a zero stride, and an upstream gradient that is a broadcast scalar.
    let row = random(1, (1, 1, 6));
    let (weight, bias) = (random(2, 6), random(3, 6));
    let x = candle_core::Var::from_tensor(&row)?;
    let y = ops::layer_norm(&x.broadcast_as((2, 5, 6))?, &weight, &bias, 1e-6)?;
    let grad = y.sqr()?.sum_all()?.backward()?.get(&x).cloned();
    let once = candle_core::Var::from_tensor(&row)?;
    let single = ops::layer_norm(&once, &weight, &bias, 1e-6)?;
    let expected = (single.sqr()?.sum_all()? * 10.0)?.backward()?.get(&once).cloned();
    let error = tensor_error(&grad.expect("gradient"), &expected.expect("gradient"));
    assert!(error < 1e-6, "{error:e}");
    Ok(())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let run = |threads: usize| -> Result<Vec<Vec<f64>>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut results = Vec::new();
            for op in all().into_iter().chain(dora()) {
                let grad_out = random(80, (op.fused)(&op.inputs)?.shape());
                let (out, grads) = gradients(&op.inputs, &grad_out, &op.fused)?;
                results.push(values(&out));
                results.extend(grads.iter().map(values));
            }
            Ok(results)
        })
    };
    let expected = run(1)?;
    for threads in [2, 3, 16] {
        assert!(run(threads)? == expected, "{threads} threads give other bits");
    }
    Ok(())
}

/// The tests above in a process of their own, as on machines without AVX-512 and without vectors.
#[test]
fn narrower_instruction_sets_agree_too() -> Result<()> {
    const TESTS: [&str; 5] = [
        "reference::values_agree_with_the_reference",
        "reference::gradients_agree_with_the_composed_graph",
        "reference::half_precision_is_no_worse_than_twice_the_eager_error",
        "reference::any_strides_give_the_same_bits",
        "reference::results_do_not_depend_on_the_number_of_threads",
    ];
    for instructions in ["avx2", "scalar"] {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.arg("--exact").args(TESTS).env(INSTRUCTIONS, instructions);
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("5 passed"), "{instructions}: {text}");
    }
    Ok(())
}

#[test]
fn nan_is_not_swallowed() -> Result<()> {
    for op in all().into_iter().chain(dora()) {
        for index in 0..op.inputs.len() {
            let mut inputs = op.inputs.clone();
            inputs[index] = (&inputs[index] * f64::NAN)?;
            let out = values(&(op.fused)(&inputs)?);
            assert!(out.iter().any(|x| x.is_nan()), "{} input {index}", op.name);
        }
    }
    Ok(())
}

/// In f32 beside an input in 16 bits, parameters enter unrounded, and their gradients are f32 sums.
#[test]
fn parameters_in_f32_beside_16_bits_are_not_rounded() -> Result<()> {
    type OnTensors = fn(&[Tensor]) -> Result<Tensor>;
    let layer_norm: OnTensors = |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-6);
    let linear: OnTensors = |t| {
        let projection = Projection { weight: &t[1], scales: None, bias: Some(&t[2]), lora: None };
        ops::lora_linear(&t[0], &projection, Activation::Identity, None)
    };
    for (name, op, weight) in
        [("layer_norm", layer_norm, vec![9]), ("lora_linear", linear, vec![7, 9])]
    {
        for (dtype, rounding) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
            let out_dim = weight[0];
            let x = random(1, (130, 9)).to_dtype(dtype)?;
            let mut inputs = vec![x, random(2, weight.as_slice()), random(3, out_dim)];
            let grad_out = random(4, (130, out_dim)).to_dtype(dtype)?;
            let (out, grads) = gradients(&inputs, &grad_out, op)?;
            inputs[0] = inputs[0].to_dtype(DType::F32)?;
            let (exact, truth) = gradients(&inputs, &grad_out.to_dtype(DType::F32)?, op)?;
            assert_eq!(out.dtype(), dtype, "{name}");
            let off = tensor_error(&out, &exact);
            // A trained weight's product is rounded, and the sum with the bias.
            assert!(off <= 2.0 * rounding, "{name} {dtype:?}: {off:e}");
            for (index, (grad, truth)) in grads.iter().zip(&truth).enumerate().skip(1) {
                assert_eq!(grad.dtype(), DType::F32, "{name} gradient {index}");
                let off = tensor_error(grad, truth);
                assert!(off <= 1e-5, "{name} {dtype:?} gradient {index}: {off:e}");
            }
        }
    }
    Ok(())
}
