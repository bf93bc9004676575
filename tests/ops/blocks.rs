//! The residual branches, and an attention layer without norm and residual, as one operation. Values and every gradient
//! are compared with the composed operations one after the other, and with the fused ones, bit for bit.

use crate::common::{gradients, random, tensor_error, Worst};
use candle_core::{DType, Result, Tensor, Var};
use candle_sam_lora::ops::{self, Activation, Lora, Norm, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::composed;

const HEADS: usize = 2;
const C: usize = 12;
const HIDDEN: usize = 20;
const RANK: usize = 3;
const EPS: f64 = 1e-6;

/// Which code runs the steps.
#[derive(Clone, Copy)]
enum Path {
    Block,
    Single,
    Composed,
}

struct Shape {
    grid: [usize; 3],
    window: Option<usize>,
    /// q, k and v by themselves, or one projection.
    split: bool,
    lora: bool,
    /// A residual branch with its norm, or the layer alone.
    branch: bool,
}

const SHAPES: [Shape; 6] = [
    Shape { grid: [2, 5, 7], window: None, split: true, lora: true, branch: true },
    Shape { grid: [1, 5, 7], window: Some(3), split: true, lora: true, branch: true },
    Shape { grid: [1, 4, 6], window: Some(2), split: false, lora: false, branch: true },
    Shape { grid: [3, 1, 1], window: Some(4), split: false, lora: true, branch: true },
    Shape { grid: [1, 5, 7], window: Some(3), split: true, lora: true, branch: false },
    Shape { grid: [2, 4, 3], window: None, split: false, lora: false, branch: false },
];

fn dropout(stream: u32) -> Option<Dropout> {
    Some(Dropout { p: 0.2, seed: 5, stream })
}

/// `[out, in]`, of the size that keeps a stage's output as large as its input: saturated softmaxes are for the tests of
/// the attention.
fn weight(seed: u64, (out_dim, in_dim): (usize, usize), dtype: DType) -> Result<Tensor> {
    (random(seed, (out_dim, in_dim)) / (in_dim as f64).sqrt())?.to_dtype(dtype)
}

/// x, norm weight and bias, q, k and v's biases, tables, B and A of an adapter, proj's bias.
fn attention_inputs(shape: &Shape) -> Vec<Tensor> {
    let [batch, h, w] = shape.grid;
    let (side_h, side_w) = shape.window.map_or((h, w), |side| (side, side));
    let d = C / HEADS;
    [
        vec![batch, h, w, C],
        vec![C],
        vec![C],
        vec![3 * C],
        vec![2 * side_h - 1, d],
        vec![2 * side_w - 1, d],
        vec![RANK, C],
        vec![C, RANK],
        vec![C],
    ]
    .into_iter()
    .enumerate()
    .map(|(index, dims)| random(index as u64, dims))
    .collect()
}

fn attention(path: Path, shape: &Shape, inputs: &[Tensor]) -> Result<Tensor> {
    let [x, weight, bias, biases, rel_pos_h, rel_pos_w, a, b, proj_bias] = inputs else {
        candle_core::bail!("nine inputs")
    };
    let dtype = x.dtype();
    let frozen = self::weight(99, (3 * C, C), dtype)?;
    let proj_weight = self::weight(98, (C, C), dtype)?;
    let part =
        |index: usize| Ok((frozen.narrow(0, index * C, C)?, biases.narrow(0, index * C, C)?));
    let parts = (0..3).map(part).collect::<Result<Vec<(Tensor, Tensor)>>>()?;
    let lora = Lora { a, b, b_bias: None, scaling: 0.7, dropout: dropout(1) };
    let adapted = |index: usize| (shape.lora && index != 1).then_some(lora);
    let qkv: Vec<_> = if shape.split {
        let split = parts.iter().enumerate();
        split
            .map(|(index, (weight, bias))| Projection {
                weight,
                scales: None,
                bias: Some(bias),
                lora: adapted(index),
            })
            .collect()
    } else {
        vec![Projection { weight: &frozen, scales: None, bias: Some(biases), lora: None }]
    };
    let config = RelPosAttention {
        num_heads: HEADS,
        softmax_scale: 0.4,
        rel_pos: Some((rel_pos_h, rel_pos_w)),
        window: shape.window,
        pad: Some(biases),
        dropout: dropout(2),
    };
    let proj = Projection {
        weight: &proj_weight,
        scales: None,
        bias: Some(proj_bias),
        lora: shape.lora.then_some(Lora { dropout: None, ..lora }),
    };
    let norm = Norm { weight, bias, eps: EPS };
    let one = |p: &Projection<'_>, x: &Tensor, residual| match path {
        Path::Composed => composed::lora_linear(x, p, Activation::Identity, residual),
        _ => ops::lora_linear(x, p, Activation::Identity, residual),
    };
    if let Path::Block = path {
        return match shape.branch {
            true => ops::attention_block(x, &norm, &qkv, &config, &proj),
            false => ops::attention_layer(x, &qkv, &config, &proj),
        };
    }
    let is_composed = matches!(path, Path::Composed);
    let normed = match (shape.branch, is_composed) {
        (true, true) => composed::layer_norm(x, weight, bias, EPS)?,
        (true, false) => ops::layer_norm(x, weight, bias, EPS)?,
        (false, _) => x.clone(),
    };
    let packed = match (&qkv[..], is_composed) {
        ([q, k, v], true) => composed::lora_qkv(&normed, &[*q, *k, *v])?,
        ([q, k, v], false) => ops::lora_qkv(&normed, &[*q, *k, *v])?,
        (other, _) => one(&other[0], &normed, None)?,
    };
    let out = match is_composed {
        true => composed::rel_pos_attention(&packed, &config)?.0,
        false => ops::rel_pos_attention(&packed, &config)?,
    };
    one(&proj, &out, shape.branch.then_some(x))
}

/// x, norm weight and bias, both biases, A and B of lin2's adapter.
fn mlp_inputs() -> Vec<Tensor> {
    let dims =
        [vec![2, 3, C], vec![C], vec![C], vec![HIDDEN], vec![C], vec![RANK, HIDDEN], vec![C, RANK]];
    dims.into_iter().enumerate().map(|(index, dims)| random(40 + index as u64, dims)).collect()
}

fn mlp(path: Path, activation: Activation, lora: bool, inputs: &[Tensor]) -> Result<Tensor> {
    let [x, weight, bias, bias1, bias2, a, b] = inputs else { candle_core::bail!("seven inputs") };
    let weight1 = self::weight(97, (HIDDEN, C), x.dtype())?;
    let weight2 = self::weight(96, (C, HIDDEN), x.dtype())?;
    let lora = lora.then_some(Lora { a, b, b_bias: None, scaling: 0.7, dropout: dropout(3) });
    let lin1 = Projection { weight: &weight1, scales: None, bias: Some(bias1), lora: None };
    let lin2 = Projection { weight: &weight2, scales: None, bias: Some(bias2), lora };
    match path {
        Path::Block => {
            ops::mlp_block(x, &Norm { weight, bias, eps: EPS }, &lin1, activation, &lin2)
        }
        Path::Single => {
            let normed = ops::layer_norm(x, weight, bias, EPS)?;
            let hidden = ops::lora_linear(&normed, &lin1, activation, None)?;
            ops::lora_linear(&hidden, &lin2, Activation::Identity, Some(x))
        }
        Path::Composed => {
            let normed = composed::layer_norm(x, weight, bias, EPS)?;
            let hidden = composed::lora_linear(&normed, &lin1, activation, None)?;
            composed::lora_linear(&hidden, &lin2, Activation::Identity, Some(x))
        }
    }
}

/// A block by its path, over its inputs.
type Block<'a> = Box<dyn Fn(Path, &[Tensor]) -> Result<Tensor> + 'a>;

fn blocks() -> Vec<(String, Vec<Tensor>, Block<'static>)> {
    let mut all: Vec<(String, Vec<Tensor>, Block<'static>)> = Vec::new();
    for (index, shape) in SHAPES.iter().enumerate() {
        let used = if shape.lora { 9 } else { 6 };
        let mut inputs = attention_inputs(shape);
        // Without an adapter its tensors have no gradient; the last input is proj's bias.
        let bias = inputs.split_off(8);
        let adapter = inputs.split_off(used.min(8));
        // Neither have the norm's where there is none.
        let norm: Vec<_> = inputs.drain(1..if shape.branch { 1 } else { 3 }).collect();
        let count = inputs.len();
        inputs.extend(bias);
        let run = move |path: Path, inputs: &[Tensor]| {
            let (middle, bias) = (&inputs[1..count], &inputs[count..]);
            attention(path, shape, &[&inputs[..1], &norm, middle, &adapter, bias].concat())
        };
        all.push((format!("attention {index}"), inputs, Box::new(run)));
    }
    for activation in [Activation::Gelu, Activation::Relu, Activation::Identity] {
        for lora in [false, true] {
            let mut inputs = mlp_inputs();
            let adapter = inputs.split_off(if lora { 7 } else { 5 });
            let run = move |path: Path, inputs: &[Tensor]| {
                mlp(path, activation, lora, &[inputs, &adapter].concat())
            };
            all.push((format!("mlp {activation:?} {lora}"), inputs, Box::new(run)));
        }
    }
    all
}

#[test]
fn values_and_gradients_agree_with_the_composed_graph() -> Result<()> {
    let mut worst = Worst::default();
    for (name, inputs, run) in blocks() {
        let grad_out = random(7, inputs[0].shape());
        let (out, block) = gradients(&inputs, &grad_out, |i: &[Tensor]| run(Path::Block, i))?;
        let (expected, composed) =
            gradients(&inputs, &grad_out, |i: &[Tensor]| run(Path::Composed, i))?;
        worst.note("out", &name, tensor_error(&out, &expected));
        for (index, (block, composed)) in block.iter().zip(&composed).enumerate() {
            worst.note(&format!("gradient {index}"), &name, tensor_error(block, composed));
        }
    }
    worst.check("blocks against the composed graph", 2e-5);
    Ok(())
}

#[test]
fn bits_are_those_of_the_single_operations() -> Result<()> {
    let bits = |t: &Tensor| -> Result<Vec<u32>> {
        Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    for (name, inputs, run) in blocks() {
        let [block, single] = [run(Path::Block, &inputs)?, run(Path::Single, &inputs)?];
        assert_eq!(bits(&block)?, bits(&single)?, "{name}");
        let grad_out = random(7, inputs[0].shape());
        let (_, block) = gradients(&inputs, &grad_out, |i: &[Tensor]| run(Path::Block, i))?;
        let (_, single) = gradients(&inputs, &grad_out, |i: &[Tensor]| run(Path::Single, i))?;
        for (index, (block, single)) in block.iter().zip(&single).enumerate() {
            assert_eq!(bits(block)?, bits(single)?, "{name}, gradient {index}");
        }
    }
    Ok(())
}

/// Each input alone: what has no gradient to come is neither kept nor computed, and nothing else is lost by it.
#[test]
fn every_input_may_be_the_only_trainable_one() -> Result<()> {
    for (name, inputs, run) in blocks() {
        let grad_out = random(7, inputs[0].shape());
        let (_, all) = gradients(&inputs, &grad_out, |i: &[Tensor]| run(Path::Block, i))?;
        for (index, expected) in all.iter().enumerate() {
            let mut some = inputs.clone();
            let variable = Var::from_tensor(&inputs[index])?;
            some[index] = variable.as_tensor().clone();
            let grads = (run(Path::Block, &some)? * &grad_out)?.sum_all()?.backward()?;
            let Some(grad) = grads.get(variable.as_tensor()) else {
                candle_core::bail!("{name}: input {index} has no gradient")
            };
            assert!(tensor_error(grad, expected) < 1e-6, "{name}: input {index}");
        }
    }
    Ok(())
}

/// At most twice as far from the f32 result as the composed graph in that dtype.
#[test]
fn half_precision_is_no_worse_than_twice_the_eager_error() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        for (name, inputs, run) in blocks() {
            let half = inputs.iter().map(|t| t.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
            let rounded =
                half.iter().map(|t| t.to_dtype(DType::F32)).collect::<Result<Vec<_>>>()?;
            // The weights inside are rounded to the dtype, so that truth is theirs.
            let truth = run(Path::Composed, &rounded)?;
            let error = |path| Ok(tensor_error(&run(path, &half)?.to_dtype(DType::F32)?, &truth));
            let (block, eager): (Result<f64>, Result<f64>) =
                (error(Path::Block), error(Path::Composed));
            let (block, eager) = (block?, eager?);
            assert!(block <= 2.0 * eager, "{name} {dtype:?}: {block:e}, eager {eager:e}");
        }
    }
    Ok(())
}
