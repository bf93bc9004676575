//! One whole number a pixel: what a mask's samples stand for.

use crate::sam::{Raster, RasterKind, SampleType};
use std::collections::BTreeSet;

/// Where the values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Grey values, or labels.
    Grey,
    /// Indices of a palette.
    Palette,
    /// Colours: red, green, blue, from the highest digits down.
    Colour,
    /// The opacity, for the colours say nothing.
    Opacity,
}

/// A mask's values.
#[derive(Clone, Debug)]
pub(super) struct Values {
    /// Row by row.
    pub values: Vec<i64>,
    /// Where they come from.
    pub source: Source,
    /// The largest value of an unsigned type, if it is one.
    pub top: Option<i64>,
    /// Pixels that are no number, taken for background.
    pub no_number: usize,
    /// The smallest and the largest of fractions, as of probabilities, that became 0 to [`STEPS`]; none for labels.
    pub fractions: Option<(f64, f64)>,
}

/// Steps that fractions are divided into.
pub(super) const STEPS: f64 = 65535.0;

/// The values of a raster.
///
/// ```text
/// palette          the index
/// grey, labels     the value; floats that are no whole numbers, 65535 steps over their range
/// colour           red, green, blue; only 0 of each is 0
/// with opacity     of one colour: the opacity; else 0 where less than half opaque, and the colour elsewhere
/// ```
/// # Errors
/// - a label is infinite, or beyond 2^53, where the numbers that are read are no longer exact.
pub(super) fn values(raster: &Raster) -> Result<Values, String> {
    let (channels, colours) = (raster.channels(), raster.kind.colours());
    let pixels = raster.samples.len() / channels.max(1);
    if let (SampleType::Float(_), 1, 1) = (raster.sample_type, channels, colours) {
        return floats((0..pixels).map(|pixel| raster.samples.get(pixel)).collect());
    }
    let whole = |index: usize| -> Result<i64, String> {
        let value = raster.samples.get(index);
        // Floats of colour masks have 0 to 1.
        let value = match raster.sample_type {
            SampleType::Float(_) => (value * 65535.0).round(),
            _ => value,
        };
        match value.abs() < 2f64.powi(53) {
            true => Ok(value as i64),
            false => Err(format!("the value {value} is beyond 2^53, too large for a label")),
        }
    };
    let base = match raster.sample_type {
        SampleType::Unsigned(bits) if bits <= 8 => 1 << 8,
        _ => 1 << 16,
    };
    let colour = |pixel: usize| -> Result<i64, String> {
        (0..colours).try_fold(0i64, |packed, channel| {
            let value = whole(pixel * channels + channel)?;
            Ok(if colours == 1 { value } else { packed * base + value.clamp(0, base - 1) })
        })
    };
    let mut all = (0..pixels).map(colour).collect::<Result<Vec<i64>, String>>()?;
    let mut source = match raster.kind {
        RasterKind::Palette => Source::Palette,
        RasterKind::Grey | RasterKind::GreyAlpha => Source::Grey,
        RasterKind::Rgb | RasterKind::Rgba => Source::Colour,
    };
    let mut top = match raster.sample_type {
        SampleType::Unsigned(bits) if colours == 1 && bits < 63 => Some((1 << bits) - 1),
        _ => None,
    };
    // Greys in three channels are greys.
    if source == Source::Colour {
        let (high, low) = (base * base, base);
        if all.iter().all(|v| v / high == v / low % low && v / low % low == v % low) {
            all.iter_mut().for_each(|value| *value %= base);
            (source, top) = (Source::Grey, Some(base - 1));
        }
    }
    if raster.kind.has_alpha() {
        let opacity = (0..pixels).map(|pixel| whole(pixel * channels + colours));
        let opacity = opacity.collect::<Result<Vec<i64>, String>>()?;
        if look_at(&opacity, &mut all) {
            (source, top) = (Source::Opacity, None);
        }
    }
    Ok(Values { values: all, source, top, no_number: 0, fractions: None })
}

/// Makes transparent pixels background; or returns true, with the opacity as the values, if all have one colour.
fn look_at(opacity: &[i64], values: &mut [i64]) -> bool {
    let (least, most) = match (opacity.iter().min(), opacity.iter().max()) {
        (Some(least), Some(most)) if least < most => (*least, *most),
        _ => return false,
    };
    if values.windows(2).all(|pair| pair[0] == pair[1]) {
        values.copy_from_slice(opacity);
        values.iter_mut().for_each(|value| *value -= least);
        return true;
    }
    let half = most / 2 + most % 2;
    let opaque = || opacity.iter().map(|value| *value >= half);
    let colours: BTreeSet<i64> = values
        .iter()
        .zip(opaque())
        .filter(|(_, opaque)| *opaque)
        .map(|(v, _)| *v)
        .take(2)
        .collect();
    let one_colour =
        values.iter().zip(opaque()).filter(|(_, o)| *o).all(|(v, _)| colours.first() == Some(v));
    for (value, opaque) in values.iter_mut().zip(opaque()) {
        *value = match opaque {
            false => 0,
            // Black is an object where there is no other colour.
            true if one_colour => (*value).max(1),
            true => *value,
        };
    }
    false
}

/// Floats: labels if all are whole numbers, else levels.
fn floats(values: Vec<f64>) -> Result<Values, String> {
    if values.iter().any(|value| value.is_infinite()) {
        return Err("a value is infinite, which no label is".into());
    }
    let finite = || values.iter().filter(|value| value.is_finite());
    let no_number = values.len() - finite().count();
    let (source, top) = (Source::Grey, None);
    if finite().all(|value| value.fract() == 0.0) {
        if let Some(value) = finite().find(|value| value.abs() >= 2f64.powi(53)) {
            return Err(format!("the value {value} is beyond 2^53, too large for a label"));
        }
        let values = values.iter().map(|v| if v.is_finite() { *v as i64 } else { 0 }).collect();
        return Ok(Values { values, source, top, no_number, fractions: None });
    }
    let low = finite().copied().fold(f64::INFINITY, f64::min).min(0.0);
    let high = finite().copied().fold(f64::NEG_INFINITY, f64::max);
    let steps = |value: &f64| match value.is_finite() {
        true => ((value - low) / (high - low).max(f64::MIN_POSITIVE) * STEPS).round() as i64,
        false => 0,
    };
    let values = values.iter().map(steps).collect();
    Ok(Values { values, source, top, no_number, fractions: Some((low, high)) })
}
