//! The residual branches of an encoder layer as one operation on the GPU. Values and gradients have the bits of the
//! single operations, with and without adapters and a gradient of the input.

use crate::common::{random, values};
use crate::{trial, with_each};
use candle_core::{bail, DType, Device, Result, Tensor, Var};
use candle_sam_lora::ops::{self, Activation, Dropout, Lora, Norm, Projection, RelPosAttention};
use libtest_mimic::Trial;

const HEADS: usize = 2;
const C: usize = 128;
const RANK: usize = 4;
const NORM_EPS: f64 = 1e-6;

#[derive(Clone, Copy)]
enum Block {
    /// Attention in windows of this size or global; as a branch with its norm, or the layer alone.
    Attention {
        window: Option<usize>,
        branch: bool,
    },
    Mlp,
}

const BLOCKS: [(&str, Block); 4] = [
    ("windows", Block::Attention { window: Some(3), branch: true }),
    ("global", Block::Attention { window: None, branch: true }),
    ("layer", Block::Attention { window: Some(3), branch: false }),
    ("mlp", Block::Mlp),
];

/// Which projections have an adapter: the first (or q and v), the last; and whether x has a gradient.
const TRAINED: [[bool; 3]; 5] = [
    [true, false, true],
    [true, true, true],
    [false, true, false],
    [true, false, false],
    [false, false, true],
];

pub fn trials() -> Vec<Trial> {
    let of = |(name, block): (&'static str, Block)| {
        [DType::F32, DType::F16, DType::BF16].map(|dtype| {
            trial(format!("blocks {name} {}", dtype.as_str()), move |device| {
                with_each(device, || bits_are_those_of_the_single_operations(block, dtype, device))
            })
        })
    };
    BLOCKS.into_iter().flat_map(of).collect()
}

fn bits_are_those_of_the_single_operations(
    block: Block,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    for trained in TRAINED {
        let inputs = Inputs::new(trained, dtype, device)?;
        let dout = random(90, inputs.x.shape()).to_dtype(dtype)?.to_device(device)?;
        let [fused, single] = [true, false].map(|fused| -> Result<_> {
            let out = inputs.run(block, fused)?;
            let store = (&out * &dout)?.sum_all()?.backward()?;
            let gradients = inputs.variables.iter().map(|variable| store.get(variable).cloned());
            Ok((out, gradients.collect::<Vec<_>>()))
        });
        let ((out, gradients), (expected, of_single)) = (fused?, single?);
        assert!(values(&out) == values(&expected), "{trained:?}: another output");
        assert!(!gradients.is_empty());
        for (index, pair) in gradients.iter().zip(&of_single).enumerate() {
            let (Some(got), Some(expected)) = pair else { bail!("gradient {index} is missing") };
            assert!(values(got) == values(expected), "{trained:?}: gradient {index} differs");
        }
    }
    Ok(())
}

struct Inputs {
    x: Tensor,
    /// A and B of the first projection's adapter, and of the last one's.
    adapters: [Option<[Tensor; 2]>; 2],
    variables: Vec<Tensor>,
    dtype: DType,
    device: Device,
}

impl Inputs {
    fn new([first, last, x_trained]: [bool; 3], dtype: DType, device: &Device) -> Result<Self> {
        let mut variables = vec![];
        let mut variable = |tensor: Tensor| -> Result<Tensor> {
            let variable = Var::from_tensor(&tensor)?.into_inner();
            variables.push(variable.clone());
            Ok(variable)
        };
        let on = |seed, shape: &[usize]| random(seed, shape).to_device(device);
        let x = on(1, &[1, 5, 7, C])?.to_dtype(dtype)?;
        let x = if x_trained { variable(x)? } else { x };
        let mut adapter = |wanted: bool, seed: u64| -> Result<Option<[Tensor; 2]>> {
            let make =
                || Ok([variable(on(seed, &[RANK, C])?)?, variable(on(seed + 1, &[C, RANK])?)?]);
            wanted.then(make).transpose()
        };
        let adapters = [adapter(first, 10)?, adapter(last, 20)?];
        Ok(Self { x, adapters, variables, dtype, device: device.clone() })
    }

    /// Frozen, of the size that keeps a projection's output as large as its input.
    fn frozen(&self, seed: u64, shape: &[usize]) -> Result<Tensor> {
        let scale = (*shape.last().unwrap_or(&1) as f64).sqrt();
        (random(seed, shape) / scale)?.to_dtype(self.dtype)?.to_device(&self.device)
    }

    fn lora(&self, place: usize, stream: u32) -> Option<Lora<'_>> {
        let [a, b] = self.adapters[place].as_ref()?;
        let dropout = Some(Dropout { p: 0.2, seed: 5, stream });
        Some(Lora { a, b, b_bias: None, scaling: 0.7, dropout })
    }

    fn run(&self, block: Block, fused: bool) -> Result<Tensor> {
        let (weight, bias) = (self.frozen(30, &[C])?, self.frozen(31, &[C])?);
        let norm = Norm { weight: &weight, bias: &bias, eps: NORM_EPS };
        match block {
            Block::Attention { window, branch } => {
                self.attention(window, branch.then_some(&norm), fused)
            }
            Block::Mlp => self.mlp(&norm, fused),
        }
    }

    fn attention(
        &self,
        window: Option<usize>,
        norm: Option<&Norm<'_>>,
        fused: bool,
    ) -> Result<Tensor> {
        let weights: Vec<_> =
            (0..4).map(|i| self.frozen(40 + i, &[C, C])).collect::<Result<_>>()?;
        let biases: Vec<_> = (0..4).map(|i| self.frozen(50 + i, &[C])).collect::<Result<_>>()?;
        let part = |i: usize, lora| Projection {
            weight: &weights[i],
            scales: None,
            bias: Some(&biases[i]),
            lora,
        };
        let qkv = [part(0, self.lora(0, 1)), part(1, None), part(2, self.lora(0, 2))];
        let proj = part(3, self.lora(1, 3));
        let side = window.map_or([5, 7], |side| [side; 2]);
        let tables = side.map(|side| self.frozen(60 + side as u64, &[2 * side - 1, C / HEADS]));
        let [h, w] = tables;
        let (h, w, pad) = (h?, w?, Tensor::cat(&biases[..3], 0)?);
        let config = RelPosAttention {
            num_heads: HEADS,
            softmax_scale: 0.125,
            rel_pos: Some((&h, &w)),
            window,
            pad: Some(&pad),
            dropout: Some(Dropout { p: 0.1, seed: 7, stream: 4 }),
        };
        let x = &self.x;
        match (norm, fused) {
            (Some(norm), true) => ops::attention_block(x, norm, &qkv, &config, &proj),
            (None, true) => ops::attention_layer(x, &qkv, &config, &proj),
            (norm, false) => {
                let normed = match norm {
                    Some(norm) => ops::layer_norm(x, norm.weight, norm.bias, norm.eps)?,
                    None => x.clone(),
                };
                let out = ops::rel_pos_attention(&ops::lora_qkv(&normed, &qkv)?, &config)?;
                ops::lora_linear(&out, &proj, Activation::Identity, norm.map(|_| x))
            }
        }
    }

    /// The hidden rows are as wide as x, so that one adapter fits both projections.
    fn mlp(&self, norm: &Norm<'_>, fused: bool) -> Result<Tensor> {
        let (weight1, weight2) = (self.frozen(70, &[C, C])?, self.frozen(71, &[C, C])?);
        let (bias1, bias2) = (self.frozen(72, &[C])?, self.frozen(73, &[C])?);
        let lin1 = Projection {
            weight: &weight1,
            scales: None,
            bias: Some(&bias1),
            lora: self.lora(0, 5),
        };
        let lin2 = Projection {
            weight: &weight2,
            scales: None,
            bias: Some(&bias2),
            lora: self.lora(1, 6),
        };
        if fused {
            return ops::mlp_block(&self.x, norm, &lin1, Activation::Gelu, &lin2);
        }
        let normed = ops::layer_norm(&self.x, norm.weight, norm.bias, norm.eps)?;
        let hidden = ops::lora_linear(&normed, &lin1, Activation::Gelu, None)?;
        ops::lora_linear(&hidden, &lin2, Activation::Identity, Some(&self.x))
    }
}
