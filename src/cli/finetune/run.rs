//! The run: load, evaluate, inject, train, evaluate, write.

use super::super::model::{self, Placement};
use super::super::processes::{census, ended, on_first};
use super::data::datasets;
use super::judge::{self, Judge};
use super::options::{Options, Symmetries};
use super::output::{self, ADAPTER};
use super::parts::Part;
use super::report::Outcome;
use super::results::{tell, Results};
use super::training::Run;
use crate::lora::{count_parameters, inject, save_adapter, unload, LoraConfig, ModuleNames};
use crate::nn::{set_trainable, trainable_variables, Mode, ModuleTree, Node};
use crate::sam::{SamModel, SamProcessor};
#[cfg(feature = "cuda")]
use crate::train::StepGraphs;
use crate::train::{Batch, BatchSource, Communicator, DatasetOptions, KeptEmbeddings, Trainer};
use crate::{Error, Result};
use anyhow::bail;
use candle_core::DType;
use serde_json::{json, Map};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// Bytes of embeddings that are kept in memory without being told to.
const MOST_IN_MEMORY: u64 = 4 << 30;

/// Does what `options` say, together with the other processes of a job.
pub fn run(options: &Options) -> anyhow::Result<Outcome> {
    let processes = options.processes.join()?;
    let console = options.console.of(processes.rank());
    let options = Options { console, ..options.clone() };
    ended(&*processes, train(&options, &processes))
}

fn train(options: &Options, processes: &Arc<dyn Communicator>) -> anyhow::Result<Outcome> {
    options.check_idle()?;
    if options.save_every == 0 {
        bail!("--save-every must be at least 1")
    }
    if options.train.has(Part::Adapters)
        && options.embeddings.as_deref().is_some_and(|place| place != Path::new("none"))
    {
        bail!(
            "--embeddings: the image encoder is trained, so embeddings change in every step; choose a --train without \
             adapters"
        )
    }
    let console = options.console;
    let place = options.backend.open(&**processes)?;
    let Placement { device, dtype, quantize } = &place;
    let batch = options.batch();
    batch.validate()?;
    #[cfg(feature = "cuda")]
    if options.cuda_graph && !(device.is_cuda() && processes.size() == 1 && options.accumulate == 1)
    {
        bail!("--cuda-graph wants an NVIDIA GPU, one process and --accumulate 1")
    }
    options.lora.config().validate()?;
    options.generator().map_or(Ok(()), |generator| generator.validate())?;
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
    let chosen_nms = options.chosen_nms(train.may_overlap());
    let options = &Options {
        automatic_nms: Some(options.nms(train.may_overlap())),
        ..options.with_epochs(train.len(), processes.size())
    };

    for (path, (width, height)) in train.sizes().chain(held_out.sizes()) {
        // Before hours of training, and not in the step that meets it; turned it has the same sides.
        let fits = processor.frame(height as usize, width as usize);
        fits.map_err(|e| Error::file(path, e.to_string()))?;
    }
    console.note(format!("{} images to train on, {} held out", train.len(), held_out.len()));
    let trained: BTreeSet<_> = train.sizes().map(|(path, _)| path).collect();
    let seen = held_out.sizes().filter(|(path, _)| trained.contains(path)).count();
    if seen > 0 {
        console.note(format!(
            "{seen} of the images held out are trained on too: their scores tell nothing about other images"
        ));
    }
    if let Some(chosen) = chosen_nms {
        console.note(chosen);
    }
    match train.transparent() + held_out.transparent() {
        0 => {}
        count => console
            .note(format!("transparent pixels are laid on white, in {count} of these images")),
    }
    let judge = Judge {
        processor: &processor,
        held_out: &held_out,
        kind: batch.kind,
        generator: options.generator(),
        device,
        console,
        processes: &**processes,
    };
    let before = judge.verdicts(&sam, None, options.overlays)?;
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
    console.note(format!("trained: {}", options.train));
    // Adapters alone are what a state without this was trained by.
    if options.train.names() != ["adapters"] {
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
    let mut trainer = Trainer::new(&sam, options.trainer())?.with_groups(&options.groups())?;
    // The best alternative alone learns its shape. The others' true IoUs still move the loss.
    if batch.loss.iou > 0.0 && batch.loss.multimask > 0.0 {
        trainer = trainer.with_zero_gradients();
    }
    let mut trainer = trainer.with_settings(settings).with_communicator(processes.clone())?;
    if processes.size() > 1 {
        let parts = processes.size() as u64 * options.trainer().accumulation;
        console.note(format!("{}; {parts} parts a step", census(&**processes)));
    }
    let [embeddings, of_held_out] =
        kept_embeddings(options, &sam, &processor, [train.len(), held_out.len()])?;
    let batches = BatchSource {
        dataset: &train,
        processor: &processor,
        config: batch,
        mask_size: 4 * config.vision_config.grid_size(),
        seed: options.seed,
        device,
        embeddings: embeddings.as_ref(),
    };
    let draw = |part| Ok::<_, candle_core::Error>(Batch::draw(&batches, part)?);
    let loss = |batch: &Batch, mode: Mode| batch.loss(&sam, mode);
    #[cfg(feature = "cuda")]
    let mut graphs = options.cuda_graph.then(|| StepGraphs::new(loss));
    let step = |trainer: &mut Trainer| {
        #[cfg(feature = "cuda")]
        if let Some(graphs) = &mut graphs {
            return trainer.step_by_graph(graphs, draw);
        }
        trainer.step(|part, mode| loss(&draw(part)?, mode))
    };
    let evaluate = || Ok(judge::scores(&judge.verdicts(&sam, of_held_out.as_ref(), 0)?));
    let eval_steps = options.eval_steps(train.len(), processes.size());
    let run = Run { options, sam: &sam, lora: &lora, eval_steps, processes: &**processes };
    run.steps(&mut trainer, step, evaluate)?;
    #[cfg(feature = "cuda")]
    if let Some(graphs) = &graphs {
        console.note(format!(
            "CUDA graphs: {} recorded; {} steps ran by them, {} plainly",
            graphs.recorded(),
            graphs.replayed(),
            graphs.plain()
        ));
    }
    if processes.size() > 1 && trainer.times().steps > 0 {
        console.note(trainer.times());
    }

    trainer.take_averages()?;
    on_first(&**processes, || Ok(save_adapter(&sam, &lora, options.output.join(ADAPTER))?))?;
    let after = judge.verdicts(&sam, of_held_out.as_ref(), options.overlays)?;
    let outcome = Outcome {
        before: judge::scores(&before),
        after: judge::scores(&after),
        evaluations: trainer.evaluations().to_vec(),
        losses: trainer.losses().to_vec(),
    };
    let results = Results {
        options,
        trainable: &trainable,
        held_out: &held_out,
        outcome: &outcome,
        verdicts: [&before, &after],
    };
    on_first(&**processes, || results.write())?;
    tell(options, &outcome, before.iter().map(|verdict| verdict.scores.len()).sum());
    Ok(outcome)
}

/// The model's name on the hub, if `folder` comes from there.
fn name_on_the_hub(options: &Options, folder: &Path) -> Option<String> {
    let name = options.model.as_deref().filter(|name| *name != folder)?.to_str()?;
    name.split('@').next().map(str::to_string)
}

/// The embeddings of the images to train on and of those held out, if they are computed once. Says what is kept.
fn kept_embeddings<'a>(
    options: &Options,
    sam: &'a SamModel,
    processor: &SamProcessor,
    [images, held_out]: [usize; 2],
) -> anyhow::Result<[Option<KeptEmbeddings<'a>>; 2]> {
    let place = options.embeddings.as_deref();
    let named = place.and_then(Path::to_str);
    if named == Some("none") || !trainable_variables(&sam.vision_encoder)?.is_empty() {
        return Ok([None, None]);
    }
    let kept = || {
        let kept = match place.filter(|_| named != Some("memory")) {
            Some(folder) => KeptEmbeddings::in_folder(sam, processor, folder),
            None => KeptEmbeddings::in_memory(sam, processor),
        };
        match options.symmetries {
            Symmetries::Stored => kept,
            Symmetries::Recomputed => kept.recompute_turned(),
        }
    };
    let [of_images, of_held_out] = [kept(), kept()];
    let bytes =
        of_images.bytes(images, !options.no_augment)? + of_held_out.bytes(held_out, false)?;
    let count = format!("{images} images and {held_out} held out");
    let size = format!("{:.1} MiB at most, {count}", bytes as f64 / f64::from(1 << 20));
    let ways = match (options.no_augment, options.symmetries) {
        (true, _) => "as they are",
        (false, Symmetries::Stored) => "turned and mirrored in eight ways",
        (false, Symmetries::Recomputed) => "as they are; turned ones are computed in every step",
    };
    let said = match place {
        None if bytes > MOST_IN_MEMORY => {
            let advice = "--embeddings DIR or memory computes them once";
            options.console.note(format!("embeddings computed in every step: {size}; {advice}"));
            return Ok([None, None]);
        }
        Some(folder) if named != Some("memory") => format!("in {}", folder.display()),
        _ => "in memory".into(),
    };
    options.console.note(format!("embeddings computed once and kept {said}: {size} {ways}"));
    Ok([Some(of_images), Some(of_held_out)])
}

/// Injects the adapters, into the image encoder alone.
fn adapt_encoder(sam: &mut SamModel, options: &Options) -> Result<LoraConfig> {
    let mut config = options.lora.config();
    let in_encoder = |name: &String| name.starts_with("vision_encoder.");
    let mut adapted = inject(sam, &config, options.seed)?;
    if !adapted.iter().all(in_encoder) {
        unload(sam)?;
        config.exclude_modules = Some(ModuleNames::Regex(r"(?!vision_encoder\.).*".into()));
        adapted = inject(sam, &config, options.seed)?;
    }
    options.lora.check_targets(&adapted)?;
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
