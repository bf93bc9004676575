//! Surroundings of the optimizer: schedules, clipping and accumulation against transformers and PyTorch. Also their
//! part in a continued run, and the state kept after a failure.

use crate::common;
use crate::common::Case;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{trainable_variables, Linear, Mode};
use candle_sam_lora::train::{
    best_evaluation, evaluations_since_best, previous_state_path, AdamW, AdamWConfig, Decay,
    EventFile, HeldOutScores, MaskScores, MetricsCsv, ObjectScores, ParameterGroups, Plateau,
    Schedule, StepMetrics, StepScores, Trainer, TrainerConfig, TrainingState,
};
use std::path::Path;

fn cases(kind: &str) -> Vec<Case> {
    let mut cases = common::cases("train/loop.safetensors");
    cases.retain(|case| case.name.split(' ').next() == Some(kind));
    assert!(!cases.is_empty(), "no case {kind}");
    cases
}

#[test]
fn schedules_are_transformers() {
    let mut compared = 0;
    for kind in ["constant", "linear", "cosine"] {
        for case in cases(kind) {
            let total_steps = case.integer("total");
            let decay = match kind {
                "constant" => Decay::Constant,
                "linear" => Decay::Linear { total_steps },
                _ => Decay::Cosine { total_steps },
            };
            let schedule = Schedule { warmup_steps: case.integer("warmup"), decay };
            schedule.validate().expect("a schedule that transformers takes");
            for (step, expected) in common::values(&case.tensor("factor")).into_iter().enumerate() {
                let found = schedule.factor(step as u64, &[]);
                // The fixture holds f32.
                assert!(
                    (found - expected).abs() <= 6e-8,
                    "{} at {step}: {found}, {expected}",
                    case.name
                );
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 3 * (12 + 30 + 2));
    for decay in [Decay::Linear { total_steps: 4 }, Decay::Cosine { total_steps: 4 }] {
        assert_eq!(Schedule { warmup_steps: 1, decay }.factor(9, &[]), 0.0);
        assert!(Schedule { warmup_steps: 4, decay }.validate().is_err());
    }
}

/// Moments of such gradients are infinite, and their parameters stand still from then on.
#[test]
fn gradients_of_infinite_squares_are_refused() -> anyhow::Result<()> {
    let var = Var::from_slice(&[1f32, 2.0], 2, &Device::Cpu)?;
    for max_norm in [None, Some(1.0)] {
        let mut optimizer = AdamW::new(vec![var.clone()], AdamWConfig::default())?;
        let loss = (var.as_tensor() * 1e20)?.sum_all()?;
        let gradients = optimizer.gradients(&loss.backward()?)?;
        let message = optimizer.apply(&gradients, None, max_norm).expect_err("taken").to_string();
        assert!(message.contains("its square is infinite in f32"), "{message}");
        assert_eq!((optimizer.steps(), var.to_vec1::<f32>()?), (0, vec![1.0, 2.0]));
    }
    Ok(())
}

#[test]
fn one_variable_under_two_names_is_refused() -> anyhow::Result<()> {
    let var = Var::ones(2, DType::F32, &Device::Cpu)?;
    let twice = ["a", "b"].map(|name| (name.to_string(), var.clone())).to_vec();
    let message = AdamW::new(twice, AdamWConfig::default()).expect_err("taken").to_string();
    assert!(message.contains("a and b are one variable"), "{message}");
    Ok(())
}

#[test]
fn writers_of_one_state_take_turns() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let state = TrainingState {
        step: 0,
        seed: 0,
        settings: Default::default(),
        losses: vec![],
        evaluations: vec![],
        tensors: [("a".to_string(), Tensor::ones(8, DType::F32, &Device::Cpu)?)].into(),
    };
    std::thread::scope(|scope| {
        let save = || (0..20).try_for_each(|_| state.save(&path));
        let writers = [0, 1, 2, 3].map(|_| scope.spawn(save));
        writers.into_iter().try_for_each(|writer| writer.join().expect("a panic"))
    })?;
    TrainingState::load(&path, &Device::Cpu)?;
    TrainingState::load(previous_state_path(&path), &Device::Cpu)?;
    Ok(())
}

#[test]
fn clipping_is_pytorchs() -> Result<()> {
    let cases = cases("clip");
    assert_eq!(cases.len(), 4);
    for case in cases {
        // Each gradient is that of sum(p g).
        let gradients: Vec<Tensor> = (0..3).map(|i| case.tensor(&format!("g{i}"))).collect();
        let vars: Vec<(String, Var)> = (gradients.iter().enumerate())
            .map(|(i, g)| Ok((format!("p{i}"), Var::zeros(g.dims(), DType::F32, &Device::Cpu)?)))
            .collect::<Result<_>>()?;
        let sums = vars.iter().zip(&gradients).map(|((_, v), g)| (v.as_tensor() * g)?.sum_all());
        let loss = Tensor::stack(&sums.collect::<Result<Vec<_>>>()?, 0)?.sum_all()?;
        let optimizer = AdamW::new(vars, AdamWConfig::default())?;
        let found = optimizer.gradients(&loss.backward()?)?;
        let (norm, expected) = (found.norm()?, case.number("norm"));
        assert!((norm - expected).abs() <= 1e-6 * expected, "{}: {norm}, {expected}", case.name);
        let clipped = found.clipped(norm, case.number("max_norm"))?;
        for (i, found) in clipped.tensors().iter().enumerate() {
            let expected = case.tensor(&format!("c{i}"));
            assert!(common::tensor_error(found, &expected) <= 1e-6, "{}", case.name);
        }
    }
    Ok(())
}

struct Fit {
    linear: Linear,
}

module_tree!(Fit { linear => "" });

/// The fixture's problem: `steps` steps of some parts each, with everything at once.
struct Problem {
    case: Case,
    config: TrainerConfig,
}

impl Problem {
    fn new() -> Self {
        let case = cases("loop").remove(0);
        let decay = Decay::Cosine { total_steps: case.integer("steps") };
        let config = TrainerConfig {
            optimizer: AdamWConfig {
                lr: case.number("lr"),
                eps: case.number("eps"),
                weight_decay: case.number("weight_decay"),
                ..Default::default()
            },
            schedule: Schedule { warmup_steps: case.integer("warmup"), decay },
            accumulation: case.integer("parts"),
            max_grad_norm: Some(case.number("max_norm")),
            ema: None,
            seed: 1,
        };
        Self { case, config }
    }

    fn start(&self, config: TrainerConfig) -> Result<(Fit, Trainer)> {
        let var = |name: &str| {
            Ok::<_, candle_core::Error>(Var::from_tensor(&self.case.tensor(name))?.into_inner())
        };
        let linear = Linear::new(var("weight")?, Some(var("bias")?));
        let model = Fit { linear };
        let trainer = Trainer::new(&model, config)?;
        Ok((model, trainer))
    }

    fn loss(&self, model: &Fit, part: u64, mode: Mode) -> Result<Tensor> {
        let (x, y) =
            (self.case.tensor("x").get(part as usize)?, self.case.tensor("y").get(part as usize)?);
        (model.linear.forward(&x, mode)? - y)?.sqr()?.mean_all()
    }

    fn step(&self, model: &Fit, trainer: &mut Trainer) -> Result<StepMetrics> {
        trainer.step(|part, mode| self.loss(model, part, mode))
    }
}

fn bits(model: &Fit) -> Vec<u32> {
    let values = trainable_variables(model)
        .expect("parameters")
        .into_iter()
        .flat_map(|(_, var)| var.flatten_all().and_then(|v| v.to_vec1::<f32>()).expect("values"));
    values.map(f32::to_bits).collect()
}

#[test]
fn accumulation_clipping_and_schedule_together_are_pytorchs() -> anyhow::Result<()> {
    let problem = Problem::new();
    let (model, mut trainer) = problem.start(problem.config)?;
    let parts = problem.config.accumulation as usize;
    let losses = common::values(&problem.case.tensor("loss"));
    let (norms, rates) =
        (common::values(&problem.case.tensor("norm")), common::values(&problem.case.tensor("lr")));
    for (step, losses) in losses.chunks(parts).enumerate() {
        let made = problem.step(&model, &mut trainer)?;
        let expected = losses.iter().sum::<f64>() / parts as f64;
        let close = |found: f64, expected: f64| (found - expected).abs() <= 2e-6 * expected.abs();
        assert_eq!(made.step, step as u64 + 1);
        assert!(close(made.loss.into(), expected), "step {step}: loss {}, {expected}", made.loss);
        assert!(
            close(made.grad_norm, norms[step]),
            "step {step}: {}, {}",
            made.grad_norm,
            norms[step]
        );
        assert!(close(made.lr, rates[step]), "step {step}: {}, {}", made.lr, rates[step]);
    }
    assert!(norms.iter().any(|norm| *norm > 2.1) && norms.iter().any(|norm| *norm < 2.1));
    let bias = model.linear.bias.as_ref().expect("a bias");
    for (found, name) in [(&model.linear.weight, "final_weight"), (bias, "final_bias")] {
        // Adam divides a gradient by its own size, so that an error of 1e-7 in it is one of 1e-7 lr in the step.
        let error = common::tensor_error(found, &problem.case.tensor(name));
        assert!(error <= 1e-6, "{name}: {error:e}");
    }
    Ok(())
}

#[test]
fn averages_are_pytorchs() -> anyhow::Result<()> {
    let problem = Problem::new();
    let config = TrainerConfig { ema: Some(problem.case.number("ema")), ..problem.config };
    let (model, mut trainer) = problem.start(config)?;
    let (plain, mut without) = problem.start(problem.config)?;
    for _ in 0..6 {
        problem.step(&model, &mut trainer)?;
        problem.step(&plain, &mut without)?;
    }
    let last = bits(&model);
    assert_eq!(last, bits(&plain), "averages change no step");
    let bias = model.linear.bias.as_ref().expect("a bias");
    trainer.with_averages(|| {
        for (found, name) in [(&model.linear.weight, "average_weight"), (bias, "average_bias")] {
            let error = common::tensor_error(found, &problem.case.tensor(name));
            assert!(error <= 1e-6, "{name}: {error:e}");
        }
        assert_ne!(bits(&model), last);
    })?;
    assert_eq!(bits(&model), last, "the parameters are back");
    Ok(())
}

#[test]
fn averages_are_continued_bit_for_bit() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let problem = Problem::new();
    let config = TrainerConfig { ema: Some(0.9), ..problem.config };
    let (whole, mut trainer) = problem.start(config)?;
    for step in 0..6 {
        problem.step(&whole, &mut trainer)?;
        if step == 2 {
            trainer.save(&path)?;
        }
    }
    let (model, mut resumed) = problem.start(config)?;
    assert!(resumed.resume(&path)?.is_none());
    for _ in 3..6 {
        problem.step(&model, &mut resumed)?;
    }
    assert_eq!(bits(&model), bits(&whole));
    let averages = |model: &Fit, trainer: &Trainer| trainer.with_averages(|| bits(model));
    assert_eq!(averages(&model, &resumed)?, averages(&whole, &trainer)?);
    let (_, mut other) = problem.start(problem.config)?;
    let message = other.resume(&path).expect_err("no averages").to_string();
    assert!(message.contains("ema: was 0.9, is nothing"), "{message}");
    Ok(())
}

/// The variables of the case `loraplus`, as they were before.
fn adapted(case: &Case) -> Result<Vec<(String, Var)>> {
    ["first.lora_A.weight", "first.lora_B.weight", "first.lora_B.bias"]
        .into_iter()
        .chain(["norm.weight", "norm.bias", "second.weight", "second.bias"])
        .map(|name| Ok((name.into(), Var::from_tensor(&case.tensor(&format!("before.{name}")))?)))
        .collect()
}

/// Makes all steps of that case with these groups.
fn fit(case: &Case, groups: Option<ParameterGroups>) -> anyhow::Result<Vec<(String, Var)>> {
    let parameters = adapted(case)?;
    let (lr, weight_decay) = (case.number("lr"), case.number("weight_decay"));
    let config = AdamWConfig { lr, weight_decay, ..Default::default() };
    let mut optimizer = AdamW::new(parameters.clone(), config)?;
    groups.map_or(Ok(()), |groups| optimizer.set_groups(&groups))?;
    for step in 0..case.tensor("gradients.norm.bias").dim(0)? {
        // Each gradient is that of sum(p g).
        let term = |(name, var): &(String, Var)| {
            let gradient = case.tensor(&format!("gradients.{name}")).get(step)?;
            (var.as_tensor() * gradient)?.sum_all()
        };
        let terms = parameters.iter().map(term).collect::<Result<Vec<_>>>()?;
        let gradients = optimizer.gradients(&Tensor::stack(&terms, 0)?.sum_all()?.backward()?)?;
        optimizer.apply(&gradients, None, None)?;
    }
    Ok(parameters)
}

#[test]
fn loraplus_is_pefts() -> anyhow::Result<()> {
    let case = cases("loraplus").remove(0);
    let no_decay = vec!["bias".into(), "norm".into()];
    let ratio = Some(case.number("ratio"));
    let groups =
        ParameterGroups { no_decay, loraplus_lr_ratio: ratio, ..ParameterGroups::default() };
    for (name, found) in fit(&case, Some(groups))? {
        let expected = case.tensor(&format!("after.{name}"));
        let error = common::tensor_error(found.as_tensor(), &expected);
        // 6 steps of 0.16 at most; the fixture holds f32.
        assert!(error <= 1e-6, "{name}: {error:e}");
    }
    Ok(())
}

#[test]
fn groups_of_factor_one_change_no_bit() -> anyhow::Result<()> {
    let case = cases("loraplus").remove(0);
    let values = |groups| -> anyhow::Result<Vec<Vec<u32>>> {
        let bits = |(_, var): (String, Var)| {
            let values = var.flatten_all()?.to_vec1::<f32>()?;
            Ok(values.into_iter().map(f32::to_bits).collect())
        };
        fit(&case, groups)?.into_iter().map(bits).collect()
    };
    let plain = values(None)?;
    let lr_factors = vec![("second".into(), 1.0), ("lora_A".into(), 1.0)];
    let loraplus_lr_ratio = Some(1.0);
    let one = ParameterGroups { lr_factors, loraplus_lr_ratio, no_decay: vec![] };
    assert_eq!(values(Some(one.clone()))?, plain);
    // The last name that fits counts, and a rate of 0 leaves a parameter as it was.
    let lr_factors = vec![("second".into(), 0.0), ("second.bias".into(), 1.0)];
    let still = values(Some(ParameterGroups { lr_factors, ..one }))?;
    for (index, (name, before)) in adapted(&case)?.into_iter().enumerate() {
        let before = before.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits);
        match name.as_str() {
            "second.weight" => assert_eq!(still[index], before.collect::<Vec<_>>()),
            _ => assert_eq!(still[index], plain[index], "{name}"),
        }
    }
    Ok(())
}

#[test]
fn groups_are_checked_and_are_settings_of_a_run() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let problem = Problem::new();
    let (_, trainer) = problem.start(problem.config)?;
    trainer.save(&path)?;
    let groups = ParameterGroups { no_decay: vec!["bias".into()], ..Default::default() };
    let (_, other) = problem.start(problem.config)?;
    let message = other.with_groups(&groups)?.resume(&path).expect_err("groups").to_string();
    assert!(message.contains("groups: was nothing"), "{message}");
    for (groups, expected) in [
        (
            ParameterGroups { no_decay: vec!["norm".into()], ..Default::default() },
            "no trained parameter's name holds \"norm\"",
        ),
        (
            ParameterGroups { lr_factors: vec![("bias".into(), -1.0)], ..Default::default() },
            "bias must be at least 0, got -1",
        ),
        (
            ParameterGroups { loraplus_lr_ratio: Some(f64::NAN), ..Default::default() },
            "LoRA+'s ratio must be at least 0, got NaN",
        ),
    ] {
        let (_, trainer) = problem.start(problem.config)?;
        let message = trainer.with_groups(&groups).map(drop).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    }
    Ok(())
}

#[test]
fn plateaus_are_pytorchs() {
    let cases = cases("plateau");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let plateau = Plateau { factor: case.number("factor"), patience: case.integer("patience") };
        let schedule = Schedule { warmup_steps: 0, decay: Decay::Plateau(plateau) };
        schedule.validate().expect("a plateau that PyTorch takes");
        let scores = common::values(&case.tensor("score"));
        let run: Vec<_> = scores.iter().zip(1..).map(|(iou, step)| evaluated(step, *iou)).collect();
        let factors = common::values(&case.tensor("factor"));
        assert!(factors.last().is_some_and(|last| *last < 0.1));
        for (seen, expected) in (1..).zip(factors) {
            let found = schedule.factor(9, &run[..seen]);
            // The fixture holds f32.
            assert!((found - expected).abs() <= 6e-8 * expected, "{seen}: {found}, {expected}");
        }
    }
    for factor in [0.0, 1.0, f64::NAN] {
        let decay = Decay::Plateau(Plateau { factor, patience: 1 });
        assert!(Schedule { warmup_steps: 0, decay }.validate().is_err());
    }
}

/// The rate of a step follows the evaluations before it, in a continued run too.
#[test]
fn a_plateau_lowers_the_next_steps_rate() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let problem = Problem::new();
    let decay = Decay::Plateau(Plateau { factor: 0.5, patience: 1 });
    let config = TrainerConfig { schedule: Schedule { warmup_steps: 0, decay }, ..problem.config };
    let (_, mut trainer) = problem.start(config)?;
    let mut rates = vec![];
    for (step, iou) in [0.5, 0.4, 0.5, 0.6, 0.6, 0.1].into_iter().enumerate() {
        let (model, mut resumed) = problem.start(config)?;
        if step > 0 {
            resumed.resume(&path)?;
        }
        let made = problem.step(&model, &mut resumed)?;
        rates.push(made.lr / config.optimizer.lr);
        resumed.note(ObjectScores { iou, ..Default::default() });
        resumed.save(&path)?;
        trainer = resumed;
    }
    assert_eq!(rates, [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]);
    assert_eq!(trainer.evaluations().len(), 6);
    Ok(())
}

#[test]
fn a_run_with_everything_is_continued_bit_for_bit() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let problem = Problem::new();
    let (whole, mut trainer) = problem.start(problem.config)?;
    let scores =
        |x: f64| ObjectScores::from_values([3.0, 7.0, 11.0, 13.0, 17.0, 19.0].map(|part| x / part));
    for step in 0..6 {
        problem.step(&whole, &mut trainer)?;
        trainer.note(HeldOutScores {
            objects: scores(f64::from(step)),
            masks: (step % 2 == 0).then(|| MaskScores::from_values([0.1, 0.7, 0.3, 0.9])),
        });
        if step == 2 {
            trainer.save(&path)?;
        }
    }
    let (model, mut resumed) = problem.start(problem.config)?;
    assert!(resumed.resume(&path)?.is_none());
    assert_eq!((resumed.steps(), resumed.evaluations().len()), (3, 3));
    for step in 3..6 {
        problem.step(&model, &mut resumed)?;
        resumed.note(HeldOutScores {
            objects: scores(f64::from(step)),
            masks: (step % 2 == 0).then(|| MaskScores::from_values([0.1, 0.7, 0.3, 0.9])),
        });
    }
    assert_eq!(bits(&model), bits(&whole));
    assert_eq!(resumed.losses(), trainer.losses());
    assert_eq!(resumed.evaluations(), trainer.evaluations());

    // Each setting is part of what must be equal.
    let TrainerConfig { schedule, .. } = problem.config;
    for (config, named) in [
        (TrainerConfig { max_grad_norm: None, ..problem.config }, "max_grad_norm"),
        (TrainerConfig { accumulation: 1, ..problem.config }, "accumulation"),
        (
            TrainerConfig { schedule: Schedule { warmup_steps: 1, ..schedule }, ..problem.config },
            "schedule",
        ),
    ] {
        let (_, mut other) = problem.start(config)?;
        let message = other.resume(&path).expect_err(named).to_string();
        assert!(message.contains(named), "{message}");
    }
    Ok(())
}

#[test]
fn impossible_configurations_are_refused() -> anyhow::Result<()> {
    let problem = Problem::new();
    for (config, expected) in [
        (TrainerConfig { accumulation: 0, ..problem.config }, "an accumulation of 0"),
        (TrainerConfig { max_grad_norm: Some(0.0), ..problem.config }, "must be positive, got 0"),
        (TrainerConfig { ema: Some(1.0), ..problem.config }, "must be in [0, 1), got 1"),
        (
            TrainerConfig { max_grad_norm: Some(f64::NAN), ..problem.config },
            "must be positive, got NaN",
        ),
        (
            TrainerConfig {
                schedule: Schedule { warmup_steps: 9, decay: Decay::Linear { total_steps: 9 } },
                ..problem.config
            },
            "shorter than the run",
        ),
    ] {
        let message = problem.start(config).map(drop).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    }
    Ok(())
}

#[test]
fn a_damaged_state_gives_way_to_the_one_before() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let problem = Problem::new();
    let (model, mut trainer) = problem.start(problem.config)?;
    let mut after = vec![];
    for _ in 0..2 {
        problem.step(&model, &mut trainer)?;
        trainer.save(&path)?;
        after.push(bits(&model));
    }
    let (newest, before) = (std::fs::read(&path)?, std::fs::read(previous_state_path(&path))?);
    let spoilt: [(&str, Option<Vec<u8>>); 3] = [
        ("cut", Some(newest[..newest.len() - 5].to_vec())),
        (
            "changed",
            Some(
                newest
                    .iter()
                    .enumerate()
                    .map(|(i, b)| if i + 3 == newest.len() { !b } else { *b })
                    .collect(),
            ),
        ),
        ("missing", None),
    ];
    for (what, bytes) in spoilt {
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes)?,
            None => std::fs::remove_file(&path)?,
        }
        std::fs::write(previous_state_path(&path), &before)?;
        let (model, mut resumed) = problem.start(problem.config)?;
        let damage = resumed.resume(&path)?.expect(what).to_string();
        assert!(damage.contains("state.safetensors"), "{damage}");
        assert_eq!((resumed.steps(), bits(&model)), (1, after[0].clone()), "{what}");
        // The next state saved must not push a damaged one into the place of the good one.
        assert!(std::fs::read(&path)? == before && !previous_state_path(&path).exists(), "{what}");
    }
    std::fs::write(&path, b"nothing")?;
    std::fs::write(previous_state_path(&path), b"nothing")?;
    let (_, mut none) = problem.start(problem.config)?;
    assert!(none.resume(&path).is_err());
    Ok(())
}

#[test]
fn after_a_loss_that_is_no_number_the_last_good_state_is_found() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let problem = Problem::new();
    // Saved after steps 1 and 3; the step after 4, or right after the saving, fails.
    for (fails_after, good) in [(4, 3), (3, 1)] {
        for what in [f64::NAN, f64::INFINITY] {
            let (model, mut trainer) = problem.start(problem.config)?;
            let mut at_good = vec![];
            while trainer.steps() < fails_after {
                problem.step(&model, &mut trainer)?;
                if [1, 3].contains(&trainer.steps()) {
                    trainer.save(&path)?;
                }
                if trainer.steps() == good {
                    at_good = bits(&model);
                }
            }
            let before = bits(&model);
            let failing = |part, mode| problem.loss(&model, part, mode)? * what;
            let message = trainer.step(failing).expect_err("not finite").to_string();
            let expected = format!("step {}: the loss is", fails_after + 1);
            assert!(message.contains(&expected), "{message}");
            assert_eq!((trainer.steps(), bits(&model)), (fails_after, before));
            trainer.roll_back(&path)?;
            assert_eq!((trainer.steps(), bits(&model)), (good, at_good));
            assert_eq!(trainer.losses().len(), good as usize);
            // The files are as they were.
            assert_eq!(TrainingState::load(&path, &Device::Cpu)?.step, 3);
        }
    }
    Ok(())
}

fn evaluated(step: u64, iou: f64) -> StepScores {
    StepScores { step, scores: ObjectScores { iou, ..Default::default() }.into() }
}

#[test]
fn the_best_evaluation_is_the_first_of_the_highest() {
    assert_eq!((best_evaluation(&[]), evaluations_since_best(&[])), (None, 0));
    let run: Vec<_> = [0.5, 0.7, 0.6, 0.7, 0.1]
        .iter()
        .zip(1..)
        .map(|(iou, step)| evaluated(step, *iou))
        .collect();
    for (count, (step, since)) in [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)].into_iter().enumerate() {
        let run = &run[..=count];
        assert_eq!(
            (best_evaluation(run).map(|best| best.step), evaluations_since_best(run)),
            (Some(step), since)
        );
    }
}

#[test]
fn a_continued_table_has_the_bytes_of_an_uninterrupted_one() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (whole, parts) = (folder.path().join("whole.csv"), folder.path().join("parts.csv"));
    let write = |path: &Path, steps: std::ops::Range<u64>| -> anyhow::Result<()> {
        let mut table = MetricsCsv::open(path, steps.start)?;
        for step in steps {
            let row =
                StepMetrics { step: step + 1, loss: 0.1 + step as f32, lr: 1e-3, grad_norm: 0.5 };
            let scores = ObjectScores::from_values([0.25, 0.4, 1.0, 0.5, 0.75, 0.125]);
            let scores = HeldOutScores::from(scores);
            table.row(&row, (step % 2 == 1).then_some(&scores))?;
        }
        Ok(())
    };
    write(&whole, 0..6)?;
    write(&parts, 0..5)?; // steps that a kill loses, and a row that it cuts
    let mut cut = std::fs::read(&parts)?;
    cut.extend_from_slice(b"6,0.");
    std::fs::write(&parts, cut)?;
    write(&parts, 3..6)?;
    let text = std::fs::read_to_string(&whole)?;
    assert_eq!(text, std::fs::read_to_string(&parts)?);
    assert!(text.starts_with("step,loss,lr,grad_norm,iou,dice,boundary_f1,iou_at_3,iou_at_5,iou_error,ap,ap_50,sa,sa_cut\n1,0.1,0.001,0.5,,,,,,,,,,\n2,1.1,0.001,0.5,0.25,0.4,1,0.5,0.75,0.125,,,,\n"), "{text}");
    std::fs::write(&parts, "my,own,table\n1,2,3\n")?;
    assert!(MetricsCsv::open(&parts, 3)
        .expect_err("not ours")
        .to_string()
        .contains("no table of metrics"));
    Ok(())
}

/// The bytes of an event file, taken apart by hand: lengths, checksums, events.
#[test]
fn an_event_file_holds_its_scalars() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for steps in [0, 300] {
        let folder = folder.path().join(format!("{steps}"));
        let mut events = EventFile::create(&folder, steps)?;
        events.scalars(steps + 1, &[("train/loss", 0.75), ("train/lr", 1e-3)])?;
        let second = EventFile::create(&folder, steps)?;
        drop(second);
        let mut names: Vec<_> = std::fs::read_dir(&folder)?
            .map(|e| e.map(|e| e.path()))
            .collect::<std::io::Result<_>>()?;
        names.sort();
        assert_eq!(names.len(), 2);
        let bytes = std::fs::read(&names[0])?;
        let (mut rest, mut records) = (&bytes[..], vec![]);
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into()?) as usize;
            let crc = |at: usize| rest[at..at + 4].try_into().map(u32::from_le_bytes);
            let masked =
                |data: &[u8]| crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8);
            assert_eq!(crc(8)?, masked(&rest[..8]));
            let event = &rest[12..12 + length];
            assert_eq!(crc(12 + length)?, masked(event));
            assert_eq!(event[0], 0x09, "the wall time");
            records.push(event[9..].to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(records[0], [&[0x10, 0, 0x1a, 13], &b"brain.Event:2"[..]].concat());
        let loss =
            [&[0x0a, 17, 0x0a, 10], &b"train/loss"[..], &[0x15], &0.75f32.to_le_bytes()].concat();
        let lr = [&[0x0a, 15, 0x0a, 8], &b"train/lr"[..], &[0x15], &1e-3f32.to_le_bytes()].concat();
        let step: &[u8] = if steps == 0 { &[0x10, 1] } else { &[0x10, 0xad, 2] };
        let scalars = [step, &[0x2a, 36], &loss, &lr].concat();
        assert_eq!(records.last(), Some(&scalars));
        // A continued run makes earlier files' later steps void.
        assert_eq!(records.len(), if steps == 0 { 2 } else { 3 });
        if steps > 0 {
            assert_eq!(records[1], [0x10, 0xad, 2, 0x3a, 2, 0x08, 1]);
        }
    }
    Ok(())
}
