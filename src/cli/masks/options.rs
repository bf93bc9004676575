//! The command line of `masks`, in groups: what is found, what is written.

use super::super::arguments::{check_fractions, Backend, ModelArguments};
use super::super::console::Console;
use super::super::embeddings::EmbeddingArguments;
use super::super::photo::PhotoArguments;
use super::super::processes::Processes;
use super::calibration::CalibrationArguments;
use crate::sam::{MaskGenerator, Ranking, Tiling};
use crate::train::Dataset;
use anyhow::bail;
use serde_json::{json, Value};
use std::path::PathBuf;

/// Finds everything in images: masks of all objects, without a prompt
///
/// Writes masks.json (COCO, run lengths). Each image gets its labels (16 bits, 0 is background) and a copy with all
/// masks drawn in. masks.jsonl gets a line after each image. From it --resume goes on, whatever stopped the run.
#[derive(clap::Args)]
pub struct Options {
    /// Images, or folders of images
    #[arg(required_unless_present = "calibrate_images")]
    pub images: Vec<PathBuf>,
    #[command(flatten)]
    pub model: ModelArguments,
    #[command(flatten)]
    pub photo: PhotoArguments,
    #[command(flatten)]
    pub generator: GeneratorArguments,
    #[command(flatten)]
    pub calibration: CalibrationArguments,
    #[command(flatten)]
    pub tiles: TileArguments,
    #[command(flatten)]
    pub embeddings: EmbeddingArguments,
    /// Folder that gets the results
    #[arg(long, value_name = "DIR", default_value = "masks")]
    pub output: PathBuf,
    #[command(flatten)]
    pub files: FileArguments,
    #[command(flatten)]
    pub processes: Processes,
    #[command(flatten)]
    pub backend: Backend,
    #[command(flatten)]
    pub console: Console,
}

impl Options {
    /// The results depend on these, beside the images. `truth` has the images that thresholds are chosen on.
    pub fn settings(&self, truth: Option<&Dataset>) -> Value {
        json!({
            "model": format!("{:?}", self.model),
            "photo": format!("{:?}", self.photo),
            "generator": format!("{:?}", self.generator.generator()),
            "calibration": truth.map(Dataset::fingerprint),
            "tiles": format!("{:?}", self.tiles.tiling()),
            "backend": format!("{:?}", self.backend),
        })
    }

    /// Refuses flags about results where no image is named that would have some.
    pub fn check_idle(&self) -> anyhow::Result<()> {
        let FileArguments { each, geojson, sheet, overwrite, resume, .. } = &self.files;
        let flags = [
            ("--each", *each),
            ("--geojson", *geojson),
            ("--sheet", sheet.is_some()),
            ("--overwrite", *overwrite),
            ("--resume", *resume),
            ("--tile", self.tiles.tile.is_some()),
            ("--embeddings", self.embeddings.is_given()),
        ];
        match flags.iter().find(|(_, is_given)| *is_given && self.images.is_empty()) {
            Some((flag, _)) => bail!("{flag} has no effect without IMAGES"),
            None => Ok(()),
        }
    }
}

/// How masks are found
#[derive(clap::Args, Clone, Debug)]
pub struct GeneratorArguments {
    /// Points along each side of the image
    #[arg(long, default_value_t = 32)]
    points_per_side: usize,
    /// Points that are decoded at a time
    #[arg(long, default_value_t = 64)]
    points_per_batch: usize,
    /// Masks need a higher predicted IoU
    #[arg(long, default_value_t = 0.88)]
    iou: f64,
    /// Masks need a higher stability
    #[arg(long, default_value_t = 0.95)]
    stability: f64,
    /// One of two masks goes whose boxes overlap by a higher IoU
    #[arg(long, default_value_t = 0.7)]
    nms: f64,
    /// The worse of two masks goes that overlap by a higher IoU. The value 0.3 suits objects that do not cover each
    /// other [default: boxes alone]
    #[arg(long, value_name = "IOU")]
    mask_nms: Option<f64>,
    /// Which of two masks is better: by predicted IoU (iou), as SAM has it, or by predicted IoU times stability
    /// (iou-stability)
    #[arg(long, default_value_t, value_name = "iou|iou-stability")]
    ranking: Ranking,
    /// Layers of crops, for small objects: layer n has 4^n crops, each encoded by itself
    #[arg(long, default_value_t = 0, conflicts_with = "embeddings")]
    crop_layers: u32,
    /// Fill holes and remove islands of fewer pixels
    #[arg(long, default_value_t = 0)]
    min_area: usize,
}

impl GeneratorArguments {
    /// Refuses settings that no generator has, or that find nothing.
    pub fn check(&self) -> anyhow::Result<()> {
        self.generator().validate()?;
        check_fractions(&[
            ("--stability", Some(self.stability)),
            ("--nms", Some(self.nms)),
            ("--mask-nms", self.mask_nms),
        ])
    }

    /// The generator of these settings.
    pub fn generator(&self) -> MaskGenerator {
        MaskGenerator {
            points_per_side: self.points_per_side,
            points_per_batch: self.points_per_batch,
            pred_iou_thresh: self.iou,
            stability_score_thresh: self.stability,
            ranking: self.ranking,
            crop_nms_thresh: self.nms,
            mask_nms_thresh: self.mask_nms,
            crop_n_layers: self.crop_layers,
            min_mask_region_area: self.min_area,
            ..MaskGenerator::default()
        }
    }
}

/// How large images are cut
#[derive(clap::Args, Clone, Debug)]
pub struct TileArguments {
    /// Segment images in tiles of at most so many pixels a side: for images that do not fit into memory, or have small
    /// objects. TIFFs are read in parts; labels are a TIFF of 32 bits; images of more than 50 megapixels get no overlay
    #[arg(long, value_name = "SIDE", conflicts_with_all = ["embeddings", "each"])]
    tile: Option<u32>,
    /// Pixels around a tile that the model sees too: half an object or more
    #[arg(long, value_name = "PIXELS", default_value_t = Tiling::default().halo, requires = "tile")]
    halo: u32,
}

impl TileArguments {
    /// The tiles, if there are any.
    pub fn tiling(&self) -> Option<Tiling> {
        self.tile.map(|tile| Tiling { tile, halo: self.halo, ..Tiling::default() })
    }
}

/// The files that are written and may be replaced
#[derive(clap::Args, Clone, Debug)]
pub struct FileArguments {
    /// Write each mask as a PNG of its own, too
    #[arg(long)]
    pub each: bool,
    /// Write the masks as polygons in pixels, too: IMAGE.geojson, for QGIS, QuPath and GeoPandas
    #[arg(long)]
    pub geojson: bool,
    /// Draw a contact sheet, too: small pictures of all images with their masks, names below
    #[arg(long, value_name = "FILE.png")]
    pub sheet: Option<PathBuf>,
    /// Pictures in a row of the sheet
    #[arg(
        long,
        default_value_t = 5,
        value_name = "N",
        requires = "sheet",
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    pub columns: u16,
    /// Replace files that exist
    #[arg(long)]
    pub overwrite: bool,
    /// Go on with the run in the output folder: images whose results are there and whole are skipped
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,
}
