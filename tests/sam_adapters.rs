//! Adapters of every kind on the whole model against PEFT in f64: evaluation, training with dropout, gradients, merge.

mod common;

use anyhow::Result;
use candle_core::Device;
use candle_sam_lora::lora;
use candle_sam_lora::nn::{named_parameters, Mode};
use common::adapters::{adapted, errors, folder, read, run, KINDS, TIMES_PYTORCH};
use common::model::{Tensors, Worst};

/// A merged weight is a sum of at most four products and the weight, then a norm with DoRA: eight roundings of 2^-24.
const WEIGHT_TOLERANCE: f64 = 4.8e-7;

#[test]
fn adapters_of_every_kind_equal_peft() -> Result<()> {
    let inputs = read(folder("inputs.safetensors"), &Device::Cpu)?;
    for (kind, output_error, gradient_error) in KINDS {
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
        worst.assert_within(TIMES_PYTORCH * output_error);
        worst_gradients.assert_within(TIMES_PYTORCH * gradient_error);
        worst_weights.assert_within(WEIGHT_TOLERANCE);
    }
    Ok(())
}
