//! The operations as the tests see them, each with its reference: from shapes to inputs and results.

use super::{random, values};
use candle_core::{DType, Device, Result, Tensor};
use candle_sam_lora::ops::{self, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::{composed, reference};

pub type OnTensors<'a> = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + 'a>;
pub type OnValues<'a> = Box<dyn Fn(&[Vec<f64>]) -> Vec<f64> + 'a>;

/// An operation as the tests see it: from its differentiable inputs to its output, three times.
pub struct Op<'a> {
    pub name: String,
    pub inputs: Vec<Tensor>,
    pub fused: OnTensors<'a>,
    pub composed: OnTensors<'a>,
    pub reference: OnValues<'a>,
}

/// An operation is told by its name.
impl std::fmt::Debug for Op<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

pub const DROPOUT: Dropout = Dropout { p: 0.25, seed: 11, stream: 5 };

pub fn layer_norm(dims: &[usize]) -> Op<'static> {
    let size = dims[dims.len() - 1];
    Op {
        name: format!("layer_norm {dims:?}"),
        inputs: vec![random(1, dims), random(2, size), random(3, size)],
        fused: Box::new(|t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-6)),
        composed: Box::new(|t| composed::layer_norm(&t[0], &t[1], &t[2], 1e-6)),
        reference: Box::new(|v| reference::layer_norm(&v[0], &v[1], &v[2], 1e-6)),
    }
}

/// An activation in f64, by its definition.
pub fn activated(activation: Activation, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Identity => x,
        Activation::Gelu => reference::gelu(x),
        Activation::Relu => x.max(0.0),
        Activation::GeluTanh => {
            let inner = std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::GeluClipped => reference::gelu(x).clamp(-10.0, 10.0),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Silu => x * sigmoid(x),
        Activation::Mish => x * x.exp().ln_1p().tanh(),
        Activation::Hardswish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Activation::LeakyRelu => x.max(0.0) + 0.01 * x.min(0.0),
        Activation::ReluSquared => x.max(0.0).powi(2),
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::Sigmoid => sigmoid(x),
        Activation::Tanh => x.tanh(),
        Activation::Laplace => {
            // (1 + erf(z)) / 2 is gelu(t) / t at t = z sqrt 2.
            #[allow(clippy::approx_constant)]
            let t = (x - 0.707107) / 0.282095;
            if t == 0.0 {
                0.5
            } else {
                reference::gelu(t) / t
            }
        }
    }
}

/// Inputs: x, bias, A, B, lora bias, residual.
#[derive(Clone, Copy)]
pub struct LoraLinear {
    /// Rows of each of two images.
    pub rows: usize,
    pub in_dim: usize,
    pub out_dim: usize,
    pub rank: usize,
    pub activation: Activation,
    pub dropout: Option<Dropout>,
}

const SCALING: f64 = 0.7;

/// The frozen weight `[out, in]` of a case.
fn weight(seed: u64, out_dim: usize, in_dim: usize) -> Tensor {
    (random(seed, (out_dim, in_dim)) * 0.2).unwrap()
}

/// A frozen weight in the dtype and on the device of the inputs.
fn beside(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    weight.to_dtype(x.dtype())?.to_device(x.device())
}

pub const PLAIN: LoraLinear = LoraLinear {
    rows: 1,
    in_dim: 1,
    out_dim: 1,
    rank: 1,
    activation: Activation::Identity,
    dropout: None,
};

impl LoraLinear {
    pub fn op(self) -> Op<'static> {
        let Self { rows, in_dim, out_dim, rank, activation, dropout } = self;
        let weight = weight(9, out_dim, in_dim);
        let weight_values = values(&weight);
        let run = move |t: &[Tensor],
                        op: fn(
            &Tensor,
            &Projection,
            Activation,
            Option<&Tensor>,
        ) -> Result<Tensor>| {
            let [x, bias, a, b, b_bias, residual] = t else { panic!("six inputs") };
            let lora = Lora { a, b, b_bias: Some(b_bias), scaling: SCALING, dropout };
            let weight = &beside(&weight, x)?;
            let projection =
                Projection { weight, scales: None, bias: Some(bias), lora: Some(lora) };
            op(x, &projection, activation, Some(residual))
        };
        let composed_run = run.clone();
        Op {
            name: format!(
                "lora_linear {rows} {in_dim} {out_dim} {rank} {activation:?} {dropout:?}"
            ),
            inputs: vec![
                random(1, (2, rows, in_dim)),
                random(2, out_dim),
                random(3, (rank, in_dim)),
                random(4, (out_dim, rank)),
                random(5, out_dim),
                random(6, (2, rows, out_dim)),
            ],
            fused: Box::new(move |t| run(t, ops::lora_linear)),
            composed: Box::new(move |t| composed_run(t, composed::lora_linear)),
            reference: Box::new(move |v| {
                let [x, bias, a, b, b_bias, residual] = v else { panic!("six inputs") };
                let mask = dropout.map(|dropout| mask(dropout, 2 * rows, in_dim));
                let b_bias = Some(b_bias.clone());
                let lora =
                    reference::Lora { a: a.clone(), b: b.clone(), b_bias, scaling: SCALING, mask };
                let y = reference::lora_linear(x, &weight_values, Some(bias), Some(&lora), in_dim);
                y.into_iter().zip(residual).map(|(y, r)| activated(activation, y) + r).collect()
            }),
        }
    }
}

/// A dropout's factors in f64.
fn mask(dropout: Dropout, rows: usize, cols: usize) -> Vec<f64> {
    dropout.mask(rows, cols).into_iter().map(f64::from).collect()
}

/// Inputs: x, bias, A, B, magnitude. No gradient goes through the norm, so the reference has another one.
#[derive(Clone, Copy)]
pub struct DoraLinear {
    pub rows: usize,
    pub in_dim: usize,
    pub out_dim: usize,
    pub rank: usize,
    pub dropout: Option<Dropout>,
}

impl DoraLinear {
    pub fn op(self) -> Op<'static> {
        let Self { rows, in_dim, out_dim, rank, dropout } = self;
        let frozen = weight(9, out_dim, in_dim);
        let weight_values = values(&frozen);
        let weight = frozen.clone();
        let run = move |t: &[Tensor]| {
            let [x, bias, a, b, magnitude] = t else { panic!("five inputs") };
            let lora = Lora { a, b, b_bias: None, scaling: SCALING, dropout };
            let weight = &beside(&weight, x)?;
            let projection =
                Projection { weight, scales: None, bias: Some(bias), lora: Some(lora) };
            ops::dora_linear(x, &projection, magnitude)
        };
        // PEFT's formula in f32, rounded once.
        let composed = move |t: &[Tensor]| {
            let wide = |t: &Tensor| t.to_dtype(DType::F32);
            let [narrow_x, bias, narrow_a, narrow_b, magnitude] = t else { panic!("five inputs") };
            let (x, a, b) = (wide(narrow_x)?, wide(narrow_a)?, wide(narrow_b)?);
            let weight = beside(&frozen, narrow_x)?;
            let norm = ops::dora_weight_norm(&weight, narrow_a, narrow_b, SCALING)?;
            let g = (wide(magnitude)? / norm)?;
            let weight = wide(&weight)?.t()?;
            let dropped = dropout.map_or(Ok(x.clone()), |dropout| ops::dropout(&x, dropout))?;
            let low_rank = (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * SCALING)?;
            let y = x.matmul(&weight)?.broadcast_add(&wide(bias)?)?;
            let y = (y + dropped.matmul(&weight)?.broadcast_mul(&(&g - 1.0)?)?)?;
            (y + low_rank.broadcast_mul(&g)?)?.to_dtype(narrow_x.dtype())
        };
        Op {
            name: format!("dora_linear {rows} {in_dim} {out_dim} {rank} {dropout:?}"),
            inputs: vec![
                random(1, (rows, in_dim)),
                random(2, out_dim),
                random(3, (rank, in_dim)),
                random(4, (out_dim, rank)),
                random(5, out_dim),
            ],
            fused: Box::new(run),
            composed: Box::new(composed),
            reference: Box::new(move |v| {
                let [x, bias, a, b, magnitude] = v else { panic!("five inputs") };
                let mask = dropout.map_or(vec![1.0; rows * in_dim], |d| mask(d, rows, in_dim));
                let dropped: Vec<f64> = x.iter().zip(mask).map(|(x, m)| x * m).collect();
                let plain = reference::linear(x, &weight_values, in_dim);
                let base = reference::linear(&dropped, &weight_values, in_dim);
                let low_rank = reference::linear(&reference::linear(&dropped, a, in_dim), b, rank);
                let norm = |o: usize| {
                    let entry = |i: usize| {
                        let delta: f64 =
                            (0..rank).map(|r| b[o * rank + r] * a[r * in_dim + i]).sum();
                        weight_values[o * in_dim + i] + SCALING * delta
                    };
                    (0..in_dim).map(|i| entry(i).powi(2)).sum::<f64>().sqrt()
                };
                let g: Vec<f64> = (0..out_dim).map(|o| magnitude[o] / norm(o)).collect();
                let y = |(i, plain): (usize, &f64)| {
                    let o = i % out_dim;
                    plain + bias[o] + (g[o] - 1.0) * base[i] + g[o] * SCALING * low_rank[i]
                };
                plain.iter().enumerate().map(y).collect()
            }),
        }
    }
}

/// Inputs: x, the three biases, A and B of q, A and B of v.
#[derive(Clone, Copy)]
pub struct LoraQkv {
    pub rows: usize,
    pub dim: usize,
    pub rank_q: usize,
    pub rank_v: usize,
}

impl LoraQkv {
    pub fn op(self) -> Op<'static> {
        let Self { rows, dim, rank_q, rank_v } = self;
        let weights = [7, 8, 9].map(|seed| weight(seed, dim, dim));
        let weight_values = weights.each_ref().map(values);
        let dropout_v = Dropout { stream: 6, ..DROPOUT };
        let run = move |t: &[Tensor], op: fn(&Tensor, &[Projection; 3]) -> Result<Tensor>| {
            let [x, bias_q, bias_k, bias_v, a_q, b_q, a_v, b_v] = t else { panic!("eight inputs") };
            let [q, k, v] = &weights;
            let (q, k, v) = (&beside(q, x)?, &beside(k, x)?, &beside(v, x)?);
            let lora = |a, b, scaling, dropout| {
                Some(Lora { a, b, b_bias: None, scaling, dropout: Some(dropout) })
            };
            let lora_q = lora(a_q, b_q, 2.0, DROPOUT);
            let lora_v = lora(a_v, b_v, 0.5, dropout_v);
            let part =
                |weight, bias, lora| Projection { weight, scales: None, bias: Some(bias), lora };
            op(x, &[part(q, bias_q, lora_q), part(k, bias_k, None), part(v, bias_v, lora_v)])
        };
        let composed_run = run.clone();
        Op {
            name: format!("lora_qkv {rows} {dim} {:?}", (rank_q, rank_v)),
            inputs: vec![
                random(1, (rows, dim)),
                random(2, dim),
                random(3, dim),
                random(4, dim),
                random(5, (rank_q, dim)),
                random(6, (dim, rank_q)),
                random(7, (rank_v, dim)),
                random(8, (dim, rank_v)),
            ],
            fused: Box::new(move |t| run(t, ops::lora_qkv)),
            composed: Box::new(move |t| composed_run(t, composed::lora_qkv)),
            reference: Box::new(move |v| {
                let [x, bias_q, bias_k, bias_v, a_q, b_q, a_v, b_v] = v else {
                    panic!("eight inputs")
                };
                let lora = |a: &[f64], b: &[f64], scaling, dropout| reference::Lora {
                    a: a.to_vec(),
                    b: b.to_vec(),
                    b_bias: None,
                    scaling,
                    mask: Some(mask(dropout, rows, dim)),
                };
                let loras = [
                    Some(lora(a_q, b_q, 2.0, DROPOUT)),
                    None,
                    Some(lora(a_v, b_v, 0.5, dropout_v)),
                ];
                let part = |((bias, lora), weight): ((&Vec<f64>, &Option<_>), &Vec<f64>)| {
                    reference::lora_linear(x, weight, Some(bias), lora.as_ref(), dim)
                };
                let biases = [bias_q, bias_k, bias_v];
                let parts: Vec<_> =
                    biases.into_iter().zip(&loras).zip(&weight_values).map(part).collect();
                (0..rows)
                    .flat_map(|r| parts.iter().flat_map(move |p| p[r * dim..][..dim].to_vec()))
                    .collect()
            }),
        }
    }
}

/// Both tables and the pad.
pub type Tables = (Tensor, Tensor, Option<Tensor>);

/// Inputs: qkv, the tables, pad (last, if windows hang over the grid).
#[derive(Clone, Copy)]
pub struct Attention {
    pub batch: usize,
    pub grid: (usize, usize),
    pub heads: usize,
    pub dim: usize,
    pub window: Option<usize>,
    pub tables: (usize, usize),
    pub dropout: Option<Dropout>,
}

impl Attention {
    pub fn op(self) -> Op<'static> {
        let Self { batch, grid: (h, w), heads, dim, window, tables, dropout } = self;
        let packed = 3 * heads * dim;
        let (side_h, side_w) = window.map_or((h, w), |side| (side, side));
        let padded = h % side_h != 0 || w % side_w != 0;
        let scale = (dim as f64).powf(-0.5);
        let mut inputs = vec![
            random(1, (batch, h, w, packed)),
            (random(2, (tables.0, dim)) * 0.3).unwrap(),
            (random(3, (tables.1, dim)) * 0.3).unwrap(),
        ];
        if padded {
            inputs.push(random(4, packed));
        }
        let config = move |t: &[Tensor], resize: bool| -> Result<Tables> {
            if !resize {
                return Ok((t[1].clone(), t[2].clone(), t.get(3).cloned()));
            }
            let table = |t: &Tensor, side: usize| ops::resize_linear(t, 2 * side - 1);
            Ok((table(&t[1], side_h)?, table(&t[2], side_w)?, t.get(3).cloned()))
        };
        fn args(t: &Tables, p: Attention, softmax_scale: f64) -> RelPosAttention<'_> {
            RelPosAttention {
                num_heads: p.heads,
                softmax_scale,
                rel_pos: Some((&t.0, &t.1)),
                window: p.window,
                pad: t.2.as_ref(),
                dropout: p.dropout,
            }
        }
        Op {
            name: format!(
                "attention {batch}x{h}x{w} window {window:?} heads {heads} dim {dim} tables {tables:?} {dropout:?}"
            ),
            inputs,
            fused: Box::new(move |t| {
                let tables = config(t, false)?;
                ops::rel_pos_attention(&t[0], &args(&tables, self, scale))
            }),
            composed: Box::new(move |t| {
                let tables = config(t, true)?;
                Ok(composed::rel_pos_attention(&t[0], &args(&tables, self, scale))?.0)
            }),
            reference: Box::new(move |v| {
                let problem = reference::Attention {
                    batch,
                    grid: (h, w),
                    num_heads: heads,
                    head_dim: dim,
                    window,
                    softmax_scale: scale,
                };
                let table_h = reference::resize_linear(&v[1], dim, 2 * side_h - 1);
                let table_w = reference::resize_linear(&v[2], dim, 2 * side_w - 1);
                let none = vec![0.0; packed];
                let tokens = side_h * side_w;
                let windows = batch * h.div_ceil(side_h) * w.div_ceil(side_w);
                let mask = dropout.map(|d| d.mask(windows * heads * tokens, tokens));
                problem.forward(
                    &v[0],
                    Some((&table_h, &table_w)),
                    v.get(3).unwrap_or(&none),
                    &|window, head, query, key| {
                        let row = (window * heads + head) * tokens + query;
                        mask.as_ref().map_or(1.0, |m| m[row * tokens + key].into())
                    },
                )
            }),
        }
    }
}

/// Inputs: q, k, v.
#[derive(Clone, Copy)]
pub struct MultiHead {
    /// Entries of q, and of k and v.
    pub batch: (usize, usize),
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub dim: usize,
}

impl MultiHead {
    pub fn op(self) -> Op<'static> {
        let Self { batch, queries, keys, heads, dim } = self;
        let (scale, channels) = ((dim as f64).powf(-0.5), heads * dim);
        let problem = reference::MultiHead {
            queries,
            keys,
            num_heads: heads,
            head_dim: dim,
            softmax_scale: scale,
        };
        Op {
            name: format!("multi-head {batch:?} x {queries} to {keys} heads {heads} dim {dim}"),
            inputs: vec![
                random(1, (batch.0, queries, channels)),
                random(2, (batch.1, keys, channels)),
                random(3, (batch.1, keys, channels)),
            ],
            fused: Box::new(move |t| {
                ops::multi_head_attention(&t[0], [&t[1], &t[2]], heads, scale)
            }),
            composed: Box::new(move |t| {
                composed::multi_head_attention([&t[0], &t[1], &t[2]], heads, scale)
            }),
            reference: Box::new(move |v| problem.forward(&v[0], &v[1], &v[2])),
        }
    }
}

/// Inputs: x.
pub fn dropout(dims: &'static [usize]) -> Op<'static> {
    let cols = dims[dims.len() - 1];
    Op {
        name: format!("dropout {dims:?}"),
        inputs: vec![random(1, dims)],
        fused: Box::new(|t| ops::dropout(&t[0], DROPOUT)),
        composed: Box::new(|t| {
            let device = t[0].device();
            ops::dropout(&t[0].to_device(&Device::Cpu)?, DROPOUT)?.to_device(device)
        }),
        reference: Box::new(move |v| {
            let mask = DROPOUT.mask(v[0].len() / cols, cols);
            v[0].iter().zip(mask).map(|(x, m)| x * f64::from(m)).collect()
        }),
    }
}
