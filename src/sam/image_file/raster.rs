//! Pixels as a file stores them, of any width and sign.

use image::metadata::Orientation;
use image::DynamicImage;

/// Kind of the samples of a pixel.
///
/// [Example](crate::train::interpret)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RasterKind {
    /// One value.
    Grey,
    /// One index into colours; the colours themselves are left out.
    Palette,
    /// A value and its opacity.
    GreyAlpha,
    /// Red, green, blue.
    Rgb,
    /// Red, green, blue and their opacity.
    Rgba,
}

impl RasterKind {
    /// Samples that are no opacity.
    pub fn colours(self) -> usize {
        match self {
            Self::Grey | Self::Palette | Self::GreyAlpha => 1,
            Self::Rgb | Self::Rgba => 3,
        }
    }

    /// Whether the last sample is the opacity.
    pub fn has_alpha(self) -> bool {
        matches!(self, Self::GreyAlpha | Self::Rgba)
    }
}

/// The type of a sample, with its bits.
///
/// [Example](crate::train::interpret)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleType {
    /// Whole numbers from 0.
    Unsigned(u8),
    /// Whole numbers.
    Signed(u8),
    /// Floating point.
    Float(u8),
}

impl SampleType {
    /// The largest value of an unsigned type.
    pub(super) fn top(self) -> Option<f64> {
        match self {
            Self::Unsigned(bits) => Some(2f64.powi(bits.into()) - 1.0),
            _ => None,
        }
    }
}

impl std::fmt::Display for SampleType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unsigned(bits) => write!(f, "{bits}-bit"),
            Self::Signed(bits) => write!(f, "signed {bits}-bit"),
            Self::Float(bits) => write!(f, "{bits}-bit float"),
        }
    }
}

/// The samples of all pixels.
///
/// [Example](crate::train::interpret)
#[derive(Clone, Debug, PartialEq)]
pub enum Samples {
    /// Unsigned, up to 8 bits.
    U8(Vec<u8>),
    /// Unsigned, 16 bits.
    U16(Vec<u16>),
    /// Everything else. Whole numbers beyond 2^53 lose their last digits.
    Wide(Vec<f64>),
}

impl Samples {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::U16(values) => values.len(),
            Self::Wide(values) => values.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sample at `index`.
    pub fn get(&self, index: usize) -> f64 {
        match self {
            Self::U8(values) => f64::from(values[index]),
            Self::U16(values) => f64::from(values[index]),
            Self::Wide(values) => values[index],
        }
    }
}

/// An image as its file stores it: rows of pixels, the samples of a pixel side by side.
///
/// [Example](crate::train::interpret)
#[derive(Clone, Debug, PartialEq)]
pub struct Raster {
    /// Pixels of a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The samples of a pixel.
    pub kind: RasterKind,
    /// The type of a sample in the file.
    pub sample_type: SampleType,
    /// `height * width * channels` of them.
    pub samples: Samples,
    /// How a viewer turns it.
    pub(crate) orientation: Orientation,
    /// Whether 0 is white.
    pub(super) white_is_zero: bool,
}

impl Raster {
    /// A raster that a viewer shows as it is, or `None` if the number of samples does not fit.
    pub fn new(
        width: u32,
        height: u32,
        kind: RasterKind,
        sample_type: SampleType,
        samples: Samples,
    ) -> Option<Self> {
        let channels = kind.colours() + usize::from(kind.has_alpha());
        let count = (width as usize).checked_mul(height as usize)?.checked_mul(channels)?;
        (count == samples.len()).then_some(Self {
            width,
            height,
            kind,
            sample_type,
            samples,
            orientation: Orientation::NoTransforms,
            white_is_zero: false,
        })
    }

    /// Samples of a pixel.
    pub fn channels(&self) -> usize {
        self.kind.colours() + usize::from(self.kind.has_alpha())
    }

    /// Whether the samples are floats, all of them finite.
    pub(super) fn is_finite_float(&self) -> bool {
        let finite = |samples: &[f64]| samples.iter().all(|sample| sample.is_finite());
        matches!((&self.samples, self.sample_type), (Samples::Wide(s), SampleType::Float(_)) if finite(s))
    }

    /// The pixels of a decoded image.
    pub(super) fn from_decoded(image: &DynamicImage) -> Option<Self> {
        use RasterKind::{Grey, GreyAlpha, Rgb, Rgba};
        use SampleType::{Float, Unsigned};
        let wide = |values: &[f32]| Samples::Wide(values.iter().map(|v| f64::from(*v)).collect());
        let (kind, sample_type, samples) = match image {
            DynamicImage::ImageLuma8(p) => (Grey, Unsigned(8), Samples::U8(p.to_vec())),
            DynamicImage::ImageLumaA8(p) => (GreyAlpha, Unsigned(8), Samples::U8(p.to_vec())),
            DynamicImage::ImageRgb8(p) => (Rgb, Unsigned(8), Samples::U8(p.to_vec())),
            DynamicImage::ImageRgba8(p) => (Rgba, Unsigned(8), Samples::U8(p.to_vec())),
            DynamicImage::ImageLuma16(p) => (Grey, Unsigned(16), Samples::U16(p.to_vec())),
            DynamicImage::ImageLumaA16(p) => (GreyAlpha, Unsigned(16), Samples::U16(p.to_vec())),
            DynamicImage::ImageRgb16(p) => (Rgb, Unsigned(16), Samples::U16(p.to_vec())),
            DynamicImage::ImageRgba16(p) => (Rgba, Unsigned(16), Samples::U16(p.to_vec())),
            DynamicImage::ImageRgb32F(p) => (Rgb, Float(32), wide(p)),
            DynamicImage::ImageRgba32F(p) => (Rgba, Float(32), wide(p)),
            _ => return None,
        };
        Self::new(image.width(), image.height(), kind, sample_type, samples)
    }
}
