//! `masks`: everything in images, without a prompt.

mod calibration;
mod journal;
mod options;
mod rejected;
mod results;

pub use options::Options;

use super::embeddings::Embeddings;
use super::photo::images;
use super::sheet;
use crate::files;
use crate::sam::{Generated, LargeImage, MaskGenerator, SamPredictor};
use crate::train::Dataset;
use anyhow::{anyhow, bail};
use indicatif::ProgressBar;
use journal::Journal;
use results::{best_iou, is_large, Results};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub fn run(options: &Options) -> anyhow::Result<()> {
    let console = options.console;
    let place = options.backend.open()?;
    let images = images(&options.images)?;
    let truth = options.calibration.open(options.photo.options(), console)?;
    let journal = match images.is_empty() {
        true => None,
        false => Some(open_journal(options, truth.as_ref())?),
    };
    let source = options.model.find(console)?;
    let sam = source.load(&place, console)?;
    let processor = source.processor(sam.config(), console)?;
    let predictor = SamPredictor::with_processor(&sam, processor);
    let mut generator = options.generator.generator();
    if let Some(truth) = &truth {
        generator = calibration::calibrated(generator, &predictor, truth, console)?;
    }
    let Some(mut journal) = journal else { return Ok(()) };
    let embeddings = options.embeddings.open(&options.photo);
    let unit = if options.tiles.tiling().is_some() { "tiles" } else { "points" };
    let bar = console.bar(0, &format!("{unit}  {{msg}}"));
    let mut finder = Finder { options, generator, predictor, embeddings, bar: bar.clone() };
    let (mut skipped, mut made, mut drawn) = (0, 0, vec![]);
    for path in &images {
        let started = Instant::now();
        let name = name_of(path);
        let results = options.results(path);
        let done = journal.find(&name).filter(|(size, masks)| results.are_whole(*size, *masks));
        if let Some((size, _)) = done {
            drawn.extend(results.is_drawn(size).then_some(path));
            skipped += 1;
            continue;
        }
        bar.set_message(format!("{name} ({} of {})", skipped + made + 1, images.len()));
        let (mut image, found) = finder.find(path, |done, of| {
            bar.set_length(((images.len() - skipped) * of) as u64);
            bar.set_position((made * of + done) as u64);
        })?;
        let object = results.write(&mut image, &found)?;
        let masks = &found.masks;
        journal.push(&name, image.size(), masks)?;
        drawn.extend(results.is_drawn(image.size()).then_some(path));
        made += 1;
        let best = best_iou(masks)
            .map_or_else(String::new, |best| format!(", expected IoU up to {best:.3}"));
        let text = format!(
            "{name}: {} masks{best}, {:.1} s",
            masks.len(),
            started.elapsed().as_secs_f64()
        );
        bar.suspend(|| console.result(text, object));
        if masks.is_empty() {
            let advice = rejected::advice(&found.statistics, &finder.generator);
            bar.suspend(|| console.note(format!("{name}: nothing was good enough; {advice}")));
        }
    }
    bar.finish_and_clear();
    finder.embeddings.tell(console);
    if skipped > 0 {
        console.note(format!("{skipped} of {} images were done already", images.len()));
    }
    let (total, json) = (journal.masks(), journal.finish()?);
    let sheets = options.write_sheets(&drawn)?;
    let text = format!("{total} masks of {} images in {}", images.len(), json.display());
    let object = json!({
        "images": images.len(),
        "skipped": skipped,
        "masks": total,
        "coco": json,
        "sheets": sheets,
    });
    console.result(text, object);
    sheets.iter().for_each(|sheet| console.note(format!("contact sheet in {}", sheet.display())));
    Ok(())
}

/// Finds the masks of one image after the other.
struct Finder<'a> {
    options: &'a Options,
    generator: MaskGenerator,
    predictor: SamPredictor<'a>,
    embeddings: Embeddings,
    bar: ProgressBar,
}

impl Finder<'_> {
    /// An image and its masks; `progress` hears of points or tiles done and of all.
    fn find(
        &mut self,
        path: &Path,
        progress: impl FnMut(usize, usize),
    ) -> anyhow::Result<(LargeImage, Generated)> {
        let Self { options, generator, predictor, embeddings, bar } = self;
        let (photo, console) = (&options.photo, options.console);
        if let Some(tiling) = options.tiles.tiling() {
            let mut image = bar.suspend(|| photo.open(path, &tiling, console))?;
            let found = generator.generate_tiled(predictor, &mut image, &tiling, progress)?;
            return Ok((image, found));
        }
        let read = bar.suspend(|| photo.read(path, console));
        let image = read.map_err(|error| {
            // An image too large to be decoded whole may be read in parts.
            let opened = LargeImage::open(path, &photo.options());
            match opened.is_ok_and(|image| is_large(image.size())) {
                true => anyhow!("{error}; --tile 1024 reads the image in parts"),
                false => error.into(),
            }
        })?;
        let (width, height) = (image.width(), image.height());
        if is_large((height, width)) {
            let name = path.display();
            let remark = format!(
                "{name}: {width} x {height} pixels seen at once: --tile 1024 finds smaller objects in less memory"
            );
            bar.suspend(|| console.note(remark));
        }
        let found = match embeddings.get(predictor, path)? {
            Some(kept) => generator.generate_embedded(predictor, &kept.embedding, progress)?,
            None => generator.generate_counted(predictor, &image, progress)?,
        };
        Ok((image.into(), found))
    }
}

impl Options {
    fn results<'a>(&'a self, image: &'a Path) -> Results<'a> {
        Results {
            folder: &self.output,
            image,
            each: self.files.each,
            geojson: self.files.geojson,
            tiled: self.tiles.tiling().is_some(),
        }
    }

    /// Draws the contact sheets of images with overlays, if they are wanted; returns their files.
    fn write_sheets(&self, images: &[&PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
        let Some(path) = &self.files.sheet else { return Ok(vec![]) };
        let overlay = |image: &&PathBuf| (name_of(image), self.results(image).overlay());
        let pictures: Vec<_> = images.iter().map(overlay).collect();
        sheet::write(path, &pictures, self.files.columns)
    }
}

/// The name that an image has in the results.
fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Begins the record of a run, or goes on with that of an earlier one of the same settings.
fn open_journal(options: &Options, truth: Option<&Dataset>) -> anyhow::Result<Journal> {
    let folder = &options.output;
    let settings = options.settings(truth)?;
    if options.files.resume {
        files::create_dir(folder)?;
        return Journal::resume(folder, settings);
    }
    let earlier =
        journal::FILES.map(|name| folder.join(name)).into_iter().find(|path| path.exists());
    if let Some(path) = earlier.filter(|_| !options.files.overwrite) {
        bail!(
            "{}: exists already; choose another --output, --resume or --overwrite",
            path.display()
        )
    }
    files::create_dir(folder)?;
    Ok(Journal::begin(folder, settings))
}
