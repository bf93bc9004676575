//! A mask that was read, and how.

use crate::train::labels::LabelImage;
use image::imageops;
use image::metadata::Orientation;
use serde::{Deserialize, Serialize};

/// A mask, read.
///
/// [Example](crate::train::interpret)
#[derive(Clone, Debug)]
pub struct Mask {
    /// A label a pixel: 0 the background, [`IGNORED`](crate::train::labels::IGNORED) what is neither.
    pub labels: LabelImage,
    /// How it was read.
    pub meaning: Meaning,
    /// Values that were ignored.
    pub ignored: Vec<i64>,
    /// The value taken for the background, if not 0.
    pub background: Option<i64>,
    /// Values that have several separate parts, each value one object.
    pub scattered: usize,
    /// Remarks about this mask alone.
    pub remarks: Vec<String>,
}

/// How a mask's pixels were read.
///
/// [Example](crate::train::interpret)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Meaning {
    /// One value beside the background; its parts are objects.
    Binary,
    /// Two levels with soft edges, cut at half; its parts are objects.
    Soft,
    /// Opaque parts are objects.
    Opacity,
    /// Each value is an object.
    Labels,
    /// Each index is an object.
    Palette,
    /// Each colour is an object.
    Colours,
    /// Each part of each value is an object.
    Parts,
    /// Every pixel is background, or ignored.
    Empty,
}

impl std::fmt::Display for Meaning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Binary => "binary, parts taken as objects",
            Self::Soft => "two levels with soft edges, cut at half, parts taken as objects",
            Self::Opacity => "by opacity, opaque parts taken as objects",
            Self::Labels => "labels, each value an object",
            Self::Palette => "palette, each index an object",
            Self::Colours => "colours, each an object",
            Self::Parts => "each part of each value an object",
            Self::Empty => "empty",
        })
    }
}

/// Labels as a viewer turns their file.
pub(in crate::train) fn turned(labels: &LabelImage, orientation: Orientation) -> LabelImage {
    use Orientation::*;
    match orientation {
        NoTransforms => labels.clone(),
        Rotate90 => imageops::rotate90(labels),
        Rotate180 => imageops::rotate180(labels),
        Rotate270 => imageops::rotate270(labels),
        FlipHorizontal => imageops::flip_horizontal(labels),
        FlipVertical => imageops::flip_vertical(labels),
        Rotate90FlipH => imageops::flip_horizontal(&imageops::rotate90(labels)),
        Rotate270FlipH => imageops::flip_horizontal(&imageops::rotate270(labels)),
    }
}
