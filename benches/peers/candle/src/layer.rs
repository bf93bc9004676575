//! An attention layer of SAM's encoder with random weights: q, k, v, relative positions, proj, LoRA on q and v.

use crate::ops::{composed, Activation, Dropout, Lora, Projection, RelPosAttention};
use crate::vit::{Vit, WINDOW};
use candle_core::{Device, Result, Tensor, Var, D};

/// A linear layer; its adapter is A, B.
struct Linear {
    weight: Tensor,
    bias: Tensor,
    adapter: Option<(Var, Var)>,
}

impl Linear {
    fn new(dim: usize, rank: usize) -> Result<Self> {
        let adapter = || Ok::<_, candle_core::Error>((var(&[rank, dim])?, var(&[dim, rank])?));
        let adapter = (rank > 0).then(adapter).transpose()?;
        Ok(Self { weight: random(&[dim, dim])?, bias: random(&[dim])?, adapter })
    }

    fn forward(&self, x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let lora = self.adapter.as_ref().map(|(a, b)| Lora {
            a: a.as_tensor(),
            b: b.as_tensor(),
            b_bias: None,
            scaling: 2.0,
            dropout,
        });
        let projection = Projection { weight: &self.weight, bias: Some(&self.bias), lora };
        composed::lora_linear(x, &projection, Activation::Identity, None)
    }
}

/// The layer, global or in windows.
pub struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    proj: Linear,
    tables: [Tensor; 2],
    heads: usize,
    window: Option<usize>,
}

impl Attention {
    /// For a grid of this side; rank 0 is frozen.
    pub fn new(vit: &Vit, grid: usize, windowed: bool, rank: usize) -> Result<Self> {
        let window = windowed.then_some(WINDOW);
        let table = || random(&[2 * window.unwrap_or(grid) - 1, vit.head_dim()]);
        Ok(Self {
            q: Linear::new(vit.dim, rank)?,
            k: Linear::new(vit.dim, 0)?,
            v: Linear::new(vit.dim, rank)?,
            proj: Linear::new(vit.dim, 0)?,
            tables: [table()?, table()?],
            heads: vit.heads,
            window,
        })
    }

    /// `[B, H, W, C] -> [B, H, W, C]`; `dropout` is that of the adapters' input.
    pub fn forward(&self, x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let parts = [&self.q, &self.k, &self.v];
        let outputs = parts.map(|part| part.forward(x, dropout));
        let qkv = Tensor::cat(&outputs.into_iter().collect::<Result<Vec<_>>>()?, D::Minus1)?;
        let pad = Tensor::cat(&parts.map(|part| &part.bias), 0)?;
        let [rel_pos_h, rel_pos_w] = &self.tables;
        let config = RelPosAttention {
            num_heads: self.heads,
            softmax_scale: ((x.dim(D::Minus1)? / self.heads) as f64).powf(-0.5),
            rel_pos: Some((rel_pos_h, rel_pos_w)),
            window: self.window,
            pad: Some(&pad),
            dropout: None,
        };
        let (out, _) = composed::rel_pos_attention(&qkv, &config)?;
        self.proj.forward(&out, None)
    }
}

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 0.02f32, shape, &Device::Cpu)
}

fn var(shape: &[usize]) -> Result<Var> {
    Var::from_tensor(&random(shape)?)
}
