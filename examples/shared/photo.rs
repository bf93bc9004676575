//! An image for the model, and what was understood of its file.

use super::console;
use candle_sam_lora::sam::{is_transparent, ReadOptions, ValueRange};
use candle_sam_lora::Result;
use image::DynamicImage;
use std::path::Path;

/// How image files are read
#[derive(clap::Args)]
pub struct PhotoArgs {
    /// Values of the image that become black and white: auto, type, min-max, percentile or LOW,HIGH
    #[arg(long, default_value = "auto", value_name = "RANGE", allow_hyphen_values = true)]
    range: ValueRange,
    /// Page, frame or channel of an image that has several, from 1
    #[arg(long, value_name = "N")]
    page: Option<usize>,
}

impl PhotoArgs {
    /// Reads an image; says if its values were scaled and if it is transparent.
    pub fn read(&self, path: &Path) -> Result<DynamicImage> {
        let picture = ReadOptions { range: self.range, page: self.page }.read(path)?;
        if let Some((low, high)) = picture.range {
            console::say(format!(
                "{}: {}, values {low} to {high} are black to white (see --range)",
                path.display(),
                picture.sample_type
            ));
        }
        if is_transparent(&picture.image) {
            console::say(format!("{}: transparent pixels are laid on white", path.display()));
        }
        Ok(picture.image)
    }
}
