//! The order in which images are visited, and how they are mirrored and turned: functions of (seed, step).

use super::labels::{layered, LabelImage};
use super::{Sample, StepRng};
use image::imageops;

/// Which of `len` images make up the batch of `step`: every image once, in an order of its own, per epoch.
///
/// [Example](crate::train::Dataset)
pub fn sample_indices(len: usize, batch: usize, seed: u64, step: u64) -> Vec<usize> {
    if len == 0 {
        return Vec::new();
    }
    let (first, batch) = (u128::from(step) * batch as u128, batch as u128);
    (first..first + batch)
        .map(|place| {
            let (epoch, place) = (place / len as u128, (place % len as u128) as usize);
            // Epochs beyond 2^64 repeat the first ones.
            StepRng::new(seed, "order", epoch as u64).permutation(len)[place]
        })
        .collect()
}

/// One of the eight ways to turn and mirror a square: the augmentation that changes no pixel.
///
/// [Example](crate::train::KeptEmbeddings)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlipRotate {
    quarter_turns: u8,
    mirrored: bool,
}

impl FlipRotate {
    /// The image as it is.
    pub const NONE: Self = Self { quarter_turns: 0, mirrored: false };
    /// All ways.
    pub const COUNT: usize = 8;

    /// One of the eight, at random.
    pub fn draw(draws: &mut StepRng) -> Self {
        Self { quarter_turns: draws.below(4) as u8, mirrored: draws.below(2) == 1 }
    }

    /// Mirrors and turns image and labels alike, and finds the instances' new bounds.
    pub fn apply(self, sample: Sample) -> Sample {
        let image = self.turn(sample.image);
        let layers: Vec<LabelImage> =
            sample.layers.into_iter().map(|labels| self.turn(labels)).collect();
        // Turning keeps the areas, so the smallest kept one admits exactly those kept before.
        let min_area = sample.instances.iter().map(|i| i.area).min().unwrap_or(1);
        let instances = layered(&layers, min_area);
        Sample { image, layers, instances, ..sample }
    }

    fn turn<P: image::Pixel + 'static>(
        self,
        image: image::ImageBuffer<P, Vec<P::Subpixel>>,
    ) -> image::ImageBuffer<P, Vec<P::Subpixel>> {
        let image = if self.mirrored { imageops::flip_horizontal(&image) } else { image };
        match self.quarter_turns {
            1 => imageops::rotate90(&image),
            2 => imageops::rotate180(&image),
            3 => imageops::rotate270(&image),
            _ => image,
        }
    }
}
