//! The judging of a model: average precision against pycocotools, and corrected prompts against a naive conversation.

use candle_core::{DType, Device, Tensor};
use candle_sam_lora::nn::Mode;
use candle_sam_lora::sam::{
    AttentionKind, MaskGenerator, Ranking, Rle, SamInput, SamModel, SamProcessor,
};
use candle_sam_lora::train::{
    evaluate_image, mask_on_grid, Batch, BatchConfig, BatchSource, Dataset, DatasetOptions,
    Evaluator, Instance, MaskMatches, MaskScores, Prompt, PromptKind, Sample, StepRng,
};
use serde::Deserialize;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

#[derive(Deserialize)]
struct Case {
    images: Vec<Image>,
    precision: Vec<f64>,
    accuracy: f64,
    cut: f64,
}

#[derive(Deserialize)]
struct Image {
    size: (u32, u32),
    objects: Vec<String>,
    found: Vec<(f32, String)>,
}

#[test]
fn average_precision_is_pycocotools() -> anyhow::Result<()> {
    let text =
        std::fs::read_to_string(format!("{ROOT}/tests/fixtures/train/average_precision.json"))?;
    let cases: Vec<Case> = serde_json::from_str(&text)?;
    assert_eq!(cases.len(), 4);
    for (number, case) in cases.iter().enumerate() {
        let mut matches = vec![];
        for image in &case.images {
            let rle = |text: &String| Rle::from_compressed(text, image.size);
            let objects = image.objects.iter().map(rle).collect::<Result<Vec<_>, _>>()?;
            let found = image.found.iter().map(|(score, text)| Ok((*score, rle(text)?)));
            let found = found.collect::<Result<Vec<_>, candle_sam_lora::Error>>()?;
            matches.push(MaskMatches::new(&found, &objects));
        }
        let found = MaskScores::of(&matches);
        let close = |found: f64, expected: f64| (found - expected).abs() < 1e-12;
        let ap = case.precision.iter().sum::<f64>() / 10.0;
        assert!(close(found.ap, ap), "case {number}: AP {}, {ap}", found.ap);
        let ap_50 = case.precision[0];
        assert!(close(found.ap_50, ap_50), "case {number}: AP at 0.5 {}, {ap_50}", found.ap_50);
        let (sa, cut) = (case.accuracy, case.cut);
        assert!(close(found.sa, sa), "case {number}: accuracy {}, {sa}", found.sa);
        // The fixture's scores are f64.
        assert!((found.sa_cut - cut).abs() < 1e-7, "case {number}: cut {}, {cut}", found.sa_cut);
    }
    assert_eq!(MaskScores::of(&[]), MaskScores::default());
    Ok(())
}

struct Tiny {
    model: SamModel,
    processor: SamProcessor,
    samples: Vec<Sample>,
}

/// The shipped model, and the first held-out micrographs.
fn tiny(images: usize) -> anyhow::Result<Tiny> {
    let folder = format!("{ROOT}/assets/tiny-sam");
    let model = SamModel::from_pretrained(&folder, AttentionKind::Split, DType::F32, &Device::Cpu)?;
    let processor = SamProcessor::load(&folder, model.config().vision_config.image_size)?;
    let data = format!("{ROOT}/assets/photos/nuclei/heldout");
    let options = DatasetOptions::min_area(20);
    let data = Dataset::open(format!("{data}/images"), format!("{data}/masks"), &options)?;
    let samples = (0..images).map(|index| data.load(index)).collect::<Result<Vec<_>, _>>()?;
    Ok(Tiny { model, processor, samples })
}

/// Whether each pixel is the object's, row by row.
fn truth(sample: &Sample, instance: &Instance) -> Vec<bool> {
    let labels = sample.labels(instance).expect("a layer");
    labels.iter().map(|label| *label == instance.label).collect()
}

fn naive_iou(found: &[bool], truth: &[bool]) -> f64 {
    let count = |both: fn(bool, bool) -> bool| {
        found.iter().zip(truth).filter(|(a, b)| both(**a, **b)).count() as f64
    };
    count(|a, b| a && b) / count(|a, b| a || b)
}

/// The IoUs of one object with 1 to 5 points, each but the first where the mask before is wrong. Each mask is predicted
/// from scratch with the whole image, and compared pixel by pixel.
fn naive_conversation(
    Tiny { model, processor, .. }: &Tiny,
    sample: &Sample,
    instance: &Instance,
    first: [f32; 2],
) -> anyhow::Result<Vec<f64>> {
    let image = image::DynamicImage::ImageRgb8(sample.image.clone());
    let (pixel_values, frame) = processor.preprocess(&image, &Device::Cpu)?;
    let scale = frame.resized.0 as f32 / frame.original.0 as f32;
    let (mut points, mut labels) = (vec![first.map(|place| place * scale)], vec![1f32]);
    let mut draws = StepRng::new(0, "evaluation corrections", u64::from(instance.label));
    let mut ious = vec![];
    loop {
        let count = points.len();
        let input = SamInput {
            pixel_values: Some(pixel_values.clone()),
            input_points: Some(Tensor::from_slice(
                points.as_flattened(),
                (1, 1, count, 2),
                &Device::Cpu,
            )?),
            input_labels: Some(Tensor::from_slice(&labels, (1, 1, count), &Device::Cpu)?),
            multimask_output: false,
            ..Default::default()
        };
        let logits = model.forward(&input, Mode::Eval)?.pred_masks.squeeze(0)?.get(0)?.get(0)?;
        let mask = processor.post_process_masks(&logits, &frame, 0.0)?;
        let mask: Vec<bool> = mask.flatten_all()?.to_vec1::<u8>()?.iter().map(|v| *v > 0).collect();
        ious.push(naive_iou(&mask, &truth(sample, instance)));
        if count == 5 {
            return Ok(ious);
        }
        // The micrographs are square, so the low mask shows nothing but the image.
        let side = logits.dim(0)?;
        let pitch = frame.original.0 as f64 / side as f64;
        let wanted =
            mask_on_grid(sample.labels(instance)?, instance.label, side, side, (pitch, pitch));
        let low = logits.to_vec2::<f32>()?;
        let places: Vec<(usize, usize)> =
            (0..side).flat_map(|y| (0..side).map(move |x| (x, y))).collect();
        let inside = |&(x, y): &(usize, usize)| wanted[y * side + x] > 0.5;
        let wrong = |place: &(usize, usize)| (low[place.1][place.0] > 0.0) != inside(place);
        let mut pool: Vec<_> = places.iter().filter(|place| wrong(place)).collect();
        if pool.is_empty() {
            pool = places.iter().filter(|place| inside(place)).collect();
        }
        let chosen = pool[draws.below(pool.len())];
        let step = processor.pad_size as f32 / side as f32;
        points.push([chosen.0, chosen.1].map(|place| (place as f32 + 0.5) * step - 0.5));
        labels.push(f32::from(u8::from(inside(chosen))));
    }
}

/// IoUs with 3 and 5 prompts.
#[test]
fn corrected_prompts_have_the_ious_of_a_naive_conversation() -> anyhow::Result<()> {
    let tiny = tiny(3)?;
    let mut compared = 0;
    for sample in &tiny.samples {
        let Tiny { model, processor, .. } = &tiny;
        let found = evaluate_image(model, processor, sample, PromptKind::Point, &Device::Cpu)?;
        for (index, instance) in sample.instances.iter().enumerate() {
            let Prompt::Point(first) = found.prompts[index] else { panic!("a box") };
            let expected = naive_conversation(&tiny, sample, instance, first)?;
            let scores = found.scores[index];
            // A resized pixel near 0 may fall on the other side when its sum has another order.
            let pixel = 1.5 / instance.area as f64;
            for (found, expected) in
                [(scores.iou_at_3, expected[2]), (scores.iou_at_5, expected[4])]
            {
                assert!((found - expected).abs() < pixel, "{}: {found}, {expected}", sample.name);
                compared += 1;
            }
        }
    }
    assert!(compared >= 10, "{compared}");
    Ok(())
}

/// The error of the predicted IoU is the mean distance of the pairs that calibration shows.
#[test]
fn predicted_ious_are_compared_with_the_true_ones() -> anyhow::Result<()> {
    let tiny = tiny(2)?;
    let Tiny { model, processor, .. } = &tiny;
    for sample in &tiny.samples {
        let found = evaluate_image(model, processor, sample, PromptKind::Point, &Device::Cpu)?;
        let pairs = found.predicted_ious.len() / sample.instances.len();
        // Five prompts, and four masks for each.
        assert_eq!(pairs, 20);
        for (scores, pairs) in found.scores.iter().zip(found.predicted_ious.chunks(pairs)) {
            let errors = pairs.iter().map(|(predicted, iou)| (f64::from(*predicted) - iou).abs());
            let mean = errors.sum::<f64>() / 20.0;
            assert!((scores.iou_error - mean).abs() < 1e-12);
            let single = pairs.iter().step_by(4).map(|(_, iou)| iou).sum::<f64>() / 5.0;
            assert!((scores.iou - single).abs() < 1e-12);
        }
    }
    Ok(())
}

/// Automatic masks of an evaluation are those of the generator with its scores, and pixels to be ignored count for
/// neither side.
#[test]
fn automatic_masks_are_judged_without_ignored_pixels() -> anyhow::Result<()> {
    let tiny = tiny(1)?;
    let Tiny { model, processor, samples } = &tiny;
    let generator = MaskGenerator {
        points_per_side: 4,
        pred_iou_thresh: 0.0,
        stability_score_thresh: 0.0,
        ranking: Ranking::IouTimesStability,
        ..MaskGenerator::original()
    };
    let device = &Device::Cpu;
    let evaluator = Evaluator {
        model,
        processor,
        kind: PromptKind::Point,
        device,
        generator: Some(&generator),
    };
    let found = evaluator.evaluate(&samples[0], |_| ())?.automatic.expect("masks");
    let predictor = candle_sam_lora::sam::SamPredictor::with_processor(model, processor.clone());
    let image = image::DynamicImage::ImageRgb8(samples[0].image.clone());
    let expected = generator.generate(&predictor, &image)?;
    let expected: Vec<_> = expected
        .into_iter()
        .filter(|mask| mask.mask.area() > 0)
        .map(|mask| (mask.iou_score * mask.stability_score, mask.mask))
        .collect();
    assert!(!expected.is_empty() && found.masks == expected);
    assert_eq!(found.matches.objects, samples[0].instances.len());

    let mut ignoring = samples[0].clone();
    let first = ignoring.instances.remove(0);
    let size = ignoring.image.dimensions();
    let hidden: Vec<bool> = truth(&samples[0], &first);
    for (label, hidden) in ignoring.layers[first.layer].iter_mut().zip(&hidden) {
        if *hidden {
            *label = candle_sam_lora::train::IGNORED;
        }
    }
    let found = evaluator.evaluate(&ignoring, |_| ())?.automatic.expect("masks");
    let hidden = Rle::from_mask(&hidden, (size.1, size.0))?;
    assert!(found.masks.iter().all(|(_, mask)| mask.intersection(&hidden) == 0));
    assert_eq!(found.matches.objects, ignoring.instances.len());
    Ok(())
}

/// Fields are public, so a sample and a batch may be of anyone's making.
#[test]
fn samples_and_batches_that_do_not_fit_are_refused() -> anyhow::Result<()> {
    let Tiny { model, processor, samples } = &tiny(1)?;
    let device = &Device::Cpu;
    let refused = |change: &dyn Fn(&mut Sample), said: &str| {
        let mut sample = samples[0].clone();
        change(&mut sample);
        let found = evaluate_image(model, processor, &sample, PromptKind::Point, device);
        let error = found.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains(&sample.name), "{error}");
    };
    refused(&|sample| sample.instances[0].layer = 7, "is of mask 7, and there are 1");
    refused(&|sample| sample.instances[0].bounds = [9999, 9999, 99999, 99999], "[9999, 9999");
    refused(&|sample| sample.instances[0].bounds = [5, 5, 4, 5], "[5, 5, 4, 5]");
    refused(&|sample| sample.image = image::RgbImage::new(9, 8), "the image has 9 x 8");

    let elsewhere = Instance { layer: 7, ..samples[0].instances[0] };
    let error = samples[0].object(&elsewhere).unwrap_err().to_string();
    assert!(error.contains("is of mask 7, of 1"), "{error}");

    let predictor = candle_sam_lora::sam::SamPredictor::with_processor(model, processor.clone());
    let other = predictor.embed(&image::DynamicImage::new_rgb8(30, 20))?;
    let evaluator =
        Evaluator { model, processor, kind: PromptKind::Point, device, generator: None };
    let found = evaluator.evaluate_embedded(&samples[0], &other, |_| ());
    let error = found.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("an embedding of (20, 30) pixels"), "{error}");

    let folder = format!("{ROOT}/assets/photos/coins/heldout");
    let options = DatasetOptions::min_area(20);
    let dataset = Dataset::open(format!("{folder}/images"), format!("{folder}/masks"), &options)?;
    let side = 4 * model.config().vision_config.grid_size();
    for mask_size in [side / 2, side] {
        let config = BatchConfig { prompts: 2, ..Default::default() };
        let (seed, embeddings) = (0, None);
        let dataset = &dataset;
        let source =
            BatchSource { dataset, processor, config, mask_size, seed, device, embeddings };
        let loss = Batch::draw(&source, 0)?.loss(model, Mode::Eval);
        match loss {
            Ok(loss) => assert!(mask_size == side && loss.to_scalar::<f32>()?.is_finite()),
            Err(error) => {
                let said =
                    format!("for masks of a side of {}, and the model's have {side}", side / 2);
                assert!(mask_size < side && error.to_string().contains(&said), "{error}");
            }
        }
    }
    Ok(())
}
