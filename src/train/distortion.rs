//! Distortions of training images beside mirrors and quarter turns.
//!
//! ```text
//! geometry    turned by up to 45 degrees, 1 / 1.4 to 1.4 times as large, one side stretched by up to 15 %, moved by
//!             up to 10 % of each side;   the image goes on mirrored beyond its edges, and labels are ignored there
//! intensity   v -> mean + gain (v - mean) + offset,   then v^gamma of 0..1,   then blurred,   then with noise
//! ```
//! Numbers are those of strength 1. All draws are functions of (seed, step).

use super::labels::{layered, LabelImage, IGNORED};
use super::{Sample, StepRng};
use crate::{Error, Result as CrateResult};
use image::{Luma, RgbImage};
use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// Largest turn, in degrees.
const TURN: f64 = 45.0;
/// Largest factor of the size.
const SCALE: f64 = 1.4;
/// Largest ratio of the two sides' factors.
const STRETCH: f64 = 1.15;
/// Largest move, over the side.
const MOVE: f64 = 0.1;
/// Largest factor of the contrast.
const GAIN: f64 = 1.4;
/// Largest change of the brightness, over white.
const OFFSET: f64 = 0.1;
/// Largest exponent.
const GAMMA: f64 = 1.5;
/// Largest standard deviation of the noise, over white.
const NOISE: f64 = 0.05;
/// Views that are tried until one shows an object.
const TRIES: usize = 4;

/// How strongly training images are distorted; 0 leaves them as they are. As text: `geometry=1,intensity=1`.
///
/// ```
/// use candle_sam_lora::train::{BatchConfig, Distortion};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let distortion: Distortion = "geometry=1,intensity=0.5".parse()?;
/// assert_eq!(distortion.to_string(), "geometry=1,intensity=0.5");
/// let config = BatchConfig { distortion, ..BatchConfig::default() };
/// config.validate()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Distortion {
    /// Turns, sizes, stretches and moves.
    pub geometry: f64,
    /// Brightness, contrast, gamma, blur and noise.
    pub intensity: f64,
}

impl Distortion {
    /// Images as they are.
    pub const NONE: Self = Self { geometry: 0.0, intensity: 0.0 };

    /// Whether images stay as they are.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    fn named(&mut self) -> [(&'static str, &mut f64); 2] {
        [("geometry", &mut self.geometry), ("intensity", &mut self.intensity)]
    }

    /// Refuses a strength outside of 0..2.
    ///
    /// # Errors
    /// As said.
    pub fn validate(&self) -> CrateResult<()> {
        let mut strengths = *self;
        for (name, strength) in strengths.named() {
            if !(0.0..=2.0).contains(strength) {
                let message = format!("the distortion's {name} must be in [0, 2], got {strength}");
                return Err(Error::config(message));
            }
        }
        Ok(())
    }

    /// Distorts an image and its labels. Objects of fewer than `min_area` pixels are left out, but not all of them.
    pub fn apply(&self, sample: Sample, min_area: usize, draws: &mut StepRng) -> Sample {
        let mut sample = sample;
        if self.geometry > 0.0 {
            let views: Vec<View> =
                (0..TRIES).map(|_| View::draw(self.geometry, &sample.image, draws)).collect();
            let seen = views.iter().find_map(|view| view.of(&sample, min_area));
            sample = seen.unwrap_or(sample);
        }
        if self.intensity > 0.0 {
            sample.image = intensities(&sample.image, self.intensity, draws);
        }
        sample
    }
}

impl FromStr for Distortion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut strengths = Self::NONE;
        for part in text.split(',') {
            let wrong = || format!("expected KIND=STRENGTH, got {part:?}");
            let (name, strength) = part.trim().split_once('=').ok_or_else(wrong)?;
            let strength: f64 = strength.trim().parse().map_err(|_| wrong())?;
            let mut known = strengths.named();
            let names = known.each_ref().map(|(name, _)| *name).join(", ");
            match known.iter_mut().find(|(known, _)| *known == name.trim()) {
                Some((_, place)) => **place = strength,
                None => return Err(format!("no distortion {name:?}; there are {names}")),
            }
        }
        strengths.validate().map_err(|e| e.to_string())?;
        Ok(strengths)
    }
}

impl fmt::Display for Distortion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut strengths = *self;
        let used = strengths.named().into_iter().filter(|(_, strength)| **strength != 0.0);
        let used: Vec<String> = used.map(|(name, strength)| format!("{name}={strength}")).collect();
        f.write_str(&used.join(","))
    }
}

/// A number in `-1..1`.
fn signed(draws: &mut StepRng) -> f64 {
    2.0 * draws.uniform() - 1.0
}

/// Where a distorted image's pixels come from: `source = matrix (place - centre) + origin`.
struct View {
    matrix: [[f64; 2]; 2],
    centre: [f64; 2],
    origin: [f64; 2],
}

impl View {
    fn draw(strength: f64, image: &RgbImage, draws: &mut StepRng) -> Self {
        let (sin, cos) = (signed(draws) * strength * TURN).to_radians().sin_cos();
        let scale = SCALE.powf(signed(draws) * strength);
        let stretch = STRETCH.powf(signed(draws) * strength / 2.0);
        let (along_x, along_y) = (1.0 / (scale * stretch), stretch / scale);
        let sides = [f64::from(image.width()), f64::from(image.height())];
        let centre = sides.map(|side| (side - 1.0) / 2.0);
        let moved = [0, 1].map(|axis| centre[axis] + signed(draws) * strength * MOVE * sides[axis]);
        let matrix = [[cos * along_x, -sin * along_y], [sin * along_x, cos * along_y]];
        Self { matrix, centre, origin: moved }
    }

    fn source(&self, x: u32, y: u32) -> [f64; 2] {
        let [dx, dy] = [f64::from(x) - self.centre[0], f64::from(y) - self.centre[1]];
        [0, 1].map(|axis| {
            let [by_x, by_y] = self.matrix[axis];
            by_x * dx + by_y * dy + self.origin[axis]
        })
    }

    /// The sample seen so, if an object of `min_area` pixels is in sight.
    fn of(&self, sample: &Sample, min_area: usize) -> Option<Sample> {
        let (width, height) = sample.image.dimensions();
        let layers: Vec<LabelImage> = (sample.layers.iter())
            .map(|labels| {
                LabelImage::from_fn(width, height, |x, y| {
                    let [u, v] = self.source(x, y).map(f64::round);
                    let inside = |at: f64, side: u32| at >= 0.0 && at < f64::from(side);
                    match inside(u, width) && inside(v, height) {
                        true => *labels.get_pixel(u as u32, v as u32),
                        false => Luma([IGNORED]),
                    }
                })
            })
            .collect();
        let known = |label: u32| sample.instances.iter().any(|before| before.label == label);
        let mut instances = layered(&layers, min_area);
        instances.retain(|instance| known(instance.label));
        if instances.is_empty() {
            return None;
        }
        let image = RgbImage::from_fn(width, height, |x, y| {
            let [u, v] = self.source(x, y);
            interpolated(&sample.image, u, v)
        });
        Some(Sample { image, layers, instances, ..sample.clone() })
    }
}

/// The colour at a place between pixels, bilinear; the image goes on mirrored beyond its edges.
fn interpolated(image: &RgbImage, u: f64, v: f64) -> image::Rgb<u8> {
    let mirrored = |at: f64, side: u32| {
        let (side, at) = (i64::from(side), at as i64);
        let folded = at.rem_euclid(2 * side);
        folded.min(2 * side - 1 - folded) as u32
    };
    let (left, top) = (u.floor(), v.floor());
    let (right, below) = (u - left, v - top);
    let pixel = |dx: f64, dy: f64| {
        let x = mirrored(left + dx, image.width());
        image.get_pixel(x, mirrored(top + dy, image.height())).0
    };
    let corners = [
        (pixel(0.0, 0.0), (1.0 - right) * (1.0 - below)),
        (pixel(1.0, 0.0), right * (1.0 - below)),
        (pixel(0.0, 1.0), (1.0 - right) * below),
        (pixel(1.0, 1.0), right * below),
    ];
    let mean = |channel: usize| {
        let sum: f64 = corners.iter().map(|(rgb, weight)| f64::from(rgb[channel]) * weight).sum();
        sum.round() as u8
    };
    image::Rgb([0, 1, 2].map(mean))
}

/// The image with other intensities, the same change in all channels.
fn intensities(image: &RgbImage, strength: f64, draws: &mut StepRng) -> RgbImage {
    let gain = GAIN.powf(signed(draws) * strength);
    let offset = signed(draws) * strength * OFFSET;
    let gamma = GAMMA.powf(signed(draws) * strength);
    let blur = (draws.uniform() * strength).min(1.0);
    let noise = draws.uniform() * strength * NOISE;
    let (width, height) = image.dimensions();
    let count = image.as_raw().len().max(1) as f64;
    let mean = image.as_raw().iter().map(|v| f64::from(*v)).sum::<f64>() / (255.0 * count);
    let change = |value: usize| {
        let linear = mean + gain * (value as f64 / 255.0 - mean) + offset;
        linear.clamp(0.0, 1.0).powf(gamma)
    };
    let table: Vec<f64> = (0..256).map(change).collect();
    RgbImage::from_fn(width, height, |x, y| {
        let grain = noise * grain(draws);
        let mean = |channel: usize| {
            let value = |dx: i64, dy: i64| {
                let at = |place: u32, d: i64, side: u32| {
                    (i64::from(place) + d).clamp(0, i64::from(side) - 1) as u32
                };
                let pixel = image.get_pixel(at(x, dx, width), at(y, dy, height));
                table[usize::from(pixel.0[channel])]
            };
            let row = |dy: i64| (value(-1, dy) + 2.0 * value(0, dy) + value(1, dy)) / 4.0;
            let sharp = value(0, 0);
            let soft = if blur > 0.0 { (row(-1) + 2.0 * row(0) + row(1)) / 4.0 } else { sharp };
            let value = sharp + blur * (soft - sharp) + grain;
            (255.0 * value).round().clamp(0.0, 255.0) as u8
        };
        image::Rgb([0, 1, 2].map(mean))
    })
}

/// A number of mean 0 and variance 1, nearly normal: the sum of four uniform bytes.
fn grain(draws: &mut StepRng) -> f64 {
    let sum: u32 = draws.bits().to_le_bytes().into_iter().map(u32::from).sum();
    // Four variances of (256^2 - 1) / 12 each.
    (f64::from(sum) - 510.0) / 21_845f64.sqrt()
}
