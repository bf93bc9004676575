//! Meaning of a mask, by rules that a run tells.
//!
//! ```text
//! one value beside the background   binary, whatever value and depth: each 8-connected part is an object
//! two levels with soft edges,       cut at half, then as binary
//! or fractions of two levels
//! values, indices, colours          one object each, or each part of each with `parts`
//! nothing but opacity               opaque parts are objects
//! 255 of 8 bits beside labels of at most 100, the largest value of 16 and 32 bits or negative ones beside labels,
//! VOC's contour (224, 224, 192)     ignored: neither object nor background
//! no pixel is 0                     the largest value of the type, -1 or white is the background if it surrounds all
//! ```
//! Refused: values that are no labels, as a photograph's; an object that is the whole image; a background that is none.

mod meaning;
mod options;
mod parts;
mod rules;
mod soft;
mod values;

pub(super) use meaning::turned;
pub use meaning::{Mask, Meaning};
pub use options::MaskOptions;

use crate::sam::{read_file, Raster};
use crate::{Error, Result};
use std::path::Path;

/// Reads a mask: grey, labels of any integer or float type, a palette, colours, or opacity.
///
/// [Example](crate::train::interpret)
///
/// # Errors
/// - the file is no image, or stored with loss as a JPEG is;
/// - it has several pages and none is chosen;
/// - its pixels are not those of a mask, see [the rules](Meaning).
pub fn read_mask(path: impl AsRef<Path>, options: &MaskOptions) -> Result<Mask> {
    let path = path.as_ref();
    read_mask_bytes(path, read_file(path)?, options)
}

/// As [`read_mask`], of a file whose bytes are at hand.
pub(super) fn read_mask_bytes(path: &Path, bytes: Vec<u8>, options: &MaskOptions) -> Result<Mask> {
    let raster = Raster::read_bytes(path, bytes, options.page)?;
    interpret(&raster, options).map_err(|message| Error::file(path, message))
}

/// Interprets the pixels of a mask.
///
/// ```
/// use candle_sam_lora::sam::{Raster, RasterKind, SampleType, Samples};
/// use candle_sam_lora::train::{interpret, read_mask, MaskOptions, Meaning, IGNORED};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let samples = Samples::U8(vec![0, 1, 2, 9]);
/// let raster = Raster::new(2, 2, RasterKind::Grey, SampleType::Unsigned(8), samples).unwrap();
/// let options = MaskOptions { ignore: Some(vec![9]), ..MaskOptions::default() };
/// let mask = interpret(&raster, &options)?;
/// assert_eq!((mask.meaning, mask.labels.as_raw()), (Meaning::Labels, &vec![0, 1, 2, IGNORED]));
///
/// let mask = read_mask("assets/photos/coins/train/masks/coins_r0c0.png", &MaskOptions::default())?;
/// assert_eq!(mask.meaning, Meaning::Labels);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - they are not those of a mask, see [the rules](Meaning).
pub fn interpret(raster: &Raster, options: &MaskOptions) -> std::result::Result<Mask, String> {
    let mut mask = rules::mask(&values::values(raster)?, raster.width, raster.height, options)?;
    mask.labels = turned(&mask.labels, raster.orientation);
    Ok(mask)
}
