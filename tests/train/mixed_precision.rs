//! A base in bf16 or f16 under f32 adapters, beside PEFT's in eager PyTorch: both measured against float64.

use crate::common;
use crate::common::adapters::{folder, run};
use crate::common::model::{self, Tensors};
use crate::common::Case;
use candle_core::{backprop::GradStore, DType, Device, Result, Tensor, Var, D};
use candle_nn::Optimizer;
use candle_sam_lora::files::read_tensors;
use candle_sam_lora::lora::{inject, load_adapter, LoraConfig};
use candle_sam_lora::nn::{
    is_adapter_tensor, named_parameters, trainable_variables, Mode, ModuleTree, NodeMut,
};
use candle_sam_lora::sam::{AttentionKind, SamModel};
use candle_sam_lora::train::{AdamW, AdamWConfig};
use std::collections::BTreeMap;

/// As far from the truth as eager PyTorch in the same dtype, at most so many times.
const TIMES_EAGER: f64 = 2.0;

/// Images whose errors of a decoder's gradients are compared by their medians, see
/// tests/fixtures/gen/mixed_precision.py.
const IMAGES: usize = 32;

/// The norm of the difference.
fn off(got: &Tensor, truth: &Tensor) -> f64 {
    assert_eq!(got.dims(), truth.dims());
    let pairs = common::values(got).into_iter().zip(common::values(truth));
    pairs.map(|(got, truth)| (got - truth).powi(2)).sum::<f64>().sqrt()
}

/// The fixture model in `dtype` with the adapter of a case.
fn adapted(kind: &str, dtype: DType) -> anyhow::Result<SamModel> {
    let mut sam = model::model("tiny", AttentionKind::Split, dtype)?;
    if kind != "save_decoder" {
        load_adapter(&mut sam, folder(kind))?;
        return Ok(sam);
    }
    // The adapter of another kind, and a decoder that is trained from where the base has it.
    let config = LoraConfig::new(2).alpha(4.0).target_modules(["q", "v"]);
    inject(&mut sam, &config.modules_to_save(["mask_decoder"]), 0)?;
    let file = folder("modules_to_save").join("adapter_model.safetensors");
    let values = read_tensors(&file, &Device::Cpu)?;
    for (name, var) in trainable_variables(&sam)? {
        if is_adapter_tensor(&name) {
            var.set(&values[&format!("base_model.model.{name}")])?;
        }
    }
    Ok(sam)
}

/// The image embeddings, and the gradients of a case's loss on its inputs.
fn embeddings_and_gradients(
    sam: &SamModel,
    case: &Case,
    inputs: &Tensors,
    dtype: DType,
) -> anyhow::Result<(Tensor, GradStore)> {
    let rounded = |(name, tensor): (&String, &Tensor)| {
        let value = match tensor.dtype() {
            DType::F32 => tensor.to_dtype(DType::BF16)?.to_dtype(DType::F32)?,
            _ => tensor.clone(),
        };
        Ok((name.clone(), value))
    };
    let weights = inputs.iter().map(rounded).collect::<Result<Tensors>>()?;
    let mut inputs = weights.clone();
    inputs.insert("pixel_values".to_string(), weights["pixel_values"].to_dtype(dtype)?);
    let outputs = run(sam, &inputs, Mode::Train { seed: case.integer("seed") })?;
    let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    let reaches_decoder = case.tensors().keys().any(|name| name.contains("mask_decoder"));
    for (name, output) in &outputs {
        assert_eq!(output.dtype(), dtype);
        let weight = match *name {
            "image_embeddings" => &weights["G"],
            _ if !reaches_decoder => continue,
            name => &weights[&format!("G_{name}")],
        };
        loss = (loss + (output.to_dtype(DType::F32)? * weight)?.sum_all()?)?;
    }
    Ok((outputs["image_embeddings"].clone(), loss.backward()?))
}

/// A model in f32 with the values that `adapted` has in `dtype`.
fn rounded(kind: &str, dtype: DType) -> anyhow::Result<SamModel> {
    let mut sam = adapted(kind, DType::F32)?;
    sam.visit_mut("", &mut |name, node| {
        if let (false, NodeMut::Parameter(tensor) | NodeMut::Buffer(tensor)) =
            (is_adapter_tensor(name), node)
        {
            let rounded = tensor.detach().to_dtype(dtype)?.to_dtype(DType::F32)?;
            *tensor = match tensor.track_op() {
                true => Var::from_tensor(&rounded)?.into_inner(),
                false => rounded,
            };
        }
        Ok(())
    })?;
    Ok(sam)
}

/// Ours and PEFT's errors of the decoder's gradients, by their names, of the rolled images. Ours are against our own in
/// f32, whose error is a thousand times smaller.
fn errors_of_rolled_images(
    case: &Case,
    inputs: &Tensors,
    dtype: DType,
) -> anyhow::Result<BTreeMap<String, Vec<[f64; 2]>>> {
    let mut errors = BTreeMap::<String, Vec<[f64; 2]>>::new();
    for image in 1..IMAGES {
        let rolled = inputs["pixel_values"].roll(2 * image as i32, D::Minus1)?;
        let mut inputs = inputs.clone();
        inputs.insert("pixel_values".to_string(), rolled);
        let gradients = |sam: &SamModel, dtype| -> anyhow::Result<Tensors> {
            let (_, gradients) = embeddings_and_gradients(sam, case, &inputs, dtype)?;
            let own = |(name, var): (String, Var)| {
                let found = gradients.get(&var).cloned();
                Ok((name, found.map_or_else(|| var.zeros_like(), Ok)?))
            };
            trainable_variables(sam)?.into_iter().map(own).collect()
        };
        let truth = gradients(&rounded("save_decoder", dtype)?, DType::F32)?;
        for (name, found) in gradients(&adapted("save_decoder", dtype)?, dtype)? {
            let key = format!("grad/base_model.model.{name}");
            if name.contains("mask_decoder") && case.get(&key).is_some() {
                let theirs = case.list("rolled", &key)[image - 1];
                errors.entry(key).or_default().push([off(&found, &truth[&name]), theirs]);
            }
        }
    }
    Ok(errors)
}

/// The median of an even number of values.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    (values[middle - 1] + values[middle]) / 2.0
}

#[test]
fn activations_and_gradients_are_as_near_as_pefts() -> anyhow::Result<()> {
    let cases = common::cases("train/mixed_precision.safetensors");
    assert_eq!(cases.len(), 20);
    let inputs =
        read_tensors(common::fixtures().join("adapters/inputs.safetensors"), &Device::Cpu)?;
    let mut failures = Vec::new();
    for case in cases {
        let (kind, dtype) = case.name.split_once('-').expect("a kind and a dtype");
        let dtype = if dtype == "bfloat16" { DType::BF16 } else { DType::F16 };
        let sam = adapted(kind, dtype)?;
        for (name, tensor) in named_parameters(&sam) {
            let expected = if is_adapter_tensor(&name) { DType::F32 } else { dtype };
            assert_eq!(tensor.dtype(), expected, "{name}");
        }
        let (embeddings, gradients) = embeddings_and_gradients(&sam, &case, &inputs, dtype)?;

        let parameters = trainable_variables(&sam)?;
        let names: BTreeMap<_, _> = case
            .tensors()
            .keys()
            .filter_map(|key| {
                Some((
                    key.strip_prefix("grad/base_model.model.")?.replace(".base_layer.", "."),
                    key,
                ))
            })
            .collect();
        let mut found = vec![("image_embeddings".to_string(), embeddings)];
        for (name, var) in &parameters {
            let Some(key) = names.get(name) else {
                assert!(gradients.get(var).is_none(), "{}: {name}", case.name);
                continue;
            };
            let gradient = gradients.get(var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
            assert_eq!(gradient.dtype(), var.dtype(), "{name}");
            found.push((key.to_string(), gradient));
        }
        assert_eq!(found.len(), 1 + names.len(), "{}", case.name);
        // PEFT's error of all gradients together, relative to their size.
        let squares = |tensor: &Tensor| common::values(tensor).iter().map(|v| v * v).sum::<f64>();
        let (mut theirs, mut truth) = (0.0, 0.0);
        for key in names.values() {
            theirs += case.of("off", key).powi(2);
            truth += squares(&case.tensor(key));
        }
        let typical = (theirs / truth).sqrt();
        let rolled = match kind {
            "save_decoder" => errors_of_rolled_images(&case, &inputs, dtype)?,
            _ => BTreeMap::new(),
        };
        let (mut worst, mut all) = ((0.0, String::new()), (0.0, 0.0));
        for (name, tensor) in found {
            let (mut ours, mut theirs) = (off(&tensor, &case.tensor(&name)), case.of("off", &name));
            if let Some(errors) = rolled.get(&name) {
                let all = || errors.iter().copied().chain([[ours, theirs]]);
                [ours, theirs] = [0, 1].map(|side| median(all().map(|e| e[side]).collect()));
            }
            all = (all.0 + ours * ours, all.1 + theirs * theirs);
            // In the decoder chance has a part: ReLUs whose argument is nearer to zero than either side's error, and
            // biases of three elements. The gradient of the keys' bias is zero but for rounding, as in
            // tests/sam/model.rs.
            if name.contains("mask_decoder") {
                let size = case.tensor(&name.replace("k_proj.bias", "q_proj.bias"));
                theirs = theirs.max(typical * squares(&size).sqrt());
            }
            let ratio = ours / theirs.max(f64::MIN_POSITIVE);
            if ratio > worst.0 {
                worst = (ratio, name.clone());
            }
            if ours > TIMES_EAGER * theirs {
                failures.push(format!("{} {name}: {ours:.2e} off, PEFT {theirs:.2e}", case.name));
            }
        }
        let all = (all.0 / all.1).sqrt();
        println!(
            "{}: {all:.2} times PEFT's error, at most {:.2} in {}",
            case.name, worst.0, worst.1
        );

        // The optimizer's state is f32, as the adapters are.
        if parameters.iter().all(|(_, var)| var.dtype() == DType::F32) {
            let mut optimizer = AdamW::new(parameters, AdamWConfig::default())?;
            optimizer.step(&gradients)?;
            assert!(optimizer.state()?.values().all(|tensor| tensor.dtype() == DType::F32));
        }
    }
    assert!(failures.is_empty(), "{} are too far off:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// A decoder that is saved with the adapter may be in f32 over an encoder in 16 bits.
#[test]
fn saved_modules_may_be_f32() -> anyhow::Result<()> {
    let path = common::fixtures().join("adapters/inputs.safetensors");
    let inputs = read_tensors(&path, &Device::Cpu)?;
    for (name, dtype) in
        [("save_decoder-bfloat16", DType::BF16), ("save_decoder-float16", DType::F16)]
    {
        let cases = common::cases("train/mixed_precision.safetensors");
        let case = cases.iter().find(|case| case.name == name).expect("a case");
        let mut sam = adapted("save_decoder", dtype)?;
        sam.mask_decoder.visit_mut("", &mut |_, node| {
            if let NodeMut::Parameter(tensor) = node {
                *tensor = Var::from_tensor(&tensor.detach().to_dtype(DType::F32)?)?.into_inner();
            }
            Ok(())
        })?;
        let (_, gradients) = embeddings_and_gradients(&sam, case, &inputs, dtype)?;
        let (mut ours, mut theirs) = (0.0, 0.0);
        for (name, var) in trainable_variables(&sam)? {
            let key = format!("grad/base_model.model.{name}");
            let Some(truth) = case.get(&key) else { continue };
            let gradient = gradients.get(&var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
            assert_eq!(gradient.dtype(), DType::F32, "{name}");
            ours += off(&gradient, &truth).powi(2);
            theirs += case.of("off", &key).powi(2);
        }
        println!(
            "{name}: {:.2} times PEFT's error with the decoder in 16 bits",
            (ours / theirs).sqrt()
        );
        assert!(ours <= theirs, "{name}: {ours:e}, {theirs:e}");
    }
    Ok(())
}
