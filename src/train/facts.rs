//! How an image and a mask were read, without their pixels.

use super::mask::{Mask, Meaning};
use crate::sam::{Picture, SampleType};
use serde::{Deserialize, Serialize};

/// The brightest value of 8 bits in an image that is said to be nearly black.
pub(super) const DARK: u8 = 31;

/// How an image was read.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct PictureFacts {
    /// The values that became black and white, as bits.
    pub range: Option<[u64; 2]>,
    pub sample_type: String,
    pub is_turned: bool,
    pub has_not_numbers: bool,
    pub has_unnamed_channel: bool,
    /// Whether it is nearly black.
    pub is_dark: bool,
}

/// How a mask was read, see [`Mask`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MaskFacts {
    pub meaning: Meaning,
    pub ignored: Vec<i64>,
    pub background: Option<i64>,
    pub is_scattered: bool,
    pub remarks: Vec<String>,
}

impl PictureFacts {
    /// Those of a picture.
    pub fn of(picture: &Picture) -> Self {
        let is_dark = |bytes: &[u8]| bytes.iter().all(|byte| *byte <= DARK);
        let is_eight_bits = picture.sample_type == SampleType::Unsigned(8);
        Self {
            range: picture.range.map(|(low, high)| [low.to_bits(), high.to_bits()]),
            sample_type: picture.sample_type.to_string(),
            is_turned: picture.stored.is_some(),
            has_not_numbers: picture.not_numbers > 0,
            has_unnamed_channel: picture.unnamed_channel,
            is_dark: is_eight_bits && is_dark(picture.image.as_bytes()),
        }
    }
}

impl MaskFacts {
    /// Those of a mask.
    pub fn of(mask: Mask) -> Self {
        let Mask { meaning, ignored, background, scattered, remarks, .. } = mask;
        Self { meaning, ignored, background, is_scattered: scattered > 0, remarks }
    }
}
