//! The loss curve as a picture.

use super::super::draw::register_font;
use anyhow::anyhow;
use image::RgbImage;
use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 500);

/// Each step's loss, and over it the mean of the steps around it.
pub fn loss_curve(losses: &[f32], terms: &str) -> anyhow::Result<RgbImage> {
    register_font()?;
    let highest = losses.iter().copied().fold(0f32, f32::max).max(1e-3);
    let steps = losses.len().max(1);
    let mut pixels = vec![0u8; (SIZE.0 * SIZE.1 * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .caption(format!("Loss ({terms})"), ("sans-serif", 22))
            .build_cartesian_2d(1..steps.max(2), 0f32..highest * 1.05)?;
        chart.configure_mesh().x_desc("step").y_desc("loss").light_line_style(WHITE).draw()?;
        let points = |values: Vec<f32>| (1..).zip(values);
        let (pale, dark) = (RGBColor(170, 190, 225), RGBColor(25, 60, 140));
        chart.draw_series(LineSeries::new(points(losses.to_vec()), pale))?;
        chart.draw_series(LineSeries::new(points(smoothed(losses)), dark.stroke_width(2)))?;
        area.present()?;
    }
    RgbImage::from_raw(SIZE.0, SIZE.1, pixels)
        .ok_or_else(|| anyhow!("the loss curve has no pixels"))
}

/// The mean over a window around each step, shorter at the ends.
fn smoothed(losses: &[f32]) -> Vec<f32> {
    let half = (losses.len() / 40).max(2);
    (0..losses.len())
        .map(|step| {
            let window = &losses[step.saturating_sub(half)..(step + half + 1).min(losses.len())];
            window.iter().sum::<f32>() / window.len() as f32
        })
        .collect()
}
