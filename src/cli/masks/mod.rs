//! `masks`: everything in images, without a prompt.

mod journal;
mod options;
mod rejected;
mod results;

pub use options::Options;

use super::photo::images;
use super::sheet;
use crate::files;
use crate::sam::SamPredictor;
use anyhow::bail;
use journal::Journal;
use results::Results;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub fn run(options: &Options) -> anyhow::Result<()> {
    let console = options.console;
    let place = options.backend.open()?;
    let images = images(&options.images)?;
    let mut journal = open_journal(options)?;
    let source = options.model.find(console)?;
    let sam = source.load(&place, console)?;
    let processor = source.processor(sam.config(), console)?;
    let predictor = SamPredictor::with_processor(&sam, processor);
    let generator = options.generator.generator();
    let bar = console.bar(0, "points  {msg}");
    let (mut skipped, mut made) = (0, 0);
    for path in &images {
        let started = Instant::now();
        let name = name_of(path);
        let results = options.results(path);
        if journal.masks_of(&name).is_some_and(|count| results.are_whole(count)) {
            skipped += 1;
            continue;
        }
        let image = bar.suspend(|| options.photo.read(path, console))?;
        bar.set_message(format!("{name} ({} of {})", skipped + made + 1, images.len()));
        let masks = generator.generate_with(&predictor, &image, |done, of| {
            bar.set_length(((images.len() - skipped) * of) as u64);
            bar.set_position((made * of + done) as u64);
        })?;
        let object = results.write(&image, &masks)?;
        journal.push(&name, (image.height(), image.width()), &masks)?;
        made += 1;
        let best = masks
            .first()
            .map_or_else(String::new, |mask| format!(", expected IoU up to {:.3}", mask.iou_score));
        let text = format!(
            "{name}: {} masks{best}, {:.1} s",
            masks.len(),
            started.elapsed().as_secs_f64()
        );
        bar.suspend(|| console.result(text, object));
        if masks.is_empty() {
            let advice = rejected::advice(&generator, &predictor, &image)?;
            bar.suspend(|| console.note(format!("{name}: nothing was good enough; {advice}")));
        }
    }
    bar.finish_and_clear();
    if skipped > 0 {
        console.note(format!("{skipped} of {} images were done already", images.len()));
    }
    let (total, json) = (journal.masks(), journal.finish()?);
    let sheets = options.write_sheets(&images)?;
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

impl Options {
    fn results<'a>(&'a self, image: &'a Path) -> Results<'a> {
        Results { folder: &self.output, image, each: self.files.each }
    }

    /// Draws the contact sheets, if they are wanted; returns their files.
    fn write_sheets(&self, images: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
        let Some(path) = &self.files.sheet else { return Ok(vec![]) };
        let overlay = |image: &PathBuf| (name_of(image), self.results(image).overlay());
        let pictures: Vec<_> = images.iter().map(overlay).collect();
        sheet::write(path, &pictures, self.files.columns)
    }
}

/// The name that an image has in the results.
fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Begins the record of a run, or goes on with that of an earlier one of the same settings.
fn open_journal(options: &Options) -> anyhow::Result<Journal> {
    let folder = &options.output;
    let settings = options.settings();
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
