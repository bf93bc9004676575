//! SAM's losses and its rounds of corrections against PyTorch's numbers, see `tests/fixtures/gen/recipes.py`.

use crate::common;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_sam_lora::nn::{set_trainable, trainable_variables, Mode};
use candle_sam_lora::sam::{AttentionKind, SamInput};
use candle_sam_lora::train::{
    focal_loss, iou_loss, Batch, BatchImages, Corrections, LossWeights, ObjectMasks,
    PromptedObjects, Round, StepRng,
};

const NONE: LossWeights = LossWeights { bce: 0.0, focal: 0.0, dice: 0.0, iou: 0.0, multimask: 0.0 };

/// The terms of the fixture, with their names there.
fn terms() -> [(&'static str, LossWeights); 6] {
    [
        ("bce", LossWeights { bce: 1.0, ..NONE }),
        ("focal", LossWeights { focal: 20.0, ..NONE }),
        ("dice", LossWeights { dice: 2.0, ..NONE }),
        ("iou", LossWeights { iou: 3.0, dice: 1e-3, ..NONE }),
        ("sam", LossWeights::SAM),
        ("all", LossWeights { bce: 0.5, focal: 4.0, dice: 0.75, iou: 2.0, multimask: 0.0 }),
    ]
}

/// Floating point of the file: f32, or the bits of f64.
fn truth(stored: &Tensor) -> Result<Vec<f64>> {
    let stored = stored.flatten_all()?;
    match stored.dtype() {
        DType::I64 => Ok(stored
            .to_vec1::<i64>()?
            .into_iter()
            .map(|bits| f64::from_bits(bits as u64))
            .collect()),
        _ => Ok(common::values(&stored)),
    }
}

#[test]
fn every_loss_and_its_gradients_are_pytorchs() -> anyhow::Result<()> {
    for (name, dtype, tolerance) in
        [("loss f32", DType::F32, 1e-6), ("loss f64", DType::F64, 1e-14)]
    {
        let cases = common::cases("train/recipes.safetensors");
        let case = cases.iter().find(|case| case.name == name).expect("the case");
        let var = |name: &str| Var::from_tensor(&case.tensor(name).to_dtype(dtype)?);
        let targets = case.tensor("targets").to_dtype(dtype)?;
        for (term, weights) in terms() {
            let (logits, scores) = (var("logits")?, var("scores")?);
            let loss = weights.loss(&logits, &scores, &targets)?;
            assert_eq!(loss.dtype(), dtype);
            let gradients = loss.backward()?;
            let none = scores.zeros_like()?;
            let of_scores = gradients.get(&scores).unwrap_or(&none);
            let found = [
                ("", &loss),
                ("/logits", gradients.get(&logits).expect("one")),
                ("/scores", of_scores),
            ];
            for (part, found) in found {
                let (found, expected) =
                    (common::values(found), truth(&case.tensor(&format!("{term}{part}")))?);
                let largest = expected.iter().fold(0f64, |most, value| most.max(value.abs()));
                let apart = found.iter().zip(&expected).map(|(f, e)| (f - e).abs());
                let error = apart.fold(0f64, f64::max) / largest.max(f64::MIN_POSITIVE);
                let error =
                    if largest == 0.0 && found.iter().all(|f| *f == 0.0) { 0.0 } else { error };
                println!("{name} {term}{part}: {error:.1e}");
                assert!(error < tolerance, "{name} {term}{part}: {error:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_best_mask_alone_learns_its_shape_and_all_their_iou() -> Result<()> {
    let cpu = &Device::Cpu;
    let targets = Tensor::new(&[[[1f32, 1.0], [0.0, 0.0]]], cpu)?;
    let logits =
        [[[2f32, 2.0], [-2.0, -2.0]], [[-2.0, 2.0], [2.0, -2.0]], [[3.0, -3.0], [-3.0, -3.0]]];
    let logits = Var::from_tensor(&Tensor::new(&logits, cpu)?.unsqueeze(0)?)?;
    let scores = Var::from_tensor(&Tensor::new(&[[0.25f32, 0.5, 0.75]], cpu)?)?;
    let gradients = LossWeights::SAM.loss(&logits, &scores, &targets)?.backward()?;
    let moved = gradients.get(&logits).expect("logits").abs()?.sum((2, 3))?.to_vec2::<f32>()?;
    assert!(moved[0][0] > 0.0 && moved[0][1..] == [0.0, 0.0], "{moved:?}");
    // True IoUs are 1, 1/3 and 1/2; 2 (s - iou) / 3 each.
    let expected = [-0.5, 1.0 / 9.0, 1.0 / 6.0];
    let found = gradients.get(&scores).expect("scores").flatten_all()?.to_vec1::<f32>()?;
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    Ok(())
}

#[test]
fn extreme_logits_give_finite_losses_and_gradients() -> Result<()> {
    let logits = Tensor::new(&[[[[-1e30f32, 1e30], [500.0, -500.0]]]], &Device::Cpu)?;
    let targets = Tensor::new(&[[[0f32, 1.0], [1.0, 0.0]]], &Device::Cpu)?;
    let scores = Tensor::ones((1, 1), DType::F32, &Device::Cpu)?;
    let var = Var::from_tensor(&logits)?;
    let loss = LossWeights::SAM.loss(&var, &scores, &targets)?;
    assert_eq!(loss.to_scalar::<f32>()?, 0.0);
    let gradient = loss.backward()?.get(&var).expect("a gradient").flatten_all()?;
    assert_eq!(gradient.to_vec1::<f32>()?, [0.0; 4]);
    // All wrong: the focal loss is the cross-entropy of 500, weighted.
    let wrong = Tensor::new(&[500f32, -500.0], &Device::Cpu)?;
    let found = focal_loss(&wrong, &Tensor::new(&[0f32, 1.0], &Device::Cpu)?)?;
    assert_eq!(found.to_scalar::<f32>()?, 250.0);
    Ok(())
}

#[test]
fn weights_are_read_and_impossible_ones_refused() -> anyhow::Result<()> {
    let weights: LossWeights =
        "focal=20,dice=1,iou=1,multimask=1".parse().map_err(anyhow::Error::msg)?;
    assert_eq!(
        (weights, weights.to_string()),
        (LossWeights::SAM, "focal=20,dice=1,iou=1,multimask=1".into())
    );
    for (text, expected) in [
        ("iou=1", "one of bce, focal and dice"),
        ("dice=-1", "at least 0"),
        ("dice=nan", "at least 0"),
        ("dice", "TERM=WEIGHT"),
        ("dices=1", "there are bce, focal, dice, iou, multimask"),
    ] {
        let message = text.parse::<LossWeights>().expect_err(text);
        assert!(message.contains(expected), "{text}: {message}");
    }
    let (x, t) = (
        Tensor::zeros((2, 3, 4, 4), DType::F32, &Device::Cpu)?,
        Tensor::zeros((2, 4, 4), DType::F32, &Device::Cpu)?,
    );
    let scores = Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?;
    let message = weights.loss(&x, &scores, &t).expect_err("two scores of three masks").to_string();
    assert!(message.contains("[2, 2]"), "{message}");
    assert!(iou_loss(&scores, &t, &t).is_err());
    assert!(Corrections { points: 1, mask_probability: 1.5, mask_rounds: 0 }.validate().is_err());
    Ok(())
}

/// The loss over all rounds, with the points that PyTorch's twin drew. The gradients of prompt encoder, decoder and the
/// encoder's first layer, too.
#[test]
fn rounds_of_corrections_are_pytorchs() -> anyhow::Result<()> {
    for kind in ["points", "boxes"] {
        let cases = common::cases("train/recipes.safetensors");
        let name = format!("corrections {kind}");
        let case = cases.iter().find(|case| case.name == name).expect("the case");
        let mut model = common::model::model("tiny", AttentionKind::Fused, DType::F32)?;
        set_trainable(&mut model, |name| case.get(&format!("grad/{name}")).is_some())?;
        let targets = case.tensor("targets");
        let objects = (0..targets.dim(0)?)
            .map(|image| Ok(ObjectMasks { targets: targets.get(image)?, ignored: None }))
            .collect::<Result<Vec<_>>>()?;
        let prompts = SamInput {
            input_points: case.get("input_points"),
            input_labels: case
                .get("input_labels")
                .map(|labels| labels.to_dtype(DType::F32))
                .transpose()?,
            input_boxes: case.get("input_boxes"),
            ..Default::default()
        };
        let rounds = [(1, 1), (1, 0), (0, 1), (1, 1), (0, 1)];
        let batch = Batch {
            images: BatchImages::Pixels(case.tensor("pixel_values")),
            groups: vec![PromptedObjects { images: vec![0, 1], prompts, objects }],
            rounds: rounds
                .map(|(point, mask)| Round { point: point == 1, mask: mask == 1 })
                .to_vec(),
            draws: StepRng::new(case.integer("seed"), "corrections", case.integer("part")),
            loss: LossWeights { multimask: case.number("multimask"), ..LossWeights::SAM },
            mask_size: 4 * model.config().vision_config.grid_size(),
        };
        let loss = batch.loss(&model, Mode::Eval)?;
        let expected = common::values(&case.tensor("loss"))[0];
        let apart = (f64::from(loss.to_scalar::<f32>()?) / expected - 1.0).abs();
        let gradients = loss.backward()?;
        let (mut worst, mut count) = ((0f64, String::new()), 0);
        for (name, var) in trainable_variables(&model)? {
            let expected = |name: &str| case.tensor(&format!("grad/{name}"));
            let scale = expected(&common::model::measured_by(&name));
            let found = gradients.get(&var).expect("a gradient");
            let error = common::model::error_relative_to(&scale, found, &expected(&name))?;
            count += 1;
            if error > worst.0 {
                worst = (error, name);
            }
        }
        println!("{kind}: loss {apart:.1e}, largest relative error of {count} gradients {worst:?}");
        assert!(count > 100, "{count} gradients");
        // f32 against f64: the loss is a mean of thousands of terms, a gradient a sum over six rounds of two passes.
        assert!(apart < 1e-6 && worst.0 < 2e-5, "{kind}: {apart:e}, {worst:?}");
    }
    Ok(())
}

/// Every group, image and round has its share: the loss is that of its images alone, averaged.
#[test]
fn points_and_boxes_in_one_batch_are_the_mean_of_both() -> anyhow::Result<()> {
    let cases = common::cases("train/recipes.safetensors");
    let case = |kind: &str| {
        let name = format!("corrections {kind}");
        cases.iter().find(|case| case.name == name).expect("the case")
    };
    let model = common::model::model("tiny", AttentionKind::Fused, DType::F32)?;
    let group = |kind: &str, images: Vec<usize>| -> Result<PromptedObjects> {
        let only = |tensor: Option<Tensor>| tensor.map(|tensor| tensor.narrow(0, 0, 1)).transpose();
        let targets = case(kind).tensor("targets").get(0)?;
        let prompts = SamInput {
            input_points: only(case(kind).get("input_points"))?,
            input_labels: only(case(kind).get("input_labels"))?,
            input_boxes: only(case(kind).get("input_boxes"))?,
            ..Default::default()
        };
        Ok(PromptedObjects {
            images,
            prompts,
            objects: vec![ObjectMasks { targets, ignored: None }],
        })
    };
    let pixels = |kind: &str| case(kind).tensor("pixel_values").narrow(0, 0, 1);
    let loss = |pixels: Tensor, groups: Vec<PromptedObjects>| {
        let draws = StepRng::new(1, "corrections", 2);
        let images = BatchImages::Pixels(pixels);
        let mask_size = 4 * model.config().vision_config.grid_size();
        let batch =
            Batch { images, groups, rounds: vec![], draws, loss: LossWeights::SAM, mask_size };
        batch.loss(&model, Mode::Eval)?.to_scalar::<f32>()
    };
    let points = loss(pixels("points")?, vec![group("points", vec![0])?])?;
    let boxes = loss(pixels("boxes")?, vec![group("boxes", vec![0])?])?;
    let both = Tensor::cat(&[pixels("boxes")?, pixels("points")?], 0)?;
    let both = loss(both, vec![group("points", vec![1])?, group("boxes", vec![0])?])?;
    assert!((both - (points + boxes) / 2.0).abs() < 1e-6, "{points} {boxes} {both}");
    Ok(())
}
