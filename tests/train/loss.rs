//! Losses and the optimizer against PyTorch's numbers (torch 2.15, float64), and what they refuse.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_sam_lora::testing::{relative_error, values};
use candle_sam_lora::train::{
    bce_with_logits, dice_loss, iou, mask_loss, AdamW, AdamWConfig, LossWeights,
};

fn close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f64::from(*f) - e).abs() <= tolerance, "found {found:?}, expected {expected:?}");
    }
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

#[test]
fn mask_loss_and_its_gradient_are_pytorchs() -> anyhow::Result<()> {
    let logits = [-30f32, -1.5, 0., 2., 0.25, 40., -0.75, 1.];
    let logits = Var::from_tensor(&Tensor::from_slice(&logits, (2, 2, 2), &Device::Cpu)?)?;
    let targets = Tensor::from_slice(&[0f32, 1., 1., 1., 0., 1., 0., 0.], (2, 2, 2), &Device::Cpu)?;
    let bce = bce_with_logits(&logits, &targets)?.to_scalar::<f32>()?;
    let dice = dice_loss(&logits, &targets)?.to_scalar::<f32>()?;
    close(&[bce, dice], &[0.6309450728872161, 0.30403819838628454], 1e-7);
    let loss = mask_loss(&logits, &targets)?;
    close(&[loss.to_scalar()?], &[0.6309450728872161 + 0.30403819838628454], 1e-7);
    let grads = loss.backward()?;
    let expected = [
        1.7935220950361287e-14,
        -0.11906343088535566,
        -0.09077191181389355,
        -0.02677384280297447,
        0.08761398429809475,
        0.0,
        0.05545493676136794,
        0.10523505134194938,
    ];
    close(&flat(grads.get(&logits).expect("a gradient"))?, &expected, 3e-8);
    Ok(())
}

/// Logits in f64 take candle's operations, those in f32 one operation of this crate's.
#[test]
fn one_operation_agrees_with_the_graph_in_f64() -> anyhow::Result<()> {
    let (objects, masks, h, w) = (3, 2, 131, 67); // more than a task, and no whole vectors
    let random = |shape: &[usize]| Tensor::randn(0f32, 3f32, shape, &Device::Cpu);
    let logits = random(&[objects, masks, h, w])?;
    let scores = random(&[objects, masks])?;
    let soft = candle_nn::ops::sigmoid(&random(&[objects, h, w])?)?;
    for targets in [soft.clone(), soft.gt(0.5)?.to_dtype(DType::F32)?] {
        for weights in ["bce=1", "focal=20", "dice=1", "iou=1,bce=0.5", "focal=20,dice=1,iou=1"] {
            let weights: LossWeights = weights.parse().map_err(anyhow::Error::msg)?;
            let run = |dtype: DType| -> Result<(Vec<f64>, Vec<f64>)> {
                let logits = Var::from_tensor(&logits.to_dtype(dtype)?)?;
                let (scores, targets) = (scores.to_dtype(dtype)?, targets.to_dtype(dtype)?);
                let loss = weights.loss(&logits, &scores, &targets)?;
                let grads = loss.backward()?;
                Ok((values(&loss)?, values(grads.get(&logits).expect("a gradient"))?))
            };
            let ((loss, gradient), (expected, expected_gradient)) =
                (run(DType::F32)?, run(DType::F64)?);
            let error = relative_error(&loss, &expected)?;
            assert!(error < 1e-6, "{weights}: {error:e}");
            let error = relative_error(&gradient, &expected_gradient)?;
            assert!(error < 1e-6, "{weights}: gradient {error:e}");
        }
    }
    Ok(())
}

#[test]
fn extreme_logits_give_a_finite_loss_and_gradient() -> anyhow::Result<()> {
    let logits = Var::from_tensor(&Tensor::from_slice(
        &[-1e30f32, 1e30, 500., -500.],
        (1, 2, 2),
        &Device::Cpu,
    )?)?;
    let targets = Tensor::from_slice(&[0f32, 1., 1., 0.], (1, 2, 2), &Device::Cpu)?;
    let loss = mask_loss(&logits, &targets)?;
    assert_eq!(loss.to_scalar::<f32>()?, 0.0);
    let grads = loss.backward()?;
    close(&flat(grads.get(&logits).expect("a gradient"))?, &[0.0; 4], 0.0);
    Ok(())
}

#[test]
fn iou_counts_pixels_and_shapes_are_checked() -> Result<()> {
    let mask = Tensor::from_slice(&[1u8, 1, 0, 0], (2, 2), &Device::Cpu)?;
    let target = Tensor::from_slice(&[1f32, 0., 1., 0.], (2, 2), &Device::Cpu)?;
    assert_eq!(iou(&mask, &target)?, 1.0 / 3.0);
    assert_eq!(iou(&mask, &mask)?, 1.0);
    let empty = mask.zeros_like()?;
    assert_eq!(iou(&empty, &empty)?, 1.0);
    assert_eq!(iou(&empty, &mask)?, 0.0);
    for error in [
        iou(&mask, &mask.reshape(4)?).map(drop),
        mask_loss(&target, &target).map(drop),
        bce_with_logits(&target, &target.reshape((1, 4))?).map(drop),
    ] {
        let message = error.expect_err("shapes that do not fit").to_string();
        assert!(message.contains("[2, 2]"), "{message}");
    }
    Ok(())
}

/// Makes the gradient of `var` equal to `gradient`, and steps.
fn step(optimizer: &mut AdamW, var: &Var, gradient: &Tensor) -> Result<()> {
    optimizer.step(&(var.as_tensor() * gradient)?.sum_all()?.backward()?)
}

fn parameter(name: &str) -> Result<(String, Var)> {
    let start = Tensor::from_slice(&[1f32, -2., 0.5, 0., 3., -0.25], (2, 3), &Device::Cpu)?;
    Ok((name.to_string(), Var::from_tensor(&start)?))
}

const CONFIG: AdamWConfig =
    AdamWConfig { lr: 0.1, beta1: 0.8, beta2: 0.95, eps: 1e-3, weight_decay: 0.3 };

#[test]
fn adamw_is_pytorchs() -> anyhow::Result<()> {
    let (name, var) = parameter("p")?;
    let mut optimizer = AdamW::new(vec![(name, var.clone())], CONFIG)?;
    let gradient = Tensor::from_slice(&[0.5f32, -1., 0., 2., 1e-3, -0.125], (2, 3), &Device::Cpu)?;
    for t in 0..4 {
        let sign = if t % 2 == 0 { 1.0 } else { -1.0 };
        step(&mut optimizer, &var, &(&gradient * (sign * f64::from(t + 1)))?)?;
    }
    let expected = [
        0.8252221406799011,
        -1.7104420058640692,
        0.44264640499999997,
        -0.060180146169833755,
        2.6301521743360623,
        -0.16168688908666606,
    ];
    close(&flat(&var)?, &expected, 5e-7);
    Ok(())
}

/// Rounded to f32 the parameter would lose 2e-9, a step's length twice.
#[test]
fn parameters_in_f64_keep_their_digits() -> anyhow::Result<()> {
    let start = || Var::new(&[1f64, 2.000_000_001, -1e-12], &Device::Cpu);
    let (ours, candles) = (start()?, start()?);
    let mut optimizer = AdamW::new(vec![ours.clone()], AdamWConfig { lr: 1e-9, ..CONFIG })?;
    let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = CONFIG;
    let config = candle_nn::ParamsAdamW { lr: 1e-9, beta1, beta2, eps, weight_decay };
    let mut reference = candle_nn::AdamW::new(vec![candles.clone()], config)?;
    for _ in 0..3 {
        optimizer.backward_step(&ours.sqr()?.sum_all()?)?;
        reference.backward_step(&candles.sqr()?.sum_all()?)?;
    }
    for (ours, candles) in ours.to_vec1::<f64>()?.into_iter().zip(candles.to_vec1::<f64>()?) {
        // Moments in f32 move a step of 1e-9 by its rounding.
        assert!((ours - candles).abs() < 3e-9 * 1e-6, "{ours} {candles}");
    }
    Ok(())
}

#[test]
fn adamw_names_what_has_no_gradient_or_no_finite_one_and_changes_nothing() -> anyhow::Result<()> {
    let (a, b) = (parameter("a")?, parameter("b")?);
    let mut optimizer = AdamW::new(vec![a.clone(), b.clone()], CONFIG)?;
    let before = flat(&a.1)?;
    let grads = a.1.as_tensor().sum_all()?.backward()?;
    let message = optimizer.step(&grads).expect_err("b has no gradient").to_string();
    assert!(
        message.contains("step 1: 1 of 2") && message.contains("got no gradient: b."),
        "{message}"
    );
    let loss = ((a.1.as_tensor() + b.1.as_tensor())?.sum_all()? * f64::NAN)?;
    let message = optimizer.step(&loss.backward()?).expect_err("not finite").to_string();
    assert!(message.contains("step 1: the gradient of a is not finite"), "{message}");
    assert_eq!((optimizer.steps(), flat(&a.1)?), (0, before));
    Ok(())
}

#[test]
fn adamw_refuses_impossible_configurations() -> Result<()> {
    for config in [
        AdamWConfig { lr: f64::NAN, ..CONFIG },
        AdamWConfig { lr: -1.0, ..CONFIG },
        AdamWConfig { beta1: 1.0, ..CONFIG },
        AdamWConfig { beta2: -0.1, ..CONFIG },
        AdamWConfig { eps: f64::INFINITY, ..CONFIG },
        AdamWConfig { weight_decay: f64::NEG_INFINITY, ..CONFIG },
    ] {
        assert!(AdamW::new(vec![parameter("p")?], config).is_err(), "{config:?}");
    }
    assert!(AdamW::new(Vec::<Var>::new(), CONFIG).is_err());
    assert!(AdamW::new(vec![parameter("p")?, parameter("p")?], CONFIG).is_err());
    Ok(())
}

#[test]
fn adamw_refuses_the_state_of_other_parameters() -> anyhow::Result<()> {
    let (a, b) = (parameter("a")?, parameter("b")?);
    let mut optimizer = AdamW::new(vec![a.clone()], CONFIG)?;
    step(&mut optimizer, &a.1, &a.1.ones_like()?)?;
    let state = optimizer.state()?;
    assert_eq!(state.keys().collect::<Vec<_>>(), ["exp_avg.a", "exp_avg_sq.a", "parameter.a"]);
    let mut other = AdamW::new(vec![b], CONFIG)?;
    let message = other.load_state(1, &state).expect_err("other names").to_string();
    assert!(message.contains("missing: exp_avg_sq.b"), "{message}");
    assert!(message.contains("surplus: exp_avg_sq.a"), "{message}");
    let narrow = Var::from_tensor(&a.1.narrow(1, 0, 2)?.contiguous()?)?;
    let mut other = AdamW::new(vec![("a".to_string(), narrow)], CONFIG)?;
    let message = other.load_state(1, &state).expect_err("other shapes").to_string();
    assert!(message.contains("parameter.a: expected [2, 2], found [2, 3]"), "{message}");
    assert_eq!(other.steps(), 0);
    Ok(())
}

#[test]
fn variables_without_names_train_by_candles_trait() -> Result<()> {
    fn train<O: Optimizer<Config = AdamWConfig>>(var: &Var) -> Result<O> {
        let mut optimizer = O::new(vec![var.clone()], CONFIG)?;
        optimizer.backward_step(&var.as_tensor().sqr()?.sum_all()?)?;
        Ok(optimizer)
    }
    let values = Tensor::new(&[1f32, -2.0], &Device::Cpu)?;
    let (var, named) = (Var::from_tensor(&values)?, Var::from_tensor(&values)?);
    let mut optimizer: AdamW = train(&var)?;
    let mut reference = AdamW::new(vec![("p".to_string(), named.clone())], CONFIG)?;
    reference.backward_step(&named.as_tensor().sqr()?.sum_all()?)?;
    assert_eq!(var.to_vec1::<f32>()?, named.to_vec1::<f32>()?);
    assert!(optimizer.state()?.contains_key("exp_avg.0"));
    optimizer.set_learning_rate(f64::NAN);
    let error = optimizer.backward_step(&var.as_tensor().sqr()?.sum_all()?);
    assert!(error.expect_err("no such rate").to_string().contains("lr must be finite"));
    Ok(())
}
