//! The mask decoder's order of products against the plain one, which runs where adapters drop in training.

use crate::common::{error, model, random, values};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{named_parameters, randomize, set_trainable, Mode, ModuleTree, NodeMut};
use candle_sam_lora::sam::{SamMaskDecoder, SamMaskDecoderConfig, SamMaskDecoderInput};
use std::collections::BTreeMap;

const SIZE: usize = 256;
const GRID: (usize, usize) = (9, 12);
/// With this probability of a dropout nothing is dropped, but the plain order of products runs.
const NEVER: f64 = 1e-9;
const TRAIN: Mode = Mode::Train { seed: 1 };

fn decoder(dtype: DType) -> Result<SamMaskDecoder> {
    let config = SamMaskDecoderConfig::default();
    let mut decoder = SamMaskDecoder::new(&config, VarBuilder::zeros(dtype, &Device::Cpu))?;
    randomize(&mut decoder, 3, 0.05).unwrap();
    Ok(decoder)
}

/// LoRA on every attention, with B of this size.
fn adapt(decoder: &mut SamMaskDecoder, size: f64, dropout: f64) {
    let config = LoraConfig::new(3).target_modules(["q_proj", "k_proj", "v_proj", "out_proj"]);
    inject(decoder, &config.dropout(dropout), 0).unwrap();
    let mut seed = 100;
    let fill = &mut |name: &str, node: NodeMut<'_>| {
        if let (true, NodeMut::Parameter(b)) = (name.ends_with("lora_B.weight"), node) {
            seed += 1;
            *b = (random(seed, b.dims()).to_dtype(b.dtype())? * size)?;
        }
        Ok(())
    };
    decoder.visit_mut("", fill).unwrap();
}

/// A decoder with adapters of this size, and its twin that runs in the plain order in training.
fn twins(dtype: DType, size: f64) -> Result<[SamMaskDecoder; 2]> {
    let (mut absorbing, mut plain) = (decoder(dtype)?, decoder(dtype)?);
    if size > 0.0 {
        adapt(&mut absorbing, size, 0.0);
    }
    adapt(&mut plain, size, NEVER);
    Ok([absorbing, plain])
}

/// An image, positions, prompts and the dense prompt.
fn inputs((prompts, tokens): (usize, usize), dtype: DType) -> Result<[Tensor; 4]> {
    let input = |seed, dims: &[usize]| random(seed, dims).to_dtype(dtype);
    Ok([
        input(1, &[1, SIZE, GRID.0, GRID.1])?,
        input(2, &[1, GRID.0, GRID.1, SIZE])?,
        input(3, &[1, prompts, tokens, SIZE])?,
        input(4, &[1, 1, 1, SIZE])?,
    ])
}

fn run(
    decoder: &SamMaskDecoder,
    [image, positions, sparse, dense]: &[Tensor; 4],
    multimask: bool,
    mode: Mode,
) -> Result<[Tensor; 2]> {
    let input = SamMaskDecoderInput {
        image_embeddings: image,
        image_positions: positions,
        sparse: Some(sparse),
        dense,
    };
    let (masks, scores) = decoder.forward(&input, multimask, mode)?;
    assert_eq!(masks.dtype(), image.dtype());
    Ok([masks, scores])
}

/// Masks and scores of `prompts` prompts, each of `tokens` tokens.
fn decode(
    decoder: &SamMaskDecoder,
    sizes: (usize, usize),
    dtype: DType,
    multimask: bool,
    mode: Mode,
) -> Result<[Vec<f64>; 2]> {
    let [masks, scores] = run(decoder, &inputs(sizes, dtype)?, multimask, mode)?;
    Ok([values(&masks), values(&scores)])
}

#[test]
fn evaluation_agrees_with_the_plain_order_of_products() -> Result<()> {
    for size in [0.0, 0.05] {
        let [absorbing, plain] = twins(DType::F32, size)?;
        // One prompt absorbs all projections, three share the first layer's, 30 tokens are too many to absorb.
        for (sizes, multimask) in [((1, 2), true), ((3, 1), false), ((2, 30), true)] {
            let got = decode(&absorbing, sizes, DType::F32, multimask, Mode::Eval)?;
            let expected = decode(&plain, sizes, DType::F32, multimask, TRAIN)?;
            for (got, expected) in got.iter().zip(&expected) {
                let error = error(got, expected);
                // Sums of some hundred products in f32, through two layers.
                assert!(error < 2e-5, "{sizes:?}: {error:e}");
            }
        }
    }
    Ok(())
}

/// The gradients of the image, of the prompts and of every parameter, by name.
fn gradients(
    decoder: &mut SamMaskDecoder,
    sizes: (usize, usize),
    multimask: bool,
) -> Result<BTreeMap<String, Tensor>> {
    set_trainable(decoder, |_| true).unwrap();
    let mut inputs = inputs(sizes, DType::F32)?;
    for index in [0, 2] {
        inputs[index] = Var::from_tensor(&inputs[index])?.into_inner();
    }
    let outputs = run(decoder, &inputs, multimask, TRAIN)?;
    let loss = |seed, output: &Tensor| (random(seed, output.dims()) * output)?.sum_all();
    let gradients = (loss(5, &outputs[0])? + loss(6, &outputs[1])?)?.backward()?;
    let parameters = named_parameters(&*decoder).into_iter();
    let inputs = [("image".to_string(), &inputs[0]), ("prompts".to_string(), &inputs[2])];
    let inputs = inputs.map(|(name, tensor)| (name, tensor.clone()));
    let gradient = |(name, tensor): (String, Tensor)| Some((name, gradients.get(&tensor)?.clone()));
    Ok(parameters.chain(inputs).filter_map(gradient).collect())
}

#[test]
fn gradients_agree_with_the_plain_order_of_products() -> Result<()> {
    for (sizes, multimask) in [((1, 2), true), ((4, 2), true), ((3, 1), false)] {
        let [mut absorbing, mut plain] = twins(DType::F32, 0.05)?;
        let got = gradients(&mut absorbing, sizes, multimask)?;
        let expected = gradients(&mut plain, sizes, multimask)?;
        let alone: Vec<_> = got.keys().filter(|name| !expected.contains_key(*name)).collect();
        let missing: Vec<_> = expected.keys().filter(|name| !got.contains_key(*name)).collect();
        assert!(got.len() > 150 && alone.is_empty() && missing.is_empty(), "{alone:?} {missing:?}");
        for (name, got) in &got {
            // A bias of all keys is without effect; that of the queries measures what rounding makes of it.
            let scale = model::largest(&expected[&model::measured_by(name)]).unwrap();
            let difference = model::largest(&(got - &expected[name])?).unwrap();
            // As the values, and back.
            let error = difference / scale.max(f64::MIN_POSITIVE);
            assert!(difference == 0.0 || error < 1e-4, "{sizes:?} {name}: {error:e}");
        }
    }
    Ok(())
}

#[test]
fn half_precision_is_no_worse_than_twice_the_plain_order() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let [absorbing, plain] = twins(dtype, 0.0)?;
        let mut exact = decoder(DType::F32)?;
        // The truth has the weights that the halves have.
        exact
            .visit_mut("", &mut |_, node| {
                if let NodeMut::Parameter(tensor) = node {
                    *tensor = tensor.to_dtype(dtype)?.to_dtype(DType::F32)?;
                }
                Ok(())
            })
            .unwrap();
        for sizes in [(1, 2), (3, 2)] {
            let truth = decode(&exact, sizes, DType::F32, true, Mode::Eval)?;
            let plain = decode(&plain, sizes, dtype, true, TRAIN)?;
            let absorbed = decode(&absorbing, sizes, dtype, true, Mode::Eval)?;
            for ((truth, plain), absorbed) in truth.iter().zip(&plain).zip(&absorbed) {
                let (plain, absorbed) = (error(plain, truth), error(absorbed, truth));
                println!("{dtype:?} {sizes:?}: absorbed {absorbed:.2e}, plain {plain:.2e}");
                assert!(absorbed <= 2.0 * plain, "{dtype:?} {sizes:?}: {absorbed:e}, {plain:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let decoder_of_all = decoder(DType::F32)?;
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| decode(&decoder_of_all, (3, 2), DType::F32, true, Mode::Eval))
    };
    let expected = run(1)?;
    assert!(run(2)? == expected && run(5)? == expected);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut decoder = decoder(DType::F32)?;
        let gradients = pool.install(|| gradients(&mut decoder, (3, 2), true))?;
        let bits = gradients.values().map(model::bits).collect::<Result<Vec<_>>>()?;
        Ok::<_, candle_core::Error>(bits)
    };
    let expected = run(1)?;
    assert!(run(2)? == expected && run(5)? == expected);
    Ok(())
}

/// Prompts of several images, of which each has its own.
#[test]
fn a_prompt_does_not_see_its_neighbours() -> Result<()> {
    let decoder = decoder(DType::F32)?;
    let sparse = random(3, (1, 5, 2, SIZE));
    let (image, positions) =
        (random(1, (1, SIZE, GRID.0, GRID.1)), random(2, (1, GRID.0, GRID.1, SIZE)));
    let dense = random(4, (1, 1, 1, SIZE));
    let run = |sparse: &Tensor| {
        let input = SamMaskDecoderInput {
            image_embeddings: &image,
            image_positions: &positions,
            sparse: Some(sparse),
            dense: &dense,
        };
        decoder.forward(&input, true, Mode::Eval)
    };
    let (masks, _) = run(&sparse)?;
    for prompt in 0..5 {
        let (alone, _) = run(&sparse.narrow(1, prompt, 1)?)?;
        let error = error(&values(&alone), &values(&masks.narrow(1, prompt, 1)?));
        // Alone, a prompt absorbs the projections that several share: rounding alone differs.
        assert!(error < 2e-5, "prompt {prompt}: {error:e}");
    }
    Ok(())
}
