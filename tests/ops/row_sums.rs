//! Gradients that are sums over thousands of rows, in bf16 and f16. They are at most twice as far from float64 as
//! PyTorch's and PEFT's in that dtype; `tests/fixtures/gen/row_sums.py` measured those errors.

use crate::common;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::nn::{Adapter, Conv2d, ConvTranspose2d, LayerNorm, Linear, Mode};
use candle_sam_lora::ops::{self, Activation};
use candle_sam_lora::philox::{philox4x32, stream_of};
use candle_sam_lora::sam::{
    LayerContext, SamConfig, SamPositionalEmbedding, SamPromptEncoder, SamPrompts,
    SamVisionAttention, VisionAttention,
};
use candle_sam_lora::testing::composed;

const TIMES_PYTORCH: f64 = 2.0;
/// Sums of 16,384 products in f32, in whatever order.
const F32_SUM: f64 = 5e-6;
/// As in the generator: probability, seed, stream.
const DROPOUT: (f64, u64, u32) = (0.25, 11, 5);

/// The generator's `lattice`: values that bf16 and f16 hold exactly.
fn lattice(name: &str, shape: &[usize], scale: f64, offset: i32) -> Tensor {
    let count = shape.iter().product::<usize>();
    let words = (0..count.div_ceil(4) as u32)
        .flat_map(|block| philox4x32([block, 0, 0, 77], [stream_of(name), 0]));
    let value = |word: u32| f64::from(2 * (word >> 25) as i32 - 127 + offset) / 64.0 * scale;
    let values: Vec<f32> = words.take(count).map(|word| value(word) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The trained parameters of a case by their names in PyTorch, made as they are asked for.
struct Parameters {
    case: &'static str,
    scale: f64,
    dtype: DType,
    made: Vec<(String, Var)>,
}

impl Parameters {
    fn frozen(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let value = lattice(&format!("{}/{name}", self.case), shape, self.scale, 0);
        let around = if name.contains("magnitude") { 1.0 } else { 0.0 };
        (value + around)?.to_dtype(dtype)
    }

    fn of(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let var = Var::from_tensor(&self.frozen(name, shape, dtype)?)?;
        self.made.push((name.to_string(), var.clone()));
        Ok(var.as_tensor().clone())
    }

    fn trained(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.of(name, shape, self.dtype)
    }
}

type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;
type Build = fn(&mut Parameters) -> Result<Forward>;
type ShapeOfRows = fn(usize) -> Vec<usize>;

const MODE: Mode = Mode::Train { seed: DROPOUT.1 };

/// Adapters as (name, rank, DoRA, LoRA bias) on a linear layer of 24 to 16, its bias trained or frozen.
fn linear(
    p: &mut Parameters,
    adapters: &[(&str, usize, bool, bool)],
    dropout: f64,
    trains_bias: bool,
) -> Result<Forward> {
    let weight = p.frozen("0.weight", &[16, 24], p.dtype)?;
    let bias = match trains_bias {
        true => p.trained("0.bias", &[16])?,
        false => p.frozen("0.bias", &[16], p.dtype)?,
    };
    let mut layer = Linear::new(weight, Some(bias));
    for &(name, rank, dora, lora_bias) in adapters {
        let suffix = if name == "default" { String::new() } else { format!(".{name}") };
        let f32 = DType::F32;
        let adapter = Adapter {
            a: p.of(&format!("0.lora_A{suffix}.weight"), &[rank, 24], f32)?,
            b: p.of(&format!("0.lora_B{suffix}.weight"), &[16, rank], f32)?,
            b_bias: lora_bias
                .then(|| p.of(&format!("0.lora_B{suffix}.bias"), &[16], f32))
                .transpose()?,
            magnitude: dora
                .then(|| p.of(&format!("0.lora_magnitude_vector{suffix}.weight"), &[16], f32))
                .transpose()?,
            scaling: 2.0,
            dropout,
            stream: DROPOUT.2,
            changes_base: false,
        };
        layer.adapters.insert(name, adapter);
        layer.adapters.active.push(name.to_string());
    }
    Ok(Box::new(move |x| layer.forward(x, MODE)))
}

fn plain_linear(p: &mut Parameters, out: usize) -> Result<Forward> {
    let (weight, bias) = (p.trained("weight", &[out, 24])?, p.trained("bias", &[out])?);
    let layer = Linear::new(weight, Some(bias));
    Ok(Box::new(move |x| layer.forward(x, MODE)))
}

fn layer_norm(p: &mut Parameters, prefix: &str, composed: bool) -> Result<Forward> {
    let weight = p.trained(&format!("{prefix}weight"), &[24])?;
    let bias = p.trained(&format!("{prefix}bias"), &[24])?;
    let norm = LayerNorm { weight, bias, eps: 1e-6 };
    Ok(Box::new(move |x| match composed {
        true => composed::layer_norm(x, &norm.weight, &norm.bias, norm.eps),
        false => norm.forward(x),
    }))
}

fn conv(p: &mut Parameters, kernel: usize, stride: usize, bias: bool) -> Result<Forward> {
    let weight = p.trained("module.weight", &[5, 6, kernel, kernel])?;
    let bias = bias.then(|| p.trained("module.bias", &[5])).transpose()?;
    let conv = Conv2d { weight, bias, stride, adapters: Default::default() };
    Ok(Box::new(move |x| conv.forward(x, MODE)))
}

fn conv_transpose(p: &mut Parameters) -> Result<Forward> {
    let weight = p.trained("module.weight", &[6, 5, 2, 2])?;
    let conv = ConvTranspose2d { weight, bias: p.trained("module.bias", &[5])? };
    Ok(Box::new(move |x| conv.forward(x, Activation::Identity)))
}

fn tables(p: &mut Parameters) -> Result<Forward> {
    let (vector, grid) = (p.trained("vector", &[1, 1, 1, 8])?, p.trained("grid", &[1, 4, 4, 8])?);
    let (tokens, image) = (p.trained("tokens", &[2, 8])?, p.trained("image", &[1, 1, 2, 8])?);
    Ok(Box::new(move |x| {
        let batch = x.dim(0)?;
        let placed = ops::broadcast_add(&ops::broadcast_add(x, &vector)?, &grid)?;
        let tokens = ops::repeat(&tokens, (batch, 2, 8))?;
        let image = ops::repeat(&image, (1, batch, 2, 8))?.squeeze(0)?;
        Tensor::cat(&[placed, Tensor::cat(&[tokens, image], 1)?.unsqueeze(2)?], 2)
    }))
}

fn masks(p: &mut Parameters) -> Result<Forward> {
    let weights = [p.trained("one", &[1, 1, 8])?, p.trained("three", &[1, 3, 8])?];
    Ok(Box::new(move |x| {
        let pixels = x.transpose(1, 2)?;
        let masks = weights.iter().map(|weights| ops::matmul(weights, &pixels));
        Tensor::cat(&masks.collect::<Result<Vec<_>>>()?, 1)
    }))
}

fn prompts(p: &mut Parameters) -> Result<Forward> {
    let config = SamConfig::load(common::fixtures().join("models/tiny/config.json")).unwrap();
    let mut encoder = SamPromptEncoder::new(&config, VarBuilder::zeros(p.dtype, &Device::Cpu))?;
    let shared = SamPositionalEmbedding::new(12, VarBuilder::zeros(p.dtype, &Device::Cpu))?;
    for (index, embedding) in encoder.point_embed.iter_mut().enumerate() {
        embedding.weight = p.trained(&format!("encoder.point_embed.{index}.weight"), &[1, 24])?;
    }
    encoder.not_a_point_embed.weight = p.trained("encoder.not_a_point_embed.weight", &[1, 24])?;
    Ok(Box::new(move |x| {
        let x = x.to_dtype(DType::F32)?.unsqueeze(0)?;
        let points = ((x.narrow(2, 0, 2)? * 8.0)? + 32.0)?;
        let boxes = Tensor::cat(&[&points, &(&points + 8.0)?], 2)?;
        let kind = x.narrow(2, 2, 1)?;
        let is_above = |bound: f64| kind.gt(bound)?.to_dtype(DType::F32);
        let labels = ((is_above(1.0)? + is_above(-1.0)?)? - 1.0)?;
        let prompts = SamPrompts {
            input_points: Some(&points.unsqueeze(2)?),
            input_labels: Some(&labels),
            input_boxes: Some(&boxes),
            input_masks: None,
        };
        let (sparse, _) = encoder.forward(&prompts, &shared, 1, MODE)?;
        sparse.expect("points and boxes").squeeze(0)
    }))
}

fn attention(p: &mut Parameters, composed: bool) -> Result<Forward> {
    let config = SamConfig::load(common::fixtures().join("models/tiny/config.json")).unwrap();
    let mut config = config.vision_config;
    (config.hidden_size, config.window_size) = (16, 8);
    let layer = LayerContext {
        config: &config,
        index: 0,
        name: "attn".to_string(),
        vb: VarBuilder::zeros(p.dtype, &Device::Cpu),
    };
    let mut attention = SamVisionAttention::new(&layer)?;
    let mut table = |name: &str| p.trained(&format!("attn.{name}"), &[15, 8]);
    attention.core.rel_pos_h = Some(table("rel_pos_h")?);
    attention.core.rel_pos_w = Some(table("rel_pos_w")?);
    let mut linear = |name: &str, out: usize| -> Result<Linear> {
        let weight = p.trained(&format!("attn.{name}.weight"), &[out, 16])?;
        Ok(Linear::new(weight, Some(p.trained(&format!("attn.{name}.bias"), &[out])?)))
    };
    (attention.qkv, attention.proj) = (linear("qkv", 48)?, linear("proj", 16)?);
    Ok(Box::new(move |x| match composed {
        true => Ok(attention.forward_with_weights(x, MODE)?.0),
        false => attention.forward(x, MODE),
    }))
}

/// Models, under the generator's names, and the shape of x for a number of rows.
const CASES: [(&str, Build, ShapeOfRows); 17] = [
    ("dora", |p| linear(p, &[("default", 4, true, false)], 0.0, true), |rows| vec![rows, 24]),
    (
        "dora_dropout",
        |p| linear(p, &[("default", 4, true, false)], DROPOUT.0, true),
        |rows| vec![rows, 24],
    ),
    (
        "several",
        |p| {
            let adapters = [
                ("default", 3, true, false),
                ("second", 2, false, false),
                ("third", 4, true, false),
            ];
            linear(p, &adapters, 0.0, false)
        },
        |rows| vec![rows, 24],
    ),
    ("lora_bias", |p| linear(p, &[("default", 4, false, true)], 0.0, true), |rows| vec![rows, 24]),
    ("linear", |p| plain_linear(p, 16), |rows| vec![rows, 24]),
    ("narrow", |p| plain_linear(p, 1), |rows| vec![rows, 24]),
    ("layer_norm", |p| layer_norm(p, "", false), |rows| vec![rows, 24]),
    ("layer_norm", |p| layer_norm(p, "", true), |rows| vec![rows, 24]),
    ("layer_norm2d", |p| layer_norm(p, "module.", false), |rows| vec![1, 64, rows / 64, 24]),
    ("conv", |p| conv(p, 2, 2, true), |rows| vec![1, 128, rows / 32, 6]),
    ("conv_same", |p| conv(p, 3, 1, false), |rows| vec![1, 64, rows / 64, 6]),
    ("conv_transpose", conv_transpose, |rows| vec![1, 64, rows / 64, 6]),
    ("tables", tables, |rows| vec![rows / 16, 4, 4, 8]),
    ("masks", masks, |rows| vec![1, rows, 8]),
    ("prompts", prompts, |rows| vec![rows, 3]),
    ("attention", |p| attention(p, false), |rows| vec![rows / 64, 8, 8, 16]),
    ("attention", |p| attention(p, true), |rows| vec![rows / 64, 8, 8, 16]),
];

fn relative(got: &Tensor, truth: &Tensor) -> f64 {
    assert_eq!(got.dims(), truth.dims());
    let (got, truth) = (common::values(got), common::values(truth));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(&truth).map(|(a, b)| a - b)) / norm(&mut truth.iter().copied())
}

#[test]
fn sums_over_rows_are_as_near_as_pytorchs() -> Result<()> {
    let stored = common::cases("ops/row_sums.safetensors");
    let mut failures = Vec::new();
    for (case, build, shape) in CASES {
        for (rows, mean, offset) in
            [(4096, "zero", 0), (4096, "shifted", 13), (16384, "zero", 0), (16384, "shifted", 13)]
        {
            let name = format!("{case}-{rows}-{mean}");
            let expected = stored.iter().find(|case| case.name == name).expect("a case");
            for (dtype, dtype_name) in [(DType::BF16, "bfloat16"), (DType::F16, "float16")] {
                let scale = if case == "prompts" { 1.0 } else { 0.125 };
                let mut parameters = Parameters { case, scale, dtype, made: vec![] };
                let forward = build(&mut parameters)?;
                let x = lattice(&format!("{case}/x"), &shape(rows), 1.0, 0).to_dtype(dtype)?;
                let x = Var::from_tensor(&x)?;
                let out = forward(&x)?;
                assert_eq!(out.dtype(), dtype, "{name}");
                let grad =
                    lattice(&format!("{case}/G"), out.dims(), 1.0, offset).to_dtype(dtype)?;
                let gradients = (out * grad)?.sum_all()?.backward()?;
                let mut found = parameters.made;
                if expected.get("x").is_some() {
                    found.push(("x".to_string(), x));
                }
                for (parameter, var) in found {
                    let truth = expected.tensor(&parameter);
                    let gradient = gradients.get(&var).expect("a gradient");
                    assert_eq!(gradient.dtype(), var.dtype(), "{name} {parameter}");
                    let gradient = match parameter.as_str() {
                        "x" => gradient.narrow(1, 0, truth.dim(1)?)?,
                        _ => gradient.clone(),
                    };
                    let ours = relative(&gradient, &truth);
                    let theirs = expected.of(dtype_name, &parameter);
                    // On one thread PyTorch's LayerNorm on the CPU sums in 16 bits too; one rounding is asked for here.
                    let rounding =
                        if dtype == DType::BF16 { 2f64.powi(-9) } else { 2f64.powi(-12) };
                    let theirs =
                        if case.starts_with("layer_norm") { theirs.min(rounding) } else { theirs };
                    let bound = (TIMES_PYTORCH * theirs).max(F32_SUM);
                    let line = format!(
                        "{name} {dtype_name} {parameter}: {ours:.1e} off, PyTorch {theirs:.1e}"
                    );
                    println!("{line}");
                    if ours > bound {
                        failures.push(line);
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} are too far off:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// Magnitudes near the norm scale the output by what they are, although no element in bf16 changes by so little.
#[test]
fn magnitudes_near_the_norm_take_effect() -> Result<()> {
    let weight = lattice("near/weight", &[16, 24], 0.125, 0);
    let x = lattice("near/x", &[16384, 24], 1.0, 0);
    let (a, b) =
        (Tensor::zeros((2, 24), DType::F32, &Device::Cpu)?, lattice("near/b", &[16, 2], 0.125, 0));
    for dropout in [None, Some(candle_sam_lora::philox::Dropout { p: 0.25, seed: 1, stream: 2 })] {
        let y = |dtype: DType, factor: f64| -> Result<Tensor> {
            let weight = weight.to_dtype(dtype)?;
            let lora = ops::Lora { a: &a, b: &b, b_bias: None, scaling: 1.0, dropout };
            let norm = ops::dora_weight_norm(&weight, &a, &b, 1.0)?;
            let projection =
                ops::Projection { weight: &weight, scales: None, bias: None, lora: Some(lora) };
            ops::dora_linear(&x.to_dtype(dtype)?, &projection, &(norm * factor)?)?
                .to_dtype(DType::F32)
        };
        let exact = y(DType::F32, 1.001)?;
        // The projection of y on the exact one: roundings average out over 262,144 elements.
        let size = |y: &Tensor| -> Result<f64> {
            let dots = (y * &exact)?.sum_all()?.to_scalar::<f32>()?;
            Ok(f64::from(dots) / f64::from(exact.sqr()?.sum_all()?.to_scalar::<f32>()?))
        };
        let change = size(&y(DType::BF16, 1.001)?)? - size(&y(DType::BF16, 1.0)?)?;
        assert!((change - 1e-3).abs() < 1e-4, "{dropout:?}: {change:e}");
    }
    Ok(())
}
