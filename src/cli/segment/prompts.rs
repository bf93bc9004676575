//! Prompts from the command line's words.

use super::super::console::Console;
use crate::sam::Prompt;
use anyhow::{anyhow, bail};

/// Points and boxes
#[derive(clap::Args, Clone, Debug)]
pub struct PromptArguments {
    /// A point in pixels: label 1 (or none) on the object, 0 off it. It belongs to object 1, or to the
    /// object that it numbers; may be repeated
    #[arg(long = "point", value_name = "X,Y[,LABEL[,OBJECT]]", allow_hyphen_values = true)]
    points: Vec<String>,
    /// A box around an object, in pixels; clipped to the image. May be repeated: the first is of object 1, the next of
    /// object 2
    #[arg(long = "box", value_name = "X0,Y0,X1,Y1", allow_hyphen_values = true)]
    boxes: Vec<String>,
}

/// The most objects of one run: each is a value of an 8-bit mask.
const MAX_OBJECTS: usize = 255;

/// Prompts of one object, in pixels of the image.
#[derive(Clone, Default)]
pub struct Prompts {
    /// Pixels from the left and from above.
    pub points: Vec<[f32; 2]>,
    labels: Vec<f32>,
    /// `[x0, y0, x1, y1]`.
    pub sides: Option<[f32; 4]>,
}

impl Prompts {
    /// The prompts of each object in an image of this width and height.
    pub fn parse(
        given: &PromptArguments,
        (width, height): (u32, u32),
        console: Console,
    ) -> anyhow::Result<Vec<Self>> {
        let size = format!("{width} x {height} pixels");
        let (width, height) = (width as f32, height as f32);
        let mut objects: Vec<Self> = Vec::new();
        let (mut largest, mut fractions) = (0f32, false);
        for text in &given.boxes {
            let [x0, y0, x1, y1] = numbers("--box", text)?[..] else {
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
                console.note(format!("--box {text}: clipped to the image, {x0},{y0},{x1},{y1}"));
            }
            largest = largest.max(clipped[2]).max(clipped[3]);
            fractions = true;
            objects.push(Self { sides: Some(clipped), ..Self::default() });
        }
        for text in &given.points {
            let (x, y, label, object) = match numbers("--point", text)?[..] {
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
            console.note(format!(
                "all coordinates are within 0 to 1: they are taken as pixels of the image of {size}, not as fractions \
                 of it"
            ));
        }
        Ok(objects)
    }

    /// As the model takes them.
    pub fn prompt(&self) -> Prompt {
        let mut prompt = Prompt { bounds: self.sides, ..Prompt::default() };
        for ([x, y], label) in self.points.iter().zip(&self.labels) {
            prompt = prompt.and_at(*x, *y, *label > 0.0);
        }
        prompt
    }
}

fn numbers(flag: &str, text: &str) -> anyhow::Result<Vec<f32>> {
    let number = |part: &str| match part.trim().parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err(anyhow!("{flag} {text:?}: expected numbers with commas between, got {part:?}")),
    };
    text.split(',').map(number).collect()
}
