//! The results of a run: figures, pictures and the page.

use super::super::draw::save_png;
use super::super::sheet;
use super::judge::{Shown, Verdict};
use super::options::Options;
use super::output::{AUTOMATIC, CALIBRATION, LOSS, METRICS, OVERLAYS, PAGE, SHEET};
use super::page::Page;
use super::pictures::{automatic_picture, side_by_side};
use super::plots::Plot;
use super::report::{self, Outcome};
use crate::files::create_dir;
use crate::train::{Dataset, HeldOutScores, Sample};
use crate::write_atomic;
use image::RgbImage;
use serde_json::json;

/// Pictures in a row of the contact sheet.
const COLUMNS: usize = 3;

/// The results of a run.
pub struct Results<'a> {
    /// Its options.
    pub options: &'a Options,
    /// The trained part, in one line.
    pub trainable: &'a str,
    /// The images it was judged by.
    pub held_out: &'a Dataset,
    /// The figures.
    pub outcome: &'a Outcome,
    /// The held-out images before and after.
    pub verdicts: [&'a [Verdict]; 2],
}

/// Pictures of an image by its name: prompted masks and those found without a prompt, each before and after.
type Pictures = (String, Vec<[RgbImage; 2]>);

impl Results<'_> {
    /// Writes everything into the output folder, `metrics.json` last.
    pub fn write(&self) -> anyhow::Result<()> {
        let Self { options, trainable, outcome, verdicts: [before, after], .. } = *self;
        let folder = &options.output;
        let calibration =
            Plot::calibration(&report::calibration(before), &report::calibration(after));
        save_png(&folder.join(CALIBRATION), &calibration.png()?.into())?;
        let loss = Plot::loss(&outcome.losses, &options.loss.to_string());
        save_png(&folder.join(LOSS), &loss.png()?.into())?;
        let pictures = self.pictures()?;
        self.save(&pictures)?;
        let evaluations = Plot::evaluations(&outcome.evaluations);
        let plots: Vec<Plot> = [loss].into_iter().chain(evaluations).chain([calibration]).collect();
        let facts = [
            format!("{} steps, seed {}, {}", outcome.losses.len(), options.seed, trainable),
            format!("trained: {}; loss {}", options.train, options.loss),
            format!("batches: {}", json!(options.batch())),
        ];
        let page = Page { outcome, facts: &facts, plots: &plots, images: &pictures }.html()?;
        write_atomic(folder.join(PAGE), |file| file.write_all(page.as_bytes()))?;
        let metrics = report::metrics(options, trainable, outcome, before, after)?;
        Ok(write_atomic(folder.join(METRICS), |file| file.write_all(metrics.as_bytes()))?)
    }

    fn pictures(&self) -> anyhow::Result<Vec<Pictures>> {
        let Self { outcome, verdicts: [before, after], .. } = self;
        let mut pictures = vec![];
        for (index, pair) in before.iter().zip(*after).enumerate() {
            let (Some(left), Some(right)) = (&pair.0.shown, &pair.1.shown) else { continue };
            let mut of_image = vec![[left.prompted.clone(), right.prompted.clone()]];
            if outcome.before.masks.is_some() {
                let sample = self.held_out.load(index)?;
                of_image.push([
                    automatic(&sample, left, &outcome.before),
                    automatic(&sample, right, &outcome.after),
                ]);
            }
            pictures.push((pair.0.name.clone(), of_image));
        }
        Ok(pictures)
    }

    /// Writes each pair of pictures, and a sheet of those without prompts.
    fn save(&self, pictures: &[Pictures]) -> anyhow::Result<()> {
        let folder = &self.options.output;
        create_dir(folder.join(OVERLAYS))?;
        let mut on_sheet = vec![];
        for (name, of_image) in pictures {
            for (kind, [left, right]) in [OVERLAYS, AUTOMATIC].into_iter().zip(of_image) {
                create_dir(folder.join(kind))?;
                let path = folder.join(kind).join(format!("{name}.png"));
                save_png(&path, &side_by_side(left, right).into())?;
                if kind == AUTOMATIC {
                    on_sheet.push((name.clone(), path));
                }
            }
        }
        if !on_sheet.is_empty() {
            sheet::write(&folder.join(SHEET), &on_sheet, COLUMNS)?;
        }
        Ok(())
    }
}

/// The masks of an image from the cut on, drawn.
fn automatic(sample: &Sample, shown: &Shown, scores: &HeldOutScores) -> RgbImage {
    let cut = scores.masks.map_or(0.0, |masks| masks.sa_cut);
    let kept = shown.automatic.iter().filter(|(score, _)| f64::from(*score) >= cut);
    automatic_picture(sample, kept.map(|(_, mask)| mask))
}

/// Tells the figures, the main one last.
pub fn tell(options: &Options, outcome: &Outcome, objects: usize) {
    let (console, [before, after]) = (options.console, [&outcome.before, &outcome.after]);
    let change = |what: &str, before: f64, after: f64| {
        console.note(format!("{what}: {before:.4} before, {after:.4} after"));
    };
    let [first, last] = [before.objects, after.objects];
    change("held-out IoU with 3 prompts", first.iou_at_3, last.iou_at_3);
    change("held-out IoU with 5 prompts", first.iou_at_5, last.iou_at_5);
    change("predicted IoU off by", first.iou_error, last.iou_error);
    if let (Some(before), Some(after)) = (before.masks, after.masks) {
        change("automatic masks, AP at IoU 0.5 to 0.95", before.ap, after.ap);
        change("automatic masks, segmentation accuracy", before.sa, after.sa);
    }
    let text = format!(
        "held-out IoU, mean over {objects} objects: {:.4} before, {:.4} after",
        first.iou, last.iou
    );
    let object = json!({
        "output": options.output,
        "steps": outcome.losses.len(),
        "objects": objects,
        "before": before,
        "after": after,
    });
    console.result(text, object);
    let page = options.output.join(PAGE);
    console.note(format!(
        "results in {}, on one page in {}",
        options.output.display(),
        page.display()
    ));
}
