//! The run: load, evaluate, inject, train, evaluate, write.

use super::console::say;
use super::curve::loss_curve;
use super::draw::save_png;
use super::options::{Options, PromptArg};
use super::report::Verdict;
use super::{model, report};
use anyhow::bail;
use candle_core::{Device, Tensor};
use candle_sam_lora::lora::{
    eject, inject, save_adapter, trainable_parameters, LoraConfig, ModuleNames,
};
use candle_sam_lora::nn::{set_trainable, Mode};
use candle_sam_lora::sam::{SamModel, SamProcessor};
use candle_sam_lora::train::{
    evaluate, AdamWConfig, Batch, BatchConfig, Dataset, PromptKind, Trainer,
};
use candle_sam_lora::{files, Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{json, Map};
use std::path::Path;

/// What a run may find in its output folder and replace.
const OUTPUTS: [&str; 5] = [ADAPTER, LOSS, OVERLAYS, METRICS, STATE];
const ADAPTER: &str = "adapter";
const LOSS: &str = "loss.png";
const OVERLAYS: &str = "overlays";
/// Written last: a folder with a state and without it holds a run that is not finished.
const METRICS: &str = "metrics.json";
const STATE: &str = "state.safetensors";

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// Mean IoU over the held-out objects, without the adapter.
    pub before: f64,
    /// The same with it.
    pub after: f64,
    /// The loss of each step.
    pub losses: Vec<f32>,
}

/// Does what `options` say.
pub fn run(options: &Options) -> anyhow::Result<Outcome> {
    if options.save_every == 0 {
        bail!("--save-every must be at least 1")
    }
    let device = model::device(&options.device)?;
    let batch = batch_config(options);
    batch.validate()?;
    options.lora.config().validate()?;
    check_output(options)?;
    let folder = options.model.clone().unwrap_or_else(model::shipped_model);
    let (config, mut sam) = model::load_model(&folder, options.lora.attention(), &device)?;
    set_trainable(&mut sam, &mut |_| false)?;
    let processor = SamProcessor::from_folder(&folder, config.vision_config.image_size)?;
    let (train, held_out) = datasets(options)?;

    say(format!("{} images to train on, {} held out", train.len(), held_out.len()));
    let before = judge(&sam, &processor, &held_out, options, &device)?;
    let (lora, names) = adapt_encoder(&mut sam, options)?;
    say(format!("adapters on {names} linear layers of the image encoder"));
    let trainable = trainable_parameters(&sam).to_string();
    say(&trainable);

    let mask_size = 4 * config.vision_config.grid_size();
    let optimizer =
        AdamWConfig { lr: options.lr, weight_decay: options.weight_decay, ..Default::default() };
    let settings = Map::from_iter([
        ("batch".to_string(), json!(batch)),
        ("lora".to_string(), serde_json::from_str(&lora.to_json()?)?),
        ("processor".to_string(), json!(format!("{processor:?}"))),
        ("data".to_string(), json!(train.fingerprint()?)),
    ]);
    let mut trainer = Trainer::new(&sam, optimizer, options.seed, settings)?;
    train_adapters(&mut trainer, options, |step, mode| {
        Batch::draw(&train, &processor, &batch, mask_size, options.seed, step, &device)?
            .loss(&sam, mode)
    })?;

    save_adapter(&sam, &lora, &options.output.join(ADAPTER))?;
    set_trainable(&mut sam, &mut |_| false)?;
    let after = judge(&sam, &processor, &held_out, options, &device)?;
    write_pictures(options, trainer.losses(), &before, &after)?;
    let outcome = Outcome {
        before: report::mean_iou(&before),
        after: report::mean_iou(&after),
        losses: trainer.losses().to_vec(),
    };
    let metrics = report::metrics(options, &trainable, &outcome, &before, &after)?;
    files::write_atomic(&options.output.join(METRICS), |file| file.write_all(metrics.as_bytes()))?;
    let objects: usize = before.iter().map(|verdict| verdict.ious.len()).sum();
    say(format!(
        "held-out IoU, mean over {objects} objects: {:.4} before, {:.4} after",
        outcome.before, outcome.after
    ));
    say(format!("results in {}", options.output.display()));
    Ok(outcome)
}

/// Starts or resumes the run, makes its steps, and saves its state now and then.
fn train_adapters(
    trainer: &mut Trainer,
    options: &Options,
    loss: impl Fn(u64, Mode) -> candle_core::Result<Tensor>,
) -> anyhow::Result<()> {
    let state = options.output.join(STATE);
    if options.resume {
        trainer.resume(&state)?;
        begin_output(options)?;
        say(format!("going on after step {}", trainer.steps()));
    } else {
        begin_output(options)?;
        trainer.save(&state)?;
    }
    let bar = progress_bar(options.steps, trainer.steps());
    while trainer.steps() < options.steps {
        let value = trainer.step(&loss)?;
        let step = trainer.steps();
        let saved = step.is_multiple_of(options.save_every) || step == options.steps;
        if saved {
            trainer.save(&state)?;
        }
        bar.set_message(format!("{value:.4}"));
        bar.inc(1);
        // Without a terminal there is no bar; a line now and then tells that it goes on.
        if saved && bar.is_hidden() {
            say(format!("step {step} of {}: loss {value:.4}", options.steps));
        }
    }
    bar.finish();
    Ok(())
}

fn batch_config(options: &Options) -> BatchConfig {
    BatchConfig {
        images: options.batch,
        prompts: options.prompts,
        kind: match options.prompt {
            PromptArg::Point => PromptKind::Point,
            PromptArg::Box => PromptKind::Box { jitter: options.box_jitter },
        },
        augment: !options.no_augment,
    }
}

/// The images to train on and those held out.
fn datasets(options: &Options) -> anyhow::Result<(Dataset, Dataset)> {
    let open = |images: &Path, masks: &Path| Dataset::open(images, masks, options.min_area);
    let (Some(images), Some(masks)) = (&options.images, &options.masks) else {
        let nuclei = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos/nuclei");
        let part =
            |part: &str| open(&nuclei.join(part).join("images"), &nuclei.join(part).join("masks"));
        return Ok((part("train")?, part("heldout")?));
    };
    let all = open(images, masks)?;
    match (&options.val_images, &options.val_masks) {
        (Some(images), Some(masks)) => Ok((all, open(images, masks)?)),
        _ => Ok(all.split(options.val_fraction, options.seed)?),
    }
}

/// Refuses an output folder in which something would be lost, or nothing can be gone on with.
fn check_output(options: &Options) -> anyhow::Result<()> {
    let output = &options.output;
    let state = output.join(STATE);
    if options.resume {
        if !state.is_file() {
            bail!("--resume: there is no {}; start the run without --resume", state.display())
        }
        return Ok(());
    }
    if !output.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(output).map_err(|e| Error::io(output, e))? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        // A kill in the middle of a writing leaves a temporary file.
        if !OUTPUTS.contains(&name.as_ref()) && !name.starts_with(".tmp") {
            bail!(
                "{}: holds {name}, which is no result of this program; choose another --output",
                output.display()
            )
        }
    }
    if state.exists() && !output.join(METRICS).exists() {
        bail!(
            "{}: holds a run that is not finished; go on with --resume, or remove {STATE} to start again",
            output.display()
        )
    }
    Ok(())
}

/// Makes the output folder, and marks the run in it as not finished.
fn begin_output(options: &Options) -> Result<()> {
    files::create_dir(&options.output)?;
    let metrics = options.output.join(METRICS);
    match std::fs::remove_file(&metrics) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(&metrics, error))
        }
        _ => Ok(()),
    }
}

/// Injects the adapters, into the image encoder alone; returns their configuration and number.
fn adapt_encoder(sam: &mut SamModel, options: &Options) -> Result<(LoraConfig, usize)> {
    let mut config = options.lora.config();
    let in_encoder = |name: &String| name.starts_with("vision_encoder.");
    let mut adapted = inject(sam, &config, options.seed)?;
    if !adapted.iter().all(in_encoder) {
        eject(sam)?;
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
    options: &Options,
    device: &Device,
) -> anyhow::Result<Vec<Verdict>> {
    let kind = batch_config(options).kind;
    (0..held_out.len())
        .map(|index| {
            let sample = held_out.load(index)?;
            let evaluation = evaluate(sam, processor, &sample, kind, device)?;
            let drawn = index < options.overlays;
            let picture = drawn.then(|| report::picture(&sample, &evaluation)).transpose()?;
            Ok(Verdict { name: sample.name, ious: evaluation.ious, picture })
        })
        .collect()
}

fn progress_bar(steps: u64, done: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps).with_position(done);
    let template = "{bar:40} {pos}/{len} steps  loss {msg}  {elapsed} elapsed, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.reset_eta();
    bar
}

fn write_pictures(
    options: &Options,
    losses: &[f32],
    before: &[Verdict],
    after: &[Verdict],
) -> anyhow::Result<()> {
    save_png(&options.output.join(LOSS), &loss_curve(losses)?.into())?;
    let folder = options.output.join(OVERLAYS);
    files::create_dir(&folder)?;
    for (before, after) in before.iter().zip(after) {
        if let (Some(left), Some(right)) = (&before.picture, &after.picture) {
            let both = report::side_by_side(left, right);
            save_png(&folder.join(format!("{}.png", before.name)), &both.into())?;
        }
    }
    Ok(())
}
