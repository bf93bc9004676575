//! AdamW's kernels: equal gradients give the parameters and moments of the CPU's AdamW.

use crate::common::{error, random, values};
use crate::device::{in_every_mode, launch_plan, Memory};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_sam_lora::launch::adamw::{plan, table, Parameter, OUTCOME};
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::launch::{AdamWRates, AdamWStep};
use candle_sam_lora::train::{AdamW, AdamWConfig, ParameterGroups};

/// Elements, dtype, and by how many elements the memory begins late. Chunks have 2048.
const PARAMETERS: [(usize, DType, usize); 6] = [
    (1, DType::F32, 0),
    (2048, DType::F32, 0),
    (4099, DType::F32, 0),
    (2051, DType::F32, 1),
    (3001, DType::BF16, 0),
    (77, DType::F16, 3),
];
const CONFIG: AdamWConfig =
    AdamWConfig { lr: 0.1, beta1: 0.8, beta2: 0.95, eps: 1e-3, weight_decay: 0.3 };
const LOSS: f32 = 1.5;

fn numbers(t: i32, max_norm: Option<f64>) -> AdamWStep {
    let AdamWConfig { beta1, beta2, eps, .. } = CONFIG;
    AdamWStep {
        beta1_rest: 1.0 - beta1,
        beta2,
        beta2_rest: 1.0 - beta2,
        root_correction: 1.0 / (1.0 - beta2.powi(t)).sqrt(),
        eps,
        max_norm,
    }
}

/// Parameters by their places: one learns faster than the others, one is not decayed.
const FASTER: (usize, f64) = (2, 3.0);
const NOT_DECAYED: usize = 4;

/// The table's parameters in step `t`.
fn parameters(t: i32) -> [Parameter; PARAMETERS.len()] {
    let AdamWConfig { lr, beta1, weight_decay, .. } = CONFIG;
    std::array::from_fn(|place| {
        let (size, dtype, _) = PARAMETERS[place];
        let lr = if place == FASTER.0 { lr * FASTER.1 } else { lr };
        let weight_decay = if place == NOT_DECAYED { 0.0 } else { weight_decay };
        let rates = AdamWRates { decay: 1.0 - lr * weight_decay, rate: lr / (1.0 - beta1.powi(t)) };
        Parameter { size, dtype, rates }
    })
}

fn tensors(seed: u64) -> Result<Vec<Tensor>> {
    let tensor = |(&(size, dtype, _), i)| random(seed + i, size).to_dtype(dtype);
    PARAMETERS.iter().zip(0..).map(tensor).collect()
}

/// The gradients of two steps.
fn gradients() -> Result<[Vec<Tensor>; 2]> {
    Ok([tensors(20)?, tensors(40)?])
}

/// Each tensor's parameter and moments, in the order of [`PARAMETERS`].
type Tensors = Vec<[Vec<f64>; 3]>;

/// The tensors after the steps on the CPU, and the norms.
fn on_the_cpu(max_norm: Option<f64>) -> Result<(Tensors, Vec<f64>)> {
    let vars: Vec<_> = tensors(1)?.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let mut optimizer = AdamW::new(vars.clone(), CONFIG)?;
    optimizer.set_groups(&ParameterGroups {
        lr_factors: vec![(FASTER.0.to_string(), FASTER.1)],
        no_decay: vec![NOT_DECAYED.to_string()],
        ..Default::default()
    })?;
    let mut norms = vec![];
    for step in gradients()? {
        let products = vars.iter().zip(&step).map(|(v, g)| (v.as_tensor() * g)?.sum_all());
        let products = products.map(|product| product?.to_dtype(DType::F32));
        let loss = Tensor::stack(&products.collect::<Result<Vec<_>>>()?, 0)?.sum_all()?;
        let found = optimizer.gradients(&loss.backward()?)?;
        norms.push(optimizer.apply(&found, None, max_norm)?.grad_norm);
    }
    let state = optimizer.state()?;
    let of = |i: usize| {
        ["parameter", "exp_avg", "exp_avg_sq"].map(|kind| values(&state[&format!("{kind}.{i}")]))
    };
    Ok(((0..vars.len()).map(of).collect(), norms))
}

/// The tensors after the steps by the kernels, in every mode, and the outcome of each step.
fn by_kernels(
    steps: &[Vec<Tensor>],
    loss: f32,
    max_norm: Option<f64>,
) -> Result<(Tensors, Vec<Vec<f64>>)> {
    let memory = |tensors: &[Tensor]| -> Vec<Memory> {
        let late = PARAMETERS.iter().map(|(.., late)| *late);
        tensors.iter().zip(late).map(|(t, late)| Memory::from_tensor_at(t, late)).collect()
    };
    let in_f32 = |tensors: &[Tensor]| -> Result<Vec<Memory>> {
        let tensors = tensors.iter().map(|tensor| tensor.to_dtype(DType::F32));
        Ok(memory(&tensors.collect::<Result<Vec<_>>>()?))
    };
    let at = |memory: &Memory, i: usize, dtype: DType| {
        memory.address() + (PARAMETERS[i].2 * dtype.size_in_bytes()) as u64
    };
    let start = tensors(1)?;
    let zeros = start.iter().map(Tensor::zeros_like).collect::<Result<Vec<_>>>()?;
    let loss = Memory::from_tensor(&Tensor::new(&[loss], &Device::Cpu)?);
    let outputs = in_every_mode("adamw", |device| {
        let (p, m, v) = (memory(&start), in_f32(&zeros)?, in_f32(&zeros)?);
        let mut outcomes = vec![];
        for (gradients, t) in steps.iter().zip(1..) {
            let g = in_f32(gradients)?;
            let rows = PARAMETERS.iter().enumerate().map(|(i, &(_, dtype, _))| {
                let [g, m, v] = [&g[i], &m[i], &v[i]].map(|memory| at(memory, i, DType::F32));
                [at(&p[i], i, dtype), g, m, v]
            });
            let parameters = parameters(t);
            let table = table(&parameters, &rows.collect::<Vec<_>>(), &numbers(t, max_norm))?;
            let table = Memory::from_bytes_at(&table, 0);
            let plan = plan(&parameters, true, &numbers(t, max_norm))?;
            let outcome = Memory::for_elements(OUTCOME, DType::F32);
            let workspace = Memory::new(plan.workspace_bytes);
            let operands = Operands {
                inputs: &[table.address(), loss.address()],
                outputs: &[outcome.address()],
                workspace: Some(workspace.address()),
                ..Default::default()
            };
            launch_plan(device, &plan, &operands)?;
            outcomes.push(outcome);
        }
        Ok(p.into_iter().chain(m).chain(v).chain(outcomes).collect())
    });
    let count = PARAMETERS.len();
    let of = |i: usize| {
        let (_, dtype, late) = PARAMETERS[i];
        let kinds = [(0, dtype), (1, DType::F32), (2, DType::F32)];
        kinds.map(|(kind, dtype)| outputs[kind * count + i].values(dtype)[late..].to_vec())
    };
    let outcomes = outputs[3 * count..].iter().map(|outcome| outcome.values(DType::F32));
    Ok(((0..count).map(of).collect(), outcomes.collect()))
}

fn norms_are(outcomes: &[Vec<f64>], expected: &[f64]) {
    for (outcome, expected) in outcomes.iter().zip(expected) {
        let [norm, not_finite, loss, _] = outcome[..] else { panic!("{outcome:?}") };
        assert!((norm - expected).abs() <= 1e-6 * expected, "{norm}, {expected}");
        assert_eq!((not_finite, loss), (0.0, LOSS.into()));
    }
}

#[test]
fn equal_gradients_make_the_cpus_parameters_and_moments() -> Result<()> {
    let (expected, norms) = on_the_cpu(None)?;
    let (found, outcomes) = by_kernels(&gradients()?, LOSS, None)?;
    norms_are(&outcomes, &norms);
    assert!(found == expected, "some element differs");
    Ok(())
}

#[test]
fn clipped_gradients_are_the_cpus_within_rounding() -> Result<()> {
    let (expected, norms) = on_the_cpu(Some(20.0))?;
    assert!(norms.iter().all(|norm| *norm > 40.0), "{norms:?}");
    let (found, outcomes) = by_kernels(&gradients()?, LOSS, Some(20.0))?;
    norms_are(&outcomes, &norms);
    for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
        // The factor may differ by a rounding; a 16-bit parameter then by one of its own.
        let rounding = match PARAMETERS[place].1 {
            DType::F32 => 2e-7,
            DType::F16 => 1.0 / 1024.0,
            _ => 1.0 / 128.0,
        };
        for (kind, bound) in [(0, rounding), (1, 2e-7), (2, 4e-7)] {
            let error = error(&found[kind], &expected[kind]);
            assert!(error <= bound, "tensor {place}, {kind}: {error:e}");
        }
    }
    Ok(())
}

#[test]
fn nothing_changes_where_a_gradient_or_the_loss_is_not_finite() -> Result<()> {
    let unchanged: Vec<_> = tensors(1)?.iter().map(values).collect();
    let [finite, _] = gradients()?;
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        // In the last element of the third tensor, and in the fifth.
        let mut gradients = finite.clone();
        for place in [4, 2] {
            let (size, dtype, _) = PARAMETERS[place];
            let last = Tensor::new(&[wrong], &Device::Cpu)?.to_dtype(dtype)?;
            gradients[place] = Tensor::cat(&[&finite[place].narrow(0, 0, size - 1)?, &last], 0)?;
        }
        for (gradients, loss, expected) in [(gradients, LOSS, 3.0), (finite.clone(), wrong, 0.0)] {
            let (found, outcomes) = by_kernels(&[gradients], loss, None)?;
            assert_eq!(outcomes[0][1], expected, "{wrong}");
            for ([parameter, m, v], before) in found.iter().zip(&unchanged) {
                assert!(parameter == before, "{wrong}");
                assert!(m.iter().chain(v).all(|moment| *moment == 0.0), "{wrong}");
            }
        }
    }
    Ok(())
}

#[test]
fn finite_gradients_with_infinite_squares_change_nothing() -> Result<()> {
    let unchanged: Vec<_> = tensors(1)?.iter().map(values).collect();
    let [mut gradients, _] = gradients()?;
    gradients[0] = Tensor::new(&[1e30f32], &Device::Cpu)?;
    for max_norm in [None, Some(1.0)] {
        let (found, outcomes) = by_kernels(&[gradients.clone()], LOSS, max_norm)?;
        assert_eq!(outcomes[0][..3], [f64::INFINITY, 0.0, LOSS.into()]);
        assert!(outcomes[0][3].is_nan(), "{:?}", outcomes[0]);
        for ([parameter, m, v], before) in found.iter().zip(&unchanged) {
            assert!(parameter == before && m.iter().chain(v).all(|moment| *moment == 0.0));
        }
    }
    Ok(())
}
