//! `segment`: objects cut out of images by points and boxes.

mod mask_file;
mod prompts;

use super::arguments::{Backend, ModelArguments};
use super::console::Console;
use super::division::{Division, Turn};
use super::draw;
use super::embeddings::{EmbeddingArguments, Origin, Tally};
use super::photo::{images, is_newer, is_whole, named_as_png, spare, PhotoArguments};
use super::processes::Processes;
use crate::sam::{convert_to_rgb, ImageEmbedding, Prediction, Prompt, Rle, SamPredictor};
use anyhow::{bail, Context};
use image::{DynamicImage, GrayImage};
use prompts::{PromptArguments, Prompts};
use serde_json::{json, Value};
use std::path::{Path, PathBuf};

/// Cuts objects out of images of any size and format
///
/// Points and a box of one object belong together; of several images each gets the same prompts. Writes for each image
/// the mask (PNG; 0 and 255, or the number of the object where there are several). A copy of the image has masks and
/// prompts drawn in. Prints the IoU that the model expects.
#[derive(clap::Args)]
pub struct Options {
    /// Images, or folders of images
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    photo: PhotoArguments,
    #[command(flatten)]
    embeddings: EmbeddingArguments,
    /// Take the best of several masks, for a prompt that could mean a part or the whole
    #[arg(long)]
    multimask: bool,
    /// Where the mask of the only image goes [default: <image>.mask.png in --output]
    #[arg(long, value_name = "FILE")]
    mask: Option<PathBuf>,
    /// Where the only image with its mask goes [default: <image>.overlay.png in --output]
    #[arg(long, value_name = "FILE")]
    overlay: Option<PathBuf>,
    /// Folder that gets the results
    #[arg(long, value_name = "DIR", default_value = ".", hide_default_value = true)]
    output: PathBuf,
    /// Replace files that exist
    #[arg(long)]
    overwrite: bool,
    /// Skip images whose results are there and whole
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    #[command(flatten)]
    processes: Processes,
    #[command(flatten)]
    backend: Backend,
    #[command(flatten)]
    console: Console,
}

/// An image and where its results go.
struct Job {
    image: PathBuf,
    mask: PathBuf,
    overlay: PathBuf,
}

impl Job {
    fn name(&self) -> String {
        self.image.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn is_done(&self, settings: &Value) -> anyhow::Result<bool> {
        let is_there = mask_file::is_there(&self.mask, settings)?;
        Ok(is_there && !is_newer(&self.image, &self.mask) && is_whole(&self.overlay))
    }
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let division = Division::join(options.processes, options.console)?;
    division.ended(segment_all(options, &division))
}

fn segment_all(options: &Options, division: &Division) -> anyhow::Result<()> {
    let console = division.console;
    let (place, mut jobs) = division
        .each(|| Ok((options.backend.open(division.processes())?, options.jobs(console)?)))?;
    division.agree_on_inputs(jobs.iter().map(|job| job.image.as_path()))?;
    let (count, several) = (jobs.len(), jobs.len() > 1);
    let settings = &options.settings();
    if options.resume {
        let is_done = division.survey(count, |index| jobs[index].is_done(settings))?;
        let mut is_done = is_done.into_iter();
        jobs.retain(|_| !is_done.next().unwrap_or(false));
        console.note(format!("{} of {count} results are there already", count - jobs.len()));
    }
    let Some(first) = jobs.first() else { return Ok(()) };
    // A wrong prompt is told before the model is loaded, which may take long.
    let mut first = division
        .each(|| division.is_first().then(|| options.open(&first.image, console)).transpose())?;
    let (source, model) = division.load(&options.model, &place)?;
    let processor = division.each(|| Ok(source.processor(model.sam().config(), console)?))?;
    let predictor = model.predictor(processor);
    division.make_folder(&options.output)?;
    let embeddings = options.embeddings.open(&options.photo);
    let bar = console.bar(jobs.len() as u64, "images  {msg}");
    let names: Vec<String> = jobs.iter().map(Job::name).collect();
    let mut tally = Tally::default();
    let work = |item: usize, turn: Turn<'_>| {
        let (job, console) = (&jobs[item], turn.console);
        bar.set_message(names[item].clone());
        let opened = match first.take() {
            Some(opened) => opened,
            None => bar.suspend(|| options.open(&job.image, console))?,
        };
        let kept = embeddings.get(&predictor, &job.image)?;
        let origin = Origin::of(kept.as_ref());
        let embedding = match kept {
            Some(kept) => kept.embedding,
            None => predictor.embed(&opened.0)?,
        };
        let objects = segment(&predictor, &embedding, &opened.1, options.multimask)?;
        write(opened, &objects, job, settings)?;
        let prefix = if several { format!("{}: ", names[item]) } else { String::new() };
        report(console.kept(), job, &objects, &prefix);
        Ok(origin)
    };
    let collect = |item: usize, origin: Origin| {
        tally.add(item, &jobs[item].image, origin);
        bar.inc(1);
        Ok(())
    };
    division.divide(&names, &bar, work, collect)?;
    bar.finish_and_clear();
    embeddings.tell(&tally, console);
    Ok(())
}

impl Options {
    /// All that a mask depends on, beside its image.
    fn settings(&self) -> Value {
        json!({
            "prompts": format!("{:?}", self.prompts),
            "model": format!("{:?}", self.model),
            "photo": format!("{:?}", self.photo),
            "multimask": self.multimask,
            "backend": format!("{:?}", self.backend),
        })
    }

    fn jobs(&self, console: Console) -> anyhow::Result<Vec<Job>> {
        let images = images(&self.images, console)?;
        let several = images.len() > 1;
        let jobs: Vec<Job> = images
            .iter()
            .map(|image| self.job(image.clone(), several))
            .collect::<anyhow::Result<_>>()?;
        spare(&images, jobs.iter().flat_map(|job| [&job.mask, &job.overlay]))?;
        Ok(jobs)
    }

    fn job(&self, image: PathBuf, several: bool) -> anyhow::Result<Job> {
        if several && (self.mask.is_some() || self.overlay.is_some()) {
            bail!("--mask and --overlay are for one image; name a folder with --output")
        }
        if self.mask.is_some() && self.overlay.is_some() && self.output != Path::new(".") {
            bail!("--output has no effect beside --mask and --overlay")
        }
        let mask = self.destination(&image, &self.mask, "mask")?;
        let overlay = self.destination(&image, &self.overlay, "overlay")?;
        if place(&mask) == place(&overlay) {
            bail!("--mask and --overlay are both {}", mask.display())
        }
        Ok(Job { image, mask, overlay })
    }

    /// The given path, or one named after the image; refused if something is there already.
    fn destination(
        &self,
        image: &Path,
        path: &Option<PathBuf>,
        ending: &str,
    ) -> anyhow::Result<PathBuf> {
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let named = || match self.output == Path::new(".") {
            true => PathBuf::from(format!("{stem}.{ending}.png")),
            false => self.output.join(format!("{stem}.{ending}.png")),
        };
        let path = path.clone().unwrap_or_else(named);
        named_as_png(&path, ending)?;
        if path.canonicalize().is_ok_and(|path| image.canonicalize().is_ok_and(|i| i == path)) {
            bail!("{}: is the image itself; choose another place", path.display())
        }
        if path.exists() && !self.overwrite && !self.resume {
            bail!("{}: exists already; choose another place or --overwrite", path.display())
        }
        Ok(path)
    }

    fn open(&self, path: &Path, console: Console) -> anyhow::Result<(DynamicImage, Vec<Prompts>)> {
        let image = self.photo.read(path, console)?;
        let size = (image.width(), image.height());
        let objects = Prompts::parse(&self.prompts, size, console)?;
        Ok((image, objects))
    }
}

/// A path in its folder's own spelling.
fn place(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).canonicalize();
    folder.map_or_else(|_| path.into(), |f| f.join(path.file_name().unwrap_or_default()))
}

/// A mask and the IoU that the model expects of it.
struct Object {
    mask: Rle,
    expected_iou: f32,
}

fn segment(
    predictor: &SamPredictor<'_>,
    embedding: &ImageEmbedding,
    objects: &[Prompts],
    multimask: bool,
) -> crate::Result<Vec<Object>> {
    let prompts: Vec<Prompt> = objects.iter().map(Prompts::prompt).collect();
    let found = predictor.predict(embedding, &prompts, multimask)?;
    let object = |prediction: &Prediction| {
        let best = prediction.best();
        let mask = predictor.mask(embedding, prediction, best)?;
        Ok(Object { mask, expected_iou: prediction.iou_scores[best] })
    };
    found.iter().map(object).collect()
}

/// Writes the mask and the overlay; the mask comes last, so that it means that both are there.
fn write(
    (image, prompts): (DynamicImage, Vec<Prompts>),
    objects: &[Object],
    job: &Job,
    settings: &Value,
) -> anyhow::Result<()> {
    let mut overlay = convert_to_rgb(&image)?;
    let mut labels = vec![0u8; image.width() as usize * image.height() as usize];
    for (index, object) in objects.iter().enumerate() {
        let inside = object.mask.to_mask();
        let value = if objects.len() == 1 { 255 } else { (index + 1) as u8 };
        labels.iter_mut().zip(&inside).filter(|(_, inside)| **inside).for_each(|(v, _)| *v = value);
        draw::fill(&mut overlay, &inside, draw::colour(index));
        draw::outline(&mut overlay, &inside, draw::WHITE);
    }
    for prompts in &prompts {
        for point in &prompts.points {
            draw::cross(&mut overlay, *point, draw::WHITE);
        }
        if let Some(sides) = prompts.sides {
            draw::rectangle(&mut overlay, sides, draw::WHITE);
        }
    }
    let mask = GrayImage::from_raw(image.width(), image.height(), labels)
        .context("the mask is not of the image's size")?;
    draw::save_png(&job.overlay, &overlay.into())?;
    Ok(mask_file::write(&job.mask, &mask, settings)?)
}

fn report(console: Console, job: &Job, objects: &[Object], prefix: &str) {
    let several = objects.len() > 1;
    let mut lines = vec![];
    let mut found = vec![];
    for (index, Object { mask, expected_iou }) in objects.iter().enumerate() {
        let (height, width) = mask.size();
        let area = mask.area();
        let percent = 100.0 * area as f64 / (f64::from(height) * f64::from(width));
        let object = if several { format!("object {}: ", index + 1) } else { String::new() };
        lines.push(format!(
            "{prefix}{object}expected IoU {expected_iou:.4}, {area} pixels ({percent:.1} %)"
        ));
        found.push(json!({ "expected_iou": expected_iou, "area": area, "bounds": mask.bounds() }));
    }
    if several {
        lines.push("where objects overlap, the mask has the number of the later one".into());
    }
    let Job { image, mask, overlay } = job;
    lines.push(format!("{} and {}", mask.display(), overlay.display()));
    let object = json!({ "image": image, "objects": found, "mask": mask, "overlay": overlay });
    console.result(lines.join("\n"), object);
}
