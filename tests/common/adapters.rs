//! The adapters of every kind that PEFT wrote, on the fixture model: what they are compared by, on any device.

use super::model::{self, gradient_errors, Tensors, Worst};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::lora;
use candle_sam_lora::nn::{named_parameters, Mode};
use candle_sam_lora::sam::{AttentionKind, SamInput, SamModel};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A kind of adapter, with the relative errors that PyTorch and PEFT themselves have in f32.
#[derive(Clone, Copy)]
pub struct Kind {
    /// The folder in `tests/fixtures/adapters`.
    pub name: &'static str,
    pub outputs: f64,
    pub gradients: f64,
}

/// Every kind, with the errors that tests/fixtures/f32_yardstick.py prints. Some adapters are strong and their
/// gradients ill-conditioned, so the model's depth alone says too little: 4.1e-5 here, where PyTorch has 2.9e-5.
pub const KINDS: [Kind; 16] = [
    Kind { name: "lora_qv", outputs: 1.4e-6, gradients: 8.9e-6 },
    Kind { name: "lora_qkv", outputs: 2.2e-6, gradients: 2.2e-5 },
    Kind { name: "rslora", outputs: 2.9e-6, gradients: 1.3e-5 },
    Kind { name: "dora", outputs: 7.6e-7, gradients: 2.2e-6 },
    Kind { name: "dora_dropout", outputs: 1.5e-6, gradients: 4.6e-6 },
    Kind { name: "lora_bias", outputs: 9.6e-7, gradients: 4.6e-6 },
    Kind { name: "bias_all", outputs: 1.4e-6, gradients: 8.1e-6 },
    Kind { name: "bias_lora_only", outputs: 1.0e-6, gradients: 5.1e-6 },
    Kind { name: "modules_to_save", outputs: 1.3e-6, gradients: 5.9e-6 },
    Kind { name: "save_prompt_encoder", outputs: 1.1e-6, gradients: 8.8e-6 },
    Kind { name: "save_composite_bias_all", outputs: 7.9e-7, gradients: 4.9e-6 },
    Kind { name: "save_both_embeddings", outputs: 7.7e-7, gradients: 4.1e-6 },
    Kind { name: "regex", outputs: 1.1e-6, gradients: 5.8e-6 },
    Kind { name: "patterns", outputs: 1.4e-6, gradients: 2.0e-5 },
    Kind { name: "mlp_and_decoder", outputs: 6.8e-6, gradients: 2.9e-5 },
    Kind { name: "fused_qkv", outputs: 2.3e-6, gradients: 9.2e-6 },
];

/// Two f32 programs round in different order, so neither need be the better one. The largest ratio seen is 1.7.
pub const TIMES_PYTORCH: f64 = 3.0;

pub fn folder(kind: &str) -> PathBuf {
    model::folder("").with_file_name("adapters").join(kind)
}

/// The tensors that PEFT computed with a kind, on the CPU; or the inputs, for `inputs.safetensors`.
pub fn read(path: PathBuf, device: &Device) -> Result<Tensors> {
    Ok(candle_sam_lora::files::read_tensors(&path, device)?)
}

/// The fixture model with an adapter.
pub fn adapted(kind: &str, device: &Device) -> Result<SamModel> {
    let attention = if kind == "fused_qkv" { AttentionKind::Fused } else { AttentionKind::Split };
    let mut adapted = model::model_on(device, "tiny", attention, DType::F32)?;
    lora::load_adapter(&mut adapted, folder(kind))?;
    Ok(adapted)
}

/// Image embeddings, masks and scores.
pub type Outputs = BTreeMap<&'static str, Tensor>;

/// The model's outputs on the inputs of a fixture, which are on its device.
pub fn run(model: &SamModel, inputs: &Tensors, mode: Mode) -> Result<Outputs> {
    let embeddings = model.vision_encoder.forward(&inputs["pixel_values"], mode)?;
    let out = model.forward(
        &SamInput {
            image_embeddings: Some(embeddings.clone()),
            input_points: inputs.get("input_points").cloned(),
            input_labels: inputs.get("input_labels").cloned(),
            input_boxes: inputs.get("input_boxes").cloned(),
            ..Default::default()
        },
        mode,
    )?;
    Ok(BTreeMap::from([
        ("image_embeddings", embeddings),
        ("pred_masks", out.pred_masks),
        ("iou_scores", out.iou_scores),
    ]))
}

/// The errors of outputs, in evaluation and training with dropout, and of gradients.
pub fn errors(kind: &str, model: &SamModel, inputs: &Tensors) -> Result<[Worst; 2]> {
    let [mut worst, mut worst_gradients] = <[Worst; 2]>::default();
    let path = folder(kind).join("io.safetensors");
    let io = read(path.clone(), &Device::Cpu)?;
    for (name, got) in run(model, inputs, Mode::Eval)? {
        worst.compare(&format!("{kind} eval"), &got, &io[&format!("eval/{name}")])?;
    }

    let seed = model::metadata(path)?["train"]["seed"].as_u64().context("no seed")?;
    let out = run(model, inputs, Mode::Train { seed })?;
    for (name, got) in &out {
        if let Some(want) = io.get(&format!("train/{name}")) {
            worst.compare(&format!("{kind} train"), got, want)?;
        }
    }
    let encoder_loss = (&out["image_embeddings"] * &inputs["G"])?.sum_all()?;
    compare_gradients(&mut worst_gradients, kind, model, &encoder_loss, &io, "train/grad/")?;
    if io.keys().any(|name| name.starts_with("train/full_grad/")) {
        let masks = (&out["pred_masks"] * &inputs["G_pred_masks"])?.sum_all()?;
        let scores = (&out["iou_scores"] * &inputs["G_iou_scores"])?.sum_all()?;
        let loss = ((encoder_loss + masks)? + scores)?;
        compare_gradients(&mut worst_gradients, kind, model, &loss, &io, "train/full_grad/")?;
    }
    Ok([worst, worst_gradients])
}

/// Every gradient PEFT has; what else is trainable has none, or zeros.
fn compare_gradients(
    worst: &mut Worst,
    kind: &str,
    model: &SamModel,
    loss: &Tensor,
    io: &Tensors,
    prefix: &str,
) -> Result<()> {
    let gradients = loss.backward()?;
    let plain = |(name, tensor): (String, Tensor)| (name.replace(".base_layer.", "."), tensor);
    let expected = model::below(io, &format!("{prefix}base_model.model."));
    let expected: Tensors = expected.into_iter().map(plain).collect();
    assert!(!expected.is_empty(), "{kind}: {prefix}");
    let parameters: Tensors = named_parameters(model).into_iter().collect();
    for name in expected.keys() {
        assert!(parameters.get(name).is_some_and(Tensor::is_variable), "{kind}: {name}");
    }
    for (_, error) in gradient_errors(model, &gradients, &expected).context(kind.to_string())? {
        worst.add(&format!("{kind} gradients"), error);
    }
    Ok(())
}
