//! `masks`: everything in images, without a prompt.

mod calibration;
mod journal;
mod options;
mod rejected;
mod results;

use options::FileArguments;
pub use options::Options;

use super::console::Console;
use super::division::{Division, Turn};
use super::embeddings::{Embeddings, Origin, Tally};
use super::photo::{images, named_as_png, spare};
use super::sheet;
use crate::sam::{Generated, LargeImage, MaskGenerator, SamPredictor};
use crate::train::Dataset;
use anyhow::{anyhow, bail};
use indicatif::ProgressBar;
use journal::{coco_text, Journal};
use results::{best_iou, is_large, Results};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub fn run(options: &Options) -> anyhow::Result<()> {
    let division = Division::join(options.processes, options.console)?;
    division.ended(find_all(options, &division))
}

fn find_all(options: &Options, division: &Division) -> anyhow::Result<()> {
    let console = division.console;
    division.each(|| {
        options.check_idle()?;
        options.generator.check()
    })?;
    let (place, images, truth) = division.each(|| {
        let (place, images) =
            (options.backend.open(division.processes())?, images(&options.images, console)?);
        Ok((place, images, options.calibration.open(options.photo.options(), console)?))
    })?;
    division.agree_on_inputs(images.iter().map(PathBuf::as_path))?;
    let journal = match images.is_empty() {
        true => None,
        false => Some(open_journal(options, &images, truth.as_ref(), division)?),
    };
    let (source, model) = division.load(&options.model, &place)?;
    let (predictor, generator) = division.each(|| {
        let processor = source.processor(model.sam().config(), console)?;
        let predictor = model.predictor(processor);
        let generator = options.generator.generator();
        let generator = match &truth {
            None => generator,
            Some(truth) => calibration::calibrated(generator, &predictor, truth, console)?,
        };
        Ok((predictor, generator))
    })?;
    let Some(mut journal) = journal else { return Ok(()) };
    let names: Vec<String> = images.iter().map(|path| name_of(path)).collect();
    let done = journal.done();
    let is_done = |index: usize| {
        let results = options.results(&images[index]);
        Ok(done.get(&names[index]).is_some_and(|(size, masks)| results.are_whole(*size, *masks)))
    };
    let is_done = division.survey(images.len(), is_done)?;
    let left: Vec<usize> = (0..images.len()).filter(|index| !is_done[*index]).collect();
    let skipped = images.len() - left.len();
    let unit = match options.tiles.tiling() {
        _ if division.is_divided() => "images",
        Some(_) => "tiles",
        None => "points",
    };
    let bar = console.bar(0, &format!("{unit}  {{msg}}"));
    let embeddings = options.embeddings.open(&options.photo);
    let finder = Finder { options, generator, predictor, embeddings, bar: bar.clone() };
    let mut tally = Tally::default();
    let work = |item: usize, turn: Turn<'_>| {
        let name = &names[left[item]];
        if !division.is_divided() {
            bar.set_message(format!("{name} ({} of {})", skipped + item + 1, images.len()));
        }
        finder.find_and_write(&images[left[item]], name, &turn, |done, of| {
            (turn.alive)();
            if !division.is_divided() {
                bar.set_length((left.len() * of) as u64);
                bar.set_position((item * of + done) as u64);
            }
        })
    };
    let collect = |item: usize, Found { coco, origin }: Found| {
        tally.add(item, &images[left[item]], origin);
        Ok(journal.push(&coco)?)
    };
    let left_names: Vec<String> = left.iter().map(|index| names[*index].clone()).collect();
    division.divide(&left_names, &bar, work, collect)?;
    bar.finish_and_clear();
    finder.embeddings.tell(&tally, console);
    if skipped > 0 {
        console.note(format!("{skipped} of {} images were done already", images.len()));
    }
    division.each(|| match division.is_first() {
        true => finish(options, journal, &images, console, skipped),
        false => Ok(()),
    })
}

/// Writes what is of all images, and tells the results.
fn finish(
    options: &Options,
    journal: Journal,
    images: &[PathBuf],
    console: Console,
    skipped: usize,
) -> anyhow::Result<()> {
    let (total, done) = (journal.masks(), journal.done());
    let names: Vec<String> = images.iter().map(|path| name_of(path)).collect();
    let json = journal.finish(&names)?;
    let is_drawn = |(path, name): &(&PathBuf, &String)| {
        done.get(*name).is_some_and(|(size, _)| options.results(path).is_drawn(*size))
    };
    let drawn = images.iter().zip(&names).filter(is_drawn).map(|(path, _)| path);
    let sheets = options.write_sheets(&drawn.collect::<Vec<_>>())?;
    let text = format!("{total} masks of {} images in {}", done.len(), json.display());
    let object = json!({
        "images": done.len(),
        "skipped": skipped,
        "masks": total,
        "coco": json,
        "sheets": sheets,
    });
    console.result(text, object);
    sheets.iter().for_each(|sheet| console.note(format!("contact sheet in {}", sheet.display())));
    Ok(())
}

/// The results of one image, as processes tell them.
#[derive(Serialize, Deserialize)]
struct Found {
    /// See [`coco_text`].
    coco: String,
    origin: Origin,
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
    /// Finds the masks of an image, writes its files and tells the result.
    fn find_and_write(
        &self,
        path: &Path,
        name: &str,
        turn: &Turn<'_>,
        progress: impl FnMut(usize, usize),
    ) -> anyhow::Result<Found> {
        let started = Instant::now();
        let (mut image, found, origin) = self.find(path, turn.console, progress)?;
        let object = self.options.results(path).write(&mut image, &found)?;
        let masks = &found.masks;
        let coco = coco_text(name, image.size(), masks)?;
        let best = best_iou(masks)
            .map_or_else(String::new, |best| format!(", expected IoU up to {best:.3}"));
        let (count, seconds) = (masks.len(), started.elapsed().as_secs_f64());
        let plural = if count == 1 { "" } else { "s" };
        let text = format!("{name}: {count} mask{plural}{best}, {seconds:.1} s");
        // Told once the journal has the image.
        let console = turn.console.kept();
        console.result(text, object);
        if masks.is_empty() {
            let advice = rejected::advice(&found.statistics, &self.generator);
            console.note(format!("{name}: nothing was good enough; {advice}"));
        }
        Ok(Found { coco, origin })
    }

    /// An image, its masks, and where its embedding came from; `progress` hears of points or tiles done and of all.
    fn find(
        &self,
        path: &Path,
        console: Console,
        progress: impl FnMut(usize, usize),
    ) -> anyhow::Result<(LargeImage, Generated, Origin)> {
        let Self { options, generator, predictor, embeddings, bar } = self;
        let photo = &options.photo;
        if let Some(tiling) = options.tiles.tiling() {
            let mut image = bar.suspend(|| photo.open(path, &tiling, console))?;
            let found = generator.generate_tiled(predictor, &mut image, &tiling, progress)?;
            return Ok((image, found, Origin::Unkept));
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
        let kept = embeddings.get(predictor, path)?;
        let origin = Origin::of(kept.as_ref());
        let found = match kept {
            Some(kept) => generator.generate_embedded(predictor, &kept.embedding, progress)?,
            None => generator.generate_counted(predictor, &image, progress)?,
        };
        Ok((image.into(), found, origin))
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

    /// Refuses results in the place of an image, and of files that may not be replaced.
    fn spare_files(&self, images: &[PathBuf]) -> anyhow::Result<()> {
        let FileArguments { sheet, columns, overwrite, resume, .. } = &self.files;
        let mut results: Vec<PathBuf> =
            images.iter().flat_map(|image| self.results(image).all()).collect();
        if let Some(path) = sheet {
            named_as_png(path, "contact sheet")?;
            results.extend(sheet::files(path, images.len(), (*columns).into()));
        }
        spare(images, &results)?;
        for path in results {
            if path.exists() && !overwrite && !resume {
                bail!(
                    "{}: exists already; choose another place, --resume or --overwrite",
                    path.display()
                )
            }
        }
        Ok(())
    }

    /// Draws the contact sheets of images with overlays, if they are wanted; returns their files.
    fn write_sheets(&self, images: &[&PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
        let Some(path) = &self.files.sheet else { return Ok(vec![]) };
        let overlay = |image: &&PathBuf| (name_of(image), self.results(image).overlay());
        let pictures: Vec<_> = images.iter().map(overlay).collect();
        sheet::write(path, &pictures, self.files.columns.into())
    }
}

/// The name that an image has in the results.
fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Begins the record of a run, or goes on with that of an earlier one of the same settings.
fn open_journal(
    options: &Options,
    images: &[PathBuf],
    truth: Option<&Dataset>,
    division: &Division,
) -> anyhow::Result<Journal> {
    let folder = &options.output;
    let earlier =
        journal::FILES.map(|name| folder.join(name)).into_iter().find(|path| path.exists());
    let settings = division.each(|| match &earlier {
        Some(path) if !options.files.overwrite && !options.files.resume => bail!(
            "{}: exists already; choose another --output, --resume or --overwrite",
            path.display()
        ),
        _ => {
            options.spare_files(images)?;
            Ok(options.settings(truth))
        }
    })?;
    division.make_folder(folder)?;
    // The first process writes it only after all have read it, for they wait for each other below.
    division.each(|| match options.files.resume {
        true => Journal::resume(folder, settings),
        false => Ok(Journal::begin(folder, settings)),
    })
}
