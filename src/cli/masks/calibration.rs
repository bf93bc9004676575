//! Thresholds that are chosen on images with true masks.

use super::super::console::Console;
use crate::sam::{Calibration, MaskGenerator, ReadOptions, Rle, SamPredictor};
use crate::train::{Dataset, DatasetOptions};
use crate::Result;
use image::DynamicImage;
use serde_json::json;
use std::path::PathBuf;

/// True objects of fewer pixels do not count, as in training.
const MIN_AREA: usize = 20;

/// Images that thresholds are chosen on
#[derive(clap::Args, Clone, Debug)]
pub struct CalibrationArguments {
    /// Choose --iou, --stability and --mask-nms on the images of this folder, print them and use them; without IMAGES
    /// print them only. A --mask-nms that is given stays
    #[arg(
        long,
        value_name = "DIR",
        requires = "calibrate_truth",
        conflicts_with_all = ["iou", "stability"]
    )]
    calibrate_images: Option<PathBuf>,
    /// Folder of their masks, read as those of `finetune`
    #[arg(long, value_name = "DIR", requires = "calibrate_images", group = "calibrate_truth")]
    calibrate_masks: Option<PathBuf>,
    /// Instead of masks, COCO's instances JSON
    #[arg(long, value_name = "FILE", requires = "calibrate_images", group = "calibrate_truth")]
    calibrate_coco: Option<PathBuf>,
}

impl CalibrationArguments {
    /// The images and their true objects, if they are named. Says what was understood.
    pub fn open(&self, images: ReadOptions, console: Console) -> Result<Option<Dataset>> {
        let options = DatasetOptions { images, ..DatasetOptions::min_area(MIN_AREA) };
        let truth = match (&self.calibrate_images, &self.calibrate_masks, &self.calibrate_coco) {
            (Some(images), Some(masks), _) => Dataset::open(images, masks, &options)?,
            (Some(images), None, Some(coco)) => Dataset::open_coco(images, coco, &options)?,
            _ => return Ok(None),
        };
        truth
            .summary()
            .lines()
            .iter()
            .for_each(|line| console.note(format!("calibration: {line}")));
        Ok(Some(truth))
    }
}

/// The generator with the thresholds that do best on `truth`. Tells them.
pub fn calibrated(
    generator: MaskGenerator,
    predictor: &SamPredictor<'_>,
    truth: &Dataset,
    console: Console,
) -> Result<MaskGenerator> {
    let bar = console.bar(truth.len() as u64, "images to calibrate on");
    let images = (0..truth.len()).map(|index| {
        bar.set_position(index as u64);
        image_and_objects(truth, index)
    });
    let found = generator.calibrate(predictor, images)?;
    bar.finish_and_clear();
    tell(&found, truth.len(), console);
    Ok(MaskGenerator {
        pred_iou_thresh: found.pred_iou_thresh,
        stability_score_thresh: found.stability_score_thresh,
        mask_nms_thresh: found.mask_nms_thresh,
        ..generator
    })
}

fn image_and_objects(truth: &Dataset, index: usize) -> Result<(DynamicImage, Vec<Rle>)> {
    let sample = truth.load(index)?;
    let objects = sample.instances.iter().map(|i| sample.object(i)).collect::<Result<_>>()?;
    Ok((sample.image.into(), objects))
}

fn tell(found: &Calibration, images: usize, console: Console) {
    let (precision, recall, warning) = (found.precision(), found.recall(), found.warning());
    let said = warning.as_ref().map_or_else(String::new, |why| format!("\nwarning: {why}"));
    let nms = found.mask_nms_thresh.map_or_else(String::new, |iou| format!(" --mask-nms {iou}"));
    let text = format!(
        "calibrated on {images} images: --iou {} --stability {}{nms}: precision {precision:.3} ({} masks), recall {recall:.3} ({} \
         of {} objects){said}",
        found.pred_iou_thresh, found.stability_score_thresh, found.kept, found.found, found.objects
    );
    let object = json!({
        "calibration": found,
        "images": images,
        "precision": precision,
        "recall": recall,
        "warning": warning,
    });
    console.result(text, object);
}
