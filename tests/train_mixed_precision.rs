//! A bf16 base under f32 adapters, beside PEFT's in eager PyTorch: both measured against float64.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_sam_lora::lora::load_adapter;
use candle_sam_lora::nn::{named_parameters, trainable, Mode};
use candle_sam_lora::sam::{checkpoint, AttentionKind, SamConfig, SamModel};
use candle_sam_lora::train::{AdamW, AdamWConfig};

/// As far from the truth as eager PyTorch in the same dtype, at most so many times.
const TIMES_EAGER: f64 = 2.0;

fn squares(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum()
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

#[test]
fn activations_and_gradients_are_as_near_as_pefts() -> anyhow::Result<()> {
    let cases = common::cases("train/mixed_precision.safetensors");
    assert_eq!(cases.len(), 3);
    let inputs = candle_core::safetensors::load(
        common::fixtures().join("adapters/inputs.safetensors"),
        &Device::Cpu,
    )?;
    let rounded = |name: &str| inputs[name].to_dtype(DType::BF16);
    for case in cases {
        let folder = common::fixtures().join("models/tiny");
        let config = SamConfig::from_file(folder.join("config.json"))?;
        let mut model = SamModel::new(&config, AttentionKind::Split, DType::BF16, &Device::Cpu)?;
        checkpoint::load(&mut model, &folder)?;
        load_adapter(&mut model, &common::fixtures().join("adapters").join(&case.name))?;
        for (name, tensor) in named_parameters(&model) {
            let expected = if tensor.is_variable() { DType::F32 } else { DType::BF16 };
            assert_eq!(tensor.dtype(), expected, "{name}");
        }
        let mode = Mode::Train { seed: case.integer("seed") };
        let embeddings = model.vision_encoder.forward(&rounded("pixel_values")?, mode)?;
        assert_eq!(embeddings.dtype(), DType::BF16);
        let weights = rounded("G")?.to_dtype(DType::F32)?;
        let gradients = (embeddings.to_dtype(DType::F32)? * weights)?.sum_all()?.backward()?;

        // Squared errors of ours and of eager PyTorch, and the square of the truth: of all gradients together.
        let (mut ours, mut eager, mut truth) = (0.0, 0.0, 0.0);
        let mut add = |name: &str, tensor: &Tensor, gradient: bool| {
            let exact = common::values(&case.tensor(&format!("f64/{name}")));
            let theirs = common::values(&case.tensor(&format!("bf16/{name}")));
            let our_error = squares(&difference(&common::values(tensor), &exact));
            let their_error = squares(&difference(&theirs, &exact));
            if gradient {
                (ours, eager, truth) =
                    (ours + our_error, eager + their_error, truth + squares(&exact));
            } else {
                let relative = |error: f64| (error / squares(&exact)).sqrt();
                let (ours, eager) = (relative(our_error), relative(their_error));
                println!("{} {name}: {ours:.2e} off, eager PyTorch {eager:.2e}", case.name);
                assert!(ours <= TIMES_EAGER * eager, "{}: {name}", case.name);
            }
        };
        add("image_embeddings", &embeddings, false);
        let parameters = trainable(&model)?;
        for (name, var) in &parameters {
            let gradient = gradients.get(var).expect("a gradient");
            assert_eq!(gradient.dtype(), DType::F32, "{name}");
            add(&format!("grad/base_model.model.{name}"), gradient, true);
        }
        let relative = |error: f64| (error / truth).sqrt();
        let (ours, eager) = (relative(ours), relative(eager));
        println!("{} gradients: {ours:.2e} off, eager PyTorch {eager:.2e}", case.name);
        assert!(ours <= TIMES_EAGER * eager, "{}: gradients", case.name);

        // The optimizer's state is f32, as the adapters are.
        let mut optimizer = AdamW::new(parameters, AdamWConfig::default())?;
        optimizer.step(&gradients)?;
        assert!(optimizer.state()?.values().all(|tensor| tensor.dtype() == DType::F32));
    }
    Ok(())
}
