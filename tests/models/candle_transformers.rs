//! candle-transformers' `Sam` and the one here that takes its place: the same program, the same results.

use crate::common::model::relative_error;
use crate::common::random;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_sam_lora::sam::candle_transformers as ours;
use candle_sam_lora::sam::{checkpoint, AttentionKind, SamVisionModel};
use candle_transformers::models::segment_anything::sam as theirs;
use std::collections::HashMap;

/// Rounding of f32 through the encoder and the decoder.
const BOUND: f64 = 2e-5;
/// The tanh approximation of GELU is off by 4.8e-4 of activations near 1, twice in a row.
const GELU_BOUND: f64 = 5e-3;

/// Width, layers, heads and global layers of a small encoder.
const SIZES: (usize, usize, usize, &[usize]) = (32, 2, 2, &[1]);

/// Random weights under the names that candle-transformers asks for, below `sam`.
fn weights() -> Result<VarBuilder<'static>> {
    let map = VarMap::new();
    let (dim, depth, heads, global) = SIZES;
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    theirs::Sam::new(dim, depth, heads, global, vb.pp("sam"))?;
    let mut names: Vec<String> = map.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    let tensors: HashMap<String, Tensor> = names
        .into_iter()
        .enumerate()
        .map(|(seed, name)| {
            let dims = map.data().lock().unwrap()[&name].dims().to_vec();
            let fan_in: usize = dims[1..].iter().product();
            let values = random(seed as u64, dims.as_slice());
            let values = match dims.len() {
                1 if name.ends_with("weight") => (values * 0.1)? + 1.0,
                1 => values * 0.1,
                _ => values * (fan_in as f64).powf(-0.5),
            };
            Ok((name, values?))
        })
        .collect::<Result<_>>()?;
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu).pp("sam"))
}

fn image(height: usize, width: usize) -> Result<Tensor> {
    Ok(((random(77, &[3, height, width]).tanh()? + 1.0)? * 127.5)?)
}

/// A program of candle-transformers' user: only the type `Sam` is another one.
macro_rules! program {
    ($sam:ident) => {{
        let (dim, depth, heads, global) = SIZES;
        let sam = $sam::Sam::new(dim, depth, heads, global, weights()?)?;
        let image = image(300, 420)?;
        let embeddings = sam.embeddings(&image)?;
        let points = [(0.3, 0.4, true), (0.9, 0.2, false)];
        let (low, iou) = sam.forward_for_embeddings(&embeddings, 300, 420, &points, true)?;
        let (whole, single) = sam.forward(&image, &points[..1], false)?;
        let (unprompted, _) = sam.forward_for_embeddings(&embeddings, 300, 420, &[], false)?;
        let pixels = sam.unpreprocess(&sam.preprocess(&image)?)?;
        let exact =
            [("embeddings", embeddings), ("iou", iou), ("single iou", single), ("pixels", pixels)];
        let masks = [("masks", low), ("whole masks", whole), ("unprompted masks", unprompted)];
        (exact, masks)
    }};
}

#[test]
fn one_changed_line_gives_the_same_results() -> Result<()> {
    let (exact, masks) = program!(ours);
    let (their_exact, their_masks) = program!(theirs);
    for ((name, got), (_, want)) in exact.iter().zip(&their_exact) {
        let error = relative_error(got, want)?;
        assert!(error < BOUND, "{name}: {error:e}");
    }
    for ((name, got), (_, want)) in masks.iter().zip(&their_masks) {
        let error = relative_error(got, want)?;
        assert!(error < GELU_BOUND, "{name}: {error:e}");
    }
    Ok(())
}

#[test]
fn an_encoder_of_ours_feeds_their_decoder() -> Result<()> {
    let (dim, depth, heads, global) = SIZES;
    let sam = theirs::Sam::new(dim, depth, heads, global, weights()?)?;
    let ours = ours::Sam::new(dim, depth, heads, global, weights()?)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("encoder.safetensors");
    checkpoint::save(&ours.model, &file, checkpoint::Naming::Original, None)?;
    let mut config = ours.model.config().vision_config.clone();
    config.global_attn_indexes = vec![1];
    let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let mut encoder = SamVisionModel::new(&config, AttentionKind::Fused, zeros)?;
    checkpoint::load(&mut encoder, &file)?;

    let image = image(200, 300)?;
    let pixels = sam.preprocess(&image)?.unsqueeze(0)?;
    let embeddings = pixels.apply(&encoder)?; // it was sam.embeddings(&image)?
    let points = [(0.5, 0.5, true)];
    let decode =
        |embeddings: &Tensor| sam.forward_for_embeddings(embeddings, 200, 300, &points, true);
    let ((masks, _), (their_masks, _)) = (decode(&embeddings)?, decode(&sam.embeddings(&image)?)?);
    let error = relative_error(&masks, &their_masks)?;
    assert!(error < BOUND, "{error:e}");
    Ok(())
}

#[test]
fn impossible_images_and_layers_are_refused() -> Result<()> {
    let (dim, depth, heads, global) = SIZES;
    let sam = ours::Sam::new(dim, depth, heads, global, weights()?)?;
    let error = sam.embeddings(&Tensor::zeros((3, 20, 1025), DType::F32, &Device::Cpu)?);
    assert!(error.unwrap_err().to_string().contains("maximum size 1024"));
    let error = sam.embeddings(&Tensor::zeros((1, 20, 20), DType::F32, &Device::Cpu)?);
    assert!(error.unwrap_err().to_string().contains("must have shape [3, h, w], got [1, 20, 20]"));
    let error = ours::Sam::new(dim, depth, heads, &[depth], weights()?).map(drop);
    assert!(error.unwrap_err().to_string().contains("no attention that could be global"));
    Ok(())
}

#[test]
fn a_missing_tensor_is_named_as_in_the_file() -> Result<()> {
    let (dim, depth, heads, global) = SIZES;
    let vb = VarBuilder::from_tensors(HashMap::new(), DType::F32, &Device::Cpu);
    let error = ours::Sam::new(dim, depth, heads, global, vb).expect_err("no tensors").to_string();
    assert!(error.contains("prompt_encoder.pe_layer"), "{error}");
    Ok(())
}
