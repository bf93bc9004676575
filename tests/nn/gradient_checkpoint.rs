//! Gradient checkpointing changes no bit of the loss or of any gradient, whatever is trained, and refuses what it
//! would get wrong.

use crate::common::model;
use crate::common::model::bits;
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::load_adapter;
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{
    gradient_checkpoint, set_trainable, trainable_variables, Buffer, LayerNorm, Linear, Mode,
};
use candle_sam_lora::sam::{
    checkpoint, in_windows, AttentionKind, LayerContext, SamInput, SamModel, VisionAttention,
};
use std::collections::BTreeMap;

const MODE: Mode = Mode::Train { seed: 11 };

/// The bits of the loss and of the gradient of every trainable parameter.
fn all_bits(model: &SamModel, input: &SamInput) -> Result<BTreeMap<String, Vec<u32>>> {
    let loss = model.forward(input, MODE)?.pred_masks.to_dtype(DType::F32)?.sqr()?.mean_all()?;
    let gradients = loss.backward()?;
    let mut all = BTreeMap::from([("loss".to_string(), bits(&loss)?)]);
    for (name, var) in trainable_variables(model)? {
        if let Some(gradient) = gradients.get(&var) {
            all.insert(name, bits(gradient)?);
        }
    }
    Ok(all)
}

fn check(what: &str, mut model: SamModel, at_least: usize) -> Result<()> {
    let inputs = candle_sam_lora::files::read_tensors(
        model::fixtures().join("adapters/inputs.safetensors"),
        &Device::Cpu,
    )?;
    let input = SamInput {
        pixel_values: inputs.get("pixel_values").cloned(),
        input_points: inputs.get("input_points").cloned(),
        input_labels: inputs.get("input_labels").cloned(),
        ..Default::default()
    };
    let plain = all_bits(&model, &input)?;
    model.vision_encoder.gradient_checkpointing = true;
    let checkpointed = all_bits(&model, &input)?;
    assert!(plain.len() > at_least, "{what}: {} gradients", plain.len());
    for (name, bits) in &plain {
        assert!(checkpointed.get(name) == Some(bits), "{what}: {name} differs");
    }
    assert_eq!(plain.len(), checkpointed.len(), "{what}");
    Ok(())
}

#[test]
fn adapters_of_every_kind_get_the_same_bits() -> Result<()> {
    for kind in [
        "lora_qv",
        "lora_qkv",
        "dora",
        "dora_dropout",
        "lora_bias",
        "bias_all",
        "modules_to_save",
        "fused_qkv",
    ] {
        let attention =
            if kind == "fused_qkv" { AttentionKind::Fused } else { AttentionKind::Split };
        let mut model = model::model("tiny", attention, DType::F32)?;
        load_adapter(&mut model, model::fixtures().join("adapters").join(kind))?;
        check(kind, model, 5)?;
    }
    Ok(())
}

#[test]
fn full_fine_tuning_and_half_precision_get_the_same_bits() -> Result<()> {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let mut model = model::model("tiny", AttentionKind::Split, dtype)?;
        set_trainable(&mut model, |name| name.starts_with("vision_encoder"))?;
        check(&format!("all of the encoder, {dtype:?}"), model, 50)?;
    }
    Ok(())
}

/// An attention that is not ours: mixes nothing but channels, in windows.
#[derive(Clone, Debug)]
struct ChannelMix {
    window: Option<usize>,
    proj: Linear,
}

module_tree!(ChannelMix { proj });

impl VisionAttention for ChannelMix {
    fn forward(&self, x: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        in_windows(x, self.window, |windows| self.proj.forward(windows, mode))
    }
}

#[test]
fn a_users_attention_gets_the_same_bits() -> Result<()> {
    let build = |layer: &LayerContext<'_>| -> candle_core::Result<Box<dyn VisionAttention>> {
        let proj = layer.linear("proj", layer.config.hidden_size, true)?;
        Ok(Box::new(ChannelMix { window: layer.window(), proj }))
    };
    let config = model::config("tiny")?;
    let mut model =
        SamModel::with_attention(&config, VarBuilder::zeros(DType::F32, &Device::Cpu), build)?;
    model.randomize(3, 0.1)?;
    set_trainable(&mut model, |name| name.contains("attn.proj"))?;
    check("a user's attention", model, 3)
}

#[test]
fn layers_below_the_first_trainable_one_cost_no_graph() -> Result<()> {
    let mut model = model::model("tiny", AttentionKind::Split, DType::F32)?;
    let last = model.vision_encoder.layers.len() - 1;
    set_trainable(&mut model, |name| name.contains(&format!("layers.{last}.attn.q")))?;
    let mut encoder = model.vision_encoder;
    encoder.gradient_checkpointing = true;
    let io = model::read("tiny", "io.safetensors")?;
    let states = encoder.forward_with_states(&io["encoder/pixel_values"], false, MODE)?;
    let tracked: Vec<bool> = states.hidden_states.iter().map(Tensor::track_op).collect();
    assert!(tracked[..=last].iter().all(|tracked| !tracked) && tracked[last + 1], "{tracked:?}");
    Ok(())
}

/// One operation for the module, and a view is as good a result as any.
#[test]
fn views_and_inputs_without_gradient_are_welcome() -> Result<()> {
    let mut norm = LayerNorm::new(
        Tensor::ones(6, DType::F32, &Device::Cpu)?,
        Tensor::zeros(6, DType::F32, &Device::Cpu)?,
        1e-6,
    );
    let x = Var::from_tensor(&Tensor::arange(0f32, 24., &Device::Cpu)?.reshape((4, 6))?.sin()?)?;
    let tail = |norm: &LayerNorm, x: &Tensor| norm.forward(x)?.narrow(0, 1, 2)?.t();
    for (trained, input) in
        [(true, x.as_tensor().clone()), (true, x.detach()), (false, x.as_tensor().clone())]
    {
        set_trainable(&mut norm, |_| trained)?;
        let run = |checkpointed: bool| -> Result<_> {
            let y = match checkpointed {
                true => gradient_checkpoint(&norm, &input, tail)?,
                false => tail(&norm, &input)?,
            };
            let gradients = y.exp()?.sum_all()?.backward()?;
            let mut found = vec![y.to_vec2::<f32>()?];
            for tensor in [&input, &norm.weight, &norm.bias] {
                found.extend(
                    gradients.get(tensor).map(|g| g.reshape(((), 6))?.to_vec2()).transpose()?,
                );
            }
            Ok(found)
        };
        assert_eq!(run(true)?, run(false)?);
    }
    Ok(())
}

#[test]
fn what_would_get_no_gradient_is_refused() -> Result<()> {
    let device = &Device::Cpu;
    let x = Var::ones((2, 3), DType::F32, device)?;
    let hidden = Var::ones(3, DType::F32, device)?.into_inner();
    let buffer = Buffer(Tensor::ones(3, DType::F32, device)?);
    let closure = move |_: &Buffer, x: &Tensor| x.broadcast_mul(&hidden);
    let message =
        gradient_checkpoint(&buffer, &x, closure).map(drop).expect_err("hidden").to_string();
    assert!(message.contains("its tree of parameters does not show"), "{message}");

    let mut norm = LayerNorm::new(
        Tensor::ones(3, DType::F32, device)?,
        Tensor::zeros(3, DType::F32, device)?,
        1e-6,
    );
    set_trainable(&mut norm, |_| true)?;
    let y = gradient_checkpoint(&norm, &x, |norm, x| x.broadcast_mul(&norm.weight))?;
    let message = y.sum_all()?.backward().map(drop).expect_err("unused").to_string();
    assert!(message.contains("parameter bias got no gradient"), "{message}");
    Ok(())
}

#[test]
fn checkpoints_of_weights_load_into_a_checkpointing_encoder() -> Result<()> {
    let mut model = model::zeros(&model::config("tiny")?, AttentionKind::Split)?;
    model.vision_encoder.gradient_checkpointing = true;
    checkpoint::load(&mut model, model::folder("tiny"))?;
    let io = model::read("tiny", "io.safetensors")?;
    let plain = model::model("tiny", AttentionKind::Split, DType::F32)?;
    let run =
        |model: &SamModel| model.vision_encoder.forward(&io["encoder/pixel_values"], Mode::Eval);
    assert_eq!(model::relative_error(&run(&model)?, &run(&plain)?)?, 0.0);
    Ok(())
}
