//! Images that are prepared once and prompted often: the masks of a call that does both, and no parameter of yesterday.

use crate::common::model::{bits, relative_error, shipped};
use crate::common::random;
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_sam_lora::lora::{self, LoraConfig};
use candle_sam_lora::nn::{without_gradients, Mode, ModuleTree, NodeMut};
use candle_sam_lora::sam::{
    AttentionKind, Frame, ImageEmbedding, Prediction, Prompt, SamInput, SamModel, SamOutput,
    SamPredictor,
};

/// Prompts of a call that computes the first layer's projections of the image once for all, as `prepare` does.
const SHARING: usize = 3;

/// Adapters on the decoder's attention, with this B.
fn adapt(model: &mut SamModel, seed: u64) -> Result<()> {
    let config = LoraConfig::new(2).target_modules(["q_proj", "k_proj", "v_proj", "out_proj"]);
    lora::inject(&mut model.mask_decoder, &config, 0)?;
    set_adapter(model, seed)
}

fn set_adapter(model: &mut SamModel, seed: u64) -> Result<()> {
    let set = &mut |name: &str, node: NodeMut<'_>| {
        if let (true, NodeMut::Parameter(b)) = (name.contains("lora_B"), node) {
            *b = (random(seed, b.dims()) * 0.2)?;
        }
        Ok(())
    };
    Ok(model.mask_decoder.visit_mut("", set)?)
}

/// Embeddings of two images, and `prompts` prompts of two points and a box for each.
fn input(model: &SamModel, prompts: usize, multimask_output: bool) -> Result<SamInput> {
    let side = model.config().vision_config.grid_size();
    let channels = model.config().vision_config.output_channels;
    let places = |seed, dims: &[usize]| (random(seed, dims) + 1.0)? * 60.0;
    Ok(SamInput {
        image_embeddings: Some(random(1, &[2, channels, side, side])),
        input_points: Some(places(2, &[2, prompts, 2, 2])?),
        input_labels: Some(Tensor::ones((2, prompts, 2), DType::F32, &Device::Cpu)?),
        input_boxes: Some(places(3, &[2, prompts, 4])?),
        multimask_output,
        ..SamInput::default()
    })
}

/// The same prompts without the embeddings, of these prepared.
fn prompt(model: &SamModel, input: &SamInput) -> Result<SamOutput> {
    let Some(embeddings) = &input.image_embeddings else { anyhow::bail!("no embeddings") };
    let images = model.prepare(embeddings)?;
    ensure!(model.is_current(&images)? && images.batch() == 2);
    let prompts = SamInput { image_embeddings: None, ..input.clone() };
    let output = model.prompt(&images, &prompts)?;
    // Prompts leave the images as they are.
    let again = model.prompt(&images, &prompts)?;
    ensure!(bits(&output.pred_masks)? == bits(&again.pred_masks)?);
    Ok(output)
}

fn assert_equal_to_one_call(model: &SamModel) -> Result<Vec<u32>> {
    let mut all = vec![];
    for (prompts, multimask) in [(1, true), (2, false), (SHARING, true), (9, false)] {
        let input = input(model, prompts, multimask)?;
        let (got, want) = (prompt(model, &input)?, model.forward(&input, Mode::Eval)?);
        for (got, want) in
            [(&got.pred_masks, &want.pred_masks), (&got.iou_scores, &want.iou_scores)]
        {
            // A call of fewer prompts absorbs the projections: rounding alone differs, through two layers.
            let error = relative_error(got, want)?;
            let tolerance = if prompts < SHARING { 2e-5 } else { 0.0 };
            ensure!(error <= tolerance, "{prompts} prompts: {error:e}");
        }
        all.extend(bits(&got.pred_masks)?);
    }
    Ok(all)
}

#[test]
fn prepared_images_give_the_masks_of_one_call() -> Result<()> {
    let mut model = shipped(AttentionKind::Split)?;
    let frozen = assert_equal_to_one_call(&model)?;
    adapt(&mut model, 5)?;
    let adapted = assert_equal_to_one_call(&model)?;
    set_adapter(&mut model, 6)?;
    let changed = assert_equal_to_one_call(&model)?;
    ensure!(frozen != adapted && adapted != changed);
    Ok(())
}

#[test]
fn images_prepared_before_a_change_are_refused() -> Result<()> {
    let mut model = shipped(AttentionKind::Split)?;
    let mut input = input(&model, 2, true)?;
    let Some(embeddings) = input.image_embeddings.take() else { anyhow::bail!("no embeddings") };
    let assert_refused = |model: &SamModel, images: &_| {
        let refused = model.prompt(images, &input).map(|_| ()).unwrap_err().to_string();
        ensure!(refused.contains("has changed since"), "{refused}");
        ensure!(!model.is_current(images)?);
        Ok(model.prepare(&embeddings)?)
    };
    let images = model.prepare(&embeddings)?;
    adapt(&mut model, 5)?;
    let images = assert_refused(&model, &images)?;
    set_adapter(&mut model, 6)?;
    let images = assert_refused(&model, &images)?;
    let no_mask = &mut model.prompt_encoder.no_mask_embed.weight;
    *no_mask = (&*no_mask + 1.0)?;
    let images = assert_refused(&model, &images)?;
    let v_proj = &mut model.mask_decoder.transformer.layers[0].cross_attn_token_to_image.v_proj;
    v_proj.weight = (&v_proj.weight * 2.0)?;
    let images = assert_refused(&model, &images)?;
    // A parameter that only prompts read may change.
    let last = &mut model.mask_decoder.transformer.layers[1].cross_attn_token_to_image.v_proj;
    last.weight = (&last.weight * 2.0)?;
    model.prompt(&images, &input)?;
    Ok(())
}

fn embedding(model: &SamModel, seed: u64) -> Result<ImageEmbedding> {
    let side = model.config().vision_config.grid_size();
    let channels = model.config().vision_config.output_channels;
    let tensor = random(seed, &[1, channels, side, side]);
    let size = (model.config().vision_config.image_size, model.config().vision_config.image_size);
    Ok(ImageEmbedding { tensor, hq_features: None, frame: Frame { original: size, resized: size } })
}

fn predict(predictor: &SamPredictor<'_>, image: &ImageEmbedding, x: f32) -> Result<Vec<u32>> {
    let predictions = predictor.predict(image, &[Prompt::at(x, 40.0)], true)?;
    let logits = predictions.iter().map(|Prediction { logits, .. }| Ok(bits(logits)?));
    Ok(logits.collect::<Result<Vec<_>>>()?.concat())
}

#[test]
fn later_prompts_equal_those_of_a_fresh_predictor() -> Result<()> {
    let model = shipped(AttentionKind::Split)?;
    let images = [embedding(&model, 1)?, embedding(&model, 2)?];
    let predictor = SamPredictor::new(&model);
    // Back and forth between the images.
    for (index, image) in [0, 0, 1, 0, 1, 1].into_iter().enumerate() {
        let x = 20.0 + 9.0 * index as f32;
        let fresh = predict(&SamPredictor::new(&model), &images[image], x)?;
        ensure!(predict(&predictor, &images[image], x)? == fresh, "prompt {index}");
    }
    Ok(())
}

/// A copy without gradients shares its memory with the variables of the model that is trained.
#[test]
fn changed_weights_and_adapters_are_noticed() -> Result<()> {
    let mut trained = shipped(AttentionKind::Split)?;
    adapt(&mut trained, 5)?;
    let mut variables = vec![];
    let make = &mut |name: &str, node: NodeMut<'_>| {
        let first = "layers.0.cross_attn_token_to_image.v_proj";
        if let NodeMut::Parameter(tensor) = node {
            if name.contains(first) && (name.contains("lora_B") || name.ends_with("proj.weight")) {
                let variable = Var::from_tensor(tensor)?;
                *tensor = variable.as_tensor().clone();
                variables.push(variable);
            }
        }
        Ok(())
    };
    trained.mask_decoder.visit_mut("", make)?;
    ensure!(variables.len() == 2, "{} variables", variables.len());
    let copy = without_gradients(&trained)?;
    for model in [&trained, &copy] {
        let (predictor, image) = (SamPredictor::new(model), embedding(model, 1)?);
        let mut before = predict(&predictor, &image, 30.0)?;
        for variable in &variables {
            variable.set(&(variable.as_tensor().detach() * 1.5)?)?;
            let after = predict(&predictor, &image, 30.0)?;
            ensure!(after == predict(&SamPredictor::new(model), &image, 30.0)?);
            ensure!(after != before);
            before = after;
        }
    }
    Ok(())
}
