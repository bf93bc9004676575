//! Cuts an object out of a photograph:
//!
//! ```text
//! cargo run --release --example segment -- photo.jpg --point 320,200
//! cargo run --release --example segment -- photo.jpg --box 100,80,400,300 --model DIR --adapter DIR
//! ```

#[path = "shared/adapted.rs"]
mod adapted;
#[path = "shared/console.rs"]
mod console;
#[path = "shared/draw.rs"]
mod draw;
#[path = "shared/draw_prompts.rs"]
mod draw_prompts;
#[path = "shared/model.rs"]
mod model;
#[path = "shared/processor.rs"]
mod processor;

use anyhow::{anyhow, bail};
use candle_core::{Device, Tensor};
use candle_sam_lora::hub;
use candle_sam_lora::nn::Mode;
use candle_sam_lora::sam::{convert_to_rgb, is_transparent, read_image, Frame, SamInput};
use clap::Parser;
use image::GrayImage;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Cuts an object out of an image of any size and format
///
/// Points and a box together mean one object. Writes the mask (PNG, 0 and 255) and the image with mask and prompts
/// drawn in, and prints the IoU that the model expects.
#[derive(Parser)]
struct Options {
    /// The image
    image: PathBuf,
    /// A point in pixels: label 1 (or none) on the object, 0 off it; may be repeated
    #[arg(long = "point", value_name = "X,Y[,LABEL]", allow_hyphen_values = true)]
    points: Vec<String>,
    /// A box around the object, in pixels
    #[arg(long = "box", value_name = "X0,Y0,X1,Y1", allow_hyphen_values = true)]
    sides: Option<String>,
    /// Folder with config.json and safetensors weights, or, with the feature `hub`, OWNER/NAME[@REVISION] on the Hugging
    /// Face hub [default: the small SAM of this project]
    #[arg(long, value_name = "DIR|NAME")]
    model: Option<PathBuf>,
    /// Folder or name of a PEFT adapter
    #[arg(long, value_name = "DIR|NAME")]
    adapter: Option<PathBuf>,
    /// Take the best of several masks, for a prompt that could mean a part or the whole
    #[arg(long)]
    multimask: bool,
    /// Where the mask goes [default: <image>.mask.png in the current folder]
    #[arg(long, value_name = "FILE")]
    mask: Option<PathBuf>,
    /// Where the image with the mask goes [default: <image>.overlay.png in the current folder]
    #[arg(long, value_name = "FILE")]
    overlay: Option<PathBuf>,
    /// Replace files that exist
    #[arg(long)]
    overwrite: bool,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Prompts in pixels of the image.
struct Prompts {
    points: Vec<[f32; 2]>,
    labels: Vec<f32>,
    sides: Option<[f32; 4]>,
}

impl Prompts {
    fn parse(options: &Options, width: u32, height: u32) -> anyhow::Result<Self> {
        let inside = |x: f32, y: f32| x >= 0.0 && y >= 0.0 && x < width as f32 && y < height as f32;
        let mut prompts = Self { points: vec![], labels: vec![], sides: None };
        for text in &options.points {
            let (x, y, label) = match numbers(text)?[..] {
                [x, y] => (x, y, 1.0),
                [x, y, label] if label == 0.0 || label == 1.0 => (x, y, label),
                _ => bail!("--point {text}: expected X,Y or X,Y,LABEL with a label of 0 or 1"),
            };
            if !inside(x, y) {
                bail!("--point {text}: outside the image, which is {width} x {height} pixels")
            }
            prompts.points.push([x, y]);
            prompts.labels.push(label);
        }
        if let Some(text) = &options.sides {
            let [x0, y0, x1, y1] = numbers(text)?[..] else {
                bail!("--box {text}: expected X0,Y0,X1,Y1")
            };
            // The right and lower sides may be the image's own.
            let fits = inside(x0, y0) && x1 <= width as f32 && y1 <= height as f32;
            if !fits || x0 >= x1 || y0 >= y1 {
                bail!(
                    "--box {text}: expected X0 < X1 and Y0 < Y1 inside the image, which is {width} x {height} pixels"
                )
            }
            prompts.sides = Some([x0, y0, x1, y1]);
        }
        if prompts.points.is_empty() && prompts.sides.is_none() {
            bail!("say what to cut out: --point X,Y or --box X0,Y0,X1,Y1")
        }
        Ok(prompts)
    }

    /// In pixels of the model's input, as one object of one image.
    fn input(&self, frame: &Frame, device: &Device) -> candle_core::Result<SamInput> {
        let mut input = SamInput::default();
        if !self.points.is_empty() {
            let points =
                Tensor::from_slice(self.points.as_flattened(), (self.points.len(), 2), device)?;
            input.input_points = Some(frame.scale_points(&points)?.unsqueeze(0)?.unsqueeze(0)?);
            let labels = Tensor::new(self.labels.as_slice(), device)?;
            input.input_labels = Some(labels.unsqueeze(0)?.unsqueeze(0)?);
        }
        if let Some(sides) = self.sides {
            let sides = Tensor::new(&[sides], device)?;
            input.input_boxes = Some(frame.scale_boxes(&sides)?.unsqueeze(0)?);
        }
        Ok(input)
    }
}

fn numbers(text: &str) -> anyhow::Result<Vec<f32>> {
    let number = |part: &str| match part.trim().parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err(anyhow!("{text}: {part:?} is no number")),
    };
    text.split(',').map(number).collect()
}

/// The given path, or one named after the image; refused if something is there already.
fn destination(options: &Options, path: &Option<PathBuf>, ending: &str) -> anyhow::Result<PathBuf> {
    let stem = options.image.file_stem().unwrap_or_default().to_string_lossy();
    let path = path.clone().unwrap_or_else(|| Path::new(&format!("{stem}.{ending}.png")).into());
    if path.canonicalize().is_ok_and(|path| options.image.canonicalize().is_ok_and(|i| i == path)) {
        bail!("{}: is the image itself; choose another place", path.display())
    }
    if path.exists() && !options.overwrite {
        bail!("{}: exists already; choose another place or --overwrite", path.display())
    }
    Ok(path)
}

fn run(options: &Options) -> anyhow::Result<()> {
    let device = model::device(&options.device)?;
    let mask_path = destination(options, &options.mask, "mask")?;
    let overlay_path = destination(options, &options.overlay, "overlay")?;
    if mask_path == overlay_path {
        bail!("--mask and --overlay are both {}", mask_path.display())
    }
    let image = read_image(&options.image)?;
    if is_transparent(&image) {
        console::say(format!("{}: transparent pixels are laid on white", options.image.display()));
    }
    let prompts = Prompts::parse(options, image.width(), image.height())?;
    let folder = model::folder(options.model.as_deref())?;
    let adapter = options.adapter.as_ref().map(hub::folder).transpose()?;
    let (config, sam) = adapted::load_adapted(&folder, adapter.as_deref(), &device)?;
    let processor = processor::load(&folder, &config)?;
    let (pixel_values, frame) = processor.preprocess(&image, &device)?;
    let input = SamInput {
        pixel_values: Some(pixel_values),
        multimask_output: options.multimask,
        ..prompts.input(&frame, &device)?
    };
    let output = sam.forward(&input, Mode::Eval)?;
    let scores = output.iou_scores.flatten_all()?.to_vec1::<f32>()?;
    let Some(best) = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])) else {
        bail!("the model gave no mask")
    };
    let mask = output.pred_masks.squeeze(0)?.squeeze(0)?.get(best)?;
    let mask = processor.post_process_masks(&mask, &frame, 0.0)?.flatten_all()?.to_vec1::<u8>()?;
    let inside: Vec<bool> = mask.iter().map(|value| *value > 0).collect();
    let values: Vec<u8> = mask.iter().map(|value| value * 255).collect();
    let mask = GrayImage::from_raw(image.width(), image.height(), values)
        .ok_or_else(|| anyhow!("the mask is not of the image's size"))?;
    let mut overlay = convert_to_rgb(&image)?;
    draw::fill(&mut overlay, &inside, draw::colour(0));
    draw::outline(&mut overlay, &inside, draw_prompts::WHITE);
    for point in &prompts.points {
        draw_prompts::cross(&mut overlay, *point, draw_prompts::WHITE);
    }
    if let Some(sides) = prompts.sides {
        draw_prompts::rectangle(&mut overlay, sides, draw_prompts::WHITE);
    }
    draw::save_png(&mask_path, &mask.into())?;
    draw::save_png(&overlay_path, &overlay.into())?;
    let area = inside.iter().filter(|inside| **inside).count();
    let percent = 100.0 * area as f64 / inside.len() as f64;
    console::say(format!("expected IoU {:.4}, {area} pixels ({percent:.1} %)", scores[best]));
    console::say(format!("{} and {}", mask_path.display(), overlay_path.display()));
    Ok(())
}

pub fn main() -> ExitCode {
    console::exit_code(run(&Options::parse()))
}
