//! The values that the network takes: percentiles of each channel at 0 and 1.
//!
//! Source: `normalize_img` in `transforms.py` of Cellpose 4.2; percentiles as NumPy's, in f32.

use crate::Result;
use candle_core::{Device, Tensor};
use image::{ColorType, DynamicImage};

/// Channels of more values are sampled.
const MOST_VALUES: usize = 224 * 224 * 224;
/// Columns, and rows, that are sampled at least.
const SAMPLED: usize = 224;
/// Two percentiles that are no further apart make an empty channel.
const LEAST_RANGE: f32 = 1e-3;

/// `[channels, H, W]` in f32: one channel of a grey image, or red, green and blue. The 1st percentile of a channel is
/// at 0, the 99th at 1; a channel of one value is 0. Alpha is left out.
///
/// [Example](crate::sam::CellposeSam)
///
/// # Errors
/// - the image has no pixel.
pub fn normalized_image(image: &DynamicImage) -> Result<Tensor> {
    let (height, width) = (image.height() as usize, image.width() as usize);
    let is_grey =
        matches!(image.color(), ColorType::L8 | ColorType::La8 | ColorType::L16 | ColorType::La16);
    // Without a scale of their own: percentiles take it out.
    let values: Vec<f32> = match image {
        DynamicImage::ImageRgb32F(values) => values.as_raw().clone(),
        DynamicImage::ImageRgba32F(_) => image.to_rgb32f().into_raw(),
        _ if image.color().bytes_per_pixel() / image.color().channel_count() == 2 => {
            let values =
                if is_grey { image.to_luma16().into_raw() } else { image.to_rgb16().into_raw() };
            values.into_iter().map(f32::from).collect()
        }
        _ => {
            let values =
                if is_grey { image.to_luma8().into_raw() } else { image.to_rgb8().into_raw() };
            values.into_iter().map(f32::from).collect()
        }
    };
    let channels = if is_grey { 1 } else { 3 };
    let mut planes = Vec::with_capacity(values.len());
    for channel in 0..channels {
        let plane: Vec<f32> = values.iter().skip(channel).step_by(channels).copied().collect();
        planes.extend(normalized(plane, (height, width)));
    }
    Ok(Tensor::from_vec(planes, (channels, height, width), &Device::Cpu)?)
}

fn normalized(mut plane: Vec<f32>, (height, width): (usize, usize)) -> Vec<f32> {
    let mut sample: Vec<f32> = if plane.len() > MOST_VALUES {
        let (rows, columns) = ((height / SAMPLED).max(1), (width / SAMPLED).max(1));
        plane
            .chunks(width)
            .step_by(rows)
            .flat_map(|row| row.iter().step_by(columns))
            .copied()
            .collect()
    } else {
        plane.clone()
    };
    let (low, high) = (percentile(&mut sample, 1.0), percentile(&mut sample, 99.0));
    let range = high - low;
    match range > LEAST_RANGE {
        true => plane.iter_mut().for_each(|value| *value = (*value - low) / range),
        false => plane.fill(0.0),
    }
    plane
}

/// Linear between the two nearest values; 0 of none.
fn percentile(values: &mut [f32], percent: f32) -> f32 {
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let place = last as f32 * (percent / 100.0);
    let (below, share) = ((place.floor() as usize).min(last), place - place.floor());
    let (_, first, above) = values.select_nth_unstable_by(below, f32::total_cmp);
    let first = *first;
    let second = above.iter().copied().min_by(f32::total_cmp).unwrap_or(first);
    let step = second - first;
    match share >= 0.5 {
        true => second - step * (1.0 - share),
        false => first + step * share,
    }
}
