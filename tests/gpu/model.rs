//! The whole model on the GPU: masks and scores of the fixtures against PyTorch in f64, gradients against the CPU's.

use crate::common::adapters;
use crate::common::model::{
    error_relative_to, measured_by, model, model_on, read, scalars, Tensors, Worst,
};
use crate::watchdog::unwatched;
use crate::{trial, with_each};
use anyhow::Context;
use candle_core::{DType, Device, Error, Tensor};
use candle_sam_lora::nn::{named_parameters, set_trainable, Mode};
use candle_sam_lora::sam::{AttentionKind, SamInput, SamModel};
use libtest_mimic::Trial;

/// Twice the CPU's 5.4e-6 (tests/sam/model.rs): the same arithmetic in f32, summed in cuBLAS' order.
const VALUES: f64 = 1.1e-5;
/// Likewise twice the CPU's 7.6e-6.
const GRADIENTS: f64 = 1.6e-5;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for name in ["tiny", "slim", "plain"] {
        for kind in [AttentionKind::Fused, AttentionKind::Split] {
            trials.push(trial(format!("model {name} {kind:?}"), move |device| {
                with_each(device, || values(name, kind, device).map_err(Error::wrap))
            }));
        }
    }
    for kind in adapters::KINDS {
        trials.push(trial(format!("model adapter {}", kind.name), move |device| {
            with_each(device, || adapter(kind, device).map_err(Error::wrap))
        }));
    }
    trials.push(trial("model gradients".to_string(), |device| {
        with_each(device, || gradients(device).map_err(Error::wrap))
    }));
    trials.push(trial("model unknown labels give no number".to_string(), |device| {
        unknown_label(device).map_err(Error::wrap)
    }));
    trials
}

/// The input of a case on a device.
fn input(name: &str, case: &str, device: &Device) -> anyhow::Result<SamInput> {
    let io = read(name, "io.safetensors")?;
    let tensor = |key: &str| io.get(key).map(|t| t.to_device(device)).transpose();
    let of_case = |key: &str| tensor(&format!("{case}/{key}"));
    let multimask = scalars(name, case)?["multimask_output"].as_bool();
    Ok(SamInput {
        pixel_values: tensor("encoder/pixel_values")?,
        image_embeddings: None,
        input_points: of_case("input_points")?,
        input_labels: of_case("input_labels")?,
        input_boxes: of_case("input_boxes")?,
        input_masks: of_case("input_masks")?,
        multimask_output: multimask.context("no multimask_output")?,
    })
}

fn values(name: &str, kind: AttentionKind, device: &Device) -> anyhow::Result<()> {
    let (io, model) = (read(name, "io.safetensors")?, model_on(device, name, kind, DType::F32)?);
    let mut worst = Worst::default();
    for case in ["points_boxes", "points_masks", "single"] {
        let out = model.forward(&input(name, case, device)?, Mode::Eval)?;
        for (what, got) in [("pred_masks", &out.pred_masks), ("iou_scores", &out.iou_scores)] {
            worst.compare(what, got, &io[&format!("{case}/{what}")])?;
        }
    }
    worst.assert_within(VALUES);
    Ok(())
}

/// A GPU cannot refuse a label without a wait, so the scores of its prompt are NaN, and those of others are not.
fn unknown_label(device: &Device) -> anyhow::Result<()> {
    let model = model_on(device, "tiny", AttentionKind::Fused, DType::F32)?;
    let pixels = read("tiny", "io.safetensors")?["encoder/pixel_values"].to_device(device)?;
    let batch = pixels.dim(0)?;
    let labels = Tensor::new(&[1f32, 2.0], device)?.reshape((1, 2, 1))?;
    let input = SamInput {
        pixel_values: Some(pixels),
        input_points: Some(Tensor::ones((batch, 2, 1, 2), DType::F32, device)?),
        input_labels: Some(labels.broadcast_as((batch, 2, 1))?.contiguous()?),
        ..SamInput::default()
    };
    let scores = model.forward(&input, Mode::Eval)?.iou_scores.to_vec3::<f32>()?;
    for prompts in scores {
        let nan: Vec<bool> = prompts.concat().iter().map(|score| score.is_nan()).collect();
        let masks = nan.len() / 2;
        anyhow::ensure!(!nan[..masks].contains(&true) && !nan[masks..].contains(&false), "{nan:?}");
    }
    Ok(())
}

/// Outputs, training with the CPU's dropout masks and gradients of an adapter against PEFT in f64.
fn adapter(kind: adapters::Kind, device: &Device) -> anyhow::Result<()> {
    /// Multiple of the CPU's bounds: sums in yet another order.
    const TIMES_CPU: f64 = 2.0;
    let inputs = adapters::read(adapters::folder("inputs.safetensors"), device)?;
    let model = adapters::adapted(kind.name, device)?;
    let [outputs, gradients] = adapters::errors(kind.name, &model, &inputs)?;
    let times = TIMES_CPU * adapters::TIMES_PYTORCH;
    outputs.assert_within(times * kind.outputs);
    gradients.assert_within(times * kind.gradients);
    Ok(())
}

/// Every parameter's gradient of the masks' sum of squares.
fn gradients(device: &Device) -> anyhow::Result<()> {
    let run = |mut model: SamModel, device: &Device| -> anyhow::Result<Vec<(String, Tensor)>> {
        set_trainable(&mut model, |_| true)?;
        let out = model.forward(&input("tiny", "points_boxes", device)?, Mode::Eval)?;
        let gradients = out.pred_masks.sqr()?.mean_all()?.backward()?;
        let mut found = Vec::new();
        for (name, parameter) in named_parameters(&model) {
            if let Some(gradient) = gradients.get(&parameter) {
                found.push((name, gradient.to_device(&Device::Cpu)?));
            }
        }
        Ok(found)
    };
    let on_cpu = model("tiny", AttentionKind::Split, DType::F32)?;
    let expected = unwatched(|| run(on_cpu, &Device::Cpu))?;
    let got = run(model_on(device, "tiny", AttentionKind::Split, DType::F32)?, device)?;
    assert_eq!(got.len(), expected.len(), "parameters with a gradient");
    let scales: Tensors = expected.iter().cloned().collect();
    let mut worst = Worst::default();
    for ((name, got), (expected_name, expected)) in got.iter().zip(&expected) {
        assert_eq!(name, expected_name);
        let scale = &scales[&measured_by(name)];
        worst.add("gradients", error_relative_to(scale, got, expected).context(name.clone())?);
    }
    worst.assert_within(GRADIENTS);
    Ok(())
}
