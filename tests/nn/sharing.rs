//! Models and adapters used at once. Threads that share a model get the bits of one that has it alone. Models do not
//! see each other.

use crate::common::model::{bits, model, read};
use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{self, Mode};
use candle_sam_lora::sam::{AttentionKind, SamInput, SamModel};

fn adapted(seed: u64, targets: &[&str]) -> Result<SamModel> {
    let mut model = model("tiny", AttentionKind::Split, DType::F32)?;
    let lora = LoraConfig::new(3).alpha(6.0).dropout(0.3).target_modules(targets.iter().copied());
    inject(&mut model, &lora, seed)?;
    // A fresh B is zero, and an adapter with it nothing.
    for (name, var) in nn::trainable_variables(&model)? {
        if name.ends_with("lora_B.weight") {
            let (rows, columns) = var.dims2()?;
            let values = (0..rows * columns).map(|i| ((i as f64 + seed as f64).sin() * 0.3) as f32);
            var.set(&Tensor::from_vec(values.collect(), (rows, columns), var.device())?)?;
        }
    }
    Ok(model)
}

/// The masks and the gradients of every trainable parameter.
fn results(model: &SamModel, input: &SamInput, seed: u64) -> Result<Vec<Vec<u32>>> {
    let masks = model.forward(input, Mode::Train { seed })?.pred_masks;
    let grads = masks.sqr()?.mean_all()?.backward()?;
    let mut results = vec![bits(&masks)?];
    for (name, var) in nn::trainable_variables(model)? {
        let grad = grads.get(&var).ok_or_else(|| anyhow::anyhow!("{name} has no gradient"))?;
        results.push(bits(grad)?);
    }
    Ok(results)
}

fn input() -> Result<SamInput> {
    let io = read("tiny", "io.safetensors")?;
    Ok(SamInput {
        pixel_values: Some(io["encoder/pixel_values"].clone()),
        input_boxes: Some(io["boxes/input_boxes"].clone()),
        ..Default::default()
    })
}

#[test]
fn threads_sharing_a_model_get_the_bits_of_one_alone() -> Result<()> {
    let (model, input) = (adapted(1, &["q", "v"])?, input()?);
    let alone: Vec<_> = (0..3).map(|seed| results(&model, &input, seed)).collect::<Result<_>>()?;
    assert_ne!(alone[0], alone[1], "dropout does nothing");
    let together = std::thread::scope(|scope| {
        let (model, input) = (&model, &input);
        let work = |thread: u64| {
            move || {
                (0..4)
                    .map(|i| (thread + i) % 3)
                    .map(|seed| Ok((seed, results(model, input, seed)?)))
                    .collect()
            }
        };
        let threads: Vec<_> = (0..8).map(|thread| scope.spawn(work(thread))).collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a thread panicked"))
            .collect::<Result<Vec<Vec<_>>>>()
    })?;
    let together: Vec<_> = together.into_iter().flatten().collect();
    assert_eq!(together.len(), 32);
    for (seed, results) in together {
        assert!(results == alone[seed as usize], "seed {seed}");
    }
    Ok(())
}

#[test]
fn two_models_with_two_adapters_do_not_see_each_other() -> Result<()> {
    let models = [adapted(1, &["q", "v"])?, adapted(2, &["k", "proj", "lin1"])?];
    let input = input()?;
    let alone: Vec<_> = models.iter().map(|m| results(m, &input, 5)).collect::<Result<_>>()?;
    assert_ne!(alone[0][0], alone[1][0]);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|i| {
                (
                    i % 2,
                    scope.spawn({
                        let (m, x) = (&models[i % 2], &input);
                        move || results(m, x, 5)
                    }),
                )
            })
            .collect();
        for (which, thread) in threads {
            let results = thread.join().expect("a thread panicked")?;
            assert!(results == alone[which], "model {which}");
        }
        Ok(())
    })
}
