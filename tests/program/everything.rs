//! `masks` on large images and with chosen thresholds; embeddings that commands share.

use super::{fail, micrograph, root, succeed};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device};
use candle_sam_lora::sam::{
    label_image, AttentionKind, GeneratedMask, LargeImage, MaskGenerator, ReadOptions, SamModel,
    SamPredictor, SamProcessor, Tiling,
};
use image::imageops;
use serde_json::Value;
use std::path::Path;
use tiff::decoder::{Decoder, DecodingResult};

const QUICK: &str = "--points-per-side 6 --iou 0.6 --stability 0.6";

/// Four micrographs in a square, as a TIFF and a PNG.
fn mosaic(here: &Path) -> Result<()> {
    let part = image::open(micrograph().0)?.into_rgb8();
    let (width, height) = part.dimensions();
    let mut all = image::RgbImage::new(2 * width, 2 * height);
    for (x, y) in [(0, 0), (width, 0), (0, height), (width, height)] {
        imageops::replace(&mut all, &part, x.into(), y.into());
    }
    all.save(here.join("mosaic.tif"))?;
    Ok(all.save(here.join("mosaic.png"))?)
}

fn json(path: impl AsRef<Path>) -> Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// The masks that the library finds in the mosaic with the settings of `QUICK`.
fn expected(here: &Path, tiling: &Tiling) -> Result<(Vec<GeneratedMask>, (u32, u32))> {
    let folder = root().join("assets/tiny-sam");
    let model = SamModel::from_pretrained(&folder, AttentionKind::Fused, DType::F32, &Device::Cpu)?;
    let size = model.config().vision_config.image_size;
    let processor = SamProcessor::load(&folder, size)?;
    let predictor = SamPredictor::with_processor(&model, processor);
    let generator = MaskGenerator {
        points_per_side: 6,
        pred_iou_thresh: 0.6,
        stability_score_thresh: 0.6,
        ..MaskGenerator::default()
    };
    let mut image = LargeImage::open(here.join("mosaic.tif"), &ReadOptions::default())?;
    let found = generator.generate_tiled(&predictor, &mut image, tiling, |_, _| {})?;
    Ok((found.masks, image.size()))
}

/// COCO, labels and polygons are in pixels of the whole image.
#[test]
fn tiles_give_the_masks_of_the_library() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    mosaic(here)?;
    let tiling = Tiling { tile: 60, halo: 12, ..Tiling::default() };
    let (masks, size) = expected(here, &tiling)?;
    ensure!(tiling.tiles(size)?.len() > 3 && masks.len() > 3, "{size:?}, {}", masks.len());
    let tiles = "--tile 60 --halo 12 --geojson";
    let line = format!("mosaic.tif {QUICK} {tiles} --output out");
    let out = succeed(here, "masks", &line)?;
    ensure!(!out.contains("decoded as a whole"), "{out}");
    let coco = json(here.join("out/masks.json"))?;
    let features = json(here.join("out/mosaic.geojson"))?;
    ensure!(coco["annotations"].as_array().map(Vec::len) == Some(masks.len()), "{coco}");
    ensure!(features["features"].as_array().map(Vec::len) == Some(masks.len()), "{features}");
    for (index, mask) in masks.iter().enumerate() {
        let (annotation, feature) = (&coco["annotations"][index], &features["features"][index]);
        ensure!(annotation["segmentation"]["counts"] == mask.mask.compressed(), "{annotation}");
        ensure!(feature["properties"]["area"] == mask.mask.area(), "{feature}");
        let [x0, y0, x1, y1] = mask.bounds;
        let edges = serde_json::json!([x0, y0, x1 + 1, y1 + 1]);
        ensure!(feature["properties"]["bbox"] == edges, "{feature}");
    }
    let labels = here.join("out/mosaic.labels.tif");
    match Decoder::new(std::fs::File::open(&labels)?)?.read_image()? {
        DecodingResult::U32(labels) => ensure!(labels == label_image(&masks, size)),
        other => anyhow::bail!("{other:?}"),
    }
    ensure!(image::image_dimensions(here.join("out/mosaic.overlay.png"))? == (size.1, size.0));
    // A result that was cut off is made again, a whole one is not.
    for file in ["mosaic.geojson", "mosaic.labels.tif"] {
        let path = here.join("out").join(file);
        let bytes = std::fs::read(&path)?;
        std::fs::write(&path, &bytes[..bytes.len() / 2])?;
        let out = succeed(here, "masks", &format!("{line} --resume"))?;
        ensure!(!out.contains("done already") && std::fs::read(&path)? == bytes, "{file}: {out}");
    }
    let out = succeed(here, "masks", &format!("{line} --resume"))?;
    ensure!(out.contains("1 of 1 images were done already"), "{out}");
    let other = format!("mosaic.tif {QUICK} --output out --resume");
    fail(here, "masks", &other, 1, &["masks.jsonl", "other settings (tiles)"])?;
    // Values of 16 bits are told as they are without tiles.
    let deep = image::open(here.join("mosaic.png"))?.into_luma8();
    let deep = image::ImageBuffer::<image::Luma<u16>, Vec<u16>>::from_fn(size.1, size.0, |x, y| {
        image::Luma([u16::from(deep.get_pixel(x, y).0[0]) * 8])
    });
    deep.save(here.join("deep.tif"))?;
    let range = |line: &str| -> Result<String> {
        let out = succeed(here, "masks", &format!("deep.tif {QUICK} {line}"))?;
        let (_, said) = out.split_once("values ").with_context(|| format!("no values: {out}"))?;
        Ok(said.lines().next().unwrap_or_default().to_string())
    };
    let (whole, tiled) = (range("--output deep")?, range("--tile 60 --output deep-tiles")?);
    ensure!(whole == tiled && whole.contains("are black to white"), "{whole}, {tiled}");
    // A PNG has the same masks, but is decoded whole.
    let line = format!("mosaic.png {QUICK} {tiles} --output png");
    let out = succeed(here, "masks", &line)?;
    ensure!(out.contains("mosaic.png: decoded as a whole: a PNG is not read in parts"), "{out}");
    ensure!(json(here.join("png/masks.json"))?["annotations"] == coco["annotations"]);
    Ok(())
}

#[test]
fn polygons_stand_beside_the_labels() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    mosaic(here)?;
    let (masks, _) = expected(here, &Tiling::default())?;
    let line = format!("mosaic.png {QUICK} --geojson --json --quiet");
    let out = succeed(here, "masks", &line)?;
    let first: Value = serde_json::from_str(out.lines().next().context("nothing")?)?;
    ensure!(first["geojson"] == "masks/mosaic.geojson", "{out}");
    ensure!(first["statistics"]["candidates"] == 6 * 6 * 3, "{out}");
    ensure!(first["statistics"]["masks"] == masks.len(), "{out}");
    candle_sam_lora::sam::save_geojson(here.join("own.geojson"), &masks)?;
    let written = std::fs::read(here.join("masks/mosaic.geojson"))?;
    ensure!(written == std::fs::read(here.join("own.geojson"))?, "other polygons");
    ensure!(here.join("masks/mosaic.labels.png").exists());
    Ok(())
}

#[test]
fn large_images_are_told_of_tiles() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    image::GrayImage::new(10_000, 5_001).save(here.join("large.png"))?;
    let line = "large.png --points-per-side 1 --iou 2";
    let out = succeed(here, "masks", line)?;
    ensure!(out.matches("--tile").count() == 1 && out.contains("10000 x 5001 pixels"), "{out}");
    let out = succeed(here, "masks", &format!("{line} --tile 5001 --output tiles --json --quiet"))?;
    let first: Value = serde_json::from_str(out.lines().next().context("nothing")?)?;
    ensure!(first["overlay"].is_null() && first["labels"] == "tiles/large.labels.tif", "{out}");
    ensure!(!here.join("tiles/large.overlay.png").exists());
    image::GrayImage::new(40_000, 1_300).save(here.join("wide.tif"))?;
    let words = ["40000 x 1300 pixels", "--tile 1024 reads the image in parts"];
    fail(here, "masks", "wide.tif --points-per-side 1 --output wide", 1, &words)
}

/// The thresholds that are printed give the masks of the calibrated run.
#[test]
fn calibration_chooses_thresholds_and_uses_them() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let heldout = root().join("assets/photos/nuclei/heldout");
    let truth = format!(
        "--points-per-side 6 --calibrate-images {0}/images --calibrate-masks {0}/masks",
        heldout.display()
    );
    let out = succeed(here, "masks", &format!("{truth} --json --quiet"))?;
    let found: Value = serde_json::from_str(&out)?;
    let calibration = &found["calibration"];
    let ratio = |count: &str, of: &str| -> Result<f64> {
        let number = |name: &str| calibration[name].as_f64().context("no number");
        Ok(number(count)? / number(of)?)
    };
    ensure!(found["precision"] == ratio("found", "kept")?, "{out}");
    ensure!(found["recall"] == ratio("found", "objects")?, "{out}");
    ensure!(ratio("found", "objects")? > 0.4, "{out}");
    ensure!(!here.join("masks").exists(), "without images nothing is written");

    let image = micrograph().0;
    let image = image.display();
    let out = succeed(here, "masks", &format!("{image} {truth} --output chosen"))?;
    let nms = calibration["mask_nms_thresh"].as_f64().context("doubles need no suppression")?;
    let flags = format!(
        "--iou {} --stability {} --mask-nms {nms}",
        calibration["pred_iou_thresh"], calibration["stability_score_thresh"]
    );
    ensure!(out.contains(&format!("images: {flags}: precision ")), "{flags}: {out}");
    let warning = found["warning"].as_str();
    ensure!(warning.is_none_or(|why| out.contains(&format!("warning: {why}"))), "{out}");
    ensure!(warning.is_some() == out.contains("warning: "), "{out}");
    succeed(here, "masks", &format!("{image} --points-per-side 6 {flags} --output named"))?;
    let bytes = |folder: &str| std::fs::read(here.join(folder).join("masks.json"));
    ensure!(bytes("chosen")? == bytes("named")?, "other masks");
    let other = format!("{image} --points-per-side 6 --output chosen --resume");
    fail(here, "masks", &other, 1, &["other settings (calibration)"])?;
    fail(here, "masks", &format!("{truth} --iou 0.5"), 2, &["--iou", "--calibrate-images"])?;
    fail(here, "masks", "--calibrate-images x", 2, &["--calibrate-masks"])
}

/// `encode` embeds once; `masks` and `segment` read it, and their results are those without it.
#[test]
fn commands_share_embeddings() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    std::fs::create_dir(here.join("photos"))?;
    for name in ["a.png", "b.png"] {
        std::fs::copy(micrograph().0, here.join("photos").join(name))?;
    }
    let kept = "--embeddings kept";
    let out = succeed(here, "encode", &format!("--input photos {kept}"))?;
    let said = "embeddings: 0 read, 2 computed (photos/a.png: there was no file)";
    ensure!(out.contains(said), "{out}");
    succeed(here, "masks", &format!("photos {QUICK} --output without"))?;
    let out = succeed(here, "masks", &format!("photos {QUICK} {kept} --output with"))?;
    ensure!(out.contains("embeddings: 2 read, 0 computed\n"), "{out}");
    for name in ["masks.json", "a.labels.png"] {
        let bytes = |folder: &str| std::fs::read(here.join(folder).join(name));
        ensure!(bytes("with")? == bytes("without")?, "{name} differs");
    }
    let point = "photos/a.png --point 30,30 --overlay o.png --overwrite";
    succeed(here, "segment", &format!("{point} --mask without.png"))?;
    let out = succeed(here, "segment", &format!("{point} {kept} --mask with.png"))?;
    ensure!(out.contains("embeddings: 1 read, 0 computed\n"), "{out}");
    ensure!(std::fs::read(here.join("with.png"))? == std::fs::read(here.join("without.png"))?);
    // Another reading of the image is another embedding, which is said.
    let out =
        succeed(here, "segment", &format!("{point} {kept} --range min-max --mask other.png"))?;
    ensure!(out.contains("0 read, 1 computed (photos/a.png: the reading of the image"), "{out}");

    succeed(here, "segment", &format!("{point} --embeddings beside --mask beside.png"))?;
    ensure!(here.join("photos/a.png.embedding.safetensors").exists());
    let out = succeed(here, "encode", "--input photos --embeddings beside --json --quiet")?;
    let lines: Vec<Value> = out.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(lines.len() == 2 && lines[0]["computed"].is_null(), "{out}");
    ensure!(lines[1]["computed"] == "there was no file", "{out}");
    ensure!(lines[1]["embedding"] == "photos/b.png.embedding.safetensors", "{out}");

    let fails = |command, line: &str, words: &[&str]| fail(here, command, line, 2, words);
    fails("masks", &format!("photos {kept} --tile 64"), &["--tile", "--embeddings"])?;
    fails("masks", &format!("photos {kept} --crop-layers 1"), &["--crop-layers", "--embeddings"])?;
    fails("encode", &format!("--input photos {kept} --output x"), &["--output", "--embeddings"])?;
    fails("encode", "--input photos", &["--output"])?;
    fail(here, "encode", "--input x --output y --page 2", 1, &["--page", "--embeddings"])
}
