//! AdamW on the GPU: the steps, states and errors of the CPU's, by three launches and one wait.

use crate::common::model::{model_on, read};
use crate::common::{random, tensor_error, values};
use crate::driver_calls::calls;
use crate::{trial, with_each};
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{set_trainable, trainable_variables, Linear, Mode};
use candle_sam_lora::sam::AttentionKind;
use candle_sam_lora::train::{AdamW, AdamWConfig, Gradients, StepMeasures, Trainer, TrainerConfig};
use libtest_mimic::Trial;

const CONFIG: AdamWConfig =
    AdamWConfig { lr: 0.1, beta1: 0.8, beta2: 0.95, eps: 1e-3, weight_decay: 0.3 };
const PARAMETERS: [(&[usize], DType); 4] = [
    (&[3, 5], DType::F32),
    (&[70, 90], DType::F32),
    (&[2048], DType::BF16),
    (&[4, 3, 7], DType::F16),
];

pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, test: fn(&Device) -> Result<()>| trial(format!("adamw {name}"), test);
    vec![
        trial("steps as on the CPU", steps),
        trial("continues bit for bit", continues),
        trial("changes nothing where a gradient is not finite", not_finite),
        trial("takes f64 beside f32", by_candle),
        trial("is three launches, a copy and a wait", launches),
        trial("in a trainer", in_a_trainer),
        trial("gradients past candle's store have its bits", past_the_store),
    ]
}

fn vars(device: &Device) -> Result<Vec<Var>> {
    let var = |((shape, dtype), seed): (&(&[usize], DType), u64)| {
        Var::from_tensor(&random(seed, *shape).to_dtype(*dtype)?.to_device(device)?)
    };
    PARAMETERS.iter().zip(1..).map(var).collect()
}

/// Gradients of a step; one element of the second parameter's is `odd`.
fn gradients(optimizer: &AdamW, vars: &[Var], step: u64, odd: f32) -> Result<Gradients> {
    let products = vars.iter().zip(1..).map(|(var, seed)| {
        let gradient = random(100 * step + seed, var.dims()).to_dtype(var.dtype())?;
        let gradient = gradient.to_device(var.device())?;
        let product = (var.as_tensor() * gradient)?.sum_all()?.to_dtype(DType::F32)?;
        match seed {
            2 => product + (var.get(7)?.get(3)?.to_dtype(DType::F32)? * f64::from(odd))?,
            _ => Ok(product),
        }
    });
    let loss = Tensor::stack(&products.collect::<Result<Vec<_>>>()?, 0)?.sum_all()?;
    optimizer.gradients(&loss.backward()?)
}

/// The state after these steps, and the last norm.
fn stepped(device: &Device, steps: std::ops::Range<u64>) -> Result<(AdamW, Vec<Var>, f64)> {
    let vars = vars(device)?;
    let mut optimizer = AdamW::new(vars.clone(), CONFIG)?;
    let mut norm = 0.0;
    for step in steps {
        let gradients = gradients(&optimizer, &vars, step, 1.0)?;
        norm = optimizer.apply(&gradients, None, Some(20.0))?.grad_norm;
    }
    Ok((optimizer, vars, norm))
}

fn steps(device: &Device) -> Result<()> {
    let (expected, _, norm) = stepped(&Device::Cpu, 0..3)?;
    let (found, _, found_norm) = stepped(device, 0..3)?;
    assert!((found_norm - norm).abs() <= 1e-6 * norm && norm > 40.0, "{found_norm}, {norm}");
    let expected = expected.state()?;
    for (name, found) in found.state()? {
        // A rounding of the gradients' factor; then one of a 16-bit parameter.
        let bound = match found.dtype() {
            DType::F32 => 1e-6,
            DType::F16 => 1.0 / 1024.0,
            _ => 1.0 / 128.0,
        };
        let error = tensor_error(&found, &expected[&name]);
        assert!(error <= bound, "{name}: {error:e}");
    }
    Ok(())
}

fn bits(optimizer: &AdamW) -> Result<Vec<Vec<f64>>> {
    Ok(optimizer.state()?.values().map(values).collect())
}

fn continues(device: &Device) -> Result<()> {
    let (whole, ..) = stepped(device, 0..3)?;
    let (first, ..) = stepped(device, 0..2)?;
    let vars = vars(device)?;
    let mut second = AdamW::new(vars.clone(), CONFIG)?;
    second.load_state(2, &first.state()?).map_err(Error::wrap)?;
    let gradients = gradients(&second, &vars, 2, 1.0)?;
    second.apply(&gradients, None, Some(20.0))?;
    assert_eq!(bits(&second)?, bits(&whole)?);
    Ok(())
}

fn not_finite(device: &Device) -> Result<()> {
    let (mut optimizer, vars, _) = stepped(device, 0..2)?;
    let before = bits(&optimizer)?;
    for odd in [f32::NAN, f32::INFINITY] {
        let gradients = gradients(&optimizer, &vars, 2, odd)?;
        let message = optimizer.apply(&gradients, None, None).expect_err("not finite").to_string();
        assert!(message.contains("step 3: the gradient of 1 is not finite"), "{message}");
    }
    for max_norm in [None, Some(1.0)] {
        let gradients = gradients(&optimizer, &vars, 2, 1e20)?;
        let message = optimizer.apply(&gradients, None, max_norm).expect_err("squares").to_string();
        assert!(message.contains("its square is infinite in f32"), "{message}");
    }
    let gradients = gradients(&optimizer, &vars, 2, 1.0)?;
    let loss = Tensor::new(f32::NAN, device)?;
    let message = optimizer.apply(&gradients, Some(&loss), None).expect_err("a loss").to_string();
    assert!(message.contains("step 3: the loss is NaN"), "{message}");
    assert_eq!((optimizer.steps(), bits(&optimizer)?), (2, before));
    Ok(())
}

fn by_candle(device: &Device) -> Result<()> {
    let run = |device: &Device| -> Result<(Vec<f64>, Vec<f64>)> {
        let wide = random(1, 5).to_dtype(DType::F64)?.to_device(device)?;
        let (wide, narrow) =
            (Var::from_tensor(&wide)?, Var::from_tensor(&random(2, 6).to_device(device)?)?);
        let parameters = [("a", &wide), ("b", &narrow)];
        let parameters = parameters.map(|(name, var)| (name.to_string(), var.clone()));
        let mut optimizer = AdamW::new(parameters.to_vec(), CONFIG)?;
        let loss = (wide.sqr()?.sum_all()?.to_dtype(DType::F32)? + narrow.sqr()?.sum_all()?)?;
        let gradients = optimizer.gradients(&loss.backward()?)?;
        optimizer.apply(&gradients, Some(&loss.detach()), Some(1.0))?;
        Ok((values(&wide), values(&narrow)))
    };
    let (found, expected) = (run(device)?, run(&Device::Cpu)?);
    for (found, expected) in [(found.0, expected.0), (found.1, expected.1)] {
        let error = crate::common::error(&found, &expected);
        assert!(error <= 1e-6, "{error:e}");
    }
    Ok(())
}

fn launches(device: &Device) -> Result<()> {
    let (mut optimizer, vars, _) = stepped(device, 0..1)?;
    let gradients = gradients(&optimizer, &vars, 1, 1.0)?;
    let loss = Tensor::new(2f32, device)?;
    let names = ["cuLaunchKernel", "cuMemcpyHtoD", "cuMemcpyDtoD", "cuMemcpyDtoH", "cuMemAlloc"];
    let counts = || names.map(calls);
    let before = counts();
    let StepMeasures { loss, .. } = optimizer.apply(&gradients, Some(&loss), Some(1.0))?;
    assert_eq!(loss, 2.0);
    let made = counts().into_iter().zip(before).map(|(after, before)| Some(after? - before?));
    if let Some(made) = made.collect::<Option<Vec<_>>>() {
        // Allocations of the outcome, the partial sums and the table.
        assert_eq!(made, [3, 1, 0, 1, 3]);
    }
    Ok(())
}

struct Fit {
    linear: Linear,
}

module_tree!(Fit { linear => "" });

/// Losses and parameters of a run with accumulation, clipping and averages. Its last step fails and changes nothing.
fn run(device: &Device) -> anyhow::Result<(Vec<f32>, Vec<f64>, Vec<f64>)> {
    let var = |seed, shape: &[usize]| Var::from_tensor(&random(seed, shape).to_device(device)?);
    let linear = Linear::new(var(1, &[6, 9])?.into_inner(), Some(var(2, &[6])?.into_inner()));
    let model = Fit { linear };
    let config = TrainerConfig {
        accumulation: 2,
        max_grad_norm: Some(0.5),
        ema: Some(0.9),
        ..CONFIG.into()
    };
    let loss = |part: u64, factor: f64| {
        let x = random(10 + part, (4, 9)).to_device(device)?;
        model.linear.forward(&x, Mode::Eval)?.sqr()?.mean_all()? * factor
    };
    let mut trainer = Trainer::new(&model, config)?;
    for _ in 0..4 {
        trainer.step(|part, _| loss(part, 1.0))?;
    }
    let parameters = || values(&model.linear.weight);
    let before = parameters();
    let message = trainer.step(|part, _| loss(part, f64::NAN)).expect_err("not finite").to_string();
    assert!(message.contains("step 5: the loss is NaN"), "{message}");
    assert_eq!((trainer.steps(), parameters()), (4, before.clone()));
    let averages = trainer.with_averages(parameters)?;
    Ok((trainer.losses().to_vec(), before, averages))
}

fn in_a_trainer(device: &Device) -> Result<()> {
    let (losses, parameters, averages) = run(device).map_err(Error::wrap)?;
    let (expected_losses, expected, expected_averages) = run(&Device::Cpu).map_err(Error::wrap)?;
    for (found, expected) in losses.iter().zip(&expected_losses) {
        assert!((found - expected).abs() <= 1e-5 * expected.abs(), "{found}, {expected}");
    }
    for (found, expected) in [(parameters, expected), (averages, expected_averages)] {
        let error = crate::common::error(&found, &expected);
        assert!(error <= 1e-5, "{error:e}");
    }
    Ok(())
}

/// With adapters alone and with biases beside them, kept and checkpointed.
fn past_the_store(device: &Device) -> Result<()> {
    let compare = |bias: &str, checkpointed: bool| -> anyhow::Result<()> {
        let mut model = model_on(device, "tiny", AttentionKind::Split, DType::F32)?;
        set_trainable(&mut model, |_| false)?;
        let lora = LoraConfig::new(4).alpha(8.0).dropout(0.1);
        inject(&mut model, &lora.target_modules(["q", "v", "lin2"]), 1)?;
        set_trainable(&mut model, |name| name.contains("lora_") || name.ends_with(bias))?;
        let mut encoder = model.vision_encoder;
        set_trainable(&mut encoder.neck, |_| false)?;
        encoder.gradient_checkpointing = checkpointed;
        let pixels = read("tiny", "io.safetensors")?["encoder/pixel_values"].to_device(device)?;
        let loss = || encoder.forward(&pixels, Mode::Train { seed: 3 })?.sqr()?.mean_all();
        let optimizer = AdamW::new(trainable_variables(&encoder)?, CONFIG)?;
        let by_candle = optimizer.gradients(&loss()?.backward()?)?;
        let (_, collected) = optimizer.backward(loss)?;
        assert!(by_candle.tensors().len() >= 12, "{}", by_candle.tensors().len());
        for (expected, found) in by_candle.tensors().iter().zip(collected.tensors()) {
            assert!(values(expected) == values(found), "{bias} {checkpointed}");
        }
        Ok(())
    };
    with_each(device, || {
        for (bias, checkpointed) in
            [("none", false), ("none", true), ("q.bias", false), ("proj.bias", true)]
        {
            compare(bias, checkpointed).map_err(Error::wrap)?;
        }
        Ok(())
    })
}
