//! Gradients that an operation lost are errors that name the parameters; gradients that are rightly zero are not.

use crate::common::vit;
use crate::common::vit::{bits, map_bits, Kept, Vit};
use anyhow::Result;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Module, Shape, Tensor, Var, D};
use candle_nn::Optimizer;
use candle_nn::VarMap;
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{set_trainable, trainable_variables, Embedding, LayerNorm, Linear, Mode};
use candle_sam_lora::ops::{lora_linear, Activation, Lora, Projection};
use candle_sam_lora::testing::{check_gradients, GradientReport, Verdict};
use candle_sam_lora::train::{AdamW, AdamWConfig, Trainer, TrainerConfig};

const EVAL: Mode = Mode::Eval;

fn first_step(vit: &Vit) -> Result<candle_core::Result<()>> {
    let mut trainer = Trainer::new(vit, AdamWConfig::default())?;
    Ok(trainer.step(|_, mode| vit.loss(mode)).map(drop))
}

fn message<T>(result: candle_core::Result<T>) -> String {
    result.map(drop).expect_err("the gradient was lost").to_string()
}

/// Trains all, or adapters on q, k and v.
fn models(kept: Kept) -> Result<Vec<(&'static str, VarMap, Vit)>> {
    let map = VarMap::new();
    let views = Vit::new(&map, kept)?;
    let mut own = views.clone();
    set_trainable(&mut own, |_| false)?;
    let mut adapted = own.clone();
    set_trainable(&mut own, |_| true)?;
    inject(&mut adapted, &LoraConfig::new(2).target_modules(["q", "k", "v"]), 0)?;
    Ok(vec![("views", map.clone(), views), ("own", map.clone(), own), ("adapted", map, adapted)])
}

#[test]
fn training_finds_what_softmax_last_dim_lost() -> Result<()> {
    let kept = Kept { softmax: true, ..Default::default() };
    for (what, map, vit) in models(kept)? {
        let before = map_bits(&map)?;
        let message = message(first_step(&vit)?);
        assert!(message.contains("softmax_last_dim"), "{what}: {message}");
        assert!(message.contains("layers.0.attn.q."), "{what}: {message}");
        assert!(message.contains("the loss depends on"), "{what}: {message}");
        assert_eq!(map_bits(&map)?, before, "{what}");
    }
    Ok(())
}

#[test]
fn training_finds_what_candles_layer_norm_lost() -> Result<()> {
    for (what, _, vit) in models(Kept { norm: true, ..Default::default() })? {
        // The last norm alone is before an adapter with a gradient.
        let result = first_step(&vit)?;
        let message = message(result);
        assert!(message.contains("candle_nn's LayerNorm"), "{what}: {message}");
        assert!(message.contains("got no gradient"), "{what}: {message}");
        let lost = if what == "adapted" { "layers.0.attn.q.lora_A.weight" } else { "embed.weight" };
        assert!(message.contains(lost), "{what}: {message}");
    }
    Ok(())
}

#[test]
fn models_without_lost_gradients_train() -> Result<()> {
    for (what, _, vit) in models(Kept::default())? {
        first_step(&vit)?.map_err(|error| anyhow::anyhow!("{what}: {error}"))?;
    }
    // Dropout with a seed of its own for each part, and parts that are added up.
    let mut vit = Vit::new(&VarMap::new(), Kept::default())?;
    inject(&mut vit, &LoraConfig::new(2).dropout(0.3).target_modules(["q", "v", "mlp"]), 0)?;
    let config = TrainerConfig { accumulation: 2, ..AdamWConfig::default().into() };
    let mut trainer = Trainer::new(&vit, config)?;
    trainer.step(|_, mode| vit.loss(mode))?;
    Ok(())
}

#[test]
fn a_parameter_the_loss_does_not_use_is_called_so() -> Result<()> {
    let mut vit = Vit::new(&VarMap::new(), Kept::default())?;
    inject(&mut vit, &LoraConfig::new(2).target_modules(["q"]).modules_to_save(["head"]), 0)?;
    let mut trainer = Trainer::new(&vit, AdamWConfig::default())?;
    let loss = |mode| vit.layers[0].forward(&vit::input()?, mode)?.sqr()?.mean_all();
    let message = message(trainer.step(|_, mode| loss(mode)));
    assert!(message.contains("the loss does not depend on them"), "{message}");
    assert!(
        message.contains("head.weight") && message.contains("layers.1.attn.q.lora_A"),
        "{message}"
    );
    assert!(!message.contains("LayerNorm"), "{message}");
    Ok(())
}

#[test]
fn the_optimizer_alone_names_both_causes() -> Result<()> {
    let used = Var::ones(2, DType::F32, &Device::Cpu)?;
    let lost = Var::ones(2, DType::F32, &Device::Cpu)?;
    let vars = vec![("used".to_string(), used.clone()), ("lost".to_string(), lost)];
    let mut optimizer = AdamW::new(vars, AdamWConfig::default())?;
    let message = message(optimizer.step(&used.sum_all()?.backward()?));
    for part in ["1 of 2", ": lost. ", "set_trainable", "softmax_last_dim", "candle_nn's LayerNorm"]
    {
        assert!(message.contains(part), "{message}");
    }
    Ok(())
}

struct Zeros {
    embedding: Embedding,
    gate: Tensor,
    relu: Linear,
}

module_tree!(Zeros { embedding, gate, relu });

#[test]
fn gradients_that_are_rightly_zero_train() -> Result<()> {
    let device = &Device::Cpu;
    let random = |dims: (usize, usize)| {
        Ok::<_, candle_core::Error>(vit::filled(dims, DType::F32)?.into_inner())
    };
    let model = Zeros {
        // Rows 1 and 3 are not used.
        embedding: Embedding { weight: random((4, 3))? },
        // A critical point of its square.
        gate: Var::zeros(3, DType::F32, device)?.into_inner(),
        // Its last outputs are dead: their bias is far below zero.
        relu: Linear::new(
            random((4, 3))?,
            Some(Var::new(&[9f32, 9., -99., -99.], device)?.into_inner()),
        ),
    };
    let used = Tensor::new(&[0u32, 2], device)?;
    let loss = || {
        let x = model.embedding.weight.index_select(&used, 0)?;
        let gated = x.broadcast_mul(&(model.gate.sqr()? + 1.0)?)?;
        let y = model.relu.forward(&gated, EVAL)?.relu()?;
        // Cubes are flat at zero too.
        y.sqr()?.mean_all()? + (&model.gate.powf(3.0)?.sum_all()? * 0.5)?
    };
    let mut trainer = Trainer::new(&model, AdamWConfig::default())?;
    trainer.step(|_, _| loss())?;
    let report = check_gradients(trainable_variables(&model)?, loss)?;
    assert!(report.checks.iter().all(|check| !check.verdict.is_fault()), "{report}");
    Ok(())
}

#[test]
fn a_loss_that_cannot_be_repeated_trains_and_is_no_check() -> Result<()> {
    let weight = Var::ones(4, DType::F32, &Device::Cpu)?;
    let unused_half = |x: &Tensor| x.narrow(0, 0, 2);
    let calls = std::cell::Cell::new(0.0);
    let loss = || {
        calls.set(calls.get() + 1.0);
        (unused_half(weight.as_tensor())?.sum_all()? * calls.get())?.sum_all()
    };
    struct One {
        weight: Tensor,
    }
    module_tree!(One { weight });
    let model = One { weight: weight.as_tensor().clone() };
    let mut trainer = Trainer::new(&model, AdamWConfig::default())?;
    trainer.step(|_, _| loss())?;
    let error = check_gradients([("weight", weight.clone())], loss).expect_err("not repeatable");
    assert!(error.to_string().contains("computed again"), "{error}");
    Ok(())
}

#[test]
fn the_check_passes_this_crates_operations() -> Result<()> {
    for (what, map, vit) in models(Kept::default())? {
        let before = map_bits(&map)?;
        if what == "adapted" {
            // At B = 0 nothing can be told of A.
            for (_, var) in trainable_variables(&vit)? {
                vit::fill(&var)?;
            }
        }
        let report = check_gradients(trainable_variables(&vit)?, || vit.loss(EVAL))?;
        let right = report.checks.iter().filter(|check| check.verdict == Verdict::Right).count();
        // A bias of k moves all scores of a query alike: softmax takes no notice, and there is no slope to see.
        let hidden = |name: &str| name.contains("k.bias");
        for check in report.checks.iter().filter(|check| check.verdict != Verdict::Right) {
            assert!(check.verdict == Verdict::Unclear && hidden(&check.name), "{what}: {report}");
        }
        assert!(right >= report.checks.len() - 2, "{what}: {report}");
        assert_eq!(map_bits(&map)?, before, "{what}");
    }
    // Gradients of the input of an operation, and of a map's variables.
    let random = |dims: (usize, usize)| vit::filled(dims, DType::F32);
    let (x, weight, a, b) = (random((5, 8))?, random((6, 8))?, random((2, 8))?, random((6, 2))?);
    let variables =
        [("x", x.clone()), ("weight", weight.clone()), ("a", a.clone()), ("b", b.clone())];
    let report = check_gradients(variables, || {
        let lora = Some(Lora { a: &a, b: &b, b_bias: None, scaling: 0.5, dropout: None });
        let projection = Projection { weight: &weight, scales: None, bias: None, lora };
        lora_linear(&x, &projection, Activation::Gelu, None)?.sqr()?.mean_all()
    })?;
    assert!(report.checks.iter().all(|check| check.verdict == Verdict::Right), "{report}");
    let map = VarMap::new();
    let vit = Vit::new(&map, Kept::default())?;
    let variables = map.data().lock().expect("no thread panicked").clone();
    let names =
        check_gradients(variables, || vit.loss(EVAL))?.checks.into_iter().map(|check| check.name);
    let names: std::collections::BTreeSet<String> = names.collect();
    assert_eq!(names.len(), map.all_vars().len());
    Ok(())
}

#[test]
fn the_check_finds_what_softmax_last_dim_lost() -> Result<()> {
    for (what, map, vit) in models(Kept { softmax: true, ..Default::default() })? {
        if what == "adapted" {
            for (_, var) in trainable_variables(&vit)? {
                vit::fill(&var)?;
            }
        }
        let before = map_bits(&map)?;
        let report = GradientReport::measure(trainable_variables(&vit)?, || vit.loss(EVAL))?;
        let faults: Vec<&str> = report.faults().map(|fault| fault.name.as_str()).collect();
        // Before the last attention all gradients are wrong, in it those of q and k, after it none.
        for check in &report.checks {
            let last = ["head", "layers.1.attn.proj", "layers.1.norm2", "layers.1.mlp"];
            if last.iter().any(|name| check.name.starts_with(name)) {
                assert_eq!(check.verdict, Verdict::Right, "{report}");
            }
        }
        for layer in ["layers.0.attn.q.", "layers.1.attn.q."] {
            assert!(faults.iter().any(|name| name.starts_with(layer)), "{what}: {report}");
        }
        let error =
            check_gradients(trainable_variables(&vit)?, || vit.loss(EVAL)).expect_err("lost");
        assert!(error.to_string().contains("softmax_last_dim"), "{error}");
        assert_eq!(map_bits(&map)?, before, "{what}");
    }
    Ok(())
}

#[test]
fn the_check_finds_what_candles_norms_lost() -> Result<()> {
    let device = &Device::Cpu;
    let (x, weight) = (vit::filled((3, 8), DType::F32)?, Var::ones(8, DType::F32, device)?);
    let bias = Var::zeros(8, DType::F32, device)?;
    let variables = || [("x", x.clone()), ("weight", weight.clone())];
    let ours =
        LayerNorm { weight: weight.as_tensor().clone(), bias: bias.as_tensor().clone(), eps: 1e-5 };
    let power = |y: Tensor| y.powf(4.0)?.sum_all();
    check_gradients(variables(), || power(ours.forward(&x)?))?;
    let norm =
        candle_nn::LayerNorm::new(weight.as_tensor().clone(), bias.as_tensor().clone(), 1e-5);
    let rms = candle_nn::RmsNorm::new(weight.as_tensor().clone(), 1e-5);
    for report in [
        GradientReport::measure(variables(), || power(norm.forward(&x)?))?,
        GradientReport::measure(variables(), || power(rms.forward(&x)?))?,
    ] {
        assert!(report.checks.iter().all(|check| check.verdict == Verdict::Missing), "{report}");
    }
    Ok(())
}

/// The square, whose backward gives `factor` times the gradient, or none for the first elements.
struct Square {
    factor: f64,
    lost: usize,
}

impl CustomOp1 for Square {
    fn name(&self) -> &'static str {
        "square"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let CpuStorage::F64(values) = storage else { candle_core::bail!("square: f64 only") };
        Ok((CpuStorage::F64(values.iter().map(|v| v * v).collect()), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let whole = (x * grad)?.affine(2.0 * self.factor, 0.0)?;
        let kept = whole.narrow(0, self.lost, x.dim(0)? - self.lost)?;
        Ok(Some(kept.pad_with_zeros(0, self.lost, 0)?))
    }
}

#[test]
fn the_check_finds_small_errors_and_lost_elements() -> Result<()> {
    let x = Var::new(&[0.7f64, -1.3, 0.4, 2.1, -0.2, 0.9], &Device::Cpu)?;
    let before = x.to_vec1::<f64>()?;
    let verdicts = |factor: f64, lost: usize, x: &Var| -> Result<Vec<(usize, Verdict)>> {
        let loss = || x.apply_op1(Square { factor, lost })?.sin()?.sum_all();
        let report = GradientReport::measure([("x", x.clone())], loss)?;
        Ok(report.checks.iter().map(|check| (check.elements, check.verdict)).collect())
    };
    assert_eq!(verdicts(1.0, 0, &x)?, [(6, Verdict::Right)]);
    assert_eq!(verdicts(1.0 + 1e-4, 0, &x)?, [(6, Verdict::Wrong)]);
    assert_eq!(verdicts(-1.0, 0, &x)?, [(6, Verdict::Wrong)]);
    assert_eq!(verdicts(1.0, 2, &x)?, [(4, Verdict::Right), (2, Verdict::Zero)]);
    assert_eq!(verdicts(0.0, 0, &x)?, [(6, Verdict::Zero)]);
    assert_eq!(x.to_vec1::<f64>()?, before);
    let unused = GradientReport::measure([("x", x.clone())], || Tensor::new(1f64, &Device::Cpu))?;
    assert_eq!(unused.checks[0].verdict, Verdict::Unused);
    Ok(())
}

#[test]
fn the_check_refuses_what_it_cannot_check() -> Result<()> {
    let x = Var::ones(3, DType::F32, &Device::Cpu)?;
    let none: [(&str, Var); 0] = [];
    let error = check_gradients(none, || x.sum_all()).expect_err("nothing");
    assert!(error.to_string().contains("no variable"), "{error}");
    let error =
        check_gradients([("x", x.clone())], || Ok(x.as_tensor().clone())).expect_err("shape");
    assert!(error.to_string().contains("must be a scalar"), "{error}");
    let error =
        check_gradients([("x", x.clone())], || x.affine(f64::NAN, 0.)?.sum_all()).expect_err("NaN");
    assert!(error.to_string().contains("NaN"), "{error}");
    // A loss that fails on the way leaves the variable as it was.
    let calls = std::cell::Cell::new(0);
    let failing = || {
        calls.set(calls.get() + 1);
        if calls.get() > 4 {
            candle_core::bail!("out of luck")
        }
        x.sqr()?.sum_all()
    };
    let error = check_gradients([("x", x.clone())], failing).expect_err("fails");
    assert!(error.to_string().contains("x: out of luck"), "{error}");
    assert_eq!(bits(&x)?, bits(&Tensor::ones(3, DType::F32, &Device::Cpu)?)?);
    Ok(())
}

#[test]
fn softmax_over_another_dimension_is_right_in_f64() -> Result<()> {
    let x = vit::filled((4, 5), DType::F64)?;
    let weights = vit::filled((4, 5), DType::F64)?.exp()?;
    for dim in [0, 1] {
        let loss =
            || (candle_nn::ops::softmax(&x, dim)? * &weights)?.sum(D::Minus1)?.sqr()?.sum_all();
        let report = check_gradients([("x", x.clone())], loss)?;
        let check = &report.checks[0];
        let off = check.by_gradient.expect("a gradient") - check.by_losses;
        assert!(off.abs() <= 1e-6 * check.by_losses.abs(), "{report}");
    }
    Ok(())
}
