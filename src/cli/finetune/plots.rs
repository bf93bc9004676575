//! A run's curves, as PNG and as SVG.

use super::super::draw::register_font;
use super::calibration::Bin;
use crate::train::StepScores;
use anyhow::anyhow;
use image::RgbImage;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::ops::Range;

const SIZE: (u32, u32) = (900, 500);
const DARK: RGBColor = RGBColor(25, 60, 140);
const PALE: RGBColor = RGBColor(170, 190, 225);
const WARM: RGBColor = RGBColor(200, 90, 30);

/// Lines over an axis.
pub struct Plot {
    caption: String,
    axes: [&'static str; 2],
    ranges: [Range<f64>; 2],
    lines: Vec<Line>,
}

struct Line {
    name: &'static str,
    points: Vec<(f64, f64)>,
    colour: RGBColor,
    width: u32,
    dots: bool,
}

impl Line {
    fn new(name: &'static str, points: Vec<(f64, f64)>, colour: RGBColor) -> Self {
        Self { name, points, colour, width: 2, dots: false }
    }
}

impl Plot {
    /// Each step's loss, and over it the mean of the steps around it.
    pub fn loss(losses: &[f32], terms: &str) -> Self {
        let highest = losses.iter().copied().fold(0f32, f32::max).max(1e-3);
        let points = |values: &[f32]| {
            values.iter().zip(1..).map(|(loss, step)| (f64::from(step), f64::from(*loss))).collect()
        };
        let each = Line { width: 1, ..Line::new("", points(losses), PALE) };
        Self {
            caption: format!("Loss ({terms})"),
            axes: ["step", "loss"],
            ranges: [1.0..losses.len().max(2) as f64, 0.0..f64::from(highest) * 1.05],
            lines: vec![each, Line::new("", points(&smoothed(losses)), DARK)],
        }
    }

    /// The held-out scores on the way; none without evaluations.
    pub fn evaluations(evaluations: &[StepScores]) -> Option<Self> {
        let last = evaluations.last()?.step;
        let line = |name, colour, value: fn(&StepScores) -> Option<f64>| {
            let point = |evaluated: &StepScores| Some((evaluated.step as f64, value(evaluated)?));
            let points: Vec<_> = evaluations.iter().filter_map(point).collect();
            Line { dots: true, ..Line::new(name, points, colour) }
        };
        let lines = vec![
            line("IoU", DARK, |e| Some(e.scores.objects.iou)),
            line("IoU, 5 prompts", PALE, |e| Some(e.scores.objects.iou_at_5)),
            line("AP of automatic masks", WARM, |e| e.scores.masks.map(|masks| masks.ap)),
        ];
        Some(Self {
            caption: "Held-out images".into(),
            axes: ["step", "score"],
            ranges: [0.0..last.max(1) as f64, 0.0..1.0],
            lines,
        })
    }

    /// The true IoU over the predicted one, before and after.
    pub fn calibration(before: &[Bin], after: &[Bin]) -> Self {
        let line = |name, colour, bins: &[Bin]| {
            let points = bins.iter().map(|bin| (bin.predicted, bin.iou)).collect();
            Line { dots: true, ..Line::new(name, points, colour) }
        };
        let ideal = Line { width: 1, ..Line::new("ideal", vec![(0.0, 0.0), (1.0, 1.0)], BLACK) };
        Self {
            caption: "Calibration of the predicted IoU".into(),
            axes: ["predicted IoU", "true IoU"],
            ranges: [0.0..1.0, 0.0..1.0],
            lines: vec![ideal, line("before", PALE, before), line("after", DARK, after)],
        }
    }

    /// As a picture.
    pub fn png(&self) -> anyhow::Result<RgbImage> {
        let mut pixels = vec![0u8; (SIZE.0 * SIZE.1 * 3) as usize];
        self.draw(BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area())?;
        RgbImage::from_raw(SIZE.0, SIZE.1, pixels).ok_or_else(|| anyhow!("a plot has no pixels"))
    }

    /// As an SVG element.
    pub fn svg(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        self.draw(SVGBackend::with_string(&mut text, SIZE).into_drawing_area())?;
        Ok(text)
    }

    fn draw<B: DrawingBackend>(&self, area: DrawingArea<B, Shift>) -> anyhow::Result<()>
    where
        B::ErrorType: 'static,
    {
        register_font()?;
        area.fill(&WHITE)?;
        let [x, y] = self.ranges.clone();
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .caption(&self.caption, ("sans-serif", 22))
            .build_cartesian_2d(x, y)?;
        let [x, y] = self.axes;
        chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw()?;
        for line in &self.lines {
            let style = line.colour.stroke_width(line.width);
            let drawn = chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
            if !line.name.is_empty() {
                let colour = line.colour;
                let key = move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 16, y)], colour);
                drawn.label(line.name).legend(key);
            }
            if line.dots {
                let dot = |place: &(f64, f64)| Circle::new(*place, 3, line.colour.filled());
                chart.draw_series(line.points.iter().map(dot))?;
            }
        }
        if self.lines.iter().any(|line| !line.name.is_empty()) {
            let place = SeriesLabelPosition::UpperLeft;
            let style = ("sans-serif", 14);
            chart.configure_series_labels().position(place).label_font(style).draw()?;
        }
        area.present()?;
        Ok(())
    }
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
