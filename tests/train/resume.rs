//! A run that was saved and continued has the bits of one that was not. A state that is damaged, or belongs to another
//! run, is refused.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{set_trainable, trainable_variables, Adapter, LayerNorm, Linear, Mode};
use candle_sam_lora::train::{AdamWConfig, StepRng, Trainer, TrainerConfig, TrainingState};
use serde_json::{json, Map, Value};

struct Model {
    lin1: Linear,
    norm: LayerNorm,
    lin2: Linear,
}

module_tree!(Model { lin1, norm, lin2 });

fn random(stream: &str, step: u64, rows: usize, cols: usize) -> Result<Tensor> {
    let mut draws = StepRng::new(1, stream, step);
    let values: Vec<f32> = (0..rows * cols).map(|_| draws.uniform() as f32 - 0.5).collect();
    Tensor::from_vec(values, (rows, cols), &Device::Cpu)
}

impl Model {
    fn new() -> anyhow::Result<Self> {
        let mut model = Self {
            lin1: Linear::load(6, 12, VarBuilder::zeros(DType::F32, &Device::Cpu))?,
            norm: LayerNorm::new(
                Tensor::ones(12, DType::F32, &Device::Cpu)?,
                Tensor::zeros(12, DType::F32, &Device::Cpu)?,
                1e-6,
            ),
            lin2: Linear::load(12, 3, VarBuilder::zeros(DType::F32, &Device::Cpu))?,
        };
        model.lin1.weight = random("lin1", 0, 12, 6)?;
        model.lin2.weight = random("lin2", 0, 3, 12)?;
        for (name, linear) in [("lin1", &mut model.lin1), ("lin2", &mut model.lin2)] {
            let adapter = Adapter {
                a: random(name, 1, 4, linear.in_dim())?,
                b: Tensor::zeros((linear.out_dim(), 4), DType::F32, &Device::Cpu)?,
                b_bias: None,
                magnitude: None,
                scaling: 2.0,
                dropout: 0.3,
                stream: 0,
                changes_base: false,
            };
            linear.put_adapter(name, adapter);
        }
        set_trainable(&mut model, |name| name.contains("lora") || name == "norm.weight")?;
        Ok(model)
    }

    fn loss(&self, step: u64, mode: Mode) -> Result<Tensor> {
        let x = random("x", step, 8, 6)?;
        let y = self.lin2.forward(&self.norm.forward(&self.lin1.forward(&x, mode)?)?, mode)?;
        (y - x.narrow(1, 0, 3)?)?.sqr()?.mean_all()
    }

    fn bits(&self) -> anyhow::Result<Vec<u32>> {
        let mut bits = Vec::new();
        for (_, var) in trainable_variables(self)? {
            bits.extend(var.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
        }
        Ok(bits)
    }
}

fn settings(rank: u32) -> Map<String, Value> {
    Map::from_iter([("rank".to_string(), json!(rank))])
}

fn trainer(model: &Model, seed: u64, rank: u32) -> anyhow::Result<Trainer> {
    let config = AdamWConfig { lr: 0.02, ..Default::default() };
    Ok(Trainer::new(model, TrainerConfig { seed, ..config.into() })?.with_settings(settings(rank)))
}

fn run(trainer: &mut Trainer, model: &Model, steps: u64) -> Result<()> {
    while trainer.steps() < steps {
        trainer.step(|step, mode| model.loss(step, mode))?;
    }
    Ok(())
}

#[test]
fn a_continued_run_has_the_bits_of_an_uninterrupted_one() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let whole = Model::new()?;
    let mut whole_run = trainer(&whole, 5, 4)?;
    run(&mut whole_run, &whole, 6)?;

    let model = Model::new()?;
    let mut first = trainer(&model, 5, 4)?;
    run(&mut first, &model, 3)?;
    first.save(&path)?;
    run(&mut first, &model, 5)?; // steps that a kill loses

    let model = Model::new()?;
    let mut second = trainer(&model, 5, 4)?;
    second.resume(&path)?;
    assert_eq!(second.steps(), 3);
    run(&mut second, &model, 6)?;
    assert_eq!(model.bits()?, whole.bits()?);
    assert_eq!(second.losses(), whole_run.losses());

    // The comparison means something: the parameters moved, and another seed gives other dropout masks.
    assert_ne!(whole.bits()?, Model::new()?.bits()?);
    let other = Model::new()?;
    run(&mut trainer(&other, 6, 4)?, &other, 6)?;
    assert_ne!(whole.bits()?, other.bits()?);
    Ok(())
}

#[test]
fn another_runs_state_is_refused_and_named() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let model = Model::new()?;
    let mut saved = trainer(&model, 5, 4)?;
    run(&mut saved, &model, 2)?;
    saved.save(&path)?;

    let refused =
        |trainer: &mut Trainer| trainer.resume(&path).expect_err("another run's state").to_string();
    let message = refused(&mut trainer(&model, 5, 8)?);
    assert!(message.contains("rank: was 4, is 8"), "{message}");
    let message = refused(&mut trainer(&model, 7, 4)?);
    assert!(message.contains("seed 5, not 7"), "{message}");
    let mut other = Model::new()?;
    set_trainable(&mut other, |name| name.contains("lin1.lora"))?;
    let message = refused(&mut trainer(&other, 5, 4)?);
    assert!(message.contains("model: was"), "{message}");
    Ok(())
}

#[test]
fn a_damaged_state_is_refused_wherever_the_damage_is() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let tensors = [("parameter.p".to_string(), random("p", 0, 3, 2)?)].into();
    let state = TrainingState {
        step: 2,
        seed: 1,
        settings: settings(4),
        losses: vec![0.5, 0.25],
        evaluations: vec![],
        tensors,
    };
    state.save(&path)?;
    let good = std::fs::read(&path)?;
    assert_eq!(TrainingState::load(&path, &Device::Cpu)?.losses, [0.5, 0.25]);
    for length in 0..good.len() {
        std::fs::write(&path, &good[..length])?;
        assert!(TrainingState::load(&path, &Device::Cpu).is_err(), "cut to {length} bytes");
    }
    for place in 0..good.len() {
        let mut bad = good.clone();
        bad[place] ^= 1;
        std::fs::write(&path, &bad)?;
        if let Ok(state) = TrainingState::load(&path, &Device::Cpu) {
            // Only the padding of the header and its entries' order may differ without a difference in content.
            assert_eq!(
                state.tensors["parameter.p"].to_vec2::<f32>()?,
                random("p", 0, 3, 2)?.to_vec2::<f32>()?,
                "byte {place}"
            );
            assert_eq!(
                (state.step, state.seed, &state.settings),
                (2, 1, &settings(4)),
                "byte {place}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_state_that_cannot_be_written_leaves_the_old_one() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let model = Model::new()?;
    let trainer = trainer(&model, 5, 4)?;
    let missing = folder.path().join("missing").join("state.safetensors");
    let message = trainer.save(&missing).expect_err("no such folder").to_string();
    assert!(message.contains("missing"), "{message}");
    // A folder in the file's place: the rename fails, and nothing is left beside it.
    let taken = folder.path().join("taken");
    std::fs::create_dir_all(taken.join("inside"))?;
    assert!(trainer.save(&taken).is_err());
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
    Ok(())
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_its_step() -> anyhow::Result<()> {
    let model = Model::new()?;
    let mut trainer = trainer(&model, 5, 4)?;
    run(&mut trainer, &model, 1)?;
    let bits = model.bits()?;
    let result = trainer.step(|step, mode| model.loss(step, mode)? / 0.0);
    let message = result.expect_err("an infinite loss").to_string();
    assert!(message.contains("step 2: the loss is inf"), "{message}");
    assert_eq!((trainer.steps(), model.bits()?), (1, bits));
    Ok(())
}
