//! A hack of the attention itself: a learned gate on what each token takes from the others.
//!
//! ```text
//! out = proj(2 sigmoid(x W_g^T + b_g) * attention(x))        W_g = 0, b_g = 0 at first, so the gate is 1
//! ```
//! The gate sits between SAM's attention and its last projection (Qiu et al., "Gated attention for large language
//! models", 2025). It goes into the layers with global attention of a loaded model, and is all that is trained.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, VarBuilder};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{set_trainable, trainable_variables, Linear, Mode};
use candle_sam_lora::sam::{
    read_image, AttentionKind, SamInput, SamModel, SamProcessor, SamVisionAttentionSplit,
    VisionAttention,
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

impl VisionAttention for GatedAttention {
    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let gate = (candle_nn::ops::sigmoid(&self.gate.forward(x, mode)?)? * 2.0)?;
        let attended = (self.inner.attend(x, mode)? * gate)?;
        self.inner.proj.forward(&attended, mode)
    }
}

pub fn main() -> Result<()> {
    let (folder, device) = ("assets/tiny-sam", Device::Cpu);
    let mut model = SamModel::from_pretrained(folder, AttentionKind::Split, DType::F32, &device)?;
    let image = read_image("assets/photos/nuclei/train/images/nuclei_r0c0.png")?;
    let processor = SamProcessor::load(folder, model.config().vision_config.image_size)?;
    let pixel_values = Some(processor.preprocess(&image, &device)?.0);
    let input = SamInput { pixel_values, multimask_output: false, ..Default::default() };
    let before = model.forward(&input, Mode::Eval)?.pred_masks;

    let vision = model.config().vision_config.clone();
    for index in (0..vision.num_hidden_layers).filter(|&index| vision.window(index).is_none()) {
        let layer = &mut model.vision_encoder.layers[index];
        let inner = (layer.attn.as_ref() as &dyn Any).downcast_ref::<SamVisionAttentionSplit>();
        let inner = inner.context("the layer's attention is not the split one")?.clone();
        let width = inner.proj.in_dim();
        let gate = Linear::load(width, width, VarBuilder::zeros(DType::F32, &device))?;
        layer.attn = Box::new(GatedAttention { inner, gate });
    }
    let gated = model.forward(&input, Mode::Eval)?.pred_masks;
    let change = (&before - &gated)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("an open gate changes the masks by {change:.1e} at most");
    ensure!(change < 1e-3, "an open gate must change nothing");

    set_trainable(&mut model, |name| name.contains(".gate."))?;
    let variables = trainable_variables(&model)?;
    let mean_square = || -> candle_core::Result<Tensor> {
        model.forward(&input, Mode::Train { seed: 0 })?.pred_masks.sqr()?.mean_all()
    };
    let loss = mean_square()?; // yours
    let gradients = loss.backward()?;
    for (name, variable) in &variables {
        let gradient = gradients.get(variable).with_context(|| format!("{name}: no gradient"))?;
        let norm = gradient.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
        println!("gradient norm {norm:.2e}  {name} {:?}", variable.dims());
        ensure!(norm > 0.0, "{name} has a zero gradient");
    }
    AdamW::new(variables, AdamWConfig { lr: 1e-3, ..Default::default() })?.step(&gradients)?;
    let (first, second) = (loss.to_scalar::<f32>()?, mean_square()?.to_scalar::<f32>()?);
    println!("loss {first:.4} -> {second:.4} after one step");
    ensure!(second < first, "the step must lower the loss");
    Ok(())
}
