//! LayerNorm's kernels: values and gradients against the f64 reference, aligned or not, rows of any length.

use crate::common::{error, gradients, random, values, Worst};
use crate::device::{bound, in_every_mode, launch_plan, Memory, DTYPES};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::layer_norm::{self, Pass};
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::launch::LayerNormProblem;
use candle_sam_lora::testing::{composed, reference};

const EPS: f64 = 1e-6;

/// Rows, their length, and how many elements the operands lie off their alignment.
const CASES: [(usize, usize, usize); 8] = [
    (1, 1, 0),
    (5, 7, 0),
    (9, 32, 0),
    (4, 33, 0),
    (6, 768, 0),
    (3, 1280, 0),
    (7, 64, 1),
    (300, 40, 0),
];

/// A case's tensors in a dtype.
struct Case {
    name: String,
    problem: LayerNormProblem,
    dtype: DType,
    offset: usize,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
}

fn cases() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for dtype in DTYPES {
        for (rows, size, offset) in CASES {
            // An offset common to all of a row: the variance must not cancel.
            let x = (random(1, (rows, size)) + 3.0)?;
            cases.push(Case {
                name: format!("[{rows}, {size}] + {offset} {dtype:?}"),
                problem: LayerNormProblem { rows, size, eps: EPS },
                dtype,
                offset,
                x: x.to_dtype(dtype)?,
                weight: random(2, size).to_dtype(dtype)?,
                bias: random(3, size).to_dtype(dtype)?,
                dy: random(4, (rows, size)).to_dtype(dtype)?,
            });
        }
    }
    Ok(cases)
}

/// The address of the operand `offset` elements into the memory.
fn at(memory: &Memory, case: &Case) -> u64 {
    memory.address() + (case.offset * case.dtype.size_in_bytes()) as u64
}

fn check(worst: &mut Worst, what: &str, case: &Case, got: &[f64], expected: &[f64], eager: &[f64]) {
    let (got, eager) = (error(got, expected), error(eager, expected));
    let bound = bound(case.dtype, eager);
    assert!(got <= bound, "{what} {}: {got:e}, eager {eager:e}", case.name);
    worst.note(&format!("{what} {:?}", case.dtype), &case.name, got);
}

#[test]
fn forward() -> Result<()> {
    let mut worst = Worst::default();
    for case in cases()? {
        let [x, weight, bias] =
            [&case.x, &case.weight, &case.bias].map(|t| Memory::from_tensor_at(t, case.offset));
        let outputs = in_every_mode(&case.name, |device| {
            let y = Memory::for_elements(case.offset + case.x.elem_count(), case.dtype);
            let inputs = &[&x, &weight, &bias].map(|memory| at(memory, &case));
            let operands = Operands { inputs, outputs: &[at(&y, &case)], ..Default::default() };
            let plan = layer_norm::plan(&case.problem, Pass::Forward, case.dtype)?;
            launch_plan(device, &plan, &operands)?;
            Ok(vec![y])
        });
        let expected = reference::layer_norm(
            &values(&case.x),
            &values(&case.weight),
            &values(&case.bias),
            EPS,
        );
        let eager = composed::layer_norm(&case.x, &case.weight, &case.bias, EPS)?;
        let got = outputs[0].values(case.dtype);
        check(&mut worst, "y", &case, &got[case.offset..], &expected, &values(&eager));
    }
    worst.check("layer_norm forward", 1.0 / 128.0);
    Ok(())
}

/// The gradients in f64, by the formulas.
fn reference_backward(x: &[f64], weight: &[f64], dy: &[f64]) -> [Vec<f64>; 3] {
    let size = weight.len();
    let (mut dx, mut dweight, mut dbias) = (Vec::new(), vec![0.0; size], vec![0.0; size]);
    let (ones, zeros) = (vec![1.0; size], vec![0.0; size]);
    for (x, dy) in x.chunks(size).zip(dy.chunks(size)) {
        let xhat = reference::layer_norm(x, &ones, &zeros, EPS);
        let n = size as f64;
        let mean = x.iter().sum::<f64>() / n;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let g: Vec<f64> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
        let mean_g = g.iter().sum::<f64>() / n;
        let mean_gx = g.iter().zip(&xhat).map(|(g, x)| g * x).sum::<f64>() / n;
        for i in 0..size {
            dx.push((g[i] - mean_g - xhat[i] * mean_gx) / (var + EPS).sqrt());
            dweight[i] += dy[i] * xhat[i];
            dbias[i] += dy[i];
        }
    }
    [dx, dweight, dbias]
}

#[test]
fn the_reference_backward_agrees_with_finite_differences() {
    const STEP: f64 = 1e-5;
    let inputs = [random(1, (3, 9)), random(2, 9), random(3, 9)].map(|t| values(&t));
    let dy = values(&random(4, (3, 9)));
    let expected = reference_backward(&inputs[0], &inputs[1], &dy);
    let loss = |v: &[Vec<f64>; 3]| -> f64 {
        reference::layer_norm(&v[0], &v[1], &v[2], EPS).iter().zip(&dy).map(|(y, g)| y * g).sum()
    };
    for (which, expected) in expected.iter().enumerate() {
        let differences: Vec<f64> = (0..expected.len())
            .map(|i| {
                let mut moved = inputs.clone();
                moved[which][i] += STEP;
                let above = loss(&moved);
                moved[which][i] -= 2.0 * STEP;
                (above - loss(&moved)) / (2.0 * STEP)
            })
            .collect();
        assert!(error(&differences, expected) < 1e-7, "gradient {which}");
    }
}

#[test]
fn backward() -> Result<()> {
    let mut worst = Worst::default();
    for case in cases()? {
        let count = case.x.elem_count();
        let [x, weight, dy] =
            [&case.x, &case.weight, &case.dy].map(|t| Memory::from_tensor_at(t, case.offset));
        let plan = |trained, residual| {
            layer_norm::plan(&case.problem, Pass::Backward { trained, residual }, case.dtype)
        };
        let outputs = in_every_mode(&case.name, |device| {
            let dx = Memory::for_elements(case.offset + count, case.dtype);
            let [dweight, dbias] =
                [0, 1].map(|_| Memory::for_elements(case.problem.size, case.dtype));
            let plan = plan(true, false)?;
            let workspace = Memory::new(plan.workspace_bytes);
            let operands = Operands {
                inputs: &[&x, &weight, &dy].map(|memory| at(memory, &case)),
                outputs: &[at(&dx, &case), dweight.address(), dbias.address()],
                workspace: Some(workspace.address()),
                ..Default::default()
            };
            launch_plan(device, &plan, &operands)?;
            Ok(vec![dx, dweight, dbias])
        });
        // Frozen weights: the same dx from one launch.
        let frozen = in_every_mode(&case.name, |device| {
            let dx = Memory::for_elements(case.offset + count, case.dtype);
            let inputs = &[&x, &weight, &dy].map(|memory| at(memory, &case));
            let operands = Operands { inputs, outputs: &[at(&dx, &case)], ..Default::default() };
            launch_plan(device, &*plan(false, false)?, &operands)?;
            Ok(vec![dx])
        });
        assert!(frozen[0].bytes() == outputs[0].bytes(), "{}: dx differs when frozen", case.name);
        // A residual's gradient is added to the rounded dx; here it is dy.
        let summed = in_every_mode(&case.name, |device| {
            let sum = Memory::for_elements(case.offset + count, case.dtype);
            let inputs = &[&x, &weight, &dy, &dy].map(|memory| at(memory, &case));
            let operands = Operands { inputs, outputs: &[at(&sum, &case)], ..Default::default() };
            launch_plan(device, &*plan(false, true)?, &operands)?;
            Ok(vec![sum])
        });
        let dx = frozen[0].values(case.dtype);
        let dx = dx[case.offset..].iter().map(|dx| *dx as f32);
        let dx = Tensor::from_iter(dx, case.x.device())?.to_dtype(case.dtype)?;
        let sum = values(&(dx + case.dy.flatten_all()?)?);
        assert_eq!(summed[0].values(case.dtype)[case.offset..], sum, "{}", case.name);

        let [x, weight, dy] = [&case.x, &case.weight, &case.dy].map(values);
        let expected = reference_backward(&x, &weight, &dy);
        let inputs = [case.x.clone(), case.weight.clone(), case.bias.clone()];
        let (_, eager) =
            gradients(&inputs, &case.dy, |t| composed::layer_norm(&t[0], &t[1], &t[2], EPS))?;
        for (index, what) in ["dx", "dweight", "dbias"].into_iter().enumerate() {
            let got = outputs[index].values(case.dtype);
            let got = if index == 0 { &got[case.offset..] } else { &got[..] };
            // A row of one element has no gradient but rounding.
            if case.problem.size > 1 || index == 2 {
                check(&mut worst, what, &case, got, &expected[index], &values(&eager[index]));
            }
        }
    }
    worst.check("layer_norm backward", 1.0 / 64.0);
    Ok(())
}
