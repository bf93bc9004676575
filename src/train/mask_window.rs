//! Masks of the image's size, in windows: a found object is computed where it can lie, and nowhere else.

use crate::sam::{Frame, MaskResizer, SamProcessor};
use crate::Result;
use candle_core::{Device, Tensor};

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub x0: usize,
    pub y0: usize,
    /// Past the last column.
    pub x1: usize,
    /// Past the last row.
    pub y1: usize,
}

impl Window {
    pub fn width(&self) -> usize {
        self.x1 - self.x0
    }

    pub fn union(self, other: Self) -> Self {
        Self {
            x0: self.x0.min(other.x0),
            y0: self.y0.min(other.y0),
            x1: self.x1.max(other.x1),
            y1: self.y1.max(other.y1),
        }
    }

    /// Wider by `margin` on each side, within an image of this size.
    pub fn widened(self, margin: usize, (height, width): (usize, usize)) -> Self {
        Self {
            x0: self.x0.saturating_sub(margin),
            y0: self.y0.saturating_sub(margin),
            x1: (self.x1 + margin).min(width),
            y1: (self.y1 + margin).min(height),
        }
    }
}

/// A found mask, as lengths of runs within a window of the image.
///
/// [Example](crate::train::evaluate_image)
#[derive(Clone, Debug)]
pub struct FoundMask {
    window: Window,
    /// Outside and inside in turns, outside first, row by row.
    runs: Vec<u32>,
}

impl FoundMask {
    pub(super) fn of(window: Window, inside: &[bool]) -> Self {
        let mut runs = vec![0];
        let mut now = false;
        for pixel in inside {
            if *pixel != now {
                now = *pixel;
                runs.push(0);
            }
            if let Some(run) = runs.last_mut() {
                *run += 1;
            }
        }
        Self { window, runs }
    }

    /// `[x, y, width, height]` of the part of the image outside of which nothing was found.
    pub fn window(&self) -> [u32; 4] {
        let Window { x0, y0, x1, y1 } = self.window;
        [x0, y0, x1 - x0, y1 - y0].map(|side| side as u32)
    }

    /// The pixels of the window, row by row: whether each is inside.
    pub fn pixels(&self) -> Vec<bool> {
        let runs = self.runs.iter().zip([false, true].into_iter().cycle());
        runs.flat_map(|(run, inside)| std::iter::repeat_n(inside, *run as usize)).collect()
    }
}

/// From low-resolution logits to parts of masks of the image's size.
pub(super) struct Resizer {
    matrices: MaskResizer,
    /// The first and last row of the logits that each row of the image depends on.
    rows: Vec<(usize, usize)>,
    /// The same of columns.
    columns: Vec<(usize, usize)>,
}

impl Resizer {
    pub fn new(processor: &SamProcessor, low: (usize, usize), frame: &Frame) -> Result<Self> {
        let matrices = processor.mask_resizer(low, frame, &Device::Cpu)?;
        let support = |weights: &Tensor| -> candle_core::Result<Vec<(usize, usize)>> {
            let span = |row: &Vec<f32>| {
                let weighted = |weight: &f32| *weight != 0.0;
                let first = row.iter().position(weighted).unwrap_or(0);
                (first, row.iter().rposition(weighted).unwrap_or(first))
            };
            Ok(weights.to_vec2::<f32>()?.iter().map(span).collect())
        };
        let rows = support(&matrices.rows)?;
        let columns = support(&matrices.columns.t()?)?;
        Ok(Self { matrices, rows, columns })
    }

    /// Where the mask can have pixels.
    pub fn window(&self, logits: &Tensor) -> Result<Option<Window>> {
        let logits = logits.to_dtype(candle_core::DType::F32)?.to_vec2::<f32>()?;
        // NaN is not above 0, but may lie beside a value that is.
        let positive = |value: &f32| *value > 0.0 || value.is_nan();
        let rows: Vec<usize> =
            (0..logits.len()).filter(|row| logits[*row].iter().any(positive)).collect();
        let (Some(top), Some(bottom)) = (rows.first(), rows.last()) else { return Ok(None) };
        let left = rows.iter().filter_map(|row| logits[*row].iter().position(positive)).min();
        let right = rows.iter().filter_map(|row| logits[*row].iter().rposition(positive)).max();
        let range = |spans: &[(usize, usize)], from: usize, to: usize| {
            let touched = |span: &(usize, usize)| span.1 >= from && span.0 <= to;
            Some((spans.iter().position(touched)?, spans.iter().rposition(touched)? + 1))
        };
        let (Some((y0, y1)), Some((x0, x1))) = (
            range(&self.rows, *top, *bottom),
            range(&self.columns, left.unwrap_or(0), right.unwrap_or(0)),
        ) else {
            return Ok(None);
        };
        Ok(Some(Window { x0, y0, x1, y1 }))
    }

    /// The pixels of a window of the mask.
    pub fn mask(&self, logits: &Tensor, window: Window) -> Result<Vec<bool>> {
        let Window { x0, y0, x1, y1 } = window;
        let rows = self.matrices.rows.narrow(0, y0, y1 - y0)?;
        let columns = self.matrices.columns.narrow(1, x0, x1 - x0)?.contiguous()?;
        let logits = logits.to_dtype(candle_core::DType::F32)?.contiguous()?;
        let resized = rows.matmul(&logits)?.matmul(&columns)?.flatten_all()?;
        Ok(resized.to_vec1::<f32>()?.into_iter().map(|logit| logit > 0.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::scores::{reach, Scores};
    use super::*;

    /// Windows leave out nothing: the mask and its scores are those of the whole image.
    #[test]
    fn windows_change_no_mask_and_no_score() -> anyhow::Result<()> {
        let processor = SamProcessor::new(64);
        for (height, width) in [(50, 90), (200, 120), (64, 64), (7, 9)] {
            let frame = processor.frame(height, width)?;
            let resizer = Resizer::new(&processor, (16, 16), &frame)?;
            for seed in 0..40u32 {
                let blob = |i: u32| {
                    let (x, y) = ((i % 16) as f32, (i / 16) as f32);
                    let (cx, cy, r) =
                        ((seed * 7 % 16) as f32, (seed * 5 % 16) as f32, (seed % 6) as f32);
                    r - (x - cx).hypot(y - cy) + ((i * 31 + seed) % 7) as f32 / 10.0 - 0.5
                };
                let low = Tensor::from_vec((0..256).map(blob).collect(), (16, 16), &Device::Cpu)?;
                let whole = processor.post_process_masks(&low, &frame, 0.0)?;
                let whole: Vec<bool> =
                    whole.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|v| v > 0).collect();
                let window = resizer.window(&low)?;
                let mut pasted = vec![false; height * width];
                if let Some(window) = window {
                    let inside = resizer.mask(&low, window)?;
                    let found = FoundMask::of(window, &inside);
                    assert_eq!(found.pixels(), inside);
                    for (place, inside) in inside.into_iter().enumerate() {
                        let (x, y) = (place % window.width(), place / window.width());
                        pasted[(window.y0 + y) * width + window.x0 + x] = inside;
                    }
                }
                assert!(pasted == whole, "{height} x {width}, seed {seed}");
                // Against a truth elsewhere.
                let truth: Vec<bool> = (0..height * width)
                    .map(|i| i % width > width / 2 && i / width < height / 3)
                    .collect();
                let bounds = Window { x0: width / 2 + 1, y0: 0, x1: width, y1: height.div_ceil(3) };
                let reach = reach(height, width);
                let window =
                    window.map_or(bounds, |w| w.union(bounds)).widened(reach + 2, (height, width));
                let cut = |mask: &[bool]| -> Vec<bool> {
                    let rows = window.y0..window.y1;
                    rows.flat_map(|y| mask[y * width + window.x0..y * width + window.x1].to_vec())
                        .collect()
                };
                let in_window = Scores::between(&cut(&whole), &cut(&truth), window.width(), reach);
                assert_eq!(in_window, Scores::between(&whole, &truth, width, reach));
            }
        }
        Ok(())
    }
}
