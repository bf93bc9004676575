//! Which values of an image are black and white.
//!
//! ```text
//! type         the whole of the type: 0 to 65535 in 16 bits, 0 to 1 in floats
//! min-max      the image's own lowest and highest value
//! percentile   the image's own percentiles 0.1 and 99.9
//! LO,HI        these
//! auto         type where the values fill it, else percentile
//! ```
//! Values fill 16 bits if the highest bit is set in one of them; 8 bits always are. Whole numbers that reach from below
//! a sixteenth of 8, 10, 12, 14 or 16 bits into their upper half fill these. Those of cameras and scanners do. Floats
//! in 0 to 1 that exceed 0.5, or in 0 to 255 that exceed 127, fill these ranges. So do floats in -1 to 1 that pass -0.5
//! and 0.5, as networks take images. Nothing else is filled.

use super::raster::{Raster, RasterKind, SampleType, Samples};
use image::{DynamicImage, ImageBuffer};
use std::str::FromStr;

/// The percentiles in percent.
pub(super) const PERCENTILES: (f64, f64) = (0.1, 99.9);
/// Percentiles are those of every n-th value where there are more values.
pub(super) const MOST_VALUES: usize = 1 << 22;

/// Which values of an image are black and white.
///
/// [Example](crate::sam::read_image)
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ValueRange {
    /// The type's range where the values fill it, else percentiles.
    #[default]
    Auto,
    /// The type's range: 0 to 65535 in 16 bits, 0 to 1 in floats.
    Type,
    /// The lowest and the highest value of each image.
    MinMax,
    /// The percentiles 0.1 and 99.9 of each image.
    Percentile,
    /// These values.
    Fixed(f64, f64),
}

impl FromStr for ValueRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fixed = || {
            let (low, high) = text.split_once(',')?;
            let (low, high) = (low.trim().parse::<f64>().ok()?, high.trim().parse::<f64>().ok()?);
            (low < high && (high - low).is_finite()).then_some(Self::Fixed(low, high))
        };
        match text {
            "auto" => Ok(Self::Auto),
            "type" => Ok(Self::Type),
            "min-max" => Ok(Self::MinMax),
            "percentile" => Ok(Self::Percentile),
            _ => fixed().ok_or(format!(
                "expected auto, type, min-max, percentile, or LOW,HIGH with LOW < HIGH, got {text:?}"
            )),
        }
    }
}

/// The values that become black and white, or `None` for the whole of an unsigned type, whose pixels stay as they are.
///
/// # Errors
/// - an image of floats leaves 0 to 1 and is to be taken by its type.
pub(super) fn limits(raster: &Raster, range: ValueRange) -> Result<Option<(f64, f64)>, String> {
    let plain = matches!(raster.samples, Samples::U8(_) | Samples::U16(_));
    let by_type = || -> Result<Option<(f64, f64)>, String> {
        Ok(match raster.sample_type {
            SampleType::Unsigned(8 | 16) if plain => None,
            SampleType::Unsigned(bits) => Some((0.0, 2f64.powi(bits.into()) - 1.0)),
            SampleType::Signed(bits) => {
                let half = 2f64.powi(i32::from(bits) - 1);
                Some((-half, half - 1.0))
            }
            SampleType::Float(_) => {
                let (low, high) = extremes(raster);
                if low < 0.0 || high > 1.0 {
                    let outside = if low < 0.0 { low } else { high };
                    return Err(format!(
                        "an image of floats must have values in 0 to 1 to be taken by its type, found {outside}"
                    ));
                }
                Some((0.0, 1.0))
            }
        })
    };
    match range {
        ValueRange::Type => by_type(),
        ValueRange::MinMax => Ok(Some(extremes(raster))),
        ValueRange::Percentile => Ok(Some(percentiles(raster))),
        ValueRange::Fixed(low, high) => Ok(Some((low, high))),
        ValueRange::Auto => match filled(raster) {
            Some((_, top)) if plain && Some(top) == raster.sample_type.top() => by_type(),
            Some(whole) => Ok(Some(whole)),
            None => Ok(Some(percentiles(raster))),
        },
    }
}

/// As [`limits`], of an image that is not in memory: by its lowest and highest value and by every n-th of its values.
///
/// # Errors
/// - as [`limits`].
pub(super) fn streamed_limits(
    extremes: &Raster,
    sampled: &Raster,
    range: ValueRange,
) -> Result<Option<(f64, f64)>, String> {
    let by_percentile = match range {
        ValueRange::Auto => filled(extremes).is_none(),
        range => range == ValueRange::Percentile,
    };
    match (by_percentile, percentiles(sampled)) {
        (true, (low, high)) if low < high => Ok(Some((low, high))),
        (true, _) => limits(extremes, ValueRange::MinMax),
        (false, _) => limits(extremes, range),
    }
}

/// An image of 8 bits, and the values that became black and white in it; `None` where nothing was scaled.
pub(super) type Scaled = Option<(DynamicImage, (f64, f64))>;

impl Raster {
    /// How many samples are no numbers.
    pub(super) fn not_numbers(&self) -> usize {
        match self.sample_type {
            SampleType::Float(_) => {
                (0..self.samples.len()).filter(|index| self.samples.get(*index).is_nan()).count()
            }
            SampleType::Unsigned(_) | SampleType::Signed(_) => 0,
        }
    }

    /// The image of 8 bits that `range` makes of it, and the values that became black and white. `None` where the
    /// samples stay as they are.
    ///
    /// # Errors
    /// - as [`limits`].
    pub(super) fn scaled(&self, range: ValueRange) -> Result<Scaled, String> {
        let Some((low, high)) = limits(self, range)? else { return Ok(None) };
        let (channels, has_alpha) = (self.channels(), self.kind.has_alpha());
        let level = |value: f64| {
            let part = if high > low { (value - low) / (high - low) } else { 0.0 };
            // A value that is no number is black.
            let level = (part.clamp(0.0, 1.0) * 255.0).round() as u8;
            if self.white_is_zero {
                255 - level
            } else {
                level
            }
        };
        let whole = match self.sample_type {
            SampleType::Unsigned(bits) => 2f64.powi(bits.into()) - 1.0,
            SampleType::Signed(bits) => 2f64.powi(i32::from(bits) - 1) - 1.0,
            SampleType::Float(_) => 1.0,
        };
        let opacity = |value: f64| ((value / whole).clamp(0.0, 1.0) * 255.0).round() as u8;
        let values = (0..self.samples.len()).map(|index| {
            let value = self.samples.get(index);
            if has_alpha && index % channels + 1 == channels {
                opacity(value)
            } else {
                level(value)
            }
        });
        let values: Vec<u8> = values.collect();
        let (width, height) = (self.width, self.height);
        let image = match self.kind {
            RasterKind::Grey | RasterKind::Palette => {
                ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageLuma8)
            }
            RasterKind::GreyAlpha => {
                ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageLumaA8)
            }
            RasterKind::Rgb => {
                ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageRgb8)
            }
            RasterKind::Rgba => {
                ImageBuffer::from_raw(width, height, values).map(DynamicImage::ImageRgba8)
            }
        };
        let image = image.ok_or("it has fewer pixels than its size says")?;
        Ok(Some((image, (low, high))))
    }
}

/// The range that the values fill by convention.
fn filled(raster: &Raster) -> Option<(f64, f64)> {
    const DEPTHS: [i32; 5] = [8, 10, 12, 14, 16];
    let (low, high) = extremes(raster);
    let reaches = |top: f64| low >= 0.0 && high <= top && high > (top / 2.0).floor().max(0.5);
    match raster.sample_type {
        SampleType::Unsigned(bits) if bits <= 8 => Some((0.0, 2f64.powi(bits.into()) - 1.0)),
        SampleType::Unsigned(16) if reaches(65535.0) => Some((0.0, 65535.0)),
        SampleType::Float(_) if (-1.0..-0.5).contains(&low) && high > 0.5 && high <= 1.0 => {
            Some((-1.0, 1.0))
        }
        SampleType::Float(_) => {
            [1.0, 255.0].into_iter().find(|top| reaches(*top)).map(|top| (0.0, top))
        }
        _ => {
            let tops = DEPTHS.map(|bits| 2f64.powi(bits) - 1.0);
            tops.into_iter().find(|top| reaches(*top) && low < top / 16.0).map(|top| (0.0, top))
        }
    }
}

/// The finite colour values, without those of alpha.
fn colours(raster: &Raster) -> impl Iterator<Item = f64> + '_ {
    let (channels, colours) = (raster.channels(), raster.kind.colours());
    (0..raster.samples.len())
        .filter(move |index| index % channels < colours)
        .map(|index| raster.samples.get(index))
        .filter(|value| value.is_finite())
}

fn extremes(raster: &Raster) -> (f64, f64) {
    let found = colours(raster).fold(None, |found: Option<(f64, f64)>, value| {
        Some(found.map_or((value, value), |(low, high)| (low.min(value), high.max(value))))
    });
    found.unwrap_or((0.0, 0.0))
}

fn percentiles(raster: &Raster) -> (f64, f64) {
    let step = (raster.samples.len() / MOST_VALUES).max(1);
    let mut values: Vec<f64> = colours(raster).step_by(step).collect();
    if values.is_empty() {
        return (0.0, 0.0);
    }
    let last = values.len() - 1;
    let mut at = |percent: f64| {
        let place = (percent / 100.0 * last as f64).round() as usize;
        *values.select_nth_unstable_by(place.min(last), f64::total_cmp).1
    };
    let (low, high) = (at(PERCENTILES.0), at(PERCENTILES.1));
    // Almost all values are one: a few objects on a flat ground.
    if low < high {
        (low, high)
    } else {
        extremes(raster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(sample_type: SampleType, values: Vec<f64>) -> Raster {
        let samples = match sample_type {
            SampleType::Unsigned(8) => Samples::U8(values.iter().map(|v| *v as u8).collect()),
            SampleType::Unsigned(16) => Samples::U16(values.iter().map(|v| *v as u16).collect()),
            _ => Samples::Wide(values.clone()),
        };
        let kind = RasterKind::Grey;
        Raster::new(values.len() as u32, 1, kind, sample_type, samples).expect("a raster")
    }

    #[test]
    fn only_values_that_do_not_fill_their_type_are_scaled() {
        use SampleType::{Float, Signed, Unsigned};
        for (sample_type, values, expected) in [
            (Unsigned(8), vec![0.0, 20.0], None),
            (Unsigned(16), vec![0.0, 40000.0], None),
            (Unsigned(16), vec![7.0, 4000.0], Some((0.0, 4095.0))),
            (Unsigned(16), vec![0.0, 200.0], Some((0.0, 255.0))),
            (Unsigned(16), vec![100.0, 900.0], Some((100.0, 900.0))),
            (Unsigned(16), vec![0.0, 1900.0], Some((0.0, 1900.0))),
            (Signed(32), vec![0.0, 65000.0], Some((0.0, 65535.0))),
            (Unsigned(32), vec![0.0, 4e9], Some((0.0, 4e9))),
            (Signed(16), vec![-1000.0, 3000.0], Some((-1000.0, 3000.0))),
            (Float(32), vec![0.1, 0.9], Some((0.0, 1.0))),
            (Float(32), vec![0.1, 0.3], Some((0.1, 0.3))),
            (Float(32), vec![2.0, 250.0], Some((0.0, 255.0))),
            (Float(64), vec![-0.9, 0.8], Some((-1.0, 1.0))),
            (Float(64), vec![-0.3, 0.8], Some((-0.3, 0.8))),
            (Float(64), vec![-0.9, 1.1], Some((-0.9, 1.1))),
            (Float(32), vec![f64::NAN, 5.0, 9.0, f64::INFINITY], Some((5.0, 9.0))),
            (Float(32), vec![f64::NAN], Some((0.0, 0.0))),
            (Unsigned(16), vec![3.0, 3.0], Some((3.0, 3.0))),
        ] {
            let raster = grey(sample_type, values.clone());
            assert_eq!(
                limits(&raster, ValueRange::Auto),
                Ok(expected),
                "{sample_type:?} {values:?}"
            );
        }
    }

    #[test]
    fn percentiles_leave_outliers_out_and_flat_grounds_in() {
        let mut values: Vec<f64> = (0..10_000).map(|v| 100.0 + f64::from(v) / 10.0).collect();
        values[5] = -9e9;
        values[6] = 9e9;
        let (low, high) = percentiles(&grey(SampleType::Float(64), values));
        assert!((low - 100.0).abs() < 2.0 && (high - 1099.0).abs() < 2.0, "{low} {high}");
        let mut flat = vec![5.0; 10_000];
        flat[9] = 900.0;
        assert_eq!(percentiles(&grey(SampleType::Unsigned(16), flat)), (5.0, 900.0));
    }

    #[test]
    fn ranges_are_parsed() {
        for (text, expected) in [
            ("auto", ValueRange::Auto),
            ("type", ValueRange::Type),
            ("min-max", ValueRange::MinMax),
            ("percentile", ValueRange::Percentile),
            ("-1000, 400.5", ValueRange::Fixed(-1000.0, 400.5)),
        ] {
            assert_eq!(text.parse(), Ok(expected));
        }
        for text in ["", "minmax", "3", "5,5", "9,1", "nan,1", "0,inf", "1,2,3"] {
            assert!(text.parse::<ValueRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn floats_beyond_their_type_are_refused_by_type() {
        let raster = grey(SampleType::Float(32), vec![0.0, 255.0]);
        assert!(limits(&raster, ValueRange::Type).unwrap_err().contains("found 255"));
    }
}
