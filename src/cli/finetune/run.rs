//! The run: load, evaluate, inject, train, evaluate, write.

use super::super::console::Console;
use super::super::draw::save_png;
use super::super::listed::listed;
use super::super::model::{self, Placement};
use super::super::processes::{census, ended, on_first};
use super::curve::loss_curve;
use super::options::Options;
use super::output::{self, ADAPTER, LOSS, METRICS, OVERLAYS};
use super::parts::Parts;
use super::progress::Progress;
use super::report;
use super::report::{Outcome, Verdict};
use super::training::Run;
use crate::lora::{count_parameters, inject, save_adapter, unload, LoraConfig, ModuleNames};
use crate::nn::{set_trainable, ModuleTree, Node};
use crate::sam::{SamModel, SamProcessor};
use crate::train::{
    together, Batch, BatchSource, Communicator, DataFiles, Dataset, DatasetOptions, Evaluator,
    PromptKind, Trainer, TruthFiles,
};
use crate::{write_atomic, Error, Result};
use anyhow::bail;
use candle_core::{DType, Device};
use serde_json::{json, Map};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Does what `options` say, together with the other processes of a job.
pub fn run(options: &Options) -> anyhow::Result<Outcome> {
    let processes = options.processes.join()?;
    let console = options.console.of(processes.rank());
    let options = Options { console, ..options.clone() };
    ended(&*processes, train(&options, &processes))
}

fn train(options: &Options, processes: &Arc<dyn Communicator>) -> anyhow::Result<Outcome> {
    if options.save_every == 0 {
        bail!("--save-every must be at least 1")
    }
    let console = options.console;
    let place = options.backend.open(&**processes)?;
    let Placement { device, dtype, quantize } = &place;
    let batch = options.batch();
    batch.validate()?;
    options.lora.config().validate()?;
    on_first(&**processes, || output::check(options))?;
    let source = model::find(options.model.as_deref(), options.adapter.as_deref(), console)?;
    let folder = source.weights.clone();
    let kind = match &source.adapter {
        Some(_) => source.kind()?,
        None => options.lora.attention(),
    };
    let mut sam = model::load(&folder, kind, &place, console)?;
    set_trainable(&mut sam, |_| false)?;
    let loaded = source.adapt(&mut sam, console)?;
    let config = sam.config().clone();
    let processor = model::processor(&folder, &config, console)?;
    let (train, held_out) = datasets(options, &**processes)?;

    for (path, (width, height)) in train.sizes().chain(held_out.sizes()) {
        // Before hours of training, and not in the step that meets it; turned it has the same sides.
        let fits = processor.frame(height as usize, width as usize);
        fits.map_err(|e| Error::file(path, e.to_string()))?;
    }
    console.note(format!("{} images to train on, {} held out", train.len(), held_out.len()));
    match train.transparent() + held_out.transparent() {
        0 => {}
        count => console
            .note(format!("transparent pixels are laid on white, in {count} of these images")),
    }
    let judge = Judge {
        processor: &processor,
        held_out: &held_out,
        kind: batch.kind,
        device,
        console,
        processes: &**processes,
    };
    let before = judge.verdicts(&sam, options.overlays)?;
    let lora = match loaded {
        Some(config) => config,
        None => adapt_encoder(&mut sam, options)?,
    };
    let mut lora = options.train.prepare(&mut sam, lora, &batch)?;
    let layers = adapted_layers(&sam);
    console.note(format!("adapters on {layers} linear layers of the image encoder"));
    let trainable = count_parameters(&sam).to_string();
    console.note(&trainable);

    sam.vision_encoder.gradient_checkpointing = options.gradient_checkpointing;
    let mut settings = Map::from_iter([
        ("batch".to_string(), json!(batch)),
        ("lora".to_string(), serde_json::from_str(&lora.to_json()?)?),
        ("processor".to_string(), json!(format!("{processor:?}"))),
        ("data".to_string(), json!(train.fingerprint())),
    ]);
    if options.data() != DatasetOptions::min_area(options.min_area) {
        settings.insert("reading".into(), json!(options.data()));
    }
    if options.train != Parts::default() {
        console.note(format!("trained: {}", options.train));
        settings.insert("train".into(), json!(options.train.names()));
    }
    if options.adapter.is_some() {
        settings.insert("begun_with_an_adapter".into(), json!(true));
    }
    if *dtype != DType::F32 {
        settings.insert("dtype".into(), json!(format!("{dtype:?}")));
    }
    if let Some(quantize) = quantize {
        settings.insert("quantize".into(), json!(format!("{quantize:?}")));
    }
    // After the settings: a run may go on with the same model from a folder.
    if options.adapter.is_none() {
        lora.base_model_name_or_path = name_on_the_hub(options, &folder);
    }
    let trainer = Trainer::new(&sam, options.trainer())?.with_settings(settings);
    let mut trainer = trainer.with_communicator(processes.clone())?;
    if processes.size() > 1 {
        let parts = processes.size() as u64 * options.trainer().accumulation;
        console.note(format!("{}; {parts} parts a step", census(&**processes)));
    }
    let batches = BatchSource {
        dataset: &train,
        processor: &processor,
        config: batch,
        mask_size: 4 * config.vision_config.grid_size(),
        seed: options.seed,
        device,
    };
    let loss = |part, mode| Batch::draw(&batches, part)?.loss(&sam, mode);
    // A frozen clone has the same tensors, but its evaluation builds no graph.
    let evaluate = || {
        let mut sam = sam.clone();
        set_trainable(&mut sam, |_| false)?;
        Ok(report::mean(&judge.verdicts(&sam, 0)?))
    };
    let eval_steps = options.eval_steps(train.len());
    let run = Run { options, sam: &sam, lora: &lora, eval_steps, processes: &**processes };
    run.steps(&mut trainer, loss, evaluate)?;
    if processes.size() > 1 && trainer.times().steps > 0 {
        console.note(trainer.times());
    }

    on_first(&**processes, || Ok(save_adapter(&sam, &lora, options.output.join(ADAPTER))?))?;
    set_trainable(&mut sam, |_| false)?;
    let after = judge.verdicts(&sam, options.overlays)?;
    let outcome = Outcome {
        before: report::mean(&before),
        after: report::mean(&after),
        evaluations: trainer.evaluations().to_vec(),
        losses: trainer.losses().to_vec(),
    };
    on_first(&**processes, || {
        write_pictures(options, trainer.losses(), &before, &after)?;
        let metrics = report::metrics(options, &trainable, &outcome, &before, &after)?;
        Ok(write_atomic(options.output.join(METRICS), |file| file.write_all(metrics.as_bytes()))?)
    })?;
    let objects: usize = before.iter().map(|verdict| verdict.scores.len()).sum();
    let (before, after) = (&outcome.before, &outcome.after);
    let change = |what: &str, before: f64, after: f64| {
        console.note(format!("{what}: {before:.4} before, {after:.4} after"));
    };
    change("held-out IoU with 3 prompts", before.iou_at_3, after.iou_at_3);
    change("held-out IoU with 5 prompts", before.iou_at_5, after.iou_at_5);
    change("predicted IoU off by", before.iou_error, after.iou_error);
    let text = format!(
        "held-out IoU, mean over {objects} objects: {:.4} before, {:.4} after",
        before.iou, after.iou
    );
    let object = json!({
        "output": options.output,
        "steps": outcome.losses.len(),
        "objects": objects,
        "before": before,
        "after": after,
    });
    console.result(text, object);
    console.note(format!("results in {}", options.output.display()));
    Ok(outcome)
}

/// The model's name on the hub, if `folder` comes from there.
fn name_on_the_hub(options: &Options, folder: &Path) -> Option<String> {
    let name = options.model.as_deref().filter(|name| *name != folder)?.to_str()?;
    name.split('@').next().map(str::to_string)
}

/// The images to train on and those held out; each process reads its share.
fn datasets(options: &Options, processes: &dyn Communicator) -> anyhow::Result<(Dataset, Dataset)> {
    let open = |part: &str, images: &[PathBuf], truth: TruthFiles| -> anyhow::Result<Dataset> {
        let files = DataFiles { images: images.to_vec(), truth };
        let dataset = Dataset::open_together(&files, &options.data(), processes)?;
        let lines = dataset.summary().lines();
        lines.iter().for_each(|line| options.console.note(format!("{part}{line}")));
        Ok(dataset)
    };
    let places = || -> Result<_> {
        let Options { images, masks, coco, .. } = options;
        let Options { val_images, val_masks, val_coco, .. } = options;
        Ok([files(images, masks, coco)?, files(val_images, val_masks, val_coco)?])
    };
    let ([all, held_out], _) = together(processes, places(), |_| vec![])?;
    let Some((images, truth)) = all else {
        let nuclei = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos/nuclei");
        let part = |said: &str, part: &str| {
            let folder = |kind: &str| nuclei.join(part).join(kind);
            open(said, &[folder("images")], TruthFiles::Masks(vec![folder("masks")]))
        };
        return Ok((part("", "train")?, part("held out: ", "heldout")?));
    };
    let all = open("", &images, truth)?;
    match held_out {
        Some((images, truth)) => Ok((all, open("held out: ", &images, truth)?)),
        None => Ok(all.split(options.val_fraction, options.seed)?),
    }
}

/// The places of images and of their truth, if they were named.
fn files(
    images: &[PathBuf],
    masks: &[PathBuf],
    coco: &Option<PathBuf>,
) -> Result<Option<(Vec<PathBuf>, TruthFiles)>> {
    let truth = match coco {
        Some(coco) => TruthFiles::Coco(coco.clone()),
        None if masks.is_empty() => TruthFiles::Beside,
        None => TruthFiles::Masks(listed(masks)?),
    };
    Ok(if images.is_empty() { None } else { Some((listed(images)?, truth)) })
}

/// Injects the adapters, into the image encoder alone.
fn adapt_encoder(sam: &mut SamModel, options: &Options) -> Result<LoraConfig> {
    let mut config = options.lora.config();
    let in_encoder = |name: &String| name.starts_with("vision_encoder.");
    let adapted = inject(sam, &config, options.seed)?;
    if !adapted.iter().all(in_encoder) {
        unload(sam)?;
        config.exclude_modules = Some(ModuleNames::Regex(r"(?!vision_encoder\.).*".into()));
        inject(sam, &config, options.seed)?;
    }
    Ok(config)
}

/// How many layers carry an adapter.
fn adapted_layers(sam: &SamModel) -> usize {
    let mut count = 0;
    sam.visit("", &mut |_, node| {
        if let Node::Layer(layer) = node {
            count += usize::from(layer.adapters.iter().next().is_some());
        }
    });
    count
}

/// How a model is judged: by the held-out images.
struct Judge<'a> {
    processor: &'a SamProcessor,
    held_out: &'a Dataset,
    kind: PromptKind,
    device: &'a Device,
    console: Console,
    processes: &'a dyn Communicator,
}

impl Judge<'_> {
    /// Prompts every object of the held-out images, which the processes divide; the first `overlays` images are drawn.
    fn verdicts(&self, sam: &SamModel, overlays: usize) -> anyhow::Result<Vec<Verdict>> {
        let Self { processor, held_out, kind, device, console, processes } = *self;
        let evaluator = Evaluator { model: sam, processor, kind, device };
        let progress = Progress::new(held_out.len(), console);
        let verdict = |index: usize| {
            let sample = held_out.load(index)?;
            let objects = sample.instances.len();
            let evaluation =
                evaluator.evaluate(&sample, |done| progress.at(index, done, objects))?;
            let picture = (index < overlays).then(|| report::picture(&sample, &evaluation));
            Ok((index, Verdict { name: sample.name, scores: evaluation.scores, picture }))
        };
        let share = |index: &usize| index % processes.size() == processes.rank();
        let own =
            (0..held_out.len()).filter(share).map(verdict).collect::<anyhow::Result<Vec<_>>>();
        progress.end();
        if processes.size() == 1 {
            return Ok(own?.into_iter().map(|(_, verdict)| verdict).collect());
        }
        let (_, told) = together(processes, own, |own| report::to_bytes(own))?;
        let mut all: BTreeMap<usize, Verdict> = BTreeMap::new();
        for (rank, told) in told.iter().enumerate() {
            let told = report::from_bytes(told);
            all.extend(told.map_err(|e| Error::Rank { rank, message: e.to_string() })?);
        }
        Ok(all.into_values().collect())
    }
}

fn write_pictures(
    options: &Options,
    losses: &[f32],
    before: &[Verdict],
    after: &[Verdict],
) -> anyhow::Result<()> {
    let curve = loss_curve(losses, &options.loss.to_string())?;
    save_png(&options.output.join(LOSS), &curve.into())?;
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
