//! Stored embeddings: read only if image, model, adapter and settings agree, and told otherwise; damage is noticed.

use crate::common::model;
use crate::common::model::shipped;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device};
use candle_sam_lora::sam::{
    AttentionKind, Embedded, EmbeddingOrigin, EmbeddingPrecision, EmbeddingStore, Frame,
    ImageEmbedding, MaskGenerator, Prompt, ReadOptions, SamModel, SamPredictor, SamProcessor,
    ValueRange,
};
use candle_sam_lora::{lora, nn};
use image::{DynamicImage, Rgb, RgbImage};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn adapted() -> Result<SamModel> {
    let mut model = shipped(AttentionKind::Split)?;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/everything/adapter");
    lora::load_adapter(&mut model, folder)?;
    Ok(model)
}

fn write_image(path: &Path, shade: u8) -> Result<()> {
    let image = RgbImage::from_fn(90, 60, |x, y| Rgb([x as u8 * 2, y as u8 * 3, shade]));
    Ok(DynamicImage::from(image).save(path)?)
}

fn folder() -> Result<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("photo.png");
    write_image(&image, 7)?;
    Ok((folder, image))
}

fn bits(embedding: &ImageEmbedding) -> Result<Vec<u32>> {
    Ok(model::bits(&embedding.tensor)?)
}

fn reason(embedded: &Embedded) -> &str {
    embedded.computed.as_deref().unwrap_or("read")
}

/// Embeds with the store and says why it was computed, or "read".
fn said(store: &EmbeddingStore, model: &SamModel, image: &Path) -> Result<String> {
    Ok(reason(&store.get_or_embed(&SamPredictor::new(model), image)?).to_string())
}

#[test]
fn stored_embedding_is_the_computed_one() -> Result<()> {
    let (_folder, image) = folder()?;
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let expected = predictor.embed(&candle_sam_lora::sam::read_image(&image)?)?;
    let store = EmbeddingStore::beside();
    let computed = store.get_or_embed(&predictor, &image)?;
    let read = store.get_or_embed(&predictor, &image)?;
    ensure!(reason(&computed) == "there was no file" && reason(&read) == "read");
    ensure!(read.path == image.with_file_name("photo.png.embedding.safetensors"));
    for found in [&computed.embedding, &read.embedding] {
        ensure!(found.frame == expected.frame && bits(found)? == bits(&expected)?);
    }
    let prompt = [Prompt::at(30.0, 20.0)];
    let (a, b) = (
        predictor.predict(&expected, &prompt, true)?,
        predictor.predict(&read.embedding, &prompt, true)?,
    );
    ensure!(a[0].iou_scores == b[0].iou_scores);
    Ok(())
}

/// Crops have embeddings of their own.
#[test]
fn one_embedding_gives_the_masks_of_the_image() -> Result<()> {
    let (_folder, image) = folder()?;
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let read = candle_sam_lora::sam::read_image(&image)?;
    let generator = MaskGenerator {
        points_per_side: 4,
        pred_iou_thresh: 0.0,
        stability_score_thresh: 0.0,
        ..MaskGenerator::default()
    };
    let expected = generator.generate_counted(&predictor, &read, |_, _| {})?;
    let embedding = predictor.embed(&read)?;
    let found = generator.generate_embedded(&predictor, &embedding, |_, _| {})?;
    ensure!(!found.masks.is_empty() && found.statistics == expected.statistics);
    for (a, b) in found.masks.iter().zip(&expected.masks) {
        ensure!(a.mask.compressed() == b.mask.compressed() && a.iou_score == b.iou_score);
    }
    let generator = MaskGenerator { crop_n_layers: 1, ..generator };
    let error = generator.generate_embedded(&predictor, &embedding, |_, _| {});
    let error = error.err().context("accepted")?.to_string();
    ensure!(error.contains("crop_n_layers is 1, expected 0"), "{error}");
    Ok(())
}

#[test]
fn whatever_differs_is_told_and_computed() -> Result<()> {
    let (_folder, image) = folder()?;
    let (plain, with_adapter) = (shipped(AttentionKind::Split)?, adapted()?);
    let store = EmbeddingStore::beside();
    ensure!(said(&store, &plain, &image)? == "there was no file");
    ensure!(said(&store, &with_adapter, &image)?.starts_with("the adapter is another: expected "));
    ensure!(said(&store, &with_adapter, &image)? == "read");
    ensure!(said(&store, &plain, &image)?.contains("the adapter is another: expected none"));
    write_image(&image, 8)?;
    ensure!(said(&store, &plain, &image)?.starts_with("the image is another: expected "));
    let mut other = shipped(AttentionKind::Split)?;
    other.randomize(3, 0.02)?;
    ensure!(said(&store, &other, &image)?.starts_with("the model is another: expected "));
    ensure!(said(&store, &plain, &image)?.starts_with("the model is another: expected "));
    let range = ReadOptions { range: ValueRange::Fixed(0.1, 200.3), ..Default::default() };
    let ranged = store.clone().with_options(range);
    ensure!(said(&ranged, &plain, &image)?.starts_with("the reading of the image is another"));
    ensure!(said(&ranged, &plain, &image)? == "read");
    let processor = SamProcessor {
        image_mean: [100.1, 110.2, 120.3],
        ..SamProcessor::new(plain.config().vision_config.image_size)
    };
    let predictor = SamPredictor::with_processor(&plain, processor);
    let first = ranged.get_or_embed(&predictor, &image)?;
    ensure!(reason(&first).starts_with("the processor is another"), "{}", reason(&first));
    ensure!(reason(&ranged.get_or_embed(&predictor, &image)?) == "read");
    Ok(())
}

/// Scaling and switching of an adapter count, though they are no tensors.
#[test]
fn adapter_in_use_is_part_of_the_origin() -> Result<()> {
    let (_folder, image) = folder()?;
    let store = EmbeddingStore::beside();
    let mut model = adapted()?;
    ensure!(said(&store, &model, &image)? == "there was no file");
    lora::disable_adapters(&mut model)?;
    ensure!(said(&store, &model, &image)?.contains("expected none"));
    ensure!(said(&store, &shipped(AttentionKind::Split)?, &image)? == "read");
    lora::enable_adapters(&mut model)?;
    ensure!(said(&store, &model, &image)?.contains("found none"));
    nn::ModuleTree::visit_mut(&mut model, "", &mut |_, node| {
        if let nn::NodeMut::Layer(layer) = node {
            layer.adapters.iter_mut().for_each(|(_, adapter)| adapter.scaling *= 2.0);
        }
        Ok(())
    })?;
    ensure!(said(&store, &model, &image)?.starts_with("the adapter is another"));
    Ok(())
}

/// A predictor notices training of the encoder between two calls.
#[test]
fn trained_encoder_is_another_model() -> Result<()> {
    let (_folder, image) = folder()?;
    let store = EmbeddingStore::beside();
    let mut model = shipped(AttentionKind::Split)?;
    nn::set_trainable(&mut model, |name| name.starts_with("vision_encoder.neck"))?;
    let predictor = SamPredictor::new(&model);
    ensure!(reason(&store.get_or_embed(&predictor, &image)?) == "there was no file");
    ensure!(reason(&store.get_or_embed(&predictor, &image)?) == "read");
    for (_, variable) in nn::trainable_variables(&model)? {
        variable.set(&(variable.as_tensor() * 1.5)?)?;
    }
    let again = store.get_or_embed(&predictor, &image)?;
    ensure!(reason(&again).starts_with("the model is another"), "{}", reason(&again));
    Ok(())
}

#[test]
fn images_of_one_name_share_a_folder() -> Result<()> {
    let (folder, first) = folder()?;
    let other = folder.path().join("other");
    std::fs::create_dir(&other)?;
    let second = other.join("photo.png");
    write_image(&second, 99)?;
    let model = shipped(AttentionKind::Split)?;
    let store = EmbeddingStore::in_folder(folder.path().join("deep/embeddings"));
    ensure!(said(&store, &model, &first)? == "there was no file");
    ensure!(said(&store, &model, &second)? == "there was no file");
    ensure!(said(&store, &model, &first)? == "read" && said(&store, &model, &second)? == "read");
    ensure!(std::fs::read_dir(folder.path().join("deep/embeddings"))?.count() == 2);
    Ok(())
}

#[test]
fn half_precision_halves_the_file() -> Result<()> {
    let (_folder, image) = folder()?;
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let exact = EmbeddingStore::beside().get_or_embed(&predictor, &image)?;
    let full = std::fs::metadata(&exact.path)?.len();
    let exact = bits(&exact.embedding)?;
    for (precision, digits) in [(EmbeddingPrecision::F16, 11), (EmbeddingPrecision::Bf16, 8)] {
        let store = EmbeddingStore::beside().with_precision(precision);
        let computed = store.get_or_embed(&predictor, &image)?;
        ensure!(reason(&computed).starts_with("the precision is another"), "{}", reason(&computed));
        let read = store.get_or_embed(&predictor, &image)?;
        ensure!(reason(&read) == "read" && read.embedding.tensor.dtype() == DType::F32);
        // A run that computes gives the bits of one that reads.
        let found = bits(&read.embedding)?;
        ensure!(bits(&computed.embedding)? == found && found != exact);
        for (found, exact) in found.iter().zip(&exact) {
            let (found, exact) = (f32::from_bits(*found), f32::from_bits(*exact));
            // Below 2^-14 f16 has fewer digits.
            let bound = exact.abs().max(2f32.powi(-14)) * 2f32.powi(-digits);
            ensure!((found - exact).abs() <= bound, "{found} for {exact}");
        }
        let length = std::fs::metadata(&read.path)?.len();
        ensure!(length < full / 2 + 2048, "{length} bytes of {full}");
    }
    Ok(())
}

fn origin() -> EmbeddingOrigin {
    EmbeddingOrigin {
        image: "a".into(),
        reading: "{}".into(),
        processor: "{}".into(),
        model: "b".into(),
        adapter: Some("c".into()),
    }
}

#[test]
fn files_keep_embedding_and_origin() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("one.safetensors");
    let tensor = candle_core::Tensor::randn(0f32, 1.0, (1, 4, 3, 3), &Device::Cpu)?;
    let frame = Frame { original: (30, 40), resized: (48, 64) };
    let embedding = ImageEmbedding { tensor, hq_features: None, frame };
    embedding.save(&path, &origin(), EmbeddingPrecision::Exact)?;
    let (read, found) = ImageEmbedding::load(&path, &Device::Cpu)?;
    ensure!(found == origin() && read.frame == frame && bits(&read)? == bits(&embedding)?);
    ensure!(found.difference(&origin()).is_none());
    let large = ImageEmbedding { tensor: (&embedding.tensor * 1e9)?, hq_features: None, frame };
    let error = large.save(&path, &origin(), EmbeddingPrecision::F16).err().context("saved")?;
    ensure!(error.to_string().contains("too large for its precision"), "{error}");
    // The old file stays.
    ensure!(bits(&ImageEmbedding::load(&path, &Device::Cpu)?.0)? == bits(&embedding)?);
    Ok(())
}

#[test]
fn every_damage_is_noticed() -> Result<()> {
    let (_folder, image) = folder()?;
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let store = EmbeddingStore::beside();
    let first = store.get_or_embed(&predictor, &image)?;
    let good = std::fs::read(&first.path)?;
    let load = || ImageEmbedding::load(&first.path, &Device::Cpu);
    for place in (0..good.len()).step_by(good.len() / 97) {
        let mut bytes = good.clone();
        bytes[place] ^= 4;
        std::fs::write(&first.path, &bytes)?;
        let error = load().err().with_context(|| format!("byte {place} changed"))?.to_string();
        ensure!(error.contains("photo.png.embedding.safetensors"), "{error}");
        std::fs::write(&first.path, &good[..place])?;
        ensure!(load().is_err(), "cut off at {place}");
    }
    let foreign = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-sam/model.safetensors");
    for (name, bytes, words) in [
        ("cut off", good[..good.len() - 9].to_vec(), "truncated"),
        ("foreign", std::fs::read(foreign)?, "not an image embedding"),
        ("text", b"hello".to_vec(), "not a valid safetensors file"),
    ] {
        std::fs::write(&first.path, bytes)?;
        let again = store.get_or_embed(&predictor, &image)?;
        ensure!(reason(&again).contains(words), "{name}: {}", reason(&again));
        ensure!(reason(&again).lines().count() == 1, "{name}");
        ensure!(bits(&again.embedding)? == bits(&first.embedding)?, "{name}");
        ensure!(std::fs::read(&first.path)? == good, "{name}: another file");
    }
    Ok(())
}

#[test]
fn images_that_cannot_be_read_are_errors() -> Result<()> {
    let (folder, _) = folder()?;
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let store = EmbeddingStore::beside();
    let text = folder.path().join("text.png");
    std::fs::write(&text, "no image")?;
    for name in ["absent.png", "text.png"] {
        let path = folder.path().join(name);
        let error = store.get_or_embed(&predictor, &path).err().context("embedded")?;
        ensure!(error.to_string().contains(name), "{error}");
    }
    ensure!(!folder.path().join("text.png.embedding.safetensors").exists());
    Ok(())
}
