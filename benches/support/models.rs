//! SAM's three encoders and their layers, with random weights and LoRA on q and v.

use super::normal;
use super::vit::{Vit, WINDOW};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{randomize, Mode, ModuleTree, NodeMut};
use candle_sam_lora::sam::{
    AttentionKind, LayerContext, PreparedImages, SamMaskDecoder, SamMaskDecoderConfig,
    SamMaskDecoderInput, SamVisionAttentionSplit, SamVisionConfig, SamVisionEncoder,
};
use candle_sam_lora::Result;

impl Vit {
    /// The configuration for images of `grid` patches a side.
    pub fn config(&self, grid: usize) -> SamVisionConfig {
        SamVisionConfig {
            hidden_size: self.dim,
            num_hidden_layers: self.depth,
            num_attention_heads: self.heads,
            image_size: 16 * grid,
            window_size: WINDOW,
            global_attn_indexes: self.global.map(|index| index as i64).to_vec(),
            ..SamVisionConfig::default()
        }
    }
}

/// LoRA on q and v; rank 0 is none.
#[derive(Clone, Copy, Debug)]
pub struct Adapters {
    pub rank: usize,
    pub dropout: f64,
}

/// Without adapters.
pub const FROZEN: Adapters = Adapters { rank: 0, dropout: 0.0 };

/// A layer's attention, qkv to proj.
pub fn attention(
    vit: &Vit,
    grid: usize,
    windowed: bool,
    adapters: Adapters,
    dtype: DType,
    device: &Device,
) -> Result<SamVisionAttentionSplit> {
    let config = vit.config(grid);
    let index = if windowed { 0 } else { vit.global[0] };
    let name = format!("vision_encoder.layers.{index}.attn");
    let layer = LayerContext { config: &config, index, name, vb: VarBuilder::zeros(dtype, device) };
    let mut attention = SamVisionAttentionSplit::new(&layer)?;
    fill(&mut attention, adapters)?;
    Ok(attention)
}

/// A whole image encoder.
pub fn encoder(
    config: &SamVisionConfig,
    adapters: Adapters,
    dtype: DType,
    device: &Device,
) -> Result<SamVisionEncoder> {
    let mut encoder =
        SamVisionEncoder::new(config, AttentionKind::Split, VarBuilder::zeros(dtype, device))?;
    fill(&mut encoder, adapters)?;
    Ok(encoder)
}

/// SAM's mask decoder, ViT-B's as any other's.
pub fn decoder(dtype: DType, device: &Device) -> Result<SamMaskDecoder> {
    let config = SamMaskDecoderConfig::default();
    let mut decoder = SamMaskDecoder::new(&config, VarBuilder::zeros(dtype, device))?;
    fill(&mut decoder, FROZEN)?;
    Ok(decoder)
}

/// The input of [`decoder`]: a stored embedding, prompts of one point, which are two tokens each.
#[derive(Debug)]
pub struct Prompts {
    pub image: Tensor,
    pub positions: Tensor,
    pub sparse: Tensor,
    pub dense: Tensor,
}

impl Prompts {
    pub fn new(prompts: usize, grid: usize, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self {
            image: normal(&[1, 256, grid, grid], dtype, device)?,
            positions: normal(&[1, grid, grid, 256], dtype, device)?,
            sparse: normal(&[1, prompts, 2, 256], dtype, device)?,
            dense: normal(&[1, 1, 1, 256], dtype, device)?,
        })
    }

    /// Three masks for each prompt.
    pub fn decode(&self, decoder: &SamMaskDecoder, mode: Mode) -> candle_core::Result<Tensor> {
        Ok(decoder.forward(&self.input(), true, mode)?.0)
    }

    /// The image, prepared for many prompts.
    pub fn prepare(&self, decoder: &SamMaskDecoder) -> candle_core::Result<PreparedImages> {
        decoder.prepare(&self.input(), usize::MAX, Mode::Eval)
    }

    fn input(&self) -> SamMaskDecoderInput<'_> {
        SamMaskDecoderInput {
            image_embeddings: &self.image,
            image_positions: &self.positions,
            sparse: Some(&self.sparse),
            dense: &self.dense,
        }
    }
}

/// Random weights, and adapters whose B is random too: zeros would spare every gradient of A.
fn fill(module: &mut dyn ModuleTree, adapters: Adapters) -> Result<()> {
    randomize(module, 0, 0.02)?;
    if adapters.rank == 0 {
        return Ok(());
    }
    let config = LoraConfig::new(adapters.rank)
        .alpha(2.0 * adapters.rank as f64)
        .dropout(adapters.dropout)
        .target_modules(["q", "v"]);
    inject(module, &config, 0)?;
    module.visit_mut("", &mut |name, node| {
        if let (true, NodeMut::Parameter(b)) = (name.ends_with("lora_B.weight"), node) {
            let random = b.randn_like(0.0, 0.02)?;
            *b = Var::from_tensor(&random)?.into_inner();
        }
        Ok(())
    })
}
