//! From an image file to SAM's input and from SAM's masks back to the image, as transformers' `SamImageProcessorPil`.
//!
//! ```text
//! resize the longest side to S (bilinear, antialiased) -> / 255 -> (x - mean) / std -> pad right and below with 0
//! low-resolution mask -> bilinear to S x S -> crop the padding -> bilinear to the image's size -> > threshold
//! ```
//! A frame is the place of an image in the square input: prompts are scaled into it and masks cut out of it.

use super::image_file::{convert_to_rgb, MAX_SIDE};
use crate::{files, ops, Error, Result};
use candle_core::{bail, DType, Device, Tensor};
use image::{imageops, DynamicImage};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where an image lies in SAM's square input; sizes are height and width.
///
/// [Example](crate::guide::library)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Size of the image as it came.
    pub original: (usize, usize),
    /// Size after resizing, without padding.
    pub resized: (usize, usize),
}

impl Frame {
    /// Points `[.., 2]` as (x, y) in pixels of the original image, in pixels of SAM's input. The result is f64
    /// for f64, else f32.
    pub fn scale_points(&self, points: &Tensor) -> candle_core::Result<Tensor> {
        self.scale(points, 2)
    }

    /// Boxes `[.., 4]` as (x0, y0, x1, y1) in pixels of the original image, in pixels of SAM's input. The
    /// result is f64 for f64, else f32.
    pub fn scale_boxes(&self, boxes: &Tensor) -> candle_core::Result<Tensor> {
        self.scale(boxes, 4)
    }

    fn scale(&self, coordinates: &Tensor, last: usize) -> candle_core::Result<Tensor> {
        if coordinates.dims().last() != Some(&last) {
            bail!("prompt coordinates: expected [.., {last}], got {:?}", coordinates.shape())
        }
        let x = self.resized.1 as f64 / self.original.1 as f64;
        let y = self.resized.0 as f64 / self.original.0 as f64;
        let factors: Vec<f64> = [x, y].into_iter().cycle().take(last).collect();
        let factors = Tensor::from_vec(factors, last, coordinates.device())?;
        // An integer holds no fraction, and 16 bits not each pixel of a photograph.
        let dtype = if coordinates.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        coordinates.to_dtype(dtype)?.broadcast_mul(&factors.to_dtype(dtype)?)
    }
}

/// A mask `[h, w]` of logits becomes `rows * mask * columns`.
pub(crate) struct MaskResizer {
    /// `[H, h]`
    pub rows: Tensor,
    /// `[w, W]`
    pub columns: Tensor,
}

/// SAM's image processor.
///
/// [Example](crate::guide::library)
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SamProcessor {
    /// Length of the longest side after resizing.
    pub longest_edge: usize,
    /// Side S of the padded square.
    pub pad_size: usize,
    /// Factor of the 8-bit values.
    pub rescale_factor: f64,
    /// Mean of each channel.
    pub image_mean: [f32; 3],
    /// Standard deviation of each channel.
    pub image_std: [f32; 3],
}

/// `preprocessor_config.json`, as far as it can differ from what SAM does.
#[derive(Deserialize)]
struct ProcessorConfig {
    size: Option<Value>,
    pad_size: Option<Value>,
    rescale_factor: Option<f64>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    resample: Option<u32>,
    do_resize: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
    do_pad: Option<bool>,
}

/// A number means `longest_edge`, as in transformers.
fn longest_edge(path: &Path, size: &Value) -> Result<usize> {
    let edge = size.as_u64().or_else(|| size.get("longest_edge")?.as_u64());
    let wrong = || format!("size is {size}, expected a number or {{\"longest_edge\": a number}}");
    edge.map(|edge| edge as usize).ok_or_else(|| Error::file(path, wrong()))
}

/// Height and width; a number is the side of a square, as in transformers.
fn height_and_width(path: &Path, size: &Value) -> Result<(u64, u64)> {
    let side = |name: &str| size.as_u64().or_else(|| size.get(name)?.as_u64());
    let wrong = || {
        format!("pad_size is {size}, expected a number or {{\"height\": a number, \"width\": a number}}")
    };
    side("height").zip(side("width")).ok_or_else(|| Error::file(path, wrong()))
}

/// `processor_config.json`, where transformers 5 writes the same, nested. An older file has other settings alone.
#[derive(Deserialize)]
struct NestedConfig {
    image_processor: Option<ProcessorConfig>,
}

const NESTED_FILE: &str = "processor_config.json";
const FILE: &str = "preprocessor_config.json";

/// The configuration in a folder, and its file.
fn find_config(folder: &Path) -> Result<Option<(PathBuf, ProcessorConfig)>> {
    let nested = folder.join(NESTED_FILE);
    if nested.exists() {
        if let Some(config) = read_config::<NestedConfig>(&nested)?.image_processor {
            return Ok(Some((nested, config)));
        }
    }
    let path = folder.join(FILE);
    path.exists().then(|| Ok((path.clone(), read_config(&path)?))).transpose()
}

fn read_config<T: DeserializeOwned>(path: &Path) -> Result<T> {
    files::read_json(path, "a configuration of SAM's image processor")
}

impl SamProcessor {
    /// SAM's own processor for a model whose input has the side `image_size`.
    pub fn new(image_size: usize) -> Self {
        Self {
            longest_edge: image_size,
            pad_size: image_size,
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.485, 0.456, 0.406],
            image_std: [0.229, 0.224, 0.225],
        }
    }

    /// The processor that a model's folder describes in the file that [`config_file`](Self::config_file) finds; SAM's
    /// own where there is none.
    ///
    /// # Errors
    /// - the file cannot be read;
    /// - it asks for something other than SAM's processing;
    /// - it pads to another size than the model's `image_size`.
    pub fn load(folder: impl AsRef<Path>, image_size: usize) -> Result<Self> {
        match find_config(folder.as_ref())? {
            Some((path, config)) => Self::from_config(&path, config, image_size),
            None => Ok(Self::new(image_size)),
        }
    }

    /// The file that describes a folder's processor: as in transformers, `processor_config.json` if it has an
    /// `image_processor`, else `preprocessor_config.json`.
    ///
    /// # Errors
    /// - a file cannot be read or is no configuration of SAM's image processor.
    pub fn config_file(folder: impl AsRef<Path>) -> Result<Option<PathBuf>> {
        Ok(find_config(folder.as_ref())?.map(|(path, _)| path))
    }

    fn from_config(path: &Path, config: ProcessorConfig, image_size: usize) -> Result<Self> {
        let default = Self::new(image_size);
        let require = |holds: bool, message: String| match holds {
            true => Ok(()),
            false => Err(Error::file(path, message)),
        };
        for (step, wanted) in [
            ("do_resize", config.do_resize),
            ("do_rescale", config.do_rescale),
            ("do_normalize", config.do_normalize),
            ("do_pad", config.do_pad),
        ] {
            require(wanted != Some(false), format!("{step} is false, which is not supported"))?;
        }
        if let Some(resample) = config.resample {
            let message = format!("resample is {resample}, only 2 (bilinear) is supported");
            require(resample == 2, message)?;
        }
        if let Some(size) = &config.pad_size {
            let (height, width) = height_and_width(path, size)?;
            let message =
                format!("images are padded to {height} x {width}, the model takes {image_size} x {image_size}");
            require((height, width) == (image_size as u64, image_size as u64), message)?;
        }
        let processor = Self {
            longest_edge: match &config.size {
                Some(size) => longest_edge(path, size)?,
                None => default.longest_edge,
            },
            pad_size: default.pad_size,
            rescale_factor: config.rescale_factor.unwrap_or(default.rescale_factor),
            image_mean: config.image_mean.unwrap_or(default.image_mean),
            image_std: config.image_std.unwrap_or(default.image_std),
        };
        processor.check().map_err(|message| Error::file(path, message))?;
        Ok(processor)
    }

    /// Fails with what no processor can have: an image that the input has no room for, or pixels that are no numbers.
    fn check(&self) -> std::result::Result<(), String> {
        let (edge, pad, most) = (self.longest_edge, self.pad_size, MAX_SIDE as usize);
        let positive = |value: &f32| value.is_finite() && *value > 0.0;
        let finite = self.image_mean.iter().all(|value| value.is_finite())
            && self.image_std.iter().all(positive)
            && self.rescale_factor.is_finite();
        if pad > most {
            return Err(format!("pad_size is {pad}, expected at most {most}"));
        }
        if !(1..=pad).contains(&edge) {
            return Err(format!("size.longest_edge is {edge}, expected 1 to {pad}"));
        }
        match finite {
            true => Ok(()),
            false => {
                Err("image_mean, image_std and rescale_factor must be finite, image_std positive"
                    .into())
            }
        }
    }

    fn checked(&self) -> candle_core::Result<()> {
        self.check().map_err(|message| candle_core::Error::msg(format!("processor: {message}")))
    }

    /// The frame of an image of this size.
    ///
    /// # Errors
    /// - the image is empty, longer than 32768 pixels, or so narrow that nothing of it is left after resizing;
    /// - the processor's sizes or numbers are impossible.
    pub fn frame(&self, height: usize, width: usize) -> candle_core::Result<Frame> {
        self.checked()?;
        let longest = height.max(width);
        if height == 0 || width == 0 || longest > MAX_SIDE as usize {
            bail!("an image of {width} x {height} pixels, expected 1 to {MAX_SIDE} a side")
        }
        let scale = self.longest_edge as f64 / longest as f64;
        let side = |side: usize| (side as f64 * scale + 0.5) as usize;
        let resized = (side(height), side(width));
        if resized.0 == 0 || resized.1 == 0 {
            let edge = self.longest_edge;
            bail!(
                "an image of {width} x {height} pixels is too narrow: resized to {edge} nothing is left of it"
            )
        }
        Ok(Frame { original: (height, width), resized })
    }

    /// An image as SAM's input `[1, 3, S, S]` in f32, and its frame.
    ///
    /// The image becomes RGB of 8 bits by [`convert_to_rgb`]: transparent pixels are laid on white.
    ///
    /// # Errors
    /// As [`frame`](Self::frame) and [`convert_to_rgb`].
    pub fn preprocess(
        &self,
        image: &DynamicImage,
        device: &Device,
    ) -> candle_core::Result<(Tensor, Frame)> {
        let frame = self.frame(image.height() as usize, image.width() as usize)?;
        let (height, width) = frame.resized;
        let rgb = convert_to_rgb(image)?;
        // Sideways first and rounded to 8 bits in between, as Pillow does it.
        let filter = imageops::FilterType::Triangle;
        let rgb = imageops::resize(&rgb, width as u32, rgb.height(), filter);
        let rgb = imageops::resize(&rgb, width as u32, height as u32, filter);
        let side = self.pad_size;
        let mut pixels = vec![0f32; 3 * side * side];
        for (channel, plane) in pixels.chunks_mut(side * side).enumerate() {
            let (mean, std) = (self.image_mean[channel], self.image_std[channel]);
            let table: Vec<f32> = (0..=255u8)
                .map(|value| ((f64::from(value) * self.rescale_factor) as f32 - mean) / std)
                .collect();
            for (line, row) in plane.chunks_mut(side).zip(rgb.rows()) {
                for (value, pixel) in line.iter_mut().zip(row) {
                    *value = table[pixel.0[channel] as usize];
                }
            }
        }
        Ok((Tensor::from_vec(pixels, (1, 3, side, side), device)?, frame))
    }

    /// SAM's low-resolution mask logits `[.., h, w]` at the size of the original image, `[.., H, W]` in f32.
    ///
    /// Both resizes are linear and act on each side alone, so they and the crop between them are one matrix a side.
    pub fn resize_masks(&self, masks: &Tensor, frame: &Frame) -> candle_core::Result<Tensor> {
        let dims = masks.dims();
        let [leading @ .., h, w] = dims else {
            bail!("masks: expected [.., h, w], got {:?}", masks.shape())
        };
        let MaskResizer { rows, columns } = self.mask_resizer((*h, *w), frame, masks.device())?;
        let (height, width) = frame.original;
        let count: usize = leading.iter().product();
        let resized = (0..count)
            .map(|i| {
                let mask = masks.reshape((count, *h, *w))?.get(i)?.to_dtype(DType::F32)?;
                rows.matmul(&mask.contiguous()?)?.matmul(&columns)
            })
            .collect::<candle_core::Result<Vec<Tensor>>>()?;
        let resized = match count {
            0 => Tensor::zeros((0, height, width), DType::F32, masks.device())?,
            _ => Tensor::stack(&resized, 0)?,
        };
        resized.reshape([leading, &[height, width]].concat())
    }

    /// The matrices that resize masks of `low` rows and columns to those of the original image.
    ///
    /// # Errors
    /// - the frame is empty, larger than this processor's input, or of a larger image than [`frame`](Self::frame)
    ///   takes.
    pub(crate) fn mask_resizer(
        &self,
        low: (usize, usize),
        frame: &Frame,
        device: &Device,
    ) -> candle_core::Result<MaskResizer> {
        self.checked()?;
        let matrix = |low: usize, resized: usize, original: usize| -> candle_core::Result<Tensor> {
            if !(1..=self.pad_size).contains(&resized) {
                bail!("masks: a frame of {:?} in an input of {}", frame.resized, self.pad_size)
            }
            if !(1..=MAX_SIDE as usize).contains(&original) {
                bail!(
                    "masks: a frame of an image of {:?}, expected 1 to {MAX_SIDE} a side",
                    frame.original
                )
            }
            let up = ops::linear_resize_matrix(low, self.pad_size, device)?;
            let back = ops::linear_resize_matrix(resized, original, device)?;
            back.matmul(&up.narrow(0, 0, resized)?)
        };
        let rows = matrix(low.0, frame.resized.0, frame.original.0)?;
        let columns = matrix(low.1, frame.resized.1, frame.original.1)?.t()?;
        Ok(MaskResizer { rows, columns })
    }

    /// SAM's low-resolution mask logits `[.., h, w]` as masks of the original image, `[.., H, W]` in u8. A pixel is 1
    /// where the logit is above `threshold`, which is 0 unless there is a reason.
    pub fn post_process_masks(
        &self,
        masks: &Tensor,
        frame: &Frame,
        threshold: f64,
    ) -> candle_core::Result<Tensor> {
        self.resize_masks(masks, frame)?.gt(threshold)
    }
}
