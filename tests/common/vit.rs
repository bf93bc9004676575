//! A small vision transformer as an existing candle program has it. Its weights are in a `VarMap`, with a fused `qkv`;
//! for this crate q, k and v are views of it.
#![allow(dead_code)]

use candle_core::{DType, Device, Module, Result, Tensor, Var, D};
use candle_nn::{VarBuilder, VarMap};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{LayerNorm, Linear, Mode};
use candle_sam_lora::ops::lora_qkv;

pub const WIDTH: usize = 8;
pub const TOKENS: usize = 6;
const LAYERS: usize = 2;
const HEADS: usize = 2;

/// Operations of candle that an existing program may have kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kept {
    /// `softmax_last_dim` in the attention.
    pub softmax: bool,
    /// `candle_nn::LayerNorm` before the attention.
    pub norm: bool,
}

#[derive(Clone, Debug)]
pub struct Attention {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub proj: Linear,
    kept: Kept,
}

module_tree!(Attention { q, k, v, proj });

impl Attention {
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let layers = [&self.q, &self.k, &self.v];
        let low_rank = [self.q.low_rank(mode)?, self.k.low_rank(mode)?, self.v.low_rank(mode)?];
        let projections = std::array::from_fn(|i| {
            layers[i].projection(&low_rank[i]).expect("one adapter without magnitude")
        });
        let qkv = lora_qkv(x, &projections)?;
        let (batch, tokens, _) = x.dims3()?;
        let part = |i: usize| {
            qkv.narrow(2, i * WIDTH, WIDTH)?
                .reshape((batch, tokens, HEADS, WIDTH / HEADS))?
                .transpose(1, 2)?
                .contiguous()
        };
        let scores = (part(0)?.matmul(&part(1)?.t()?)? * (WIDTH as f64 / HEADS as f64).powf(-0.5))?;
        let weights = match self.kept.softmax {
            true => candle_nn::ops::softmax_last_dim(&scores)?,
            false => candle_nn::ops::softmax(&scores, D::Minus1)?,
        };
        let mixed = weights.matmul(&part(2)?)?.transpose(1, 2)?.flatten_from(2)?;
        self.proj.forward(&mixed, mode)
    }
}

#[derive(Clone, Debug)]
pub struct Layer {
    norm1: LayerNorm,
    /// Not in the tree: candle's.
    candle_norm: Option<candle_nn::LayerNorm>,
    pub attn: Attention,
    norm2: LayerNorm,
    mlp: Linear,
}

module_tree!(Layer { norm1, attn, norm2, mlp });

impl Layer {
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let normed = match &self.candle_norm {
            Some(norm) => norm.forward(x)?,
            None => self.norm1.forward(x)?,
        };
        let x = self.attn.forward(&normed, mode)?;
        self.mlp.forward(&self.norm2.forward(&x)?, mode)?.gelu_erf()
    }
}

#[derive(Clone, Debug)]
pub struct Vit {
    pub embed: Linear,
    pub layers: Vec<Layer>,
    pub head: Linear,
}

module_tree!(Vit { embed, layers, head });

impl Vit {
    /// From variables of `map`, each random by its name.
    pub fn new(map: &VarMap, kept: Kept) -> Result<Self> {
        let vb = VarBuilder::from_varmap(map, DType::F32, &Device::Cpu);
        let linear = |vb: VarBuilder<'_>, out| Linear::load(WIDTH, out, vb);
        let norm = |vb: VarBuilder<'_>| LayerNorm::load(WIDTH, 1e-6, vb);
        let embed = linear(vb.pp("embed"), WIDTH)?;
        let mut layers = Vec::new();
        for index in 0..LAYERS {
            let vb = vb.pp(format!("layers.{index}"));
            let fused = linear(vb.pp("attn.qkv"), 3 * WIDTH)?;
            let rows = |part: usize| -> Result<Linear> {
                let take = |tensor: &Tensor| tensor.narrow(0, part * WIDTH, WIDTH);
                Ok(Linear::new(take(&fused.weight)?, fused.bias.as_ref().map(take).transpose()?))
            };
            let (q, k, v, proj) =
                (rows(0)?, rows(1)?, rows(2)?, linear(vb.pp("attn.proj"), WIDTH)?);
            let norm1 = norm(vb.pp("norm1"))?;
            let candle_norm = kept
                .norm
                .then(|| candle_nn::LayerNorm::new(norm1.weight.clone(), norm1.bias.clone(), 1e-6));
            layers.push(Layer {
                norm1,
                candle_norm,
                attn: Attention { q, k, v, proj, kept },
                norm2: norm(vb.pp("norm2"))?,
                mlp: linear(vb.pp("mlp"), WIDTH)?,
            });
        }
        let vit = Self { embed, layers, head: linear(vb.pp("head"), WIDTH)? };
        for (name, var) in map.data().lock().expect("no thread panicked").iter() {
            let start = if name.contains("norm") && name.ends_with("weight") { 1.0 } else { 0.0 };
            let random = (0..var.elem_count()).map(|i| start + wave(name.len() + 7 * i, name));
            let random = random.collect::<Vec<f32>>();
            var.set(&Tensor::from_vec(random, var.dims(), &Device::Cpu)?)?;
        }
        Ok(vit)
    }

    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.embed.forward(x, mode)?;
        for layer in &self.layers {
            x = layer.forward(&x, mode)?;
        }
        self.head.forward(&x, mode)
    }

    /// A scalar that every parameter has a part in.
    pub fn loss(&self, mode: Mode) -> Result<Tensor> {
        let out = self.forward(&input()?, mode)?;
        (out - target()?)?.sqr()?.mean_all()
    }
}

/// Between -0.5 and 0.5, different for each name.
fn wave(i: usize, name: &str) -> f32 {
    let phase: u32 = name.bytes().map(u32::from).sum();
    ((i as f64 * 1.7 + f64::from(phase)).sin() * 0.5) as f32
}

fn numbers(name: &str) -> Result<Tensor> {
    let values: Vec<f32> = (0..2 * TOKENS * WIDTH).map(|i| 2.0 * wave(i, name)).collect();
    Tensor::from_vec(values, (2, TOKENS, WIDTH), &Device::Cpu)
}

pub fn input() -> Result<Tensor> {
    numbers("input")
}

fn target() -> Result<Tensor> {
    numbers("target")
}

/// Gives a variable numbers between -0.5 and 0.5.
pub fn fill(var: &Var) -> Result<()> {
    let values: Vec<f32> = (0..var.elem_count()).map(|i| wave(i, "fill")).collect();
    var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?.to_dtype(var.dtype())?)
}

/// A new variable, filled.
pub fn filled(dims: (usize, usize), dtype: DType) -> Result<Var> {
    let var = Var::zeros(dims, dtype, &Device::Cpu)?;
    fill(&var)?;
    Ok(var)
}

/// The bits of an f32 tensor.
pub fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Names and bits of the variables in `map`, sorted.
pub fn map_bits(map: &VarMap) -> Result<std::collections::BTreeMap<String, Vec<u32>>> {
    let data = map.data().lock().expect("no thread panicked");
    data.iter().map(|(name, var)| Ok((name.clone(), bits(var)?))).collect()
}
