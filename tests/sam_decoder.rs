//! The mask decoder's order of products in evaluation against the plain one, which runs where a gradient is wanted.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::nn::{randomize, Mode, ModuleTree, NodeMut};
use candle_sam_lora::sam::{SamMaskDecoder, SamMaskDecoderConfig, SamMaskDecoderInput};
use common::{error, random, values};

const SIZE: usize = 256;
const GRID: (usize, usize) = (9, 12);

fn decoder(dtype: DType) -> Result<SamMaskDecoder> {
    let config = SamMaskDecoderConfig::default();
    let mut decoder = SamMaskDecoder::new(&config, VarBuilder::zeros(dtype, &Device::Cpu))?;
    randomize(&mut decoder, 3, 0.05).unwrap();
    Ok(decoder)
}

/// LoRA on every attention, of which no B is zero.
fn adapt(decoder: &mut SamMaskDecoder) {
    let config = LoraConfig::new(3).target_modules(["q_proj", "k_proj", "v_proj", "out_proj"]);
    inject(decoder, &config, 0).unwrap();
    let fill = &mut |name: &str, node: NodeMut<'_>| {
        if let (true, NodeMut::Parameter(b)) = (name.ends_with("lora_B.weight"), node) {
            *b = b.randn_like(0.0, 0.05)?;
        }
        Ok(())
    };
    decoder.visit_mut("", fill).unwrap();
}

/// Masks and scores of `prompts` prompts, each of `tokens` tokens; `plain` asks for a gradient of the image.
fn decode(
    decoder: &SamMaskDecoder,
    (prompts, tokens): (usize, usize),
    (plain, dtype): (bool, DType),
    multimask: bool,
) -> Result<[Vec<f64>; 2]> {
    let input = |seed, dims: &[usize]| random(seed, dims).to_dtype(dtype);
    let mut image = input(1, &[1, SIZE, GRID.0, GRID.1])?;
    if plain {
        image = Var::from_tensor(&image)?.into_inner();
    }
    let positions = input(2, &[1, GRID.0, GRID.1, SIZE])?;
    let sparse = input(3, &[1, prompts, tokens, SIZE])?;
    let dense = input(4, &[1, 1, 1, SIZE])?;
    let input = SamMaskDecoderInput {
        image_embeddings: &image,
        image_positions: &positions,
        sparse: Some(&sparse),
        dense: &dense,
    };
    let (masks, scores) = decoder.forward(&input, multimask, Mode::Eval)?;
    assert_eq!(masks.dtype(), dtype);
    Ok([values(&masks), values(&scores)])
}

#[test]
fn evaluation_agrees_with_the_plain_order_of_products() -> Result<()> {
    let mut adapted = decoder(DType::F32)?;
    adapt(&mut adapted);
    for decoder in [decoder(DType::F32)?, adapted] {
        // One prompt absorbs all projections, three share the first layer's, 30 tokens are too many to absorb.
        for (sizes, multimask) in [((1, 2), true), ((3, 1), false), ((2, 30), true)] {
            let run = |plain| decode(&decoder, sizes, (plain, DType::F32), multimask);
            for (got, expected) in run(false)?.iter().zip(&run(true)?) {
                let error = error(got, expected);
                // Sums of some hundred products in f32, through two layers.
                assert!(error < 2e-5, "{sizes:?}: {error:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_is_no_worse_than_twice_the_plain_order() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let half = decoder(dtype)?;
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
            let truth = decode(&exact, sizes, (true, DType::F32), true)?;
            let plain = decode(&half, sizes, (true, dtype), true)?;
            let absorbed = decode(&half, sizes, (false, dtype), true)?;
            for ((truth, plain), absorbed) in truth.iter().zip(&plain).zip(&absorbed) {
                let (plain, absorbed) = (error(plain, truth), error(absorbed, truth));
                assert!(absorbed <= 2.0 * plain, "{dtype:?} {sizes:?}: {absorbed:e}, {plain:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let decoder = decoder(DType::F32)?;
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| decode(&decoder, (3, 2), (false, DType::F32), true))
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
