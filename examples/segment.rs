//! Cuts objects out of a photograph:
//!
//! ```text
//! cargo run --release --example segment -- photo.jpg --point 320,200
//! cargo run --release --example segment -- photo.jpg --box 100,80,400,300 --box 10,10,90,90 --model sam_vit_b.pth
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
#[path = "shared/photo.rs"]
mod photo;
#[path = "shared/processor.rs"]
mod processor;

use anyhow::{anyhow, bail};
use candle_sam_lora::hub;
use candle_sam_lora::sam::{convert_to_rgb, Prompt, SamPredictor};
use clap::Parser;
use image::GrayImage;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Cuts objects out of an image of any size and format
///
/// Points and a box of one object belong together. Writes the mask (PNG; 0 and 255, or the number of the object where
/// there are several) and the image with masks and prompts drawn in, and prints the IoU that the model expects.
#[derive(Parser)]
struct Options {
    /// The image
    image: PathBuf,
    /// A point in pixels: label 1 (or none) on the object, 0 off it. It belongs to object 1, or to the
    /// object that it numbers; may be repeated
    #[arg(long = "point", value_name = "X,Y[,LABEL[,OBJECT]]", allow_hyphen_values = true)]
    points: Vec<String>,
    /// A box around an object, in pixels; clipped to the image. May be repeated: the first is of object 1, the next of
    /// object 2
    #[arg(long = "box", value_name = "X0,Y0,X1,Y1", allow_hyphen_values = true)]
    boxes: Vec<String>,
    /// File of weights or folder with them, or, with the feature `hub`, OWNER/NAME[@REVISION] on the Hugging Face hub
    /// [default: the adapter's base model; without an adapter, the small SAM of this project]
    #[arg(long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    /// Folder, file or name of a PEFT adapter, or a LoRA file of SAMed or micro-sam
    #[arg(long, value_name = "PATH|NAME")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    photo: photo::PhotoArgs,
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

/// The most objects of one run: each is a value of an 8-bit mask.
const MAX_OBJECTS: usize = 255;

/// Prompts of one object, in pixels of the image.
#[derive(Clone, Default)]
struct Prompts {
    points: Vec<[f32; 2]>,
    labels: Vec<f32>,
    sides: Option<[f32; 4]>,
}

impl Prompts {
    /// The prompts of each object.
    fn parse(options: &Options, width: u32, height: u32) -> anyhow::Result<Vec<Self>> {
        let size = format!("{width} x {height} pixels");
        let (width, height) = (width as f32, height as f32);
        let mut objects: Vec<Self> = Vec::new();
        let (mut largest, mut fractions) = (0f32, false);
        for text in &options.boxes {
            let [x0, y0, x1, y1] = numbers(text)?[..] else {
                bail!("--box {text}: expected X0,Y0,X1,Y1")
            };
            if x0 >= x1 || y0 >= y1 {
                bail!("--box {text}: expected X0 < X1 and Y0 < Y1; X1,Y1 is a corner, not a size")
            }
            let clipped = [
                x0.clamp(0.0, width),
                y0.clamp(0.0, height),
                x1.clamp(0.0, width),
                y1.clamp(0.0, height),
            ];
            if clipped[0] >= clipped[2] || clipped[1] >= clipped[3] {
                bail!("--box {text}: outside the image, which is {size}")
            }
            if clipped != [x0, y0, x1, y1] {
                let [x0, y0, x1, y1] = clipped;
                console::say(format!("--box {text}: clipped to the image, {x0},{y0},{x1},{y1}"));
            }
            largest = largest.max(clipped[2]).max(clipped[3]);
            fractions = true;
            objects.push(Self { sides: Some(clipped), ..Self::default() });
        }
        for text in &options.points {
            let (x, y, label, object) = match numbers(text)?[..] {
                [x, y] => (x, y, 1.0, 1.0),
                [x, y, label] => (x, y, label, 1.0),
                [x, y, label, object] => (x, y, label, object),
                _ => bail!("--point {text}: expected X,Y or X,Y,LABEL or X,Y,LABEL,OBJECT"),
            };
            if label != 0.0 && label != 1.0 {
                bail!("--point {text}: expected a label of 0 or 1")
            }
            if !(1.0..=MAX_OBJECTS as f32).contains(&object) || object.fract() != 0.0 {
                bail!("--point {text}: expected the number of an object, 1 to {MAX_OBJECTS}")
            }
            if !((0.0..width).contains(&x) && (0.0..height).contains(&y)) {
                bail!("--point {text}: outside the image, which is {size}")
            }
            largest = largest.max(x).max(y);
            fractions |= x.fract() != 0.0 || y.fract() != 0.0;
            let index = object as usize - 1;
            objects.resize(objects.len().max(index + 1), Self::default());
            objects[index].points.push([x, y]);
            objects[index].labels.push(label);
        }
        if objects.is_empty() {
            bail!("say what to cut out: --point X,Y or --box X0,Y0,X1,Y1")
        }
        if objects.len() > MAX_OBJECTS {
            bail!("{} objects: one run takes {MAX_OBJECTS} at most", objects.len())
        }
        if let Some(empty) = objects.iter().position(|o| o.points.is_empty() && o.sides.is_none()) {
            bail!("object {} of {} has neither point nor box", empty + 1, objects.len())
        }
        if fractions && largest <= 1.0 && width.min(height) > 2.0 {
            console::say(format!(
                "all coordinates are within 0 to 1: they are taken as pixels of the image of {size}, not as fractions of it"
            ));
        }
        Ok(objects)
    }

    fn prompt(&self) -> Prompt {
        let mut prompt = Prompt { bounds: self.sides, ..Prompt::default() };
        for ([x, y], label) in self.points.iter().zip(&self.labels) {
            prompt = prompt.and_at(*x, *y, *label > 0.0);
        }
        prompt
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
    let image = options.photo.read(&options.image)?;
    let objects = Prompts::parse(options, image.width(), image.height())?;
    let adapter = options.adapter.as_ref().map(hub::folder).transpose()?;
    let folder = adapted::base(options.model.as_deref(), adapter.as_deref())?;
    let (config, sam) = adapted::load_adapted(&folder, adapter.as_deref(), &device)?;
    let processor = processor::load(&folder, &config)?;
    let predictor = SamPredictor::with_processor(&sam, processor);
    let embedding = predictor.embed(&image)?;
    let prompts: Vec<Prompt> = objects.iter().map(Prompts::prompt).collect();
    let found = predictor.predict(&embedding, &prompts, options.multimask)?;
    let mut overlay = convert_to_rgb(&image)?;
    let mut labels = vec![0u8; image.width() as usize * image.height() as usize];
    for (index, prediction) in found.iter().enumerate() {
        let best = prediction.best();
        let mask = predictor.mask(&embedding, prediction, best)?;
        let inside = mask.to_mask();
        let value = if objects.len() == 1 { 255 } else { (index + 1) as u8 };
        labels.iter_mut().zip(&inside).filter(|(_, inside)| **inside).for_each(|(v, _)| *v = value);
        draw::fill(&mut overlay, &inside, draw::colour(index));
        draw::outline(&mut overlay, &inside, draw_prompts::WHITE);
        let (area, pixels) = (mask.area(), inside.len());
        let percent = 100.0 * area as f64 / pixels as f64;
        let object =
            if objects.len() == 1 { String::new() } else { format!("object {}: ", index + 1) };
        console::say(format!(
            "{object}expected IoU {:.4}, {area} pixels ({percent:.1} %)",
            prediction.iou_scores[best]
        ));
    }
    for prompts in &objects {
        for point in &prompts.points {
            draw_prompts::cross(&mut overlay, *point, draw_prompts::WHITE);
        }
        if let Some(sides) = prompts.sides {
            draw_prompts::rectangle(&mut overlay, sides, draw_prompts::WHITE);
        }
    }
    let mask = GrayImage::from_raw(image.width(), image.height(), labels)
        .ok_or_else(|| anyhow!("the mask is not of the image's size"))?;
    draw::save_png(&mask_path, &mask.into())?;
    draw::save_png(&overlay_path, &overlay.into())?;
    if objects.len() > 1 {
        console::say("where objects overlap, the mask has the number of the later one");
    }
    console::say(format!("{} and {}", mask_path.display(), overlay_path.display()));
    Ok(())
}

pub fn main() -> ExitCode {
    console::exit_code(run(&Options::parse()))
}
