//! Masks of everything against transformers' pipeline and the original generator, both in f64: the same masks in the
//! same order, pixel for pixel.

use crate::common::model::{fixtures, metadata, relative_error, shipped, Tensors};
use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_sam_lora::files::read_tensors;
use candle_sam_lora::lora;
use candle_sam_lora::nn::Mode;
use candle_sam_lora::sam::{
    label_image, save_labels, AttentionKind, CocoAnnotations, Crop, GeneratedMask, MaskGenerator,
    Prompt, Ranking, Rle, SamInput, SamPredictor,
};
use image::{DynamicImage, RgbImage};
use std::collections::BTreeMap;

/// Twice what f32 errs by in the model, see `tests/sam/model.rs`.
const SCORE_TOLERANCE: f64 = 1.1e-5;

fn io() -> Result<(Tensors, BTreeMap<String, serde_json::Value>)> {
    let path = fixtures().join("everything/io.safetensors");
    Ok((read_tensors(&path, &Device::Cpu)?, metadata(&path)?))
}

fn picture(pixels: &Tensor) -> Result<DynamicImage> {
    let (height, width, _) = pixels.dims3()?;
    let pixels = pixels.flatten_all()?.to_vec1::<u8>()?;
    let image = RgbImage::from_raw(width as u32, height as u32, pixels).context("no image")?;
    Ok(image.into())
}

/// The generator that a case's settings describe.
fn generator(settings: &serde_json::Value) -> Result<MaskGenerator> {
    let mut generator = MaskGenerator::default();
    for (name, value) in settings.as_object().context("no settings")? {
        let (float, whole) = (value.as_f64().unwrap_or(0.0), value.as_u64().unwrap_or(0));
        match name.as_str() {
            "points_per_side" => generator.points_per_side = whole as usize,
            "points_per_batch" => generator.points_per_batch = whole as usize,
            "pred_iou_thresh" => generator.pred_iou_thresh = float,
            "stability_score_thresh" => generator.stability_score_thresh = float,
            "stability_score_offset" => generator.stability_score_offset = float,
            "mask_threshold" => generator.mask_threshold = float,
            "crop_n_layers" => generator.crop_n_layers = whole as u32,
            "crop_overlap_ratio" => generator.crop_overlap_ratio = float,
            "crop_n_points_downscale_factor" => {
                generator.crop_n_points_downscale_factor = whole as usize
            }
            "crop_nms_thresh" => generator.crop_nms_thresh = float,
            "box_nms_thresh" => generator.box_nms_thresh = Some(float),
            "min_mask_region_area" => generator.min_mask_region_area = whole as usize,
            other => anyhow::bail!("no setting {other}"),
        }
    }
    Ok(generator)
}

fn same(
    case: &str,
    found: &[GeneratedMask],
    facts: &serde_json::Value,
    io: &Tensors,
) -> Result<()> {
    let tensor = |name: &str| io.get(&format!("{case}/{name}"));
    let masks: Vec<String> = serde_json::from_value(facts["masks"].clone())?;
    ensure!(found.len() == masks.len(), "{case}: {} masks, not {}", found.len(), masks.len());
    let boxes = tensor("boxes").context("no boxes")?.to_vec2::<i64>()?;
    for (index, (mask, want)) in found.iter().zip(&masks).enumerate() {
        let decoded = Rle::from_compressed(want, mask.mask.size())?;
        let wrong =
            mask.mask.to_mask().iter().zip(decoded.to_mask()).filter(|(a, b)| **a != *b).count();
        ensure!(wrong == 0, "{case}: mask {index} has {wrong} wrong pixels");
        ensure!(mask.mask == decoded && mask.mask.compressed() == *want, "{case}: mask {index}");
        let bounds: Vec<i64> = mask.bounds.iter().map(|side| i64::from(*side)).collect();
        ensure!(bounds == boxes[index], "{case}: box {index} is {bounds:?}");
    }
    let column =
        |of: fn(&GeneratedMask) -> f32| Tensor::from_iter(found.iter().map(of), &Device::Cpu);
    let want = tensor("scores").context("no scores")?;
    let error = relative_error(&column(|mask| mask.iou_score)?, want)?;
    ensure!(error < SCORE_TOLERANCE, "{case}: scores differ by {error}");
    if let (Some(stability), Some(points)) = (tensor("stability"), tensor("points")) {
        let error = relative_error(&column(|mask| mask.stability_score)?, stability)?;
        ensure!(error < 1e-6, "{case}: stabilities differ by {error}");
        let found: Vec<f32> = found.iter().flat_map(|mask| mask.point).collect();
        let found = Tensor::from_vec(found, points.shape(), &Device::Cpu)?;
        ensure!(relative_error(&found, points)? < 1e-6, "{case}: other points");
    }
    Ok(())
}

#[test]
fn masks_equal_those_of_transformers_and_of_the_original() -> Result<()> {
    let (tensors, cases) = io()?;
    ensure!(cases.len() == 9, "{} cases", cases.len());
    let (plain, mut adapted) = (shipped(AttentionKind::Split)?, shipped(AttentionKind::Split)?);
    lora::load_adapter(&mut adapted, fixtures().join("everything/adapter"))?;
    for (case, facts) in &cases {
        let predictor = SamPredictor::new(if case == "adapter" { &adapted } else { &plain });
        let image = picture(&tensors[&format!("{case}/image")])?;
        let generator = generator(&facts["settings"])?;
        same(case, &generator.generate(&predictor, &image)?, facts, &tensors)?;
    }
    Ok(())
}

type Score = fn(&GeneratedMask) -> f32;

/// The best mask stays, all that overlap it by more than the threshold go, and so on among the rest.
fn naively(
    masks: &[GeneratedMask],
    score: Score,
    threshold: f64,
    iou: fn(&GeneratedMask, &GeneratedMask) -> f64,
) -> Vec<GeneratedMask> {
    let mut left = masks.to_vec();
    let mut kept: Vec<GeneratedMask> = vec![];
    while let Some(best) =
        (0..left.len()).max_by(|a, b| score(&left[*a]).total_cmp(&score(&left[*b])))
    {
        let best = left.remove(best);
        left.retain(|mask| iou(&best, mask) <= threshold);
        kept.push(best);
    }
    kept
}

fn box_iou(a: &GeneratedMask, b: &GeneratedMask) -> f64 {
    let [a, b] = [a.bounds, b.bounds].map(|bounds| bounds.map(f64::from));
    let area = |[x0, y0, x1, y1]: [f64; 4]| (x1 - x0) * (y1 - y0);
    let side = |i: usize| (a[i + 2].min(b[i + 2]) - a[i].max(b[i])).max(0.0);
    let both = side(0) * side(1);
    both / (area(a) + area(b) - both).max(1.0)
}

fn pixel_iou(a: &GeneratedMask, b: &GeneratedMask) -> f64 {
    let (a, b) = (a.mask.to_mask(), b.mask.to_mask());
    let count =
        |inside: fn(bool, bool) -> bool| a.iter().zip(&b).filter(|(a, b)| inside(**a, **b)).count();
    count(|a, b| a && b) as f64 / count(|a, b| a || b).max(1) as f64
}

/// Each ranking keeps the better of two doubles by its own score, by boxes and by masks, and orders what stays.
#[test]
fn rankings_keep_what_a_naive_suppression_keeps() -> Result<()> {
    let (tensors, _) = io()?;
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let image = picture(&tensors["grid/image"])?;
    let all = MaskGenerator {
        points_per_side: 6,
        pred_iou_thresh: 0.0,
        // Drops masks without a pixel alone.
        stability_score_thresh: 1e-9,
        crop_nms_thresh: 1.0,
        ..MaskGenerator::default()
    };
    let candidates = all.generate(&predictor, &image)?;
    let rankings: [(Ranking, Score); 2] = [
        (Ranking::PredictedIou, |mask| mask.iou_score),
        (Ranking::IouTimesStability, |mask| mask.iou_score * mask.stability_score),
    ];
    let mut kept = vec![];
    for (ranking, score) in rankings {
        let generator = MaskGenerator {
            ranking,
            crop_nms_thresh: 0.7,
            mask_nms_thresh: Some(0.3),
            ..all.clone()
        };
        let want = naively(&naively(&candidates, score, 0.7, box_iou), score, 0.3, pixel_iou);
        // By the original's order of steps, too: boxes go within the crop.
        let original =
            MaskGenerator { box_nms_thresh: Some(0.7), crop_nms_thresh: 1.0, ..generator.clone() };
        for generator in [generator, original] {
            let found = generator.generate(&predictor, &image)?;
            let key = |mask: &GeneratedMask| (mask.mask.compressed(), mask.point.map(f32::to_bits));
            let [got, naive] = [&found, &want].map(|m| m.iter().map(key).collect::<Vec<_>>());
            ensure!(got == naive, "{ranking}: {} masks, not {}", found.len(), want.len());
        }
        kept.push(want.iter().map(|mask| mask.mask.compressed()).collect::<Vec<_>>());
    }
    ensure!(candidates.len() > 2 * kept[0].len() && kept[0] != kept[1], "{kept:?}");
    Ok(())
}

/// A mask without a pixel, whose stability is 0 / 0, is the worst.
#[test]
fn masks_without_a_pixel_rank_last() -> Result<()> {
    let some = disc((32, 32), (16.0, 16.0), 5.0)?;
    let none = GeneratedMask { stability_score: f32::NAN, ..some.clone() };
    let score = |mask: &GeneratedMask| mask.score(Ranking::IouTimesStability);
    ensure!(score(&none).total_cmp(&score(&some)).is_lt() && score(&none) < -f32::MAX);
    Ok(())
}

/// Prompts of several kinds in one call give what each gives alone, in the prompts' order.
#[test]
fn several_objects_in_one_call_equal_each_alone() -> Result<()> {
    let (tensors, _) = io()?;
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let embedding = predictor.embed(&picture(&tensors["grid/image"])?)?;
    let first = Prompt::at(20.0, 30.0);
    let logits = predictor.predict(&embedding, std::slice::from_ref(&first), false)?;
    let logits = logits[0].logits.get(0)?;
    let prompts = [
        Prompt::within([10.0, 10.0, 60.0, 50.0]),
        first.clone(),
        Prompt::at(70.0, 40.0).and_at(5.0, 5.0, false),
        Prompt::at(50.5, 12.0),
        first.and_logits(logits),
        Prompt::within([0.0, 0.0, 96.0, 72.0]).and_at(3.0, 4.0, true),
    ];
    let together = predictor.predict(&embedding, &prompts, true)?;
    ensure!(together.len() == prompts.len());
    for (index, (prompt, all)) in prompts.iter().zip(&together).enumerate() {
        let alone = predictor.predict(&embedding, std::slice::from_ref(prompt), true)?;
        let error = relative_error(&all.logits, &alone[0].logits)?;
        ensure!(error < 1e-6, "prompt {index}: {error}");
        // The model itself, called as transformers' users call theirs.
        let mut input =
            SamInput { image_embeddings: Some(embedding.tensor.clone()), ..SamInput::default() };
        let count = prompt.points.len();
        if count > 0 {
            let points: Vec<f32> = prompt.points.iter().flat_map(|p| [p.x, p.y]).collect();
            let points = Tensor::from_vec(points, (1, 1, count, 2), &Device::Cpu)?;
            input.input_points = Some(embedding.frame.scale_points(&points)?);
            let labels: Vec<f32> =
                prompt.points.iter().map(|p| if p.on_object { 1.0 } else { 0.0 }).collect();
            input.input_labels = Some(Tensor::from_vec(labels, (1, 1, count), &Device::Cpu)?);
        }
        if let Some(bounds) = prompt.bounds {
            let bounds = Tensor::from_slice(&bounds, (1, 1, 4), &Device::Cpu)?;
            input.input_boxes = Some(embedding.frame.scale_boxes(&bounds)?);
        }
        if let Some(logits) = &prompt.logits {
            input.input_masks = Some(logits.unsqueeze(0)?.unsqueeze(0)?);
        }
        let want = model.forward(&input, Mode::Eval)?.pred_masks.squeeze(0)?.squeeze(0)?;
        ensure!(relative_error(&all.logits, &want)? < 1e-6, "prompt {index}");
    }
    Ok(())
}

#[test]
fn what_is_no_prompt_or_no_setting_is_refused() -> Result<()> {
    let model = shipped(AttentionKind::Split)?;
    let predictor = SamPredictor::new(&model);
    let image = DynamicImage::new_rgb8(40, 30);
    let embedding = predictor.embed(&image)?;
    for (prompt, words) in [
        (Prompt::default(), "no point, no box"),
        (Prompt::at(f32::NAN, 1.0), "NaN is no pixel"),
        (Prompt::at(1.0, f32::MAX), "3.4028235e38 is no pixel"),
        (Prompt::within([0.0, 0.0, f32::INFINITY, 1.0]), "inf is no pixel"),
    ] {
        let error = predictor.predict(&embedding, &[prompt], true).err().context("accepted")?;
        ensure!(error.to_string().contains(words), "{error}");
    }
    let usual = MaskGenerator::default();
    for (generator, words) in [
        (MaskGenerator { points_per_side: 0, ..usual.clone() }, "points_per_side"),
        (MaskGenerator { points_per_batch: 0, ..usual.clone() }, "points_per_batch"),
        (MaskGenerator { crop_n_layers: 9, ..usual.clone() }, "crop_n_layers"),
        (MaskGenerator { crop_overlap_ratio: f64::NAN, ..usual.clone() }, "crop_overlap_ratio"),
        (MaskGenerator { stability_score_offset: -1.0, ..usual.clone() }, "stability_score_offset"),
        (MaskGenerator { mask_threshold: f64::INFINITY, ..usual }, "mask_threshold"),
    ] {
        let error = generator.generate(&predictor, &image).err().context("accepted")?;
        ensure!(error.to_string().contains(words), "{error}");
    }
    Ok(())
}

#[test]
fn progress_counts_every_point() -> Result<()> {
    let model = shipped(AttentionKind::Split)?;
    let generator = MaskGenerator {
        points_per_side: 4,
        points_per_batch: 5,
        crop_n_layers: 1,
        crop_n_points_downscale_factor: 2,
        ..MaskGenerator::default()
    };
    let mut seen = vec![];
    let image = DynamicImage::new_rgb8(50, 40);
    generator
        .generate_with(&SamPredictor::new(&model), &image, |done, of| seen.push((done, of)))?;
    ensure!(seen.last() == Some(&(32, 32)) && seen.len() == 8, "{seen:?}");
    ensure!(seen.is_sorted());
    Ok(())
}

fn disc(size: (u32, u32), centre: (f64, f64), radius: f64) -> Result<GeneratedMask> {
    let inside: Vec<bool> = (0..size.0)
        .flat_map(|y| (0..size.1).map(move |x| (y, x)))
        .map(|(y, x)| (f64::from(y) - centre.0).hypot(f64::from(x) - centre.1) < radius)
        .collect();
    let mask = Rle::from_mask(&inside, size)?;
    Ok(GeneratedMask {
        bounds: mask.bounds().context("empty")?,
        mask,
        iou_score: 0.9,
        stability_score: 0.8,
        point: [centre.1 as f32, centre.0 as f32],
        crop: Crop { left: 0, top: 0, right: size.1, bottom: size.0 },
    })
}

/// The smaller of two masks lies above; 16 and 32 bits read back as written.
#[test]
fn label_images_hold_every_mask() -> Result<()> {
    let size = (40, 50);
    let masks = [disc(size, (20.0, 20.0), 4.0)?, disc(size, (20.0, 22.0), 15.0)?];
    let labels = label_image(&masks, size);
    let place = |y: usize, x: usize| labels[y * 50 + x];
    ensure!(place(20, 20) == 1 && place(20, 30) == 2 && place(0, 49) == 0);
    // A smaller image has the same labels.
    let part = label_image(&masks, (25, 24));
    let cut: Vec<u32> = labels.chunks(50).take(25).flat_map(|row| row[..24].to_vec()).collect();
    ensure!(part == cut);
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    for name in ["labels.png", "labels.tif"] {
        save_labels(folder.join(name), &labels, size)?;
    }
    let options = candle_sam_lora::train::MaskOptions::default();
    let read = candle_sam_lora::train::read_mask(folder.join("labels.png"), &options)?.labels;
    ensure!(read.into_raw() == labels);
    let mut many = labels.clone();
    many[7] = 70_000;
    let error = save_labels(folder.join("many.png"), &many, size).err().context("accepted")?;
    ensure!(error.to_string().contains("32 bits"), "{error}");
    save_labels(folder.join("many.tif"), &many, size)?;
    let file = std::fs::File::open(folder.join("many.tif"))?;
    let tiff::decoder::DecodingResult::U32(read) =
        tiff::decoder::Decoder::new(file)?.read_image()?
    else {
        anyhow::bail!("not 32 bits")
    };
    ensure!(read == many);
    ensure!(save_labels(folder.join("labels.jpg"), &labels, size).is_err());
    ensure!(save_labels(folder.join("short.png"), &labels[1..], size).is_err());
    Ok(())
}

#[test]
fn annotations_are_coco() -> Result<()> {
    let size = (40, 50);
    let masks = [disc(size, (20.0, 20.0), 4.0)?, disc(size, (30.0, 40.0), 12.0)?];
    let mut annotations = CocoAnnotations::default();
    let outside = GeneratedMask { bounds: [4, 0, 50, 1], ..masks[0].clone() };
    let turned = GeneratedMask { bounds: [4, 0, 3, 1], ..masks[0].clone() };
    for (size, mask) in [((50, 40), masks[0].clone()), (size, outside), (size, turned)] {
        let error = annotations.push("odd.png", size, &[mask]).err().context("accepted")?;
        ensure!(error.to_string().contains("mask 0 has (height, width) (40, 50)"), "{error}");
    }
    annotations.push("empty.png", (3, 4), &[])?;
    annotations.push("two.png", size, &masks)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("masks.json");
    annotations.save(&path)?;
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
    ensure!(
        json["images"][1]
            == serde_json::json!(
                { "id": 2, "file_name": "two.png", "width": 50, "height": 40 }
            )
    );
    let second = &json["annotations"][1];
    ensure!(second["image_id"] == 2 && second["category_id"] == 1 && second["iscrowd"] == 0);
    // The disc is cut at the image's right and lower sides.
    ensure!(second["bbox"] == serde_json::json!([29, 19, 21, 21]), "{}", second["bbox"]);
    ensure!(second["area"] == masks[1].mask.area());
    let counts = second["segmentation"]["counts"].as_str().context("no counts")?;
    ensure!(Rle::from_compressed(counts, size)? == masks[1].mask);
    Ok(())
}
