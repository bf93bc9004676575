//! `encode`: tensors through a model, for comparison with other implementations and for work of one's own on
//! embeddings.

use super::arguments::{Backend, ModelArguments};
use super::console::Console;
use super::division::{Division, Turn};
use super::embeddings::{EmbeddingArguments, Origin, Tally};
use super::model::{Placement, Source};
use super::photo::{images, is_newer, PhotoArguments};
use super::processes::Processes;
use super::settings;
use crate::files::Seal;
use crate::nn::{Mode, ModuleTree};
use crate::sam::{
    model_type, DeepSeekOcrEncoder, ReadOptions, SamInput, SamModel, SamVisionConfig,
    SamVisionEncoderOutput, SamVisionModel,
};
use crate::{read_tensors, TensorFile};
use anyhow::{anyhow, bail};
use candle_core::{DType, Device, Tensor};
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Runs a SAM on tensors from safetensors files, or embeds images for later runs
///
/// With --embeddings the input is an image or a folder of images, whose embeddings are kept for `masks` and `segment`.
///
/// Tensors read: pixel_values [B,3,S,S], and if wanted input_points [B,P,N,2], input_labels [B,P,N],
/// input_boxes [B,P,4], input_masks [B,1,4h,4w], as Hugging Face's SamModel takes them. Tensors written:
/// image_embeddings, hidden_states.0 .. hidden_states.N, and with prompts pred_masks and iou_scores. All in f32.
///
/// The model may be an image encoder alone (SamVisionModel); it takes no prompts.
///
/// With --deepseek-ocr the model is a checkpoint of DeepSeek-OCR, of which the SAM encoder runs. For any S that is a
/// multiple of 16, pixel_values [B,3,S,S] become image_embeddings [B,1024,S/64,S/64].
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelArguments,
    /// Safetensors file to read, or a folder of such files; with --embeddings images
    #[arg(long, value_name = "FILE|DIR")]
    input: PathBuf,
    /// Safetensors file to write; with a folder of input the folder that gets a file of each file's name
    #[arg(
        long,
        value_name = "FILE|DIR",
        required_unless_present = "embeddings",
        conflicts_with = "embeddings"
    )]
    output: Option<PathBuf>,
    #[command(flatten)]
    embeddings: EmbeddingArguments,
    #[command(flatten)]
    photo: PhotoArguments,
    /// Run the SAM encoder of DeepSeek-OCR
    #[arg(long, requires = "model", conflicts_with = "embeddings")]
    deepseek_ocr: bool,
    /// One mask for each prompt instead of several (multimask_output=False)
    #[arg(long, conflicts_with = "embeddings")]
    single_mask: bool,
    /// Skip files whose results are there and whole
    #[arg(long, conflicts_with = "embeddings")]
    resume: bool,
    #[command(flatten)]
    processes: Processes,
    #[command(flatten)]
    backend: Backend,
    #[command(flatten)]
    console: Console,
}

/// A file to read and the file to write for it.
struct Job {
    input: PathBuf,
    output: PathBuf,
}

/// A file of results holds its run's settings.
const RESULT: Seal = Seal { key: "candle-sam-lora settings", what: "a result of encode" };

impl Job {
    /// Whether a whole result of these settings is there, as new as its input.
    fn is_done(&self, settings: &Value) -> anyhow::Result<bool> {
        let read = TensorFile::open(&self.output).and_then(|file| RESULT.read(&file, &Device::Cpu));
        let Ok((text, _)) = read else { return Ok(false) };
        settings::check(&self.output, &serde_json::from_str(&text).unwrap_or_default(), settings)?;
        Ok(!is_newer(&self.input, &self.output))
    }
}

type Tensors = BTreeMap<String, Tensor>;

impl Options {
    /// All that a result depends on, beside its input, as checksums.
    fn settings(&self) -> Value {
        settings::checksums(&json!({
            "model": format!("{:?}", self.model),
            "deepseek-ocr": self.deepseek_ocr,
            "single-mask": self.single_mask,
            "backend": format!("{:?}", self.backend),
        }))
    }
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let division = Division::join(options.processes, options.console)?;
    division.ended(match &options.output {
        Some(output) => encode_files(options, output, &division),
        None => embed_images(options, &division),
    })
}

fn encode_files(options: &Options, output: &Path, division: &Division) -> anyhow::Result<()> {
    let console = division.console;
    let (place, mut jobs) = division.each(|| {
        let place = options.backend.open(division.processes())?;
        if options.photo.options() != ReadOptions::default() {
            bail!("--range, --page and --channels are for images, which --embeddings takes")
        }
        Ok((place, jobs(&options.input, output)?))
    })?;
    division.agree_on_inputs(jobs.iter().map(|job| job.input.as_path()))?;
    if options.input.is_dir() {
        division.make_folder(output)?;
    }
    let all = jobs.len();
    let settings = &options.settings();
    // Inputs are looked at before the model is loaded, which may take long.
    let is_done = division.survey(all, |index| {
        let job = &jobs[index];
        let is_done = options.resume && job.is_done(settings)?;
        if !is_done {
            TensorFile::open(&job.input)?;
        }
        Ok(is_done)
    })?;
    let mut is_done = is_done.into_iter();
    jobs.retain(|_| !is_done.next().unwrap_or(false));
    if options.resume {
        console.note(format!("{} of {all} results are there already", all - jobs.len()));
    }
    if jobs.is_empty() {
        return Ok(());
    }
    let model =
        division.each(|| Model::load(options, &options.model.find(console)?, &place, console))?;
    division.agree_on_model(model.tree())?;
    let bar = console.bar(jobs.len() as u64, "files");
    let work = |item: usize, turn: Turn<'_>| {
        let Job { input, output } = &jobs[item];
        let request = Request::read(input, &place)?;
        let largest = request.largest_pixel()?;
        if largest > MOST_NORMALISED {
            let name = input.display();
            turn.console.note(format!(
                "{name}: pixel_values reach {largest}; normalised ones, as SAM's image processor gives, are -3 to 3"
            ));
        }
        if options.single_mask && !request.has_prompts() {
            let name = input.display();
            turn.console.note(format!("{name}: has no prompts; --single-mask has no effect"));
        }
        let mut tensors = model.run(request, options)?;
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::F32)?;
        }
        RESULT.stage(output, &settings.to_string(), &tensors)?.commit()?;
        let shapes = tensors.iter().map(|(name, tensor)| (name.clone(), json!(tensor.dims())));
        let object = json!({
            "input": input,
            "output": output,
            "tensors": Value::Object(Map::from_iter(shapes)),
        });
        let text = format!("{}: {} tensors", output.display(), tensors.len());
        turn.console.kept().result(text, object);
        Ok(())
    };
    let collect = |_, ()| {
        bar.inc(1);
        Ok(())
    };
    let names: Vec<String> = jobs.iter().map(|job| job.input.display().to_string()).collect();
    division.divide(&names, &bar, work, collect)?;
    bar.finish_and_clear();
    Ok(())
}

/// Embeds the images that have no embedding yet.
fn embed_images(options: &Options, division: &Division) -> anyhow::Result<()> {
    let console = division.console;
    let (place, images) = division.each(|| {
        Ok((
            options.backend.open(division.processes())?,
            images(std::slice::from_ref(&options.input), console)?,
        ))
    })?;
    division.agree_on_inputs(images.iter().map(PathBuf::as_path))?;
    if let Some(folder) = options.embeddings.folder() {
        division.make_folder(folder)?;
    }
    let (source, model) = division.load(&options.model, &place)?;
    let processor = division.each(|| Ok(source.processor(model.sam().config(), console)?))?;
    let predictor = model.predictor(processor);
    let embeddings = options.embeddings.open(&options.photo);
    let bar = console.bar(images.len() as u64, "images");
    let mut tally = Tally::default();
    let work = |item: usize, turn: Turn<'_>| {
        let image = &images[item];
        let found = embeddings.get(&predictor, image)?;
        if let Some(found) = &found {
            let did = if found.computed.is_some() { "computed" } else { "read" };
            let text = format!("{}: embedding {did}, {}", image.display(), found.path.display());
            let object =
                json!({ "input": image, "embedding": found.path, "computed": found.computed });
            turn.console.kept().result(text, object);
        }
        Ok(Origin::of(found.as_ref()))
    };
    let collect = |item: usize, origin: Origin| {
        tally.add(item, &images[item], origin);
        bar.inc(1);
        Ok(())
    };
    let names: Vec<String> = images.iter().map(|image| image.display().to_string()).collect();
    division.divide(&names, &bar, work, collect)?;
    bar.finish_and_clear();
    embeddings.tell(&tally, console);
    Ok(())
}

/// The files to be read and written.
fn jobs(input: &Path, output: &Path) -> anyhow::Result<Vec<Job>> {
    if !input.is_dir() {
        if output.exists() && input.canonicalize().ok() == output.canonicalize().ok() {
            bail!("{}: --input and --output are one file", output.display())
        }
        return Ok(vec![Job { input: input.into(), output: output.into() }]);
    }
    let mut jobs = vec![];
    for entry in std::fs::read_dir(input)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let hidden = name.to_string_lossy().starts_with('.');
        if path.is_file() && !hidden && path.extension().is_some_and(|e| e == "safetensors") {
            jobs.push(Job { input: path, output: output.join(name) });
        }
    }
    if jobs.is_empty() {
        bail!("{}: the folder has no .safetensors file", input.display())
    }
    if input.canonicalize().ok() == output.canonicalize().ok() {
        bail!("{}: --input and --output are one folder", output.display())
    }
    jobs.sort_by(|a, b| a.input.cmp(&b.input));
    Ok(jobs)
}

/// Larger pixels are not normalised.
const MOST_NORMALISED: f32 = 20.0;
const PROMPTS: [&str; 4] = ["input_points", "input_labels", "input_boxes", "input_masks"];

/// The tensors of one file.
struct Request<'a> {
    path: &'a Path,
    pixel_values: Tensor,
    /// Points, labels, boxes, masks.
    prompts: [Option<Tensor>; 4],
}

impl<'a> Request<'a> {
    fn read(path: &'a Path, place: &Placement) -> anyhow::Result<Self> {
        let mut tensors = read_tensors(path, &place.device)?;
        for (name, tensor) in &tensors {
            check_values(name, tensor).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        }
        let mut take = |name: &str| {
            tensors.remove(name).map(|tensor| tensor.to_dtype(place.dtype)).transpose()
        };
        let Some(pixel_values) = take("pixel_values")? else {
            bail!("{}: has no tensor pixel_values", path.display())
        };
        let [points, labels, boxes, masks] = PROMPTS.map(take);
        let prompts = [points?, labels?, boxes?, masks?];
        if let Some(name) = tensors.keys().next() {
            let known = PROMPTS.join(", ");
            bail!("{}: unknown tensor {name}; known: pixel_values, {known}", path.display())
        }
        let [points, labels, ..] = &prompts;
        if labels.is_some() && points.is_none() {
            bail!("{}: input_labels without input_points", path.display())
        }
        Ok(Self { path, pixel_values, prompts })
    }

    fn has_prompts(&self) -> bool {
        self.prompts.iter().any(Option::is_some)
    }

    /// The largest magnitude of a pixel.
    fn largest_pixel(&self) -> candle_core::Result<f32> {
        match self.pixel_values.elem_count() {
            0 => Ok(0.0),
            _ => self.pixel_values.to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar(),
        }
    }

    /// Refuses prompts, which `model` does not take.
    fn without_prompts(&self, model: &str) -> anyhow::Result<&Tensor> {
        if self.has_prompts() {
            bail!("{}: has prompts, but {model}", self.path.display())
        }
        Ok(&self.pixel_values)
    }
}

/// Refuses what would give results without a meaning: pixels that nobody normalised, values that are not finite.
fn check_values(name: &str, tensor: &Tensor) -> anyhow::Result<()> {
    let dtype = tensor.dtype();
    if name == "pixel_values" && !dtype.is_float() {
        bail!(
            "pixel_values are {}; expected normalised floats, as SAM's image processor gives",
            dtype.as_str()
        )
    }
    // 0 times a finite number is 0; times an infinity or a NaN it is NaN.
    let sum = (tensor.to_dtype(DType::F32)? * 0.0)?.sum_all()?.to_scalar::<f32>()?;
    if dtype.is_float() && sum.is_nan() {
        bail!("{name} has values that are not finite")
    }
    Ok(())
}

/// The models that encode.
enum Model {
    DeepSeekOcr(Box<DeepSeekOcrEncoder>),
    Vision(Box<SamVisionModel>),
    Sam(Box<SamModel>),
}

impl Model {
    fn load(
        options: &Options,
        source: &Source,
        place: &Placement,
        console: Console,
    ) -> anyhow::Result<Self> {
        let (Placement { device, dtype, .. }, weights) = (place, &source.weights);
        if options.deepseek_ocr {
            let mut encoder =
                DeepSeekOcrEncoder::from_pretrained(weights, source.kind()?, *dtype, device)?;
            place.quantize(&mut encoder.sam, console)?;
            source.adapt(&mut encoder, console)?;
            return Ok(Self::DeepSeekOcr(Box::new(encoder)));
        }
        let config = weights.join("config.json");
        if config.exists() && model_type(&config)? == SamVisionConfig::MODEL_TYPE {
            let mut model =
                SamVisionModel::from_pretrained(weights, source.kind()?, *dtype, device)?;
            place.quantize(&mut model.vision_encoder, console)?;
            source.adapt(&mut model, console)?;
            return Ok(Self::Vision(Box::new(model)));
        }
        Ok(Self::Sam(Box::new(source.load(place, console)?)))
    }

    fn tree(&self) -> &dyn ModuleTree {
        match self {
            Self::DeepSeekOcr(encoder) => &**encoder,
            Self::Vision(model) => &**model,
            Self::Sam(sam) => &**sam,
        }
    }

    fn run(&self, request: Request<'_>, options: &Options) -> anyhow::Result<Tensors> {
        match self {
            Self::DeepSeekOcr(encoder) => {
                let pixels = request.without_prompts("DeepSeek-OCR's encoder takes none")?;
                let embeddings = encoder.forward(pixels, Mode::Eval)?;
                Ok(BTreeMap::from([("image_embeddings".into(), embeddings)]))
            }
            Self::Vision(model) => {
                let alone = "the model is an image encoder alone: it has no prompt encoder and no mask decoder";
                let pixels = request.without_prompts(alone)?;
                let encoder = &model.vision_encoder;
                Ok(tensors_of(encoder.forward_with_states(pixels, false, Mode::Eval)?))
            }
            Self::Sam(sam) => prompted(sam, request, options.single_mask),
        }
    }
}

fn prompted(sam: &SamModel, request: Request<'_>, single_mask: bool) -> anyhow::Result<Tensors> {
    let encoder = &sam.vision_encoder;
    let encoded = encoder.forward_with_states(&request.pixel_values, false, Mode::Eval)?;
    let embeddings = encoded.image_embeddings.clone();
    let mut output = tensors_of(encoded);
    if request.has_prompts() {
        let [input_points, input_labels, input_boxes, input_masks] = request.prompts;
        let input = SamInput {
            pixel_values: None,
            image_embeddings: Some(embeddings),
            input_points,
            input_labels,
            input_boxes,
            input_masks,
            multimask_output: !single_mask,
        };
        let masks = sam.forward(&input, Mode::Eval)?;
        output.insert("pred_masks".into(), masks.pred_masks);
        output.insert("iou_scores".into(), masks.iou_scores);
    }
    Ok(output)
}

fn tensors_of(encoded: SamVisionEncoderOutput) -> Tensors {
    let states = encoded.hidden_states.into_iter().enumerate();
    let states = states.map(|(index, state)| (format!("hidden_states.{index}"), state));
    states.chain([("image_embeddings".into(), encoded.image_embeddings)]).collect()
}
