//! A hack of the attention itself: a learned gate on what each token takes from the others.
//!
//! ```text
//! out = proj(2 sigmoid(x W_g^T + b_g) * attention(x))        W_g = 0, b_g = 0 at first, so the gate is 1
//! ```
//! The gate sits between SAM's attention and its last projection (Qiu et al., "Gated attention for large language
//! models", 2025). It is put around the attention of a model that is already loaded, in the layers with global
//! attention alone, changes nothing at first, and is all that is trained. The model here is small and random.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, VarBuilder};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{set_trainable, trainable_variables, Linear, Mode};
use candle_sam_lora::sam::{
    AttentionKind, SamConfig, SamInput, SamModel, SamVisionAttentionSplit, VisionAttention,
};
use candle_sam_lora::train::{AdamW, AdamWConfig};
use std::any::Any;

/// SAM's attention with a gate. An empty name keeps the inner names, `attn.q`, `attn.rel_pos_h` ..., as they were;
/// the new parameters are `attn.gate.weight` and `attn.gate.bias`.
#[derive(Clone, Debug)]
struct GatedAttention {
    inner: SamVisionAttentionSplit,
    gate: Linear,
}

module_tree!(GatedAttention { inner => "", gate });

impl GatedAttention {
    fn around(inner: SamVisionAttentionSplit) -> Result<Self> {
        let (size, weight) = (inner.proj.in_dim(), &inner.proj.weight);
        let gate = Linear::load(size, size, VarBuilder::zeros(weight.dtype(), weight.device()))?;
        Ok(Self { inner, gate })
    }
}

impl VisionAttention for GatedAttention {
    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let gate = (candle_nn::ops::sigmoid(&self.gate.forward(x, mode)?)? * 2.0)?;
        let attended = (self.inner.attend(x, mode)? * gate)?;
        self.inner.proj.forward(&attended, mode)
    }
}

fn main() -> Result<()> {
    let config = small_config();
    let mut model =
        SamModel::new(&config, AttentionKind::Split, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    model.randomize(0, 0.2)?;
    let (input, target) = example(&config)?;
    let before = model.forward(&input, Mode::Eval)?.pred_masks;

    let vision = &config.vision_config;
    for index in (0..vision.num_hidden_layers).filter(|&index| vision.window(index).is_none()) {
        let layer = &mut model.vision_encoder.layers[index];
        let ours = (layer.attn.as_ref() as &dyn Any).downcast_ref::<SamVisionAttentionSplit>();
        let ours = ours.context("the layer's attention is not the split one")?.clone();
        layer.attn = Box::new(GatedAttention::around(ours)?);
    }
    let with_gates = model.forward(&input, Mode::Eval)?.pred_masks;
    let change = (&before - &with_gates)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    println!("an open gate changes the masks by {change:.1e} at most");
    ensure!(change < 1e-5, "an open gate must change nothing");

    set_trainable(&mut model, |name| name.contains(".gate."))?;
    let variables = trainable_variables(&model)?;
    let loss = |model: &SamModel| -> Result<Tensor> {
        let masks = model.forward(&input, Mode::Train { seed: 0 })?.pred_masks;
        Ok(candle_nn::loss::binary_cross_entropy_with_logit(&masks, &target)?)
    };
    let first = loss(&model)?;
    let gradients = first.backward()?;
    for (name, variable) in &variables {
        let gradient =
            gradients.get(variable).with_context(|| format!("{name} has no gradient"))?;
        let norm = gradient.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
        println!("gradient norm {norm:.2e}  {name} {:?}", variable.dims());
        ensure!(norm > 0.0, "{name} has a zero gradient");
    }
    let mut optimizer = AdamW::new(variables, AdamWConfig { lr: 0.05, ..Default::default() })?;
    optimizer.step(&gradients)?;
    let (first, second) = (first.to_scalar::<f32>()?, loss(&model)?.to_scalar::<f32>()?);
    println!("loss {first:.6} -> {second:.6} after one step");
    ensure!(second < first, "the step must lower the loss");
    Ok(())
}

/// Two layers, the second with global attention, over a grid of 8 x 8 patches.
fn small_config() -> SamConfig {
    let mut config = SamConfig::default();
    let (vision, prompt) = (&mut config.vision_config, &mut config.prompt_encoder_config);
    (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) = (32, 2, 2);
    (vision.image_size, vision.patch_size, vision.window_size) = (64, 8, 3);
    (vision.output_channels, vision.num_pos_feats) = (32, 16);
    vision.global_attn_indexes = vec![1];
    (prompt.hidden_size, prompt.image_size, prompt.patch_size) = (32, 64, 8);
    (config.mask_decoder_config.hidden_size, config.mask_decoder_config.mlp_dim) = (32, 64);
    config
}

/// A bright disc on a dark ground, a point on it, and its mask.
fn example(config: &SamConfig) -> Result<(SamInput, Tensor)> {
    let side = config.vision_config.image_size;
    let disc = |side: usize| -> candle_core::Result<Tensor> {
        let inside = |i: usize| {
            let offset = |j: usize| (j as f32 + 0.5) / side as f32 - 0.5;
            f32::from(u8::from(offset(i % side).hypot(offset(i / side)) < 0.25))
        };
        let pixels: Vec<f32> = (0..side * side).map(inside).collect();
        Tensor::from_vec(pixels, (1, 1, side, side), &Device::Cpu)
    };
    let middle = side as f32 / 2.0;
    let input = SamInput {
        pixel_values: Some(disc(side)?.repeat((1, 3, 1, 1))?),
        input_points: Some(Tensor::from_vec(vec![middle; 2], (1, 1, 1, 2), &Device::Cpu)?),
        multimask_output: false,
        ..Default::default()
    };
    let target = disc(4 * config.vision_config.grid_size())?.unsqueeze(0)?;
    Ok((input, target))
}
