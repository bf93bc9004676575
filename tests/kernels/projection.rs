//! The projections' kernels: values and gradients against the f64 reference, for every dtype and tile. The cases have
//! odd shapes, ranks from 1 to 256, and any subset of q, k and v adapted.

use crate::common::{error, gradients, values, Worst};
use crate::device::{bound, in_modes, launch_all, Memory, DTYPES};
use crate::projection_case::{Case, Data, PLAIN};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::projection::tiles::{Tile, TILES};
use candle_sam_lora::launch::projection::{
    self, Activation, BackwardOperands, ForwardOperands, LoraProblem, Small,
};
use candle_sam_lora::launch::Launch;
use candle_sam_lora::testing::{composed, reference};
use candle_sam_lora_emulator::Mode;

const GELU: Activation = Activation::Gelu;

pub const CASES: [Case; 12] = [
    PLAIN,
    Case { rows: 1, in_dim: 1, outs: &[1], ranks: &[1], p: 0.0, bias: true, ..PLAIN },
    Case { rows: 130, in_dim: 136, outs: &[136], ranks: &[16], p: 0.1, bias: true, ..PLAIN },
    Case { ranks: &[3], lora_bias: true, bias: true, activation: GELU, residual: true, ..PLAIN },
    // Nothing is aligned: odd depth, odd width, odd rank.
    Case { rows: 33, in_dim: 37, outs: &[29], ranks: &[17], p: 0.5, activation: GELU, ..PLAIN },
    Case { in_dim: 40, ranks: &[16], p: 0.25, bias: true, residual: true, offset: 1, ..PLAIN },
    Case { rows: 40, in_dim: 72, ranks: &[64], activation: Activation::Relu, bias: true, ..PLAIN },
    Case { rows: 20, in_dim: 24, outs: &[40], ranks: &[256], p: 0.1, ..PLAIN },
    // q and v, as most adapters have it; then all, each with its own rank; then k alone.
    Case { outs: &[40; 3], ranks: &[16, 0, 16], p: 0.1, bias: true, ..PLAIN },
    Case { rows: 67, outs: &[33; 3], ranks: &[1, 16, 17], p: 0.3, lora_bias: true, ..PLAIN },
    Case { outs: &[200; 3], ranks: &[0, 64, 0], bias: true, lora_bias: true, ..PLAIN },
    // More rows than a split of the gradients' sums has.
    Case { rows: 300, in_dim: 24, outs: &[16], ranks: &[5], p: 0.2, bias: true, ..PLAIN },
];

fn all() -> Result<Vec<Data>> {
    let pairs = DTYPES.into_iter().flat_map(|dtype| CASES.map(|case| (case, dtype)));
    pairs.map(|(case, dtype)| Data::new(case, dtype)).collect()
}

impl Data {
    /// dx and dsmall in f64, by the formulas.
    fn reference_backward(&self) -> (Vec<f64>, Vec<f64>) {
        const STEP: f64 = 1e-5;
        let Case { rows, in_dim, .. } = self.case;
        // The derivative of the activation by differences, to 1e-9.
        let derivative = |x: f64| match self.case.activation {
            Activation::Identity => 1.0,
            _ => (self.activate(x + STEP) - self.activate(x - STEP)) / (2.0 * STEP),
        };
        let sum = self.reference_sum();
        let g: Vec<f64> =
            sum.iter().zip(values(&self.grad)).map(|(&x, grad)| grad * derivative(x)).collect();
        let x = values(&self.x);
        let (mut dx, mut dsmall) = (vec![0.0; rows * in_dim], Vec::new());
        let mut column = 0;
        for part in &self.parts {
            let out = part.problem.out_dim;
            let g = |row: usize, o: usize| g[row * self.total + column + o];
            let weight = values(&part.weight);
            let dbias: Vec<f64> = (0..out).map(|o| (0..rows).map(|row| g(row, o)).sum()).collect();
            if part.bias.is_some() {
                dsmall.extend(&dbias);
            }
            for row in 0..rows {
                for i in 0..in_dim {
                    dx[row * in_dim + i] +=
                        (0..out).map(|o| g(row, o) * weight[o * in_dim + i]).sum::<f64>();
                }
            }
            if let Some(LoraProblem { rank, scaling, .. }) = part.problem.lora {
                let (a, b, mask) = (values(&part.a), values(&part.b), self.mask(part));
                let scaling = f64::from(scaling);
                let dropped: Vec<f64> = x.iter().zip(&mask).map(|(x, m)| x * m).collect();
                let s = reference::linear(&dropped, &a, in_dim);
                let ds = |row: usize, r: usize| -> f64 {
                    scaling * (0..out).map(|o| g(row, o) * b[o * rank + r]).sum::<f64>()
                };
                let ds: Vec<f64> = (0..rows * rank).map(|at| ds(at / rank, at % rank)).collect();
                for (at, dx) in dx.iter_mut().enumerate() {
                    let (row, i) = (at / in_dim, at % in_dim);
                    let low_rank: f64 =
                        (0..rank).map(|r| ds[row * rank + r] * a[r * in_dim + i]).sum();
                    *dx += mask[at] * low_rank;
                }
                dsmall.extend((0..rank * in_dim).map(|at| -> f64 {
                    let (r, i) = (at / in_dim, at % in_dim);
                    (0..rows).map(|row| ds[row * rank + r] * dropped[row * in_dim + i]).sum()
                }));
                dsmall.extend((0..out * rank).map(|at| -> f64 {
                    let (o, r) = (at / rank, at % rank);
                    (0..rows).map(|row| scaling * g(row, o) * s[row * rank + r]).sum()
                }));
                if part.lora_bias.is_some() {
                    dsmall.extend(dbias.iter().map(|sum| scaling * sum));
                }
            }
            column += out;
        }
        (dx, dsmall)
    }

    fn check(&self, worst: &mut Worst, what: &str, got: &[f64], expected: &[f64], eager: f64) {
        let got = error(got, expected);
        assert!(got <= bound(self.dtype, eager), "{what} {}: {got:e}, eager {eager:e}", self.name);
        worst.note(&format!("{what} {:?}", self.dtype), &self.name, got);
    }
}

/// The composed graph, for these tensors in the order of `small_tensors`.
fn eager(data: &Data, x: &Tensor, small: &[Tensor], residual: Option<&Tensor>) -> Result<Tensor> {
    let activation = data.case.activation;
    let projections = data.with_small(small).into_iter();
    let outputs = projections.map(|part| composed::lora_linear(x, &part, activation, None));
    let y = Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 1)?;
    residual.map_or(Ok(y.clone()), |residual| residual + &y)
}

/// Makes the launches for these operands.
type ForwardPlan<'a> = dyn Fn(&ForwardOperands<'_>) -> Result<Vec<Launch>> + 'a;
type BackwardPlan<'a> = dyn Fn(&BackwardOperands<'_>) -> Result<Vec<Launch>> + 'a;

/// Runs the forward that each plan makes, in these modes, and checks all that it writes.
pub fn check_forward(
    data: &Data,
    worst: &mut Worst,
    modes: &[Mode],
    plans: &[&ForwardPlan<'_>],
) -> Result<()> {
    let on_device = data.memory()?;
    let expected_sum = data.reference_sum();
    let mut expected: Vec<f64> = expected_sum.iter().map(|&x| data.activate(x)).collect();
    if let Some(residual) = &data.residual {
        expected.iter_mut().zip(values(residual)).for_each(|(y, r)| *y += r);
    }
    let eager = eager(data, &data.x, &data.small_tensors(), data.residual.as_ref())?;
    let eager = error(&values(&eager), &expected);
    for plan in plans {
        let outputs = in_modes(&data.name, modes.iter().copied(), |device| {
            let outputs = data.outputs();
            let operands = on_device.forward(&outputs);
            // Wherever they lie, the bits are the same.
            let small = match device.mode.seed {
                0 => operands.small,
                _ => Small::Separate(&on_device.separate),
            };
            launch_all(device, &plan(&ForwardOperands { small, ..operands })?)?;
            Ok(outputs.into())
        });
        data.check(worst, "y", &data.read(&outputs[0]), &expected, eager);
        if data.dtype == DType::F32 {
            // The CPU's own path.
            let cpu = values(&data.output()?);
            data.check(worst, "y of the CPU", &data.read(&outputs[0]), &cpu, 0.0);
        }
        if data.keeps_sum() {
            data.check(worst, "sum", &data.read(&outputs[1]), &expected_sum, eager);
        }
    }
    Ok(())
}

#[test]
fn forward() -> Result<()> {
    let mut worst = Worst::default();
    for data in all()? {
        let problem = data.projections();
        let plan = |tile: &'static Tile| {
            move |operands: &ForwardOperands<'_>| {
                projection::forward_with(tile, &problem, data.dtype, operands)
            }
        };
        let [large, small] = [0, 1].map(|index| plan(&TILES[index]));
        let modes: Vec<_> = Mode::all().collect();
        check_forward(&data, &mut worst, &modes, &[&large, &small])?;
    }
    worst.check("projection forward", 1.0 / 64.0);
    Ok(())
}

#[test]
fn the_reference_backward_agrees_with_finite_differences() -> Result<()> {
    let case = Case {
        rows: 3,
        in_dim: 5,
        outs: &[4, 2],
        ranks: &[2, 0],
        bias: true,
        lora_bias: true,
        p: 0.4,
        activation: GELU,
        ..PLAIN
    };
    let mut data = Data::new(case, DType::F32)?;
    let (dx, _) = data.reference_backward();
    let grad = values(&data.grad);
    let x = data.x.clone();
    let mut loss = |at: usize, step: f32| -> Result<f64> {
        let mut moved: Vec<f32> = x.flatten_all()?.to_vec1()?;
        moved[at] += step;
        data.x = Tensor::from_vec(moved, (3, 5), x.device())?;
        let sum = data.reference_sum();
        Ok(sum.iter().zip(&grad).map(|(&x, g)| data.activate(x) * g).sum())
    };
    const STEP: f32 = 1.0 / 512.0;
    let differences = (0..15)
        .map(|at| Ok((loss(at, STEP)? - loss(at, -STEP)?) / f64::from(2.0 * STEP)))
        .collect::<Result<Vec<_>>>()?;
    assert!(error(&differences, &dx) < 1e-4, "dx");
    Ok(())
}

/// Runs the backward that each plan makes, after the portable forward, in these modes, and checks all that it writes.
/// In the first mode it also checks that each gradient has the same bits alone.
pub fn check_backward(
    data: &Data,
    worst: &mut Worst,
    modes: &[Mode],
    plans: &[&BackwardPlan<'_>],
) -> Result<()> {
    let Case { rows, in_dim, activation, .. } = data.case;
    let problem = data.projections();
    let on_device = data.memory()?;
    let small_tensors = data.small_tensors();
    let small_len: usize = small_tensors.iter().map(Tensor::elem_count).sum();
    let (expected_dx, expected_dsmall) = data.reference_backward();

    let mut inputs = vec![data.x.clone()];
    inputs.extend(small_tensors);
    let (_, eager) = gradients(&inputs, &data.grad, |t| eager(data, &t[0], &t[1..], None))?;
    let eager_dsmall: Vec<f64> = eager[1..].iter().flat_map(values).collect();

    for (index, plan) in plans.iter().enumerate() {
        let outputs = in_modes(&data.name, modes.iter().copied(), |device| {
            let results =
                || [data.alloc(rows * in_dim), Memory::for_elements(small_len, DType::F32)];
            let workspace = || Memory::new(projection::workspace_bytes(&problem, data.dtype));
            let forward = data.outputs();
            let operands = on_device.forward(&forward);
            let launches = projection::forward_with(&TILES[1], &problem, data.dtype, &operands)?;
            launch_all(device, &launches)?;
            let (together, scratch) = (results(), workspace());
            let operands = on_device.backward(&forward, &together, &scratch);
            launch_all(device, &plan(&operands)?)?;
            if data.dtype == DType::BF16 && index == 0 {
                let alone = results();
                for without_dx in [false, true] {
                    let scratch = workspace();
                    let operands = on_device.backward(&forward, &alone, &scratch);
                    let operands = match without_dx {
                        true => BackwardOperands { dx: 0, ..operands },
                        false => BackwardOperands { dsmall: 0, ..operands },
                    };
                    launch_all(device, &plan(&operands)?)?;
                }
                let same = |index: usize| together[index].bytes() == alone[index].bytes();
                assert!(same(0), "{}: dx alone differs", data.name);
                assert!(small_len == 0 || same(1), "{}: dsmall alone differs", data.name);
            }
            Ok(together.into())
        });
        let dx = data.read(&outputs[0]);
        let eager_dx = error(&values(&eager[0]), &expected_dx);
        data.check(worst, "dx", &dx, &expected_dx, eager_dx);
        if small_len == 0 {
            continue;
        }
        // Tensor by tensor, each on its own scale.
        let dsmall = outputs[1].values(DType::F32);
        let mut start = 0;
        for tensor in &inputs[1..] {
            let range = start..start + tensor.elem_count();
            start = range.end;
            let expected = &expected_dsmall[range.clone()];
            let eager = error(&eager_dsmall[range.clone()], expected);
            data.check(worst, "dsmall", &dsmall[range.clone()], expected, eager);
            // Without an activation nothing is rounded on the way, whatever the dtype.
            if activation == Activation::Identity {
                let error = error(&dsmall[range], expected);
                assert!(error <= 1e-5, "dsmall {}: {error:e}", data.name);
            }
        }
    }
    Ok(())
}

#[test]
fn backward() -> Result<()> {
    let mut worst = Worst::default();
    for data in all()? {
        let problem = data.projections();
        let plan = |tile: &'static Tile| {
            move |operands: &BackwardOperands<'_>| {
                projection::backward_with(tile, &problem, data.dtype, operands)
            }
        };
        let [large, small] = [0, 1].map(|index| plan(&TILES[index]));
        let modes: Vec<_> = Mode::all().collect();
        check_backward(&data, &mut worst, &modes, &[&small, &large])?;
    }
    worst.check("projection backward", 1.0 / 64.0);
    Ok(())
}
