//! Five steps of training SAM's adapters, against PyTorch with transformers, peft and torch.optim.AdamW.

use crate::common;
use candle_core::{DType, Tensor};
use candle_nn::Optimizer;
use candle_sam_lora::lora::load_adapter;
use candle_sam_lora::nn::{trainable_variables, Mode};
use candle_sam_lora::sam::{AttentionKind, SamInput};
use candle_sam_lora::train::{mask_loss, AdamW, AdamWConfig};

#[test]
fn five_steps_are_pytorchs() -> anyhow::Result<()> {
    let case = &common::cases("train/adamw.safetensors")[0];
    let mut model = common::model::model("tiny", AttentionKind::Split, DType::F32)?;
    load_adapter(&mut model, common::fixtures().join("adapters/lora_qv"))?;
    let parameters = trainable_variables(&model)?;
    let hyperparameters = AdamWConfig {
        lr: case.number("lr"),
        eps: case.number("eps"),
        weight_decay: case.number("weight_decay"),
        ..Default::default()
    };
    let mut optimizer = AdamW::new(parameters.clone(), hyperparameters)?;
    let input = SamInput {
        pixel_values: case.get("pixel_values"),
        input_points: case.get("input_points"),
        input_labels: case.get("input_labels"),
        multimask_output: false,
        ..Default::default()
    };
    let flat = |x: &Tensor| x.flatten(0, 2);
    let targets = flat(&case.tensor("targets"))?;
    let expected: Vec<f64> = common::values(&case.tensor("loss"));
    let mut errors = [0f64; 3];
    for (step, expected) in expected.iter().enumerate() {
        let mode = Mode::Train { seed: case.integer("seed") + step as u64 };
        let loss = mask_loss(&flat(&model.forward(&input, mode)?.pred_masks)?, &targets)?;
        errors[0] = errors[0].max((f64::from(loss.to_scalar::<f32>()?) / expected - 1.0).abs());
        let grads = loss.backward()?;
        if step == 0 {
            for (name, var) in &parameters {
                let expected = case.tensor(&format!("grad/base_model.model.{name}"));
                let found = grads.get(var).expect("a gradient");
                errors[1] = errors[1].max(common::tensor_error(found, &expected));
            }
        }
        optimizer.step(&grads)?;
    }
    for (name, var) in &parameters {
        let expected = case.tensor(&format!("final/base_model.model.{name}"));
        errors[2] = errors[2].max(common::tensor_error(var, &expected));
    }
    println!(
        "largest relative error: loss {:.1e}, gradient {:.1e}, final {:.1e}",
        errors[0], errors[1], errors[2]
    );
    assert_eq!(parameters.len(), case.tensors().keys().filter(|k| k.starts_with("final/")).count());
    // f32 against f64: a loss is a mean of thousands of terms; a gradient has passed some thirty layers. Adam divides
    // gradients by their own size, but moves no value by much more than lr, 1e-3 of the largest.
    assert!(errors[0] < 1e-6 && errors[1] < 2e-5 && errors[2] < 5e-6, "{errors:?}");
    Ok(())
}
