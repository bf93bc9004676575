//! Models whose parameters are views of variables that an existing program keeps in a `VarMap`. Every parameter is
//! trained, frozen, or refused by name. The map keeps its variables.

use crate::common::vit;
use crate::common::vit::{bits, map_bits, Kept, Vit, WIDTH};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_sam_lora::lora::{
    adapter_state, add_adapter, count_parameters, inject, load_adapter, merge, merge_and_unload,
    save_adapter, set_adapter, set_adapter_state, unmerge, LoraConfig,
};
use candle_sam_lora::nn::{
    gradient_checkpoint, named_parameters, randomize, set_trainable, trainable_variables, Buffer,
    Linear, Mode, ModuleTree, Node,
};
use candle_sam_lora::sam::checkpoint::{self, Naming};
use candle_sam_lora::train::{AdamWConfig, Trainer};
use candle_sam_lora::{files, module_tree};
use std::collections::BTreeMap;

const MODE: Mode = Mode::Train { seed: 3 };
const QKV: &str = "layers.0.attn.qkv.weight";

fn config() -> AdamWConfig {
    AdamWConfig { lr: 0.01, ..Default::default() }
}

fn lora() -> LoraConfig {
    LoraConfig::new(2).target_modules(["q", "v"])
}

/// A model, and the map of its variables.
fn in_map() -> Result<(VarMap, Vit)> {
    let map = VarMap::new();
    let vit = Vit::new(&map, Kept::default())?;
    Ok((map, vit))
}

/// The same model with q, k and v as variables of their own.
fn separate(vit: &Vit) -> Result<Vit> {
    let mut own = vit.clone();
    set_trainable(&mut own, |_| false)?;
    set_trainable(&mut own, |_| true)?;
    Ok(own)
}

fn trained(model: &dyn ModuleTree) -> Result<Vec<String>> {
    Ok(trainable_variables(model)?.into_iter().map(|(name, _)| name).collect())
}

fn parameter_bits(model: &dyn ModuleTree) -> Result<BTreeMap<String, Vec<u32>>> {
    named_parameters(model).iter().map(|(name, t)| Ok((name.clone(), bits(t)?))).collect()
}

/// Names of the map's variables with a gradient.
fn reached(map: &VarMap, loss: &Tensor) -> Result<Vec<String>> {
    let gradients = loss.backward()?;
    let data = map.data().lock().expect("no thread panicked");
    let reached = data.iter().filter(|(_, var)| gradients.get(var).is_some());
    Ok(reached.map(|(name, _)| name.clone()).collect())
}

#[test]
fn training_views_trains_the_variable_behind_them() -> Result<()> {
    let (map, vit) = in_map()?;
    let own = separate(&vit)?;
    let before = map_bits(&map)?;
    let names = trained(&vit)?;
    assert!(names
        .contains(&"layers.0.attn.q.weight+layers.0.attn.k.weight+layers.0.attn.v.weight".into()));
    assert_eq!(names.len(), map.all_vars().len());
    assert_eq!(count_parameters(&vit).trainable, count_parameters(&vit).all);

    let mut trainer = Trainer::new(&vit, config())?;
    let mut reference = Trainer::new(&own, config())?;
    for _ in 0..3 {
        trainer.step(|_, mode| vit.loss(mode))?;
        reference.step(|_, mode| own.loss(mode))?;
    }
    // The same operations on the same numbers, element by element.
    assert_eq!(parameter_bits(&vit)?, parameter_bits(&own)?);
    let after = map_bits(&map)?;
    for (name, before) in before {
        assert_ne!(after[&name], before, "{name} was not trained");
    }
    Ok(())
}

#[test]
fn freezing_stops_every_gradient_of_views() -> Result<()> {
    let (map, mut vit) = in_map()?;
    let before = map_bits(&map)?;
    assert_eq!(reached(&map, &vit.loss(MODE)?)?.len(), map.all_vars().len());
    let mut injected = vit.clone();
    inject(&mut injected, &lora(), 0)?;
    assert_eq!(reached(&map, &injected.loss(MODE)?)?, [] as [&str; 0]);
    assert_eq!(trainable_variables(&injected)?.len(), 8);
    for (name, tensor) in named_parameters(&injected) {
        assert_eq!(tensor.track_op(), name.contains("lora_"), "{name}");
    }
    set_trainable(&mut vit, |_| false)?;
    assert!(!vit.loss(MODE)?.track_op());
    assert!(trainable_variables(&vit)?.is_empty());
    assert_eq!(map_bits(&map)?, before);
    Ok(())
}

#[test]
fn views_of_one_variable_part_when_some_are_frozen() -> Result<()> {
    let (map, mut vit) = in_map()?;
    let before = map_bits(&map)?;
    set_trainable(&mut vit, |name| name.ends_with("attn.q.weight") || name.starts_with("head"))?;
    let names = trained(&vit)?;
    assert_eq!(
        names,
        ["layers.0.attn.q.weight", "layers.1.attn.q.weight", "head.weight", "head.bias"]
    );
    let start = parameter_bits(&vit)?;
    // Weight decay would move all rows of a shared variable.
    let mut trainer = Trainer::new(&vit, config())?;
    trainer.step(|_, mode| vit.loss(mode))?;
    for (name, now) in parameter_bits(&vit)? {
        let trained = names.contains(&name);
        assert_eq!(now != start[&name], trained, "{name}");
    }
    for (name, now) in map_bits(&map)? {
        assert_eq!(
            now != before[&name],
            name.starts_with("head"),
            "{name}: the map keeps what is its own"
        );
    }
    Ok(())
}

#[test]
fn a_variable_under_two_names_is_trained_once() -> Result<()> {
    struct Tied {
        a: Tensor,
        b: Tensor,
    }
    module_tree!(Tied { a, b });
    let var = Var::ones(3, DType::F32, &Device::Cpu)?;
    let tied = Tied { a: var.as_tensor().clone(), b: var.as_tensor().clone() };
    assert_eq!(trained(&tied)?, ["a+b"]);
    let sgd_like = AdamWConfig { weight_decay: 0.0, lr: 0.5, ..Default::default() };
    let mut trainer = Trainer::new(&tied, sgd_like)?;
    trainer.step(|_, _| (&tied.a + &tied.b)?.sum_all())?;
    // AdamW's first step is as long as its learning rate.
    assert!(var.to_vec1::<f32>()?.iter().all(|v| (v - 0.5).abs() < 1e-6), "{var}");
    Ok(())
}

/// A weight that is computed from a variable, by a cast and back.
struct Computed {
    linear: Linear,
}

module_tree!(Computed { linear });

/// As an embedding and a head that share their weight, in a frozen model.
#[test]
fn one_frozen_tensor_under_two_names_becomes_one_variable() -> Result<()> {
    struct Tied {
        embedding: Tensor,
        head: Linear,
        other: Tensor,
    }
    module_tree!(Tied { embedding, head, other });
    let weight = Tensor::ones((3, 4), DType::F32, &Device::Cpu)?;
    let head = Linear::new(weight.clone(), None);
    let mut tied = Tied { embedding: weight.clone(), head, other: weight.copy()? };
    set_trainable(&mut tied, |_| true)?;
    assert_eq!(trained(&tied)?, ["embedding+head.weight", "other"]);
    set_trainable(&mut tied, |name| name != "embedding")?;
    assert_eq!(trained(&tied)?, ["head.weight", "other"]);
    Ok(())
}

fn computed() -> Result<(Var, Computed)> {
    let var = Var::ones((2, 2), DType::F32, &Device::Cpu)?;
    let weight = var.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    Ok((var, Computed { linear: Linear::new(weight, None) }))
}

#[test]
fn what_is_computed_from_a_variable_is_refused_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.safetensors");
    let (var, mut model) = computed()?;
    checkpoint::save(&model, &file, Naming::HuggingFace, None)?;
    let errors = [
        trainable_variables(&model).map(drop),
        Trainer::new(&model, config()).map(drop),
        randomize(&mut model, 0, 0.1),
        checkpoint::load(&mut model, &file).map(drop),
    ];
    for error in errors {
        let message = error.expect_err("a step would not change it").to_string();
        assert!(message.contains("linear.weight is computed from a variable"), "{message}");
        assert!(message.contains("set_trainable"), "{message}");
    }
    let x = Var::ones((1, 2), DType::F32, &Device::Cpu)?;
    let message = gradient_checkpoint(&model.linear, &x, |linear, x| linear.forward(x, MODE))
        .map(drop)
        .expect_err("refused")
        .to_string();
    assert!(message.contains("weight is computed from a variable"), "{message}");

    set_trainable(&mut model, |_| true)?;
    assert_eq!(trainable_variables(&model)?.len(), 1);
    let (_, mut model) = computed()?;
    set_trainable(&mut model, |_| false)?;
    assert!(!model.linear.weight.track_op());
    let (_, mut model) = computed()?;
    inject(&mut model, &LoraConfig::new(1).target_modules(["linear"]), 0)?;
    assert!(!model.linear.weight.track_op());
    assert_eq!(bits(&var)?, bits(&Tensor::ones((2, 2), DType::F32, &Device::Cpu)?)?);
    Ok(())
}

#[test]
fn randomize_keeps_the_variables_of_a_map() -> Result<()> {
    let (map, mut vit) = in_map()?;
    let before = map_bits(&map)?;
    let mut plain = vit.clone();
    set_trainable(&mut plain, |_| false)?;
    for (_, tensor) in named_parameters(&plain) {
        assert!(!tensor.track_op());
    }
    randomize(&mut vit, 5, 0.1)?;
    assert_eq!(trainable_variables(&vit)?.len(), map.all_vars().len());
    assert_eq!(reached(&map, &vit.loss(MODE)?)?.len(), map.all_vars().len());
    let after = map_bits(&map)?;
    assert!(before.iter().all(|(name, before)| after[name] != *before));
    // The values are those that constants get.
    randomize(&mut plain, 5, 0.1)?;
    assert_eq!(parameter_bits(&vit)?, parameter_bits(&plain)?);
    Ok(())
}

#[test]
fn buffers_that_are_variables_keep_them() -> Result<()> {
    struct Positions {
        grid: Buffer,
    }
    module_tree!(Positions { grid });
    let var = Var::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let mut model = Positions { grid: Buffer(var.as_tensor().clone()) };
    randomize(&mut model, 1, 0.1)?;
    assert_eq!(bits(&var)?, bits(&model.grid.0)?);
    assert!(bits(&var)?.iter().all(|bits| *bits != 0));
    Ok(())
}

#[test]
fn checkpoints_load_into_the_variables_behind_views() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("vit.safetensors");
    let saved = VarMap::new();
    let mut vit = Vit::new(&saved, Kept::default())?;
    randomize(&mut vit, 9, 0.2)?;
    saved.save(&file)?;
    let (map, mut vit) = in_map()?;
    checkpoint::load(&mut vit, &file)?;
    assert_eq!(map_bits(&map)?, map_bits(&saved)?);
    assert_eq!(trainable_variables(&vit)?.len(), map.all_vars().len());
    // And back: q, k and v are written as the map's qkv.
    let back = folder.path().join("back.safetensors");
    checkpoint::save(&vit, &back, Naming::HuggingFace, None)?;
    for (name, tensor) in files::read_tensors(&back, &Device::Cpu)? {
        assert_eq!(bits(&tensor)?, map_bits(&saved)?[&name], "{name}");
    }
    Ok(())
}

#[test]
fn views_of_any_strides_take_values_in_place() -> Result<()> {
    struct Views {
        views: Vec<Tensor>,
    }
    module_tree!(Views { views => "" });
    let var = Var::zeros((3, 4, 5), DType::F32, &Device::Cpu)?;
    let of =
        |view: candle_core::Result<Tensor>| -> Result<(Var, Tensor)> { Ok((var.clone(), view?)) };
    for (what, view) in [
        ("rows", of(var.narrow(0, 1, 2))?),
        ("columns", of(var.narrow(2, 1, 3))?),
        ("transposed", of(var.transpose(0, 2))?),
        ("transposed columns", of(var.transpose(0, 2).and_then(|t| t.narrow(1, 1, 2)))?),
        ("flat", of(var.flatten_all())?),
        ("one", of(var.get(2).and_then(|t| t.get(3)).and_then(|t| t.get(4)))?),
    ] {
        let (var, view) = view;
        var.set(&var.zeros_like()?)?;
        let mut model = Views { views: vec![view.clone()] };
        assert_eq!(trainable_variables(&model)?[0].1.id(), var.id(), "{what}");
        randomize(&mut model, 1, 1.0)?;
        let mut expected = Views { views: vec![view.zeros_like()?.contiguous()?] };
        randomize(&mut expected, 1, 1.0)?;
        assert_eq!(bits(&view)?, bits(&expected.views[0])?, "{what}");
        let set = bits(&var)?.iter().filter(|bits| **bits != 0).count();
        assert_eq!(set, view.elem_count(), "{what}: nothing beside it changed");
    }
    let mut model = Views { views: vec![var.get(0)?.get(0)?.get(0)?.broadcast_as((2, 2))?] };
    let message = randomize(&mut model, 1, 1.0).expect_err("one number for four").to_string();
    assert!(message.contains("0 is a broadcast view"), "{message}");
    Ok(())
}

#[test]
fn merging_leaves_the_map_alone() -> Result<()> {
    let (map, mut vit) = in_map()?;
    let (base, before) = (map_bits(&map)?, bits(&vit.forward(&vit::input()?, Mode::Eval)?)?);
    inject(&mut vit, &lora(), 0)?;
    for (_, var) in trainable_variables(&vit)? {
        vit::fill(&var)?;
    }
    let adapted = vit.forward(&vit::input()?, Mode::Eval)?;
    merge(&mut vit)?;
    let merged = vit.forward(&vit::input()?, Mode::Eval)?;
    let apart = (&adapted - &merged)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let scale = adapted.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(apart <= 1e-5 * scale, "{apart} of {scale}");
    assert_ne!(bits(&merged)?, before);
    unmerge(&mut vit)?;
    assert_eq!(bits(&vit.forward(&vit::input()?, Mode::Eval)?)?, bits(&adapted)?);
    merge_and_unload(&mut vit)?;
    assert_eq!(bits(&vit.forward(&vit::input()?, Mode::Eval)?)?, bits(&merged)?);
    assert_eq!(map_bits(&map)?, base);
    Ok(())
}

#[test]
fn gradient_checkpointing_of_views_gives_the_same_bits() -> Result<()> {
    let (_map, vit) = in_map()?;
    let x = vit::input()?;
    let plain = vit.layers[0].forward(&x, MODE)?.sqr()?.sum_all()?.backward()?;
    let y = gradient_checkpoint(&vit.layers[0], &x, |layer, x| layer.forward(x, MODE))?;
    let checkpointed = y.sqr()?.sum_all()?.backward()?;
    let variables = trainable_variables(&vit.layers[0])?;
    assert_eq!(variables.len(), 10);
    for (name, var) in variables {
        let (a, b) = (plain.get(&var), checkpointed.get(&var));
        assert_eq!(bits(a.expect(&name))?, bits(b.expect(&name))?, "{name}");
    }
    Ok(())
}

/// Adapters whose A and B are rows of one variable.
fn adapters_of_views(vit: &mut Vit) -> Result<Var> {
    let var = Var::zeros((8, WIDTH), DType::F32, &Device::Cpu)?;
    vit::fill(&var)?;
    let adapters = &mut vit.layers[0].attn.q.adapters;
    let adapter = adapters.get_mut("default").expect("injected");
    (adapter.a, adapter.b) = (var.narrow(0, 0, 2)?, var.narrow(0, 2, 2)?.t()?);
    Ok(var)
}

#[test]
fn adapters_that_are_views_switch_and_load() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_map, mut vit) = in_map()?;
    inject(&mut vit, &lora(), 0)?;
    let other = adapter_state(&vit, &lora())?;
    let var = adapters_of_views(&mut vit)?;
    assert_eq!(reached_by(&var, &vit.loss(MODE)?)?, 1);

    // In place: the variable behind A has the new values, its last rows the old ones.
    let before = bits(&var)?;
    set_adapter_state(&mut vit, &lora(), &other)?;
    let key = "base_model.model.layers.0.attn.q.lora_A.weight";
    assert_eq!(bits(&var)?[..2 * WIDTH], bits(&other[key])?);
    assert_eq!(bits(&var)?[4 * WIDTH..], before[4 * WIDTH..]);
    save_adapter(&vit, &lora(), folder.path())?;
    var.set(&var.ones_like()?)?;
    candle_sam_lora::lora::hotswap_adapter(&mut vit, "default", folder.path())?;
    assert_eq!(bits(&var)?[..2 * WIDTH], bits(&other[key])?);

    // Adapters that are not active are frozen, views too.
    add_adapter(&mut vit, "second", &lora(), 1)?;
    set_adapter(&mut vit, &["second"])?;
    assert_eq!(reached_by(&var, &vit.loss(MODE)?)?, 0);
    let names = trained(&vit)?;
    assert!(names.iter().all(|name| name.contains(".second.")), "{names:?}");
    set_adapter(&mut vit, &["default"])?;
    assert_eq!(trainable_variables(&vit)?.len(), 8);
    Ok(())
}

fn reached_by(var: &Var, loss: &Tensor) -> Result<usize> {
    Ok(usize::from(loss.backward()?.get(var).is_some()))
}

#[test]
fn saved_modules_load_into_the_maps_variables() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = lora().modules_to_save(["head"]);
    let first = VarMap::new();
    let mut trained = Vit::new(&first, Kept::default())?;
    inject(&mut trained, &config, 0)?;
    let head = |map: &VarMap| map.data().lock().expect("no thread panicked")["head.weight"].clone();
    head(&first).set(&head(&first).ones_like()?)?;
    save_adapter(&trained, &config, folder.path())?;
    let (map, mut vit) = in_map()?;
    load_adapter(&mut vit, folder.path())?;
    assert_eq!(bits(&head(&map))?, bits(&head(&first))?);
    assert_eq!(reached(&map, &vit.loss(MODE)?)?.len(), 2, "head.weight and head.bias");
    Ok(())
}

#[test]
fn saved_modules_part_from_tied_ones_that_are_frozen() -> Result<()> {
    let mut vit = Vit::new(&VarMap::new(), Kept::default())?;
    vit.head.weight = vit.embed.weight.clone();
    let before = bits(&vit.embed.weight)?;
    inject(&mut vit, &lora().modules_to_save(["head"]), 0)?;
    let mut trainer = Trainer::new(&vit, config())?;
    trainer.step(|_, mode| vit.loss(mode))?;
    assert_eq!(bits(&vit.embed.weight)?, before);
    assert_ne!(bits(&vit.head.weight)?, before);
    Ok(())
}

#[test]
fn views_trained_beside_adapters_become_variables_of_their_own() -> Result<()> {
    let (map, mut vit) = in_map()?;
    let before = map_bits(&map)?;
    let config = LoraConfig::new(2).target_modules(["q", "v"]).modules_to_save(["layers.1.attn.k"]);
    inject(&mut vit, &config, 0)?;
    let names = trained(&vit)?;
    assert!(names.contains(&"layers.1.attn.k.weight".to_string()), "{names:?}");
    let mut trainer = Trainer::new(&vit, self::config())?;
    trainer.step(|_, mode| vit.loss(mode))?;
    assert_eq!(map_bits(&map)?, before, "the other rows of {QKV} stay");
    Ok(())
}

#[test]
fn states_of_views_resume_with_the_same_bits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("state.safetensors");
    let run =
        |steps: u64, save_after: Option<u64>, resume: bool| -> Result<BTreeMap<String, Vec<u32>>> {
            let map = VarMap::new();
            let vit = Vit::new(&map, Kept::default())?;
            let mut trainer = Trainer::new(&vit, config())?;
            if resume {
                trainer.resume(&file)?;
            }
            while trainer.steps() < steps {
                trainer.step(|_, mode| vit.loss(mode))?;
                if Some(trainer.steps()) == save_after {
                    trainer.save(&file)?;
                }
            }
            Ok(map_bits(&map)?)
        };
    let whole = run(4, Some(2), false)?;
    assert_eq!(run(4, None, true)?, whole);
    Ok(())
}

#[test]
fn a_tree_counts_views_as_trainable() -> Result<()> {
    let (map, vit) = in_map()?;
    let (mut views, mut variables) = (0, 0);
    vit.visit("", &mut |_, node| {
        if let Node::Parameter(tensor) = node {
            match tensor.is_variable() {
                true => variables += 1,
                false => views += 1,
            }
        }
    });
    assert_eq!((views, variables), (12, 20));
    let elements: usize = map.all_vars().iter().map(|var| var.elem_count()).sum();
    assert_eq!(count_parameters(&vit).trainable, elements);
    Ok(())
}
