//! Every operation against the naive f64 reference: values, finite differences of the reference for every gradient,
//! the composed candle graph, half precision, strides, threads.

mod common;

use candle_core::{DType, Result, Tensor};
use candle_sam_lora::ops::{self, composed, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::reference;
use common::{error, gradients, random, tensor_error, values, Worst};

type OnTensors<'a> = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + 'a>;
type OnValues<'a> = Box<dyn Fn(&[Vec<f64>]) -> Vec<f64> + 'a>;

/// An operation as the tests see it: from its differentiable inputs to its output, three times.
struct Op<'a> {
    name: String,
    inputs: Vec<Tensor>,
    fused: OnTensors<'a>,
    composed: OnTensors<'a>,
    reference: OnValues<'a>,
}

const DROPOUT: Dropout = Dropout { p: 0.25, seed: 11, stream: 5 };

fn layer_norm(dims: &'static [usize]) -> Op<'static> {
    let size = dims[dims.len() - 1];
    Op {
        name: format!("layer_norm {dims:?}"),
        inputs: vec![random(1, dims), random(2, size), random(3, size)],
        fused: Box::new(|t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-6)),
        composed: Box::new(|t| composed::layer_norm(&t[0], &t[1], &t[2], 1e-6)),
        reference: Box::new(|v| reference::layer_norm(&v[0], &v[1], &v[2], 1e-6)),
    }
}

/// Inputs: x, bias, A, B, lora bias, residual.
fn lora_linear(
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
            let weight = weight.to_dtype(t[0].dtype())?;
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
            let act = |y: f64| match activation {
                Activation::None => y,
                Activation::Gelu => reference::gelu(y),
                Activation::Relu => y.max(0.0),
            };
            y.into_iter().zip(&v[5]).map(|(y, residual)| act(y) + residual).collect()
        }),
    }
}

/// Inputs: x, the three biases, A and B of q, A and B of v.
fn lora_qkv(rows: usize, dim: usize, ranks: (usize, usize)) -> Op<'static> {
    let weights = [7, 8, 9].map(|seed| (random(seed, (dim, dim)) * 0.2).unwrap());
    let weight_values = weights.each_ref().map(values);
    let dropout_v = Dropout { stream: 6, ..DROPOUT };
    let run = move |t: &[Tensor], op: fn(&Tensor, &[Projection; 3]) -> Result<Tensor>| {
        let weights = [0, 1, 2].map(|i: usize| weights[i].to_dtype(t[0].dtype()));
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
type Tables = (Tensor, Tensor, Option<Tensor>);

/// Inputs: qkv, the tables, pad (last, if windows hang over the grid).
#[derive(Clone, Copy)]
struct Attention {
    batch: usize,
    grid: (usize, usize),
    heads: usize,
    dim: usize,
    window: Option<usize>,
    tables: (usize, usize),
    dropout: Option<Dropout>,
}

impl Attention {
    fn op(self) -> Op<'static> {
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
            name: format!("attention {h}x{w} window {window:?} heads {heads} dim {dim}"),
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

fn all() -> Vec<Op<'static>> {
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
        lora_linear(3, (5, 7), 2, Activation::None, None),
        lora_linear(3, (8, 6), 3, Activation::Gelu, Some(DROPOUT)),
        lora_linear(2, (4, 5), 1, Activation::Relu, None),
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

#[test]
fn values_agree_with_the_reference() -> Result<()> {
    let mut worst = Worst::default();
    for op in all() {
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
    for op in all() {
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

/// In f16 and bf16 the operation may be at most twice as far from the truth as the composed graph in that dtype.
#[test]
fn half_precision_is_no_worse_than_twice_the_eager_error() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let epsilon = if dtype == DType::F16 { 1.0 / 1024.0 } else { 1.0 / 128.0 };
        for op in all() {
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

/// The same values behind other strides and offsets.
fn disguises(t: &Tensor) -> Result<Vec<Tensor>> {
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

#[test]
fn any_strides_give_the_same_bits() -> Result<()> {
    for op in all() {
        let expected = values(&(op.fused)(&op.inputs)?);
        for index in 0..op.inputs.len() {
            for disguise in disguises(&op.inputs[index])? {
                let mut inputs = op.inputs.clone();
                inputs[index] = disguise;
                let got = values(&(op.fused)(&inputs)?);
                assert_eq!(
                    got,
                    expected,
                    "{} input {index}: {:?}",
                    op.name,
                    inputs[index].layout()
                );
            }
        }
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
            for op in all() {
                let grad_out = random(80, (op.fused)(&op.inputs)?.shape());
                let (out, grads) = gradients(&op.inputs, &grad_out, &op.fused)?;
                results.push(values(&out));
                results.extend(grads.iter().map(values));
            }
            Ok(results)
        })
    };
    let expected = run(1)?;
    for threads in [2, 3] {
        assert!(run(threads)? == expected, "{threads} threads give other bits");
    }
    Ok(())
}

#[test]
fn nan_is_not_swallowed() -> Result<()> {
    for op in all() {
        for index in 0..op.inputs.len() {
            let mut inputs = op.inputs.clone();
            inputs[index] = (&inputs[index] * f64::NAN)?;
            let out = values(&(op.fused)(&inputs)?);
            assert!(out.iter().any(|x| x.is_nan()), "{} input {index}", op.name);
        }
    }
    Ok(())
}
