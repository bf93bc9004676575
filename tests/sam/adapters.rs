//! Adapters of every kind on the whole model against PEFT in f64: evaluation, training with dropout, gradients, merge.

use crate::common;
use crate::common::adapters::{adapted, errors, folder, read, run, Kind, KINDS, TIMES_PYTORCH};
use crate::common::model::{self, Tensors, Worst};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_sam_lora::lora;
use candle_sam_lora::nn::{named_parameters, trainable_variables, Linear, Mode};
use candle_sam_lora::sam::{AttentionKind, SamVisionAttentionSplit, VisionAttention};
use std::any::Any;

/// A merged weight is a sum of at most four products and the weight, then a norm with DoRA: eight roundings of 2^-24.
const WEIGHT_TOLERANCE: f64 = 4.8e-7;

#[test]
fn adapters_of_every_kind_equal_peft() -> Result<()> {
    let inputs = read(folder("inputs.safetensors"), &Device::Cpu)?;
    for Kind { name: kind, outputs, gradients } in KINDS {
        let io = read(folder(kind).join("io.safetensors"), &Device::Cpu)?;
        let mut model = adapted(kind, &Device::Cpu)?;
        let [mut worst, worst_gradients] = errors(kind, &model, &inputs)?;
        let mut worst_weights = Worst::default();
        lora::merge(&mut model)?;
        let merged = run(&model, &inputs, Mode::Eval)?;
        let want = &io["merged/image_embeddings"];
        worst.compare(&format!("{kind} merged"), &merged["image_embeddings"], want)?;
        let parameters: Tensors = named_parameters(&model).into_iter().collect();
        for (name, want) in &io {
            if let Some(name) = name.strip_prefix("merged/weight/") {
                worst_weights.compare(
                    &format!("{kind} merged weights"),
                    &parameters[name],
                    want,
                )?;
            }
        }
        worst.assert_within(TIMES_PYTORCH * outputs);
        worst_gradients.assert_within(TIMES_PYTORCH * gradients);
        worst_weights.assert_within(WEIGHT_TOLERANCE);
    }
    Ok(())
}

/// The output of a layer with just these of its adapters in use.
fn with_active(layer: &Linear, active: &[&str], x: &Tensor) -> candle_core::Result<Tensor> {
    let mut layer = layer.clone();
    layer.adapters.active = active.iter().map(|name| name.to_string()).collect();
    layer.forward(x, Mode::Eval)
}

/// To the attention's residual branch, two adapters in use are one of the sum of their ranks. It gives the bits of the
/// single operations and, but for rounding, what either adds by itself.
#[test]
fn two_adapters_at_once_are_one_operation() -> Result<()> {
    let mut model = model::model("tiny", AttentionKind::Split, DType::F32)?;
    lora::load_named_adapter(&mut model, "plain", folder("lora_qv"))?;
    lora::load_named_adapter(&mut model, "stable", folder("rslora"))?;
    lora::set_adapter(&mut model, &["plain", "stable"])?;
    let variables = trainable_variables(&model)?;
    let mut worst = <[Worst; 2]>::default();
    for layer in &model.vision_encoder.layers {
        let attn = (layer.attn.as_ref() as &dyn Any)
            .downcast_ref::<SamVisionAttentionSplit>()
            .context("split attention")?;
        let x = common::random(7, (2, 8, 8, 32));
        let weight = common::random(8, (2, 8, 8, 32));
        let normed = layer.layer_norm1.forward(&x)?;
        let branch = layer.attn.forward_normed(&x, &layer.layer_norm1, Mode::Eval)?;
        let single = (&x + VisionAttention::forward(attn, &normed, Mode::Eval)?)?;
        let apart = |part: &Linear| -> Result<Tensor> {
            let both = (with_active(part, &["plain"], &normed)?
                + with_active(part, &["stable"], &normed)?)?;
            Ok((both - with_active(part, &[], &normed)?)?)
        };
        let qkv = [apart(&attn.q)?, apart(&attn.k)?, apart(&attn.v)?];
        let biases = [&attn.q, &attn.k, &attn.v].map(|part| part.bias.clone());
        let biases = biases.into_iter().collect::<Option<Vec<_>>>().context("biases")?;
        let pad = Tensor::cat(&biases, 0)?;
        let out = attn.core.forward(&Tensor::cat(&qkv, D::Minus1)?, Some(&pad), Mode::Eval)?;
        let apart = (&x + attn.proj.forward(&out, Mode::Eval)?)?;

        assert_eq!(common::values(&branch), common::values(&single));
        worst[0].compare("outputs", &branch, &apart)?;
        let gradients = |out: &Tensor| (out * &weight)?.sum_all()?.backward();
        let [branch, single, apart] =
            [gradients(&branch)?, gradients(&single)?, gradients(&apart)?];
        let mut compared = 0;
        for (name, variable) in &variables {
            let Some(got) = branch.get(variable) else { continue };
            let single = single.get(variable).with_context(|| name.clone())?;
            assert_eq!(common::values(got), common::values(single), "{name}");
            worst[1].compare("gradients", got, apart.get(variable).context("a gradient")?)?;
            compared += 1;
        }
        assert_eq!(compared, 8, "A and B of q and v of both");
    }
    let Kind { outputs, gradients, .. } = KINDS[2];
    worst[0].assert_within(TIMES_PYTORCH * outputs);
    worst[1].assert_within(TIMES_PYTORCH * gradients);
    Ok(())
}
