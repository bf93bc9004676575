//! The operations as the tests see them: small cases that hold every path, each with its reference.

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
pub fn lora_linear(
    rows: usize,
    (in_dim, out_dim): (usize, usize),
    rank: usize,
    activation: Activation,
    dropout: Option<Dropout>,
) -> Op<'static> {
    let weight = (random(9, (out_dim, in_dim)) * 0.2).unwrap();
    let weight_values = values(&weight);
    let scaling = 0.7;
    let run =
        move |t: &[Tensor],
              op: fn(&Tensor, &Projection, Activation, Option<&Tensor>) -> Result<Tensor>| {
            // The weight is frozen, whatever dtype the inputs have.
            let weight = weight.to_dtype(t[0].dtype())?.to_device(t[0].device())?;
            let lora = Lora { a: &t[2], b: &t[3], b_bias: Some(&t[4]), scaling, dropout };
            let projection = Projection { weight: &weight, bias: Some(&t[1]), lora: Some(lora) };
            op(&t[0], &projection, activation, Some(&t[5]))
        };
    let composed_run = run.clone();
    Op {
        name: format!("lora_linear {rows} {in_dim} {out_dim} {rank} {activation:?} {dropout:?}"),
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
            let mask =
                dropout.map(|d| d.mask(2 * rows, in_dim).iter().map(|&m| m.into()).collect());
            let lora = reference::Lora {
                a: v[2].clone(),
                b: v[3].clone(),
                b_bias: Some(v[4].clone()),
                scaling,
                mask,
            };
            let y = reference::lora_linear(&v[0], &weight_values, Some(&v[1]), Some(&lora), in_dim);
            let act = |y: f64| activated(activation, y);
            y.into_iter().zip(&v[5]).map(|(y, residual)| act(y) + residual).collect()
        }),
    }
}

/// Inputs: x, bias, A, B, magnitude. No gradient goes through the norm, so the reference has another one.
pub fn dora_linear(
    rows: usize,
    (in_dim, out_dim): (usize, usize),
    rank: usize,
    dropout: Option<Dropout>,
) -> Op<'static> {
    let weight = (random(9, (out_dim, in_dim)) * 0.2).unwrap();
    let weight_values = values(&weight);
    let scaling = 0.7;
    let run = move |t: &[Tensor]| {
        let weight = weight.to_dtype(t[0].dtype())?.to_device(t[0].device())?;
        let lora = Lora { a: &t[2], b: &t[3], b_bias: None, scaling, dropout };
        let projection = Projection { weight: &weight, bias: Some(&t[1]), lora: Some(lora) };
        ops::dora_linear(&t[0], &projection, &t[4])
    };
    let frozen = (random(9, (out_dim, in_dim)) * 0.2).unwrap();
    // PEFT's formula in f32, rounded once.
    let composed = move |t: &[Tensor]| {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        let (x, a, b) = (wide(&t[0])?, wide(&t[2])?, wide(&t[3])?);
        let weight = frozen.to_dtype(t[0].dtype())?.to_device(t[0].device())?;
        let g = (wide(&t[4])? / ops::dora_weight_norm(&weight, &t[2], &t[3], scaling)?)?;
        let weight = wide(&weight)?.t()?;
        let dropped = dropout.map_or(Ok(x.clone()), |dropout| ops::dropout(&x, dropout))?;
        let low_rank = (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * scaling)?;
        let y = x.matmul(&weight)?.broadcast_add(&wide(&t[1])?)?;
        let y = (y + dropped.matmul(&weight)?.broadcast_mul(&(&g - 1.0)?)?)?;
        (y + low_rank.broadcast_mul(&g)?)?.to_dtype(t[0].dtype())
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
            let mask = dropout.map_or(vec![1.0; rows * in_dim], |d| d.mask(rows, in_dim));
            let dropped: Vec<f64> = v[0].iter().zip(mask).map(|(x, m)| x * f64::from(m)).collect();
            let plain = reference::linear(&v[0], &weight_values, in_dim);
            let base = reference::linear(&dropped, &weight_values, in_dim);
            let s = reference::linear(&dropped, &v[2], in_dim);
            let low_rank = reference::linear(&s, &v[3], rank);
            let norm = |o: usize| {
                let entry = |i: usize| {
                    let delta: f64 =
                        (0..rank).map(|r| v[3][o * rank + r] * v[2][r * in_dim + i]).sum();
                    weight_values[o * in_dim + i] + scaling * delta
                };
                (0..in_dim).map(|i| entry(i).powi(2)).sum::<f64>().sqrt()
            };
            let g: Vec<f64> = (0..out_dim).map(|o| v[4][o] / norm(o)).collect();
            let y = |(i, plain): (usize, &f64)| {
                let o = i % out_dim;
                plain + v[1][o] + (g[o] - 1.0) * base[i] + g[o] * scaling * low_rank[i]
            };
            plain.iter().enumerate().map(y).collect()
        }),
    }
}

/// Inputs: x, the three biases, A and B of q, A and B of v.
pub fn lora_qkv(rows: usize, dim: usize, ranks: (usize, usize)) -> Op<'static> {
    let weights = [7, 8, 9].map(|seed| (random(seed, (dim, dim)) * 0.2).unwrap());
    let weight_values = weights.each_ref().map(values);
    let dropout_v = Dropout { stream: 6, ..DROPOUT };
    let run = move |t: &[Tensor], op: fn(&Tensor, &[Projection; 3]) -> Result<Tensor>| {
        let weights =
            [0, 1, 2].map(|i: usize| weights[i].to_dtype(t[0].dtype())?.to_device(t[0].device()));
        let [wq, wk, wv] = weights;
        let (wq, wk, wv) = (wq?, wk?, wv?);
        let lora = |a, b, scaling, dropout| {
            Some(Lora { a, b, b_bias: None, scaling, dropout: Some(dropout) })
        };
        let (q, v) = (lora(&t[4], &t[5], 2.0, DROPOUT), lora(&t[6], &t[7], 0.5, dropout_v));
        op(
            &t[0],
            &[
                Projection { weight: &wq, bias: Some(&t[1]), lora: q },
                Projection { weight: &wk, bias: Some(&t[2]), lora: None },
                Projection { weight: &wv, bias: Some(&t[3]), lora: v },
            ],
        )
    };
    let composed_run = run.clone();
    Op {
        name: format!("lora_qkv {rows} {dim} {ranks:?}"),
        inputs: vec![
            random(1, (rows, dim)),
            random(2, dim),
            random(3, dim),
            random(4, dim),
            random(5, (ranks.0, dim)),
            random(6, (dim, ranks.0)),
            random(7, (ranks.1, dim)),
            random(8, (dim, ranks.1)),
        ],
        fused: Box::new(move |t| run(t, ops::lora_qkv)),
        composed: Box::new(move |t| composed_run(t, composed::lora_qkv)),
        reference: Box::new(move |v| {
            let lora = |a: usize, scaling, dropout: Dropout| reference::Lora {
                a: v[a].clone(),
                b: v[a + 1].clone(),
                b_bias: None,
                scaling,
                mask: Some(dropout.mask(rows, dim).iter().map(|&m| m.into()).collect()),
            };
            let (lora_q, lora_v) = (lora(4, 2.0, DROPOUT), lora(6, 0.5, dropout_v));
            let parts = [Some(&lora_q), None, Some(&lora_v)];
            let parts: Vec<_> = (0..3)
                .map(|i| {
                    let bias = Some(v[1 + i].as_slice());
                    reference::lora_linear(&v[0], &weight_values[i], bias, parts[i], dim)
                })
                .collect();
            (0..rows)
                .flat_map(|r| parts.iter().flat_map(move |p| p[r * dim..][..dim].to_vec()))
                .collect()
        }),
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

pub fn all() -> Vec<Op<'static>> {
    let attention = Attention {
        batch: 1,
        grid: (3, 4),
        heads: 2,
        dim: 5,
        window: None,
        tables: (5, 7),
        dropout: None,
    };
    vec![
        layer_norm(&[3, 4, 7]),
        layer_norm(&[1, 1]),
        layer_norm(&[130, 9]),
        lora_linear(3, (5, 7), 2, Activation::Identity, None),
        lora_linear(3, (8, 6), 3, Activation::Gelu, Some(DROPOUT)),
        lora_linear(2, (4, 5), 1, Activation::Relu, None),
        lora_linear(2, (5, 4), 1, Activation::GeluTanh, Some(DROPOUT)),
        lora_linear(3, (4, 3), 1, Activation::Silu, None),
        lora_linear(300, (3, 2), 5, Activation::Gelu, Some(DROPOUT)),
        lora_qkv(5, 6, (2, 3)),
        lora_qkv(1, 1, (1, 4)),
        attention.op(),
        Attention { dropout: Some(DROPOUT), ..attention }.op(),
        Attention { grid: (1, 1), tables: (1, 1), ..attention }.op(),
        Attention { grid: (1, 9), tables: (1, 17), ..attention }.op(),
        Attention { window: Some(2), tables: (3, 3), ..attention }.op(),
        Attention { window: Some(3), tables: (5, 5), batch: 2, ..attention }.op(),
        Attention { window: Some(3), tables: (5, 5), dropout: Some(DROPOUT), ..attention }.op(),
        Attention { window: Some(6), tables: (11, 11), ..attention }.op(),
        Attention { tables: (9, 4), ..attention }.op(),
        // More queries than a block, more keys than a tile.
        Attention { grid: (9, 33), heads: 1, dim: 3, tables: (17, 65), ..attention }.op(),
    ]
}

/// DoRA. Its norm has no gradient, so finite differences of the reference do not apply.
pub fn dora() -> Vec<Op<'static>> {
    vec![dora_linear(5, (9, 6), 2, None), dora_linear(300, (8, 7), 3, Some(DROPOUT))]
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

/// Sizes as SAM has them, of which a naive reference can still do a few: for what tiles its work.
pub fn large() -> Vec<Op<'static>> {
    let attention = |dim, window: Option<usize>, grid: (usize, usize)| {
        let side = |length: usize| window.unwrap_or(length);
        let tables = (2 * side(grid.0) - 1, 2 * side(grid.1) - 1);
        Attention { batch: 1, grid, heads: 2, dim, window, tables, dropout: None }.op()
    };
    vec![
        layer_norm(&[2, 14, 14, 768]),
        layer_norm(&[5, 1280]),
        dropout(&[3, 100, 77]),
        lora_linear(65, (768, 129), 16, Activation::Gelu, Some(DROPOUT)),
        lora_linear(1, (96, 64), 7, Activation::Identity, None),
        dora_linear(65, (96, 72), 16, Some(DROPOUT)),
        dora_linear(33, (40, 129), 5, None),
        lora_qkv(130, 128, (8, 100)),
        // Enough rows for the projections' large tiles.
        lora_qkv(1793, 384, (16, 4)),
        attention(64, Some(14), (16, 20)),
        // Key tiles of 64 and of 40 columns.
        attention(64, None, (3, 64)),
        attention(80, None, (5, 40)),
        attention(80, None, (10, 12)),
        attention(64, None, (20, 20)),
        attention(16, Some(7), (14, 14)),
        attention(32, None, (7, 9)),
    ]
}

/// The same values behind other strides and offsets.
pub fn disguises(t: &Tensor) -> Result<Vec<Tensor>> {
    let mut disguises = Vec::new();
    if t.rank() >= 2 {
        let (a, b) = (t.rank() - 2, t.rank() - 1);
        disguises.push(t.transpose(a, b)?.contiguous()?.transpose(a, b)?);
    }
    let wide = Tensor::cat(&[t, t, t], 0)?;
    disguises.push(wide.narrow(0, t.dim(0)?, t.dim(0)?)?);
    let last = t.rank() - 1;
    let interleaved = Tensor::stack(&[&t.zeros_like()?, t], last + 1)?;
    disguises.push(interleaved.narrow(last + 1, 1, 1)?.squeeze(last + 1)?);
    Ok(disguises)
}
