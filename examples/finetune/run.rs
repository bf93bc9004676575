//! The run: load, evaluate, inject, train, evaluate, write.

use super::console::say;
use super::curve::loss_curve;
use super::draw::save_png;
use super::options::{DTypeArg, Options};
use super::output::{self, ADAPTER, LOSS, METRICS, OVERLAYS};
use super::progress::Progress;
use super::report::{Outcome, Verdict};
use super::training::Run;
use super::{model, processor, report};
use anyhow::bail;
use candle_core::{DType, Device};
use candle_sam_lora::lora::{
    count_parameters, inject, save_adapter, unload, LoraConfig, ModuleNames,
};
use candle_sam_lora::nn::set_trainable;
use candle_sam_lora::sam::{SamModel, SamProcessor};
use candle_sam_lora::train::{
    Batch, BatchSource, Dataset, DatasetOptions, Evaluator, PromptKind, Trainer,
};
use candle_sam_lora::{write_atomic, Error, Result};
use serde_json::{json, Map};
use std::path::{Path, PathBuf};

/// Does what `options` say.
pub fn run(options: &Options) -> anyhow::Result<Outcome> {
    if options.save_every == 0 {
        bail!("--save-every must be at least 1")
    }
    let device = model::device(&options.device)?;
    let batch = options.batch();
    batch.validate()?;
    options.lora.config().validate()?;
    output::check(options)?;
    let folder = model::folder(options.model.as_deref())?;
    let dtype = match options.dtype {
        DTypeArg::F32 => DType::F32,
        DTypeArg::Bf16 => DType::BF16,
    };
    let (config, mut sam) = model::load_model(&folder, options.lora.attention(), dtype, &device)?;
    set_trainable(&mut sam, |_| false)?;
    let processor = processor::load(&folder, &config)?;
    let (train, held_out) = datasets(options)?;

    for (path, (width, height)) in train.sizes().chain(held_out.sizes()) {
        // Before hours of training, and not in the step that meets it; turned it has the same sides.
        let fits = processor.frame(height as usize, width as usize);
        fits.map_err(|e| Error::file(path, e.to_string()))?;
    }
    say(format!("{} images to train on, {} held out", train.len(), held_out.len()));
    match train.transparent() + held_out.transparent() {
        0 => {}
        count => say(format!("transparent pixels are laid on white, in {count} of these images")),
    }
    let judge = |sam: &SamModel, overlays: usize| {
        judge(sam, &processor, &held_out, batch.kind, overlays, &device)
    };
    let before = judge(&sam, options.overlays)?;
    let (mut lora, names) = adapt_encoder(&mut sam, options)?;
    say(format!("adapters on {names} linear layers of the image encoder"));
    let trainable = count_parameters(&sam).to_string();
    say(&trainable);

    sam.vision_encoder.gradient_checkpointing = options.gradient_checkpointing;
    let mut settings = Map::from_iter([
        ("batch".to_string(), json!(batch)),
        ("lora".to_string(), serde_json::from_str(&lora.to_json()?)?),
        ("processor".to_string(), json!(format!("{processor:?}"))),
        ("data".to_string(), json!(train.fingerprint()?)),
    ]);
    if options.data() != DatasetOptions::min_area(options.min_area) {
        settings.insert("reading".into(), json!(options.data()));
    }
    if dtype != DType::F32 {
        settings.insert("dtype".into(), json!(format!("{dtype:?}")));
    }
    // After the settings: a run may go on with the same model from a folder.
    lora.base_model_name_or_path = name_on_the_hub(options, &folder);
    let mut trainer = Trainer::new(&sam, options.trainer())?.with_settings(settings);
    let source = BatchSource {
        dataset: &train,
        processor: &processor,
        config: batch,
        mask_size: 4 * config.vision_config.grid_size(),
        seed: options.seed,
        device: &device,
    };
    let loss = |part, mode| Batch::draw(&source, part)?.loss(&sam, mode);
    // A frozen clone has the same tensors, but its evaluation builds no graph.
    let evaluate = || {
        let mut sam = sam.clone();
        set_trainable(&mut sam, |_| false)?;
        Ok(report::mean(&judge(&sam, 0)?))
    };
    let eval_steps = options.eval_steps(train.len());
    Run { options, sam: &sam, lora: &lora, eval_steps }.steps(&mut trainer, loss, evaluate)?;

    save_adapter(&sam, &lora, options.output.join(ADAPTER))?;
    set_trainable(&mut sam, |_| false)?;
    let after = judge(&sam, options.overlays)?;
    write_pictures(options, trainer.losses(), &before, &after)?;
    let outcome = Outcome {
        before: report::mean(&before),
        after: report::mean(&after),
        evaluations: trainer.evaluations().to_vec(),
        losses: trainer.losses().to_vec(),
    };
    let metrics = report::metrics(options, &trainable, &outcome, &before, &after)?;
    write_atomic(options.output.join(METRICS), |file| file.write_all(metrics.as_bytes()))?;
    let objects: usize = before.iter().map(|verdict| verdict.scores.len()).sum();
    say(format!(
        "held-out IoU, mean over {objects} objects: {:.4} before, {:.4} after",
        outcome.before.iou, outcome.after.iou
    ));
    say(format!("results in {}", options.output.display()));
    Ok(outcome)
}

/// What the model is called on the hub, if `folder` comes from there.
fn name_on_the_hub(options: &Options, folder: &Path) -> Option<String> {
    let name = options.model.as_deref().filter(|name| *name != folder)?.to_str()?;
    name.split('@').next().map(str::to_string)
}

/// The images to train on and those held out.
fn datasets(options: &Options) -> anyhow::Result<(Dataset, Dataset)> {
    let Options { images, masks, coco, .. } = options;
    let Some(all) = dataset("", images, masks, coco, options)? else {
        let nuclei = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos/nuclei");
        let part = |said: &str, part: &str| {
            let folder = |kind: &str| Some(nuclei.join(part).join(kind));
            let found = dataset(said, &folder("images"), &folder("masks"), &None, options)?;
            found.ok_or_else(|| Error::file(&nuclei, "the project's micrographs are not there"))
        };
        return Ok((part("", "train")?, part("held out: ", "heldout")?));
    };
    let Options { val_images, val_masks, val_coco, .. } = options;
    match dataset("held out: ", val_images, val_masks, val_coco, options)? {
        Some(held_out) => Ok((all, held_out)),
        None => Ok(all.split(options.val_fraction, options.seed)?),
    }
}

/// The images of a folder with their masks or their annotations, if they were named; says what was understood.
fn dataset(
    part: &str,
    images: &Option<PathBuf>,
    masks: &Option<PathBuf>,
    coco: &Option<PathBuf>,
    options: &Options,
) -> Result<Option<Dataset>> {
    let dataset = match (images, masks, coco) {
        (Some(images), Some(masks), _) => Dataset::open(images, masks, &options.data())?,
        (Some(images), None, Some(coco)) => Dataset::open_coco(images, coco, &options.data())?,
        _ => return Ok(None),
    };
    dataset.summary().lines().iter().for_each(|line| say(format!("{part}{line}")));
    Ok(Some(dataset))
}

/// Injects the adapters, into the image encoder alone; returns their configuration and number.
fn adapt_encoder(sam: &mut SamModel, options: &Options) -> Result<(LoraConfig, usize)> {
    let mut config = options.lora.config();
    let in_encoder = |name: &String| name.starts_with("vision_encoder.");
    let mut adapted = inject(sam, &config, options.seed)?;
    if !adapted.iter().all(in_encoder) {
        unload(sam)?;
        config.exclude_modules = Some(ModuleNames::Regex(r"(?!vision_encoder\.).*".into()));
        adapted = inject(sam, &config, options.seed)?;
    }
    Ok((config, adapted.len()))
}

/// Prompts every object of the held-out images; the first of them are drawn.
fn judge(
    sam: &SamModel,
    processor: &SamProcessor,
    held_out: &Dataset,
    kind: PromptKind,
    overlays: usize,
    device: &Device,
) -> anyhow::Result<Vec<Verdict>> {
    let evaluator = Evaluator { model: sam, processor, kind, device };
    (0..held_out.len())
        .map(|index| {
            let sample = held_out.load(index)?;
            let (count, images) = (sample.instances.len(), held_out.len());
            let progress =
                Progress::new(format!("evaluating image {} of {images}", index + 1), count);
            let evaluation = evaluator.evaluate(&sample, |done| progress.at(done))?;
            progress.end();
            let drawn = index < overlays;
            let picture = drawn.then(|| report::picture(&sample, &evaluation));
            Ok(Verdict { name: sample.name, scores: evaluation.scores, picture })
        })
        .collect()
}

fn write_pictures(
    options: &Options,
    losses: &[f32],
    before: &[Verdict],
    after: &[Verdict],
) -> anyhow::Result<()> {
    save_png(&options.output.join(LOSS), &loss_curve(losses)?.into())?;
    let folder = options.output.join(OVERLAYS);
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
    for (before, after) in before.iter().zip(after) {
        if let (Some(left), Some(right)) = (&before.picture, &after.picture) {
            let both = report::side_by_side(left, right);
            save_png(&folder.join(format!("{}.png", before.name)), &both.into())?;
        }
    }
    Ok(())
}
