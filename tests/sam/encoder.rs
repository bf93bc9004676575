//! The image encoder against PyTorch in f64, in both forms of attention. Three models differ in grid, head width,
//! padding and positions. An attention that is not ours is among the tests.

use crate::common::model;
use crate::common::model::{model, read, relative_error, Worst};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{set_trainable, Linear, Mode};
use candle_sam_lora::sam::{
    checkpoint, in_windows, AttentionKind, LayerContext, RelPosCore, SamModel, SamVisionAttention,
    SamVisionAttentionSplit, VisionAttention,
};
use std::any::Any;

const KINDS: [AttentionKind; 2] = [AttentionKind::Fused, AttentionKind::Split];

/// Three layers are some 20 steps deep (projections, softmax, norms), each over sums of up to 200 products. Roundings
/// of 2^-24 add up as a random walk: sqrt(20 * 200) * 6e-8 = 3.8e-6 of the largest element.
const F32_TOLERANCE: f64 = 3.8e-6;

#[test]
fn states_and_embeddings_equal_pytorch() -> Result<()> {
    let mut worst = Worst::default();
    for name in ["tiny", "slim", "plain"] {
        let io = read(name, "io.safetensors")?;
        for kind in KINDS {
            let encoder = model(name, kind, DType::F32)?.vision_encoder;
            let out =
                encoder.forward_with_states(&io["encoder/pixel_values"], false, Mode::Eval)?;
            assert!(out.attentions.is_empty());
            assert_eq!(out.hidden_states.len(), encoder.layers.len() + 1);
            for (i, state) in out.hidden_states.iter().enumerate() {
                let want = &io[&format!("encoder/hidden_states.{i}")];
                worst.compare(&format!("{name} {kind:?} hidden states"), state, want)?;
            }
            let want = &io["encoder/image_embeddings"];
            let what = format!("{name} {kind:?} image embeddings");
            worst.compare(&what, &out.image_embeddings, want)?;
            let plain = encoder.forward(&io["encoder/pixel_values"], Mode::Eval)?;
            assert_eq!(relative_error(&plain, &out.image_embeddings)?, 0.0);
        }
    }
    worst.assert_within(F32_TOLERANCE);
    Ok(())
}

#[test]
fn attention_weights_equal_pytorch() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let mut worst = Worst::default();
    for kind in KINDS {
        let encoder = model("tiny", kind, DType::F32)?.vision_encoder;
        let out = encoder.forward_with_states(&io["encoder/pixel_values"], true, Mode::Eval)?;
        assert_eq!(out.attentions.len(), encoder.layers.len());
        for (i, weights) in out.attentions.iter().enumerate() {
            let want = &io[&format!("encoder/attentions.{i}")];
            worst.compare(&format!("{kind:?} attentions"), weights, want)?;
        }
        worst.compare(
            &format!("{kind:?} image embeddings"),
            &out.image_embeddings,
            &io["encoder/image_embeddings"],
        )?;
    }
    worst.assert_within(F32_TOLERANCE);
    Ok(())
}

/// Half precision rounds at every step to 2^-11 (f16) or 2^-8 (bf16) of an element. Errors of about 20 steps add up
/// as a random walk, sqrt(20) = 4.5 units. As much again is for elements that are larger inside than at the end.
#[test]
fn half_precision_follows_f32() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    for (dtype, unit) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        let encoder = model("tiny", AttentionKind::Split, dtype)?.vision_encoder;
        let out = encoder.forward(&io["encoder/pixel_values"], Mode::Eval)?;
        assert_eq!(out.dtype(), dtype);
        let error = relative_error(&out, &io["encoder/image_embeddings"])?;
        println!("{dtype:?}: largest relative error {error:.2e} = {:.1} units", error / unit);
        assert!(error < 9.0 * unit, "{dtype:?}: {error:.3e}");
    }
    Ok(())
}

#[test]
fn attention_dropout_acts_in_training_alone() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let pixels = &io["encoder/pixel_values"];
    let mut config = model::config("tiny")?.vision_config;
    config.attention_dropout = 0.2;
    let kind = AttentionKind::Split;
    let mut model = model("tiny", kind, DType::F32)?;
    let eval = model.vision_encoder.forward(pixels, Mode::Eval)?;
    for (index, layer) in model.vision_encoder.layers.iter_mut().enumerate() {
        let attention = layer.attn.as_mut() as &mut dyn Any;
        let ours =
            attention.downcast_mut::<SamVisionAttentionSplit>().expect("the split attention");
        ours.core.dropout = config.attention_dropout;
        let name = format!("vision_encoder.layers.{index}.attn");
        assert_eq!(ours.core.stream, candle_sam_lora::philox::stream_of(&name));
    }
    let encoder = model.vision_encoder;
    let train = |seed| encoder.forward(pixels, Mode::Train { seed });
    assert_eq!(relative_error(&encoder.forward(pixels, Mode::Eval)?, &eval)?, 0.0);
    assert_eq!(relative_error(&train(1)?, &train(1)?)?, 0.0);
    assert!(relative_error(&train(1)?, &eval)? > 1e-3);
    assert!(relative_error(&train(1)?, &train(2)?)? > 1e-3);
    Ok(())
}

/// An attention written as Hugging Face's is: it is handed padded windows and knows nothing of the grid.
#[derive(Clone, Debug)]
struct WindowAttention {
    core: RelPosCore,
    window: Option<usize>,
    qkv: Linear,
    proj: Linear,
}

module_tree!(WindowAttention { core => "", qkv, proj });

impl WindowAttention {
    fn new(layer: &LayerContext<'_>) -> candle_core::Result<Self> {
        let SamVisionAttention { core, qkv, proj } = SamVisionAttention::new(layer)?;
        Ok(Self { window: layer.window(), core: RelPosCore { window: None, ..core }, qkv, proj })
    }
}

impl VisionAttention for WindowAttention {
    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        in_windows(x, self.window, |windows| {
            let qkv = self.qkv.forward(windows, mode)?;
            self.proj.forward(&self.core.forward(&qkv, None, mode)?, mode)
        })
    }
}

#[test]
fn attention_over_padded_windows_equals_ours() -> Result<()> {
    let mut worst = Worst::default();
    for name in ["tiny", "slim"] {
        let io = read(name, "io.safetensors")?;
        let mut model = model(name, AttentionKind::Fused, DType::F32)?;
        let config = model::config(name)?;
        // Built in for all layers ...
        let mut windowed = SamModel::with_attention(
            &config,
            VarBuilder::zeros(DType::F32, &Device::Cpu),
            |layer| Ok(Box::new(WindowAttention::new(layer)?)),
        )?;
        checkpoint::load(&mut windowed, model::folder(name))?;
        // ... or put in the place of one.
        std::mem::swap(
            &mut model.vision_encoder.layers[1].attn,
            &mut windowed.vision_encoder.layers[1].attn,
        );
        for (what, model) in [("one of ours replaced", &model), ("all but one theirs", &windowed)] {
            let got = model.vision_encoder.forward(&io["encoder/pixel_values"], Mode::Eval)?;
            worst.compare(&format!("{name}: {what}"), &got, &io["encoder/image_embeddings"])?;
        }
        let weights = windowed.vision_encoder.layers[0]
            .attn
            .forward_with_weights(&io["encoder/hidden_states.0"], Mode::Eval);
        let message = weights.map(|_| ()).expect_err("gave weights").to_string();
        assert!(message.contains("WindowAttention"), "{message}");
    }
    worst.assert_within(F32_TOLERANCE);
    Ok(())
}

#[test]
fn images_of_another_size_are_refused() -> Result<()> {
    let encoder = model("slim", AttentionKind::Split, DType::F32)?.vision_encoder;
    for shape in [&[1, 3, 40, 48][..], &[1, 4, 40, 40], &[3, 40, 40], &[1, 3, 0, 40]] {
        let pixels = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        let message =
            encoder.forward(&pixels, Mode::Eval).map(|_| ()).expect_err("accepted").to_string();
        assert!(message.contains("[B, 3, 40, 40]"), "{message}");
        assert!(message.contains(&format!("{shape:?}")), "{message}");
    }
    Ok(())
}

#[test]
fn a_frozen_encoder_costs_no_graph() -> Result<()> {
    let io = read("tiny", "io.safetensors")?;
    let mut model = model("tiny", AttentionKind::Split, DType::F32)?;
    let frozen = model.vision_encoder.forward(&io["encoder/pixel_values"], Mode::Eval)?;
    assert!(!frozen.track_op());
    set_trainable(&mut model, |name| name.ends_with("layers.0.attn.q.weight"))?;
    let tracked = model.vision_encoder.forward(&io["encoder/pixel_values"], Mode::Eval)?;
    assert!(tracked.track_op());
    // A trained weight is multiplied by candle, whose sums are ours on some machines only.
    assert!(relative_error(&frozen, &tracked)? < F32_TOLERANCE);
    Ok(())
}
