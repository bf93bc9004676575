//! A case of the projections for the emulator: its shapes, its tensors, and its buffers on the device.
#![allow(dead_code)]

use super::device::Memory;
use crate::common::{random, values};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::projection::{
    low_rank_len, Activation, BackwardOperands, ForwardOperands, LoraProblem, Problem,
    ProjectionProblem, Small, SmallTensor,
};
use candle_sam_lora::ops::{self, Lora, Projection};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::reference;

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

/// One projection's tensors.
pub struct Part {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub a: Tensor,
    pub b: Tensor,
    pub lora_bias: Option<Tensor>,
    pub problem: ProjectionProblem,
}

impl Part {
    fn map(&self, change: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let optional = |tensor: &Option<Tensor>| tensor.as_ref().map(change).transpose();
        Ok(Self {
            weight: change(&self.weight)?,
            bias: optional(&self.bias)?,
            a: change(&self.a)?,
            b: change(&self.b)?,
            lora_bias: optional(&self.lora_bias)?,
            problem: self.problem,
        })
    }
}

/// A case's tensors in a dtype; adapters are f32.
pub struct Data {
    pub name: String,
    pub case: Case,
    pub dtype: DType,
    pub parts: Vec<Part>,
    problems: Vec<ProjectionProblem>,
    pub x: Tensor,
    pub residual: Option<Tensor>,
    pub grad: Tensor,
    /// All output widths.
    pub total: usize,
}

impl Data {
    pub fn new(case: Case, dtype: DType) -> Result<Self> {
        let Case { rows, in_dim, outs, ranks, .. } = case;
        let scale = (1.0 / in_dim as f64).sqrt();
        let mut parts = Vec::new();
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
            parts.push(Part {
                weight: (random(seed + 1, (out, in_dim)) * scale)?.to_dtype(dtype)?,
                bias: case.bias.then(|| random(seed + 2, out).to_dtype(dtype)).transpose()?,
                a: (random(seed + 3, (rank.max(1), in_dim)) * (scale / case.b_scale))?,
                b: (random(seed + 4, (out, rank.max(1)))
                    * (case.b_scale / (rank.max(1) as f64).sqrt()))?,
                lora_bias: (rank > 0 && case.lora_bias).then(|| random(seed + 5, out)),
                problem: ProjectionProblem { out_dim: out, bias: case.bias, lora },
            });
        }
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
            total,
        })
    }

    /// The case with each tensor changed, to another dtype or device.
    pub fn map(&self, change: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            name: self.name.clone(),
            parts: self.parts.iter().map(|part| part.map(change)).collect::<Result<_>>()?,
            problems: self.problems.clone(),
            x: change(&self.x)?,
            residual: self.residual.as_ref().map(change).transpose()?,
            grad: change(&self.grad)?,
            ..*self
        })
    }

    /// The output of the operations, on the device of the tensors.
    pub fn output(&self) -> Result<Tensor> {
        match <[Projection<'_>; 3]>::try_from(self.with_small(&self.small_tensors())) {
            Ok(three) => ops::lora_qkv(&self.x, &three),
            Err(one) => {
                let activation = self.case.activation;
                ops::lora_linear(&self.x, &one[0], activation, self.residual.as_ref())
            }
        }
    }

    pub fn keeps_sum(&self) -> bool {
        self.case.activation != Activation::Identity
    }

    pub fn projections(&self) -> Problem<'_> {
        let Case { rows, in_dim, activation, .. } = self.case;
        Problem { rows, in_dim, projections: &self.problems, activation }
    }

    /// Room for elements of the case's dtype, off their alignment.
    pub fn alloc(&self, count: usize) -> Memory {
        Memory::for_elements(self.case.offset + count, self.dtype)
    }

    pub fn at(&self, memory: &Memory) -> u64 {
        memory.address() + (self.case.offset * self.dtype.size_in_bytes()) as u64
    }

    pub fn read(&self, memory: &Memory) -> Vec<f64> {
        memory.values(self.dtype)[self.case.offset..].to_vec()
    }

    /// The projections with these tensors in the order of `small_tensors`.
    pub fn with_small<'a>(&'a self, small: &'a [Tensor]) -> Vec<Projection<'a>> {
        let mut small = small.iter();
        let of_part = |part: &'a Part| {
            let bias = part.bias.as_ref().and_then(|_| small.next());
            let lora = part.problem.lora.map(|LoraProblem { scaling, dropout, .. }| {
                let (a, b) = (small.next().unwrap(), small.next().unwrap());
                let b_bias = part.lora_bias.as_ref().and_then(|_| small.next());
                Lora { a, b, b_bias, scaling: scaling.into(), dropout }
            });
            Projection { weight: &part.weight, scales: None, bias, lora }
        };
        self.parts.iter().map(of_part).collect()
    }

    pub fn memory(&self) -> Result<OnDevice<'_>> {
        let memory = |tensor: &Tensor| Memory::from_tensor_at(tensor, self.case.offset);
        let tensors = self.small_tensors();
        let wide = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F32);
        let flat = match tensors.is_empty() {
            true => Tensor::zeros(1, DType::F32, self.x.device())?,
            false => Tensor::cat(&tensors.iter().map(wide).collect::<Result<Vec<_>>>()?, 0)?,
        };
        let small: Vec<_> = tensors.iter().map(Memory::from_tensor).collect();
        let separate = tensors.iter().zip(&small).map(|(tensor, memory)| SmallTensor {
            at: memory.address(),
            typed: tensor.dtype() != DType::F32,
            trained: true,
        });
        let weights: Vec<_> = self.parts.iter().map(|part| memory(&part.weight)).collect();
        Ok(OnDevice {
            data: self,
            x: memory(&self.x),
            weights_at: weights.iter().map(|weight| self.at(weight)).collect(),
            weights,
            flat: Memory::from_tensor(&flat),
            separate: separate.collect(),
            small,
            residual: self.residual.as_ref().map(memory),
            grad: memory(&self.grad),
        })
    }

    /// Room for the output of the forward, for the sum before the activation, and for S.
    pub fn outputs(&self) -> [Memory; 3] {
        let count = self.case.rows * self.total;
        let s = Memory::for_elements(low_rank_len(&self.projections()), DType::F32);
        [self.alloc(count), self.alloc(count), s]
    }

    /// Biases and adapters, part by part.
    pub fn small_tensors(&self) -> Vec<Tensor> {
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

    pub fn mask(&self, part: &Part) -> Vec<f64> {
        let Case { rows, in_dim, .. } = self.case;
        match part.problem.lora.and_then(|lora| lora.dropout) {
            Some(dropout) => dropout.mask(rows, in_dim).into_iter().map(f64::from).collect(),
            None => vec![1.0; rows * in_dim],
        }
    }

    /// The packed sums before the activation, in f64.
    pub fn reference_sum(&self) -> Vec<f64> {
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

    pub fn activate(&self, x: f64) -> f64 {
        match self.case.activation {
            Activation::Identity => x,
            Activation::Gelu => reference::gelu(x),
            Activation::Relu => x.max(0.0),
            other => panic!("no kernel computes {other:?}"),
        }
    }
}

/// A case's inputs.
pub struct OnDevice<'a> {
    data: &'a Data,
    x: Memory,
    weights: Vec<Memory>,
    weights_at: Vec<u64>,
    /// Biases and adapters as one tensor, and each by itself.
    flat: Memory,
    small: Vec<Memory>,
    pub separate: Vec<SmallTensor>,
    residual: Option<Memory>,
    grad: Memory,
}

impl OnDevice<'_> {
    /// Operands of the forward for these outputs. With an activation the forward keeps the sum before it.
    pub fn forward(&self, [y, sum, s]: &[Memory; 3]) -> ForwardOperands<'_> {
        let data = self.data;
        ForwardOperands {
            x: data.at(&self.x),
            weights: &self.weights_at,
            small: Small::Flat(self.flat.address()),
            residual: self.residual.as_ref().map_or(0, |residual| data.at(residual)),
            out: data.at(y),
            low_rank: s.address(),
            sum: if data.keeps_sum() { data.at(sum) } else { 0 },
        }
    }

    /// Operands of the backward of that forward, for these results.
    pub fn backward(
        &self,
        [_, sum, s]: &[Memory; 3],
        [dx, dsmall]: &[Memory; 2],
        workspace: &Memory,
    ) -> BackwardOperands<'_> {
        let data = self.data;
        BackwardOperands {
            x: data.at(&self.x),
            weights: &self.weights_at,
            small: Small::Flat(self.flat.address()),
            low_rank: s.address(),
            sum: data.at(sum),
            dout: data.at(&self.grad),
            dx: data.at(dx),
            dsmall: dsmall.address(),
            workspace: workspace.address(),
        }
    }
}
