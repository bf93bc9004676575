//! Frozen weights in int8: the integers beside NumPy's, values and gradients beside f64 loops. The error is compared
//! with that of PyTorch's dynamic int8 (tests/fixtures/gen/int8.py). A quantized model refuses by name what it cannot
//! do.

use crate::common::model;
use crate::common::{cases, error, gradients, random, tensor_error, values};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, merge, LoraConfig};
use candle_sam_lora::nn::{
    self, named_parameters, quantize_int8, randomize, set_trainable, trainable_variables, Linear,
    Mode, ModuleTree,
};
use candle_sam_lora::ops::{self, Activation, Lora, Projection};
use candle_sam_lora::sam::checkpoint::{self, Naming};
use candle_sam_lora::sam::{AttentionKind, SamModel};
use candle_sam_lora::testing::composed;

/// A layer in int8.
fn quantized(weight: &Tensor, bias: Option<&Tensor>) -> Linear {
    let mut layer = Linear::new(weight.clone(), bias.cloned());
    assert_eq!(quantize_int8(&mut layer).unwrap().layers, 1);
    layer
}

/// The relative error in the Euclidean norm.
fn off(got: &Tensor, truth: &Tensor) -> f64 {
    let (got, truth) = (values(got), values(truth));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(&truth).map(|(a, b)| a - b)) / norm(&mut truth.iter().copied())
}

/// W as the layer has it, in f64.
fn weight_of(layer: &Linear) -> Vec<f64> {
    let scales = values(layer.scales.as_ref().unwrap());
    let bytes = values(&layer.weight);
    bytes.iter().enumerate().map(|(i, b)| (b - 128.0) * scales[i / layer.in_dim()]).collect()
}

/// x as the product sees it: rounded to its row's integers, in f64.
fn rounded(x: &[f64], in_dim: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let largest = row.iter().fold(0f32, |max, &x| max.max((x as f32).abs()));
        let (scale, inverse) = (largest / 127.0, 127.0 / largest);
        row.iter()
            .map(|&x| f64::from((x as f32 * inverse).round_ties_even()) * f64::from(scale))
            .collect::<Vec<_>>()
    };
    x.chunks_exact(in_dim).flat_map(row).collect()
}

/// `a [m, k] b [n, k]^T`
fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    a.chunks_exact(k).flat_map(|a| b.chunks_exact(k).map(move |b| dot(a, b))).collect()
}

#[test]
fn integers_equal_numpys() -> Result<()> {
    let cases = cases("ops/int8.safetensors");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let layer = quantized(&case.tensor("weight"), None);
        assert_eq!(layer.weight.to_vec2::<u8>()?, case.tensor("bytes").to_vec2::<u8>()?);
        let scales = layer.scales.as_ref().unwrap().to_vec1::<f32>()?;
        assert_eq!(scales, case.tensor("scale").to_vec1::<f32>()?);
        // The output over the scales is the integer, to the rounding of three f32 operations.
        let x = case.tensor("x");
        let out = values(&layer.forward(&x, Mode::Eval)?);
        let x_scales: Vec<f32> =
            (x.abs()?.max(1)?.to_vec1::<f32>()?).iter().map(|max| max / 127.0).collect();
        for (i, (y, sum)) in out.iter().zip(values(&case.tensor("sums"))).enumerate() {
            let (row, column) = (i / scales.len(), i % scales.len());
            let integer = y / f64::from(x_scales[row]) / f64::from(scales[column]);
            assert!((integer - sum).abs() <= 3e-7 * sum.abs(), "{}: {integer} {sum}", case.name);
            assert_eq!(integer.round(), sum, "{}", case.name);
        }
    }
    Ok(())
}

#[test]
fn errors_are_no_worse_than_pytorchs() -> Result<()> {
    for case in cases("ops/int8.safetensors") {
        let layer = quantized(&case.tensor("weight"), case.get("bias").as_ref());
        for dtype in [DType::F32, DType::BF16] {
            let x = case.tensor("x").to_dtype(dtype)?;
            let ours = off(&layer.forward(&x, Mode::Eval)?, &case.tensor("out"));
            let (pytorch, weights) = (case.number("pytorch"), case.number("per_channel_weights"));
            println!(
                "{} {dtype:?}: {ours:.5}, PyTorch {pytorch:.5}, weights {weights:.5}",
                case.name
            );
            assert!(ours <= pytorch, "{} {dtype:?}: {ours} {pytorch}", case.name);
        }
    }
    Ok(())
}

/// One layer of every kind: bias, LoRA, activation, residual; ragged and deep shapes.
#[test]
fn values_and_gradients_agree_with_f64_loops() -> Result<()> {
    for (rows, in_dim, out_dim, rank) in [(5, 12, 7, 2), (70, 132, 70, 4), (200, 64, 130, 3)] {
        let inputs = [
            random(1, (rows, in_dim)),
            random(2, out_dim),
            random(3, (rank, in_dim)),
            (random(4, (out_dim, rank)) * 0.3)?,
            random(5, (rows, out_dim)),
        ];
        let layer = quantized(&random(6, (out_dim, in_dim)), None);
        let run = |t: &[Tensor]| {
            let lora = Lora { a: &t[2], b: &t[3], b_bias: None, scaling: 0.5, dropout: None };
            let scales = layer.scales.as_ref();
            let projection =
                Projection { weight: &layer.weight, scales, bias: Some(&t[1]), lora: Some(lora) };
            ops::lora_linear(&t[0], &projection, Activation::Gelu, Some(&t[4]))
        };
        let grad_out = random(7, (rows, out_dim));
        let (out, grads) = gradients(&inputs, &grad_out, run)?;
        let (w, t) = (weight_of(&layer), inputs.iter().map(values).collect::<Vec<_>>());
        let x0 = t[0].clone();
        let frozen = product(&rounded(&x0, in_dim), &w, in_dim);
        // Rounding is passed through: near x0 the sum moves with W.
        let reference = |t: &[Vec<f64>]| -> Vec<f64> {
            let moved: Vec<f64> = t[0].iter().zip(&x0).map(|(x, x0)| x - x0).collect();
            let (moved, s) = (product(&moved, &w, in_dim), product(&t[0], &t[2], in_dim));
            let up = product(&s, &t[3], rank);
            (0..rows * out_dim)
                .map(|i| {
                    let sum = frozen[i] + moved[i] + t[1][i % out_dim] + 0.5 * up[i];
                    let erf = candle_core::cpu::erf::erf_f64(sum / 2f64.sqrt());
                    0.5 * sum * (1.0 + erf) + t[4][i]
                })
                .collect()
        };
        let off = error(&values(&out), &reference(&t));
        assert!(off < 1e-6, "{rows} {in_dim} {out_dim}: {off:e}");
        let weights = values(&grad_out);
        let loss =
            |t: &[Vec<f64>]| -> f64 { reference(t).iter().zip(&weights).map(|(y, g)| y * g).sum() };
        const STEP: f64 = 1e-5;
        for (index, grad) in grads.iter().enumerate() {
            let grad = values(grad);
            let (mut got, mut expected) = (Vec::new(), Vec::new());
            for element in (0..grad.len()).step_by(grad.len().div_ceil(12)) {
                let mut moved = t.clone();
                moved[index][element] += STEP;
                let above = loss(&moved);
                moved[index][element] -= 2.0 * STEP;
                expected.push((above - loss(&moved)) / (2.0 * STEP));
                got.push(grad[element]);
            }
            let off = error(&got, &expected);
            assert!(off < 1e-5, "{rows} {in_dim} {out_dim} input {index}: {off:e}");
        }
    }
    Ok(())
}

/// In bf16 values and gradients are rounded once more; the composed graph multiplies the same weights in floating
/// point.
#[test]
fn bf16_and_packed_projections_agree_with_the_composed_graph() -> Result<()> {
    const C: usize = 96;
    let layers =
        [1, 2, 3].map(|seed| quantized(&random(seed, (C, C)), Some(&random(seed + 10, C))));
    for (dtype, bound) in [(DType::F32, 2e-2), (DType::BF16, 3e-2)] {
        let x = [random(5, (2, 7, 11, C)).to_dtype(dtype)?];
        let grad_out = random(6, (2, 7, 11, 3 * C)).to_dtype(dtype)?;
        let [q, k, v] = layers.each_ref().map(|layer| layer.projection(&[]).unwrap());
        let (out, grads) = gradients(&x, &grad_out, |t| ops::lora_qkv(&t[0], &[q, k, v]))?;
        let (exact, expected) =
            gradients(&x, &grad_out, |t| composed::lora_qkv(&t[0], &[q, k, v]))?;
        assert_eq!(out.dtype(), dtype);
        assert!(tensor_error(&out, &exact) < bound, "{dtype:?}: {}", tensor_error(&out, &exact));
        let off = tensor_error(&grads[0], &expected[0]);
        let bound = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
        assert!(off < bound, "{dtype:?}: {off}");
    }
    Ok(())
}

#[test]
fn nan_reaches_its_row_alone() -> Result<()> {
    let layer = quantized(&random(1, (20, 16)), None);
    let mut x = random(2, (3, 16)).to_vec2::<f32>()?;
    let clean = layer.forward(&Tensor::new(x.clone(), &candle_core::Device::Cpu)?, Mode::Eval)?;
    for bad in [f32::NAN, f32::INFINITY] {
        x[1][3] = bad;
        let x = Tensor::new(x.clone(), &candle_core::Device::Cpu)?;
        let out = layer.forward(&x, Mode::Eval)?.to_vec2::<f32>()?;
        assert!(out[1].iter().all(|y| y.is_nan()));
        assert_eq!(out[0], clean.to_vec2::<f32>()?[0]);
        assert_eq!(out[2], clean.to_vec2::<f32>()?[2]);
    }
    Ok(())
}

fn small() -> SamModel {
    model::model("tiny", AttentionKind::Split, DType::F32).unwrap()
}

#[test]
fn an_encoder_is_quantized_and_trains_its_adapters() -> anyhow::Result<()> {
    let (exact, mut sam) = (small(), small());
    let quantized = quantize_int8(&mut sam.vision_encoder)?;
    let layers = 6 * sam.vision_encoder.layers.len();
    assert_eq!((quantized.layers, quantized.left.len()), (layers, 0));
    let said = quantized.to_string();
    assert!(said.starts_with(&format!("int8: {layers} linear layers, ")), "{said}");
    let side = sam.config().vision_config.image_size;
    let pixels = random(3, (1, 3, side, side));
    let embed = |sam: &SamModel, mode| sam.vision_encoder.forward(&pixels, mode);
    let error = off(&embed(&sam, Mode::Eval)?, &embed(&exact, Mode::Eval)?);
    assert!(error > 0.0 && error < 0.05, "{error}");
    inject(&mut sam, &LoraConfig::new(2).target_modules(["q", "v"]), 1)?;
    let loss = embed(&sam, Mode::Train { seed: 1 })?.sqr()?.mean_all()?;
    let grads = loss.backward()?;
    for (name, var) in trainable_variables(&sam)? {
        let grad = values(grads.get(&var).unwrap());
        assert_eq!(grad.iter().any(|&g| g != 0.0), name.contains("lora_B"), "{name}");
    }
    Ok(())
}

#[test]
fn what_a_layer_in_int8_cannot_do_is_refused_by_name() -> anyhow::Result<()> {
    let mut sam = small();
    quantize_int8(&mut sam.vision_encoder)?;
    let before = named_parameters(&sam);
    let refused = |result: candle_sam_lora::Result<()>, words: &[&str]| {
        let message = result.expect_err("accepted").to_string();
        for word in words.iter().chain(&["int8"]) {
            assert!(message.contains(word), "{message}");
        }
    };
    let first = "vision_encoder.layers.0.attn.q";
    refused(set_trainable(&mut sam, |name| name.ends_with("mlp.lin2.weight")), &["lin2.weight"]);
    refused(randomize(&mut sam, 1, 0.1), &[first]);
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.safetensors");
    refused(checkpoint::save(&sam, &file, Naming::HuggingFace, None), &[first]);
    refused(checkpoint::load(&mut sam, model::folder("tiny")).map(drop), &[first]);
    let zeros = VarBuilder::zeros(DType::F32, &candle_core::Device::Cpu);
    refused(nn::load(&mut sam, &zeros), &[first]);
    let adapted = |config: LoraConfig| config.target_modules(["q"]);
    for config in [adapted(LoraConfig::new(2)).dora(), adapted(LoraConfig::new(2)).init("pissa")] {
        refused(inject(&mut sam, &config, 1).map(drop), &[first]);
    }
    let config = LoraConfig::new(2).target_modules(["q"]).modules_to_save(["mlp"]);
    refused(inject(&mut sam, &config, 1).map(drop), &["mlp.lin1.weight"]);
    inject(&mut sam, &adapted(LoraConfig::new(2)), 1)?;
    refused(merge(&mut sam), &[first]);
    for (name, tensor) in before {
        let now = named_parameters(&sam).into_iter().find(|(now, _)| *now == name).unwrap().1;
        assert_eq!(values(&tensor), values(&now), "{name}");
    }
    Ok(())
}

#[test]
fn layers_that_cannot_be_in_int8_stay_and_are_named() -> anyhow::Result<()> {
    struct Four {
        good: Linear,
        trained: Linear,
        narrow: Linear,
        broken: Linear,
    }
    candle_sam_lora::module_tree!(Four { good, trained, narrow, broken });
    let plain = |seed, in_dim| Linear::new(random(seed, (4, in_dim)), None);
    let weight = Var::from_tensor(&random(2, (4, 8)))?;
    let mut four = Four {
        good: plain(1, 8),
        trained: Linear::new(weight.as_tensor().clone(), None),
        narrow: plain(3, 6),
        broken: Linear::new((random(4, (4, 8)) * f64::NAN)?, None),
    };
    let quantized = quantize_int8(&mut four)?;
    let left: Vec<&str> = quantized.left.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((quantized.layers, left), (1, vec!["trained", "narrow", "broken"]));
    let said = quantized.to_string();
    for words in ["1 linear layers", "trained (is trained)", "narrow (", "broken (holds NaN"] {
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(four.narrow.weight.dtype(), DType::F32);
    let message = quantize_int8(&mut four).expect_err("nothing is left").to_string();
    assert!(message.contains("good (is in int8 already)"), "{message}");
    let mut names = Vec::new();
    four.visit("", &mut |name, node| {
        if let nn::Node::Buffer(_) = node {
            names.push(name.to_string());
        }
    });
    assert_eq!(names, ["good.weight_scale"]);
    Ok(())
}
