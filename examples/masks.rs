//! Finds everything in photographs:
//!
//! ```text
//! cargo run --release --example masks -- photo.jpg
//! cargo run --release --example masks -- FOLDER --model DIR --adapter DIR --output everything
//! ```

#[path = "shared/adapted.rs"]
mod adapted;
#[path = "shared/console.rs"]
mod console;
#[path = "shared/draw.rs"]
mod draw;
#[path = "shared/model.rs"]
mod model;
#[path = "shared/photo.rs"]
mod photo;
#[path = "shared/processor.rs"]
mod processor;

use anyhow::bail;
use candle_sam_lora::sam::{
    convert_to_rgb, label_image, save_labels, CocoAnnotations, GeneratedMask, MaskGenerator,
    SamPredictor,
};
use candle_sam_lora::{files, hub};
use clap::Parser;
use image::{GrayImage, RgbImage};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Endings of the files that are taken as images in a folder.
const ENDINGS: [&str; 9] = ["png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "gif", "pnm"];

/// Finds everything in images: masks of all objects, without a prompt
///
/// Writes masks.json (COCO, run lengths), and for each image its labels (16 bits, 0 is background) and the image with
/// all masks drawn in.
#[derive(Parser)]
struct Options {
    /// Images, or folders of images
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// File or folder of weights, or, with the feature `hub`, OWNER/NAME[@REVISION] on the Hugging Face hub [default: the
    /// adapter's base, without an adapter the small SAM of this project]
    #[arg(long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    /// Folder or name of a PEFT adapter
    #[arg(long, value_name = "DIR|NAME")]
    adapter: Option<PathBuf>,
    /// Folder that gets the results
    #[arg(long, value_name = "DIR", default_value = "masks")]
    output: PathBuf,
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
    /// Layers of crops, for small objects: layer n has 4^n crops, each encoded by itself
    #[arg(long, default_value_t = 0)]
    crop_layers: u32,
    /// Fill holes and remove islands of fewer pixels
    #[arg(long, default_value_t = 0)]
    min_area: usize,
    #[command(flatten)]
    photo: photo::PhotoArgs,
    /// Write each mask as a PNG of its own, too
    #[arg(long)]
    each: bool,
    /// Replace files that exist
    #[arg(long)]
    overwrite: bool,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl Options {
    fn generator(&self) -> MaskGenerator {
        MaskGenerator {
            points_per_side: self.points_per_side,
            points_per_batch: self.points_per_batch,
            pred_iou_thresh: self.iou,
            stability_score_thresh: self.stability,
            crop_nms_thresh: self.nms,
            crop_n_layers: self.crop_layers,
            min_mask_region_area: self.min_area,
            ..MaskGenerator::default()
        }
    }
}

/// The images that are named, and those of the folders that are, in the order of their names; no two with one stem.
fn images(named: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut images = vec![];
    for path in named {
        if !path.is_dir() {
            images.push(path.clone());
            continue;
        }
        let ending = |path: &Path| {
            let ending = path.extension().and_then(|ending| ending.to_str());
            ending.is_some_and(|e| ENDINGS.contains(&e.to_ascii_lowercase().as_str()))
        };
        let mut found = vec![];
        for entry in std::fs::read_dir(path)? {
            let path = entry?.path();
            let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            if path.is_file() && ending(&path) && !hidden {
                found.push(path);
            }
        }
        if found.is_empty() {
            bail!("{}: the folder has no image ({})", path.display(), ENDINGS.join(", "))
        }
        found.sort();
        images.extend(found);
    }
    let mut stems: Vec<_> = images.iter().map(|path| (path.file_stem(), path)).collect();
    stems.sort();
    if let Some(two) = stems.windows(2).find(|two| two[0].0 == two[1].0) {
        bail!(
            "{} and {}: the results would have the same names",
            two[0].1.display(),
            two[1].1.display()
        )
    }
    Ok(images)
}

fn draw_all(image: &mut RgbImage, masks: &[GeneratedMask]) {
    let mut largest_first: Vec<(usize, &GeneratedMask)> = masks.iter().enumerate().collect();
    largest_first.sort_by_key(|(_, mask)| std::cmp::Reverse(mask.mask.area()));
    for (index, mask) in largest_first {
        let inside = mask.mask.to_mask();
        draw::fill(image, &inside, draw::colour(index));
        draw::outline(image, &inside, draw::colour(index));
    }
}

fn bar(points: u64) -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::new(points);
    bar.set_style(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} points, {eta}")?);
    Ok(bar)
}

fn run(options: &Options) -> anyhow::Result<()> {
    let device = model::device(&options.device)?;
    let images = images(&options.images)?;
    let json = options.output.join("masks.json");
    if json.exists() && !options.overwrite {
        bail!("{}: exists already; choose another --output or --overwrite", json.display())
    }
    let adapter = options.adapter.as_ref().map(hub::folder).transpose()?;
    let folder = adapted::base(options.model.as_deref(), adapter.as_deref())?;
    let (config, sam) = adapted::load_adapted(&folder, adapter.as_deref(), &device)?;
    let processor = processor::load(&folder, &config)?;
    let predictor = SamPredictor::with_processor(&sam, processor);
    let generator = options.generator();
    files::create_dir(&options.output)?;
    let mut annotations = CocoAnnotations::default();
    let mut total = 0;
    for path in &images {
        let started = Instant::now();
        let image = options.photo.read(path)?;
        let size = (image.height(), image.width());
        let bar = bar(0)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        bar.set_message(name.clone());
        let masks = generator.generate_with(&predictor, &image, |done, of| {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let file = |ending: &str| options.output.join(format!("{stem}.{ending}"));
        let ending = if masks.len() > 65535 { "labels.tif" } else { "labels.png" };
        save_labels(file(ending), &label_image(&masks, size), size)?;
        let mut overlay = convert_to_rgb(&image)?;
        draw_all(&mut overlay, &masks);
        draw::save_png(&file("overlay.png"), &overlay.into())?;
        for (index, mask) in masks.iter().enumerate().filter(|_| options.each) {
            let values = mask.mask.to_mask().into_iter().map(|inside| u8::from(inside) * 255);
            let Some(mask) = GrayImage::from_raw(size.1, size.0, values.collect()) else {
                bail!("{}: a mask is not of the image's size", path.display())
            };
            draw::save_png(&file(&format!("{:04}.png", index + 1)), &mask.into())?;
        }
        let best = masks
            .first()
            .map_or_else(String::new, |mask| format!(", expected IoU up to {:.3}", mask.iou_score));
        console::say(format!(
            "{name}: {} masks{best}, {:.1} s",
            masks.len(),
            started.elapsed().as_secs_f64()
        ));
        if masks.is_empty() {
            console::say(format!(
                "{name}: nothing was good enough; lower --iou (now {}) or --stability (now {})",
                options.iou, options.stability
            ));
        }
        total += masks.len();
        annotations.push(&name, size, &masks);
        // After each image, so that a run that is stopped leaves what it found.
        annotations.save(&json)?;
    }
    console::say(format!("{total} masks of {} images in {}", images.len(), json.display()));
    Ok(())
}

pub fn main() -> ExitCode {
    console::exit_code(run(&Options::parse()))
}
