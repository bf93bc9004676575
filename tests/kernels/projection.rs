//! The projections' kernels: values and gradients against the f64 reference, for every dtype and tile, odd shapes, ranks
//! from 1 to 256, any subset of q, k and v adapted.

use crate::common::{error, gradients, random, values, Worst};
use crate::device::{bound, in_modes, launch_all, Memory, DTYPES};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::projection::tiles::{Tile, TILES};
use candle_sam_lora::launch::projection::{
    self, Activation, BackwardOperands, ForwardOperands, LoraProblem, Problem, ProjectionProblem,
    Small, SmallTensor,
};
use candle_sam_lora::launch::Launch;
use candle_sam_lora::ops::{self, Lora, Projection};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::{composed, reference};
use candle_sam_lora_emulator::Mode;

/// Shapes and options; everything else follows.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub rows: usize,
    pub in_dim: usize,
    /// Output widths.
    pub outs: &'static [usize],
    /// Ranks, 0 without LoRA.
    pub ranks: &'static [usize],
    pub bias: bool,
    pub lora_bias: bool,
    pub p: f64,
    pub activation: Activation,
    pub residual: bool,
    /// How many elements the tensors lie off their alignment.
    pub offset: usize,
    /// Factor of b, and divisor of a.
    pub b_scale: f64,
}

pub const PLAIN: Case = Case {
    rows: 70,
    in_dim: 48,
    outs: &[72],
    ranks: &[0],
    bias: false,
    lora_bias: false,
    p: 0.0,
    activation: Activation::Identity,
    residual: false,
    offset: 0,
    b_scale: 1.0,
};
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
    Case { outs: &[72; 3], ranks: &[0, 64, 0], bias: true, lora_bias: true, ..PLAIN },
    // More rows than a split of the gradients' sums has.
    Case { rows: 300, in_dim: 24, outs: &[16], ranks: &[5], p: 0.2, bias: true, ..PLAIN },
];

/// One projection's tensors.
struct Part {
    weight: Tensor,
    bias: Option<Tensor>,
    a: Tensor,
    b: Tensor,
    lora_bias: Option<Tensor>,
    problem: ProjectionProblem,
}

/// A case's tensors in a dtype; adapters are f32.
pub struct Data {
    pub name: String,
    pub case: Case,
    pub dtype: DType,
    parts: Vec<Part>,
    problems: Vec<ProjectionProblem>,
    x: Tensor,
    residual: Option<Tensor>,
    grad: Tensor,
    small: Tensor,
    total: usize,
}

impl Data {
    pub fn new(case: Case, dtype: DType) -> Result<Self> {
        let Case { rows, in_dim, outs, ranks, .. } = case;
        let scale = (1.0 / in_dim as f64).sqrt();
        let mut parts = Vec::new();
        let mut small = vec![];
        for (index, (&out, &rank)) in outs.iter().zip(ranks).enumerate() {
            let seed = 10 * index as u64;
            let dropout = (case.p > 0.0).then(|| Dropout {
                p: case.p,
                seed: 77 << 32 | 5,
                stream: index as u32 + 1,
            });
            let lora = (rank > 0).then_some(LoraProblem {
                rank,
                scaling: 0.7,
                dropout,
                bias: case.lora_bias,
            });
            let part = Part {
                weight: (random(seed + 1, (out, in_dim)) * scale)?.to_dtype(dtype)?,
                bias: case.bias.then(|| random(seed + 2, out).to_dtype(dtype)).transpose()?,
                a: (random(seed + 3, (rank.max(1), in_dim)) * (scale / case.b_scale))?,
                b: (random(seed + 4, (out, rank.max(1)))
                    * (case.b_scale / (rank.max(1) as f64).sqrt()))?,
                lora_bias: (rank > 0 && case.lora_bias).then(|| random(seed + 5, out)),
                problem: ProjectionProblem { out_dim: out, bias: case.bias, lora },
            };
            small.extend(part.bias.clone());
            if rank > 0 {
                small.extend([part.a.clone(), part.b.clone()]);
                small.extend(part.lora_bias.clone());
            }
            parts.push(part);
        }
        let small: Vec<_> =
            small.iter().map(|t| t.flatten_all()?.to_dtype(DType::F32)).collect::<Result<_>>()?;
        let small = match small.is_empty() {
            true => Tensor::zeros(1, DType::F32, &candle_core::Device::Cpu)?,
            false => Tensor::cat(&small, 0)?,
        };
        let total = outs.iter().sum();
        let residual = case.residual.then(|| random(91, (rows, total)).to_dtype(dtype));
        Ok(Self {
            name: format!("{case:?} {dtype:?}"),
            case,
            dtype,
            problems: parts.iter().map(|part| part.problem).collect(),
            parts,
            x: random(90, (rows, in_dim)).to_dtype(dtype)?,
            residual: residual.transpose()?,
            grad: random(92, (rows, total)).to_dtype(dtype)?,
            small,
            total,
        })
    }

    fn all() -> Result<Vec<Self>> {
        let pairs = DTYPES.into_iter().flat_map(|dtype| CASES.map(|case| (case, dtype)));
        pairs.map(|(case, dtype)| Self::new(case, dtype)).collect()
    }

    pub fn projections(&self) -> Problem<'_> {
        let Case { rows, in_dim, activation, .. } = self.case;
        Problem { rows, in_dim, projections: &self.problems, activation }
    }

    /// A tensor of the case's dtype, off its alignment.
    fn memory(&self, tensor: &Tensor) -> Memory {
        Memory::from_tensor_at(tensor, self.case.offset)
    }

    fn alloc(&self, count: usize) -> Memory {
        Memory::for_elements(self.case.offset + count, self.dtype)
    }

    fn at(&self, memory: &Memory) -> u64 {
        memory.address() + (self.case.offset * self.dtype.size_in_bytes()) as u64
    }

    fn read(&self, memory: &Memory) -> Vec<f64> {
        memory.values(self.dtype)[self.case.offset..].to_vec()
    }

    /// The projections as the composed graph takes them, of these tensors in the order of `small`.
    fn eager(&self, x: &Tensor, small: &[Tensor], residual: Option<&Tensor>) -> Result<Tensor> {
        let mut small = small.iter();
        let activation = self.case.activation;
        let mut outputs = Vec::new();
        for part in &self.parts {
            let bias = part.bias.as_ref().and_then(|_| small.next());
            let lora = match part.problem.lora {
                None => None,
                Some(LoraProblem { scaling, dropout, .. }) => {
                    let (a, b) = (small.next().unwrap(), small.next().unwrap());
                    let b_bias = part.lora_bias.as_ref().and_then(|_| small.next());
                    Some(Lora { a, b, b_bias, scaling: scaling.into(), dropout })
                }
            };
            let projection = Projection { weight: &part.weight, bias, lora };
            outputs.push(composed::lora_linear(x, &projection, activation, None)?);
        }
        let y = Tensor::cat(&outputs, 1)?;
        residual.map_or(Ok(y.clone()), |residual| residual + &y)
    }

    fn small_tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        for part in &self.parts {
            tensors.extend(part.bias.clone());
            if part.problem.lora.is_some() {
                tensors.extend([part.a.clone(), part.b.clone()]);
                tensors.extend(part.lora_bias.clone());
            }
        }
        tensors
    }

    fn mask(&self, part: &Part) -> Vec<f64> {
        let Case { rows, in_dim, .. } = self.case;
        match part.problem.lora.and_then(|lora| lora.dropout) {
            Some(dropout) => dropout.mask(rows, in_dim).into_iter().map(f64::from).collect(),
            None => vec![1.0; rows * in_dim],
        }
    }

    /// The packed sums before the activation, in f64.
    fn reference_sum(&self) -> Vec<f64> {
        let Case { rows, in_dim, .. } = self.case;
        let outputs: Vec<_> = self
            .parts
            .iter()
            .map(|part| {
                let lora = part.problem.lora.map(|lora| reference::Lora {
                    a: values(&part.a),
                    b: values(&part.b),
                    b_bias: part.lora_bias.as_ref().map(values),
                    scaling: lora.scaling.into(),
                    mask: Some(self.mask(part)),
                });
                let bias = part.bias.as_ref().map(values);
                let (x, weight) = (values(&self.x), values(&part.weight));
                reference::lora_linear(&x, &weight, bias.as_deref(), lora.as_ref(), in_dim)
            })
            .collect();
        let row = |row: usize| {
            let parts = outputs.iter().zip(&self.parts);
            parts.flat_map(move |(y, part)| {
                let out = part.problem.out_dim;
                y[row * out..][..out].to_vec()
            })
        };
        (0..rows).flat_map(row).collect()
    }

    fn activate(&self, x: f64) -> f64 {
        match self.case.activation {
            Activation::Identity => x,
            Activation::Gelu => reference::gelu(x),
            Activation::Relu => x.max(0.0),
            other => panic!("no kernel computes {other:?}"),
        }
    }

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

/// Output of the CPU's own path for an f32 case.
fn on_the_cpu(data: &Data) -> Result<Tensor> {
    let mut small = data.small_tensors().into_iter();
    let mut small = || small.next().unwrap();
    let owned: Vec<_> = data
        .parts
        .iter()
        .map(|part| {
            let bias = part.bias.as_ref().map(|_| small());
            let lora = part.problem.lora.map(|_| (small(), small()));
            (bias, lora, part.lora_bias.as_ref().map(|_| small()))
        })
        .collect();
    let projections: Vec<_> = data
        .parts
        .iter()
        .zip(&owned)
        .map(|(part, (bias, lora, b_bias))| Projection {
            weight: &part.weight,
            bias: bias.as_ref(),
            lora: part.problem.lora.zip(lora.as_ref()).map(|(lora, (a, b))| Lora {
                a,
                b,
                b_bias: b_bias.as_ref(),
                scaling: lora.scaling.into(),
                dropout: lora.dropout,
            }),
        })
        .collect();
    match <[Projection<'_>; 3]>::try_from(projections) {
        Ok(three) => ops::lora_qkv(&data.x, &three),
        Err(one) => {
            ops::lora_linear(&data.x, &one[0], data.case.activation, data.residual.as_ref())
        }
    }
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
    let problem = data.projections();
    let count = data.case.rows * data.total;
    let keeps_sum = data.case.activation != Activation::Identity;
    let x = data.memory(&data.x);
    let weights: Vec<_> = data.parts.iter().map(|part| data.memory(&part.weight)).collect();
    let weights_at: Vec<_> = weights.iter().map(|weight| data.at(weight)).collect();
    let small = Memory::from_tensor(&data.small);
    let tensors = data.small_tensors();
    let memories: Vec<_> = tensors.iter().map(Memory::from_tensor).collect();
    let typed = |tensor: &Tensor| tensor.dtype() != DType::F32;
    let separate = tensors.iter().zip(&memories);
    let separate: Vec<_> = separate
        .map(|(tensor, memory)| SmallTensor { at: memory.address(), typed: typed(tensor) })
        .collect();
    let residual = data.residual.as_ref().map(|residual| data.memory(residual));
    let expected_sum = data.reference_sum();
    let mut expected: Vec<f64> = expected_sum.iter().map(|&x| data.activate(x)).collect();
    if let Some(residual) = &data.residual {
        expected.iter_mut().zip(values(residual)).for_each(|(y, r)| *y += r);
    }
    let eager = data.eager(&data.x, &data.small_tensors(), data.residual.as_ref())?;
    let eager = error(&values(&eager), &expected);
    for plan in plans {
        let outputs = in_modes(&data.name, modes.iter().copied(), |device| {
            let (y, sum) = (data.alloc(count), data.alloc(count));
            let s = Memory::for_elements(projection::low_rank_len(&problem), DType::F32);
            let operands = ForwardOperands {
                x: data.at(&x),
                weights: &weights_at,
                // Wherever they lie, the bits are the same.
                small: match device.mode.seed {
                    0 => Small::Flat(small.address()),
                    _ => Small::Separate(&separate),
                },
                residual: residual.as_ref().map_or(0, |residual| data.at(residual)),
                out: data.at(&y),
                low_rank: s.address(),
                sum: if keeps_sum { data.at(&sum) } else { 0 },
            };
            launch_all(device, &plan(&operands)?)?;
            Ok(vec![y, sum, s])
        });
        data.check(worst, "y", &data.read(&outputs[0]), &expected, eager);
        if data.dtype == DType::F32 {
            let cpu = values(&on_the_cpu(data)?);
            data.check(worst, "y of the CPU", &data.read(&outputs[0]), &cpu, 0.0);
        }
        if keeps_sum {
            data.check(worst, "sum", &data.read(&outputs[1]), &expected_sum, eager);
        }
    }
    Ok(())
}

#[test]
fn forward() -> Result<()> {
    let mut worst = Worst::default();
    for data in Data::all()? {
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

/// Runs the backward that each plan makes, after the portable forward, in these modes, and checks all that it writes,
/// and in the first one that each gradient has the same bits alone.
pub fn check_backward(
    data: &Data,
    worst: &mut Worst,
    modes: &[Mode],
    plans: &[&BackwardPlan<'_>],
) -> Result<()> {
    let Case { rows, in_dim, activation, .. } = data.case;
    let problem = data.projections();
    let [x, grad] = [&data.x, &data.grad].map(|tensor| data.memory(tensor));
    let weights: Vec<_> = data.parts.iter().map(|part| data.memory(&part.weight)).collect();
    let weights_at: Vec<_> = weights.iter().map(|weight| data.at(weight)).collect();
    let small = Memory::from_tensor(&data.small);
    let small_tensors = data.small_tensors();
    let small_len: usize = small_tensors.iter().map(Tensor::elem_count).sum();
    let (expected_dx, expected_dsmall) = data.reference_backward();

    let mut inputs = vec![data.x.clone()];
    inputs.extend(small_tensors);
    let (_, eager) = gradients(&inputs, &data.grad, |t| data.eager(&t[0], &t[1..], None))?;
    let eager_dsmall: Vec<f64> = eager[1..].iter().flat_map(values).collect();

    for (index, plan) in plans.iter().enumerate() {
        let outputs = in_modes(&data.name, modes.iter().copied(), |device| {
            let dx = data.alloc(rows * in_dim);
            let dsmall = Memory::for_elements(small_len, DType::F32);
            let (y, sum) = (data.alloc(rows * data.total), data.alloc(rows * data.total));
            let s = Memory::for_elements(projection::low_rank_len(&problem), DType::F32);
            let bytes = projection::workspace_bytes(&problem, data.dtype);
            let workspace = Memory::new(bytes);
            let forward = ForwardOperands {
                x: data.at(&x),
                weights: &weights_at,
                small: Small::Flat(small.address()),
                residual: 0,
                out: data.at(&y),
                low_rank: s.address(),
                sum: if activation == Activation::Identity { 0 } else { data.at(&sum) },
            };
            let small_tile = &TILES[1];
            launch_all(
                device,
                &projection::forward_with(small_tile, &problem, data.dtype, &forward)?,
            )?;
            let operands = BackwardOperands {
                x: data.at(&x),
                weights: &weights_at,
                small: Small::Flat(small.address()),
                low_rank: s.address(),
                sum: data.at(&sum),
                dout: data.at(&grad),
                dx: data.at(&dx),
                dsmall: dsmall.address(),
                workspace: workspace.address(),
            };
            launch_all(device, &plan(&operands)?)?;
            if data.dtype == DType::BF16 && index == 0 {
                let (dx_alone, dsmall_alone) =
                    (data.alloc(rows * in_dim), Memory::for_elements(small_len, DType::F32));
                for operands in [
                    BackwardOperands { dx: data.at(&dx_alone), dsmall: 0, ..operands },
                    BackwardOperands { dx: 0, dsmall: dsmall_alone.address(), ..operands },
                ] {
                    let bytes = projection::workspace_bytes(&problem, data.dtype);
                    let workspace = Memory::new(bytes);
                    let operands = BackwardOperands { workspace: workspace.address(), ..operands };
                    launch_all(device, &plan(&operands)?)?;
                }
                assert!(dx.bytes() == dx_alone.bytes(), "{}: dx alone differs", data.name);
                let same = dsmall.bytes() == dsmall_alone.bytes();
                assert!(small_len == 0 || same, "{}: dsmall alone differs", data.name);
            }
            Ok(vec![dx, dsmall])
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
    for data in Data::all()? {
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
