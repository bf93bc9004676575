//! Images that are read region by region.

use super::limits::MAX_DECODED;
use super::tiff_chunks::Chunks;
use super::{format, guarded, Picture, ReadOptions, ValueRange};
use crate::sam::generate::Crop;
use crate::{Error, Result};
use image::{DynamicImage, ImageFormat};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// An image of which a region at a time is in memory, where its file allows that.
///
/// TIFFs with grey, RGB or RGBA pixels of 8 or 16 bits are read in parts if they are not compressed. So are those
/// compressed with LZW, deflate or PackBits in several strips or tiles. Every other file is decoded as a whole, within
/// the limits of [`ReadOptions::read`]; [`decoded_whole`](Self::decoded_whole) tells why.
///
/// ```no_run
/// use candle_sam_lora::sam::{Crop, LargeImage, ReadOptions};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let mut image = LargeImage::open("slide.tif", &ReadOptions::default())?;
/// if let Some(why) = image.decoded_whole() {
///     println!("slide.tif: {why}");
/// }
/// let part = image.region(&Crop { left: 9000, top: 7000, right: 10000, bottom: 8000 })?;
/// assert_eq!((part.width(), part.height()), (1000, 1000));
/// # Ok(())
/// # }
/// ```
pub struct LargeImage {
    path: PathBuf,
    pixels: Pixels,
    range: ValueRange,
    scaled: Option<(f64, f64)>,
    unnamed_channel: bool,
    decoded_whole: Option<String>,
}

enum Pixels {
    Chunks(Box<Chunks>),
    Whole(DynamicImage),
}

/// An image in memory.
impl From<DynamicImage> for LargeImage {
    fn from(image: DynamicImage) -> Self {
        let (path, range) = (PathBuf::from("an image in memory"), ValueRange::Type);
        let pixels = Pixels::Whole(image);
        Self { path, pixels, range, scaled: None, unnamed_channel: false, decoded_whole: None }
    }
}

impl std::fmt::Debug for LargeImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (height, width) = self.size();
        write!(f, "LargeImage({}, {width} x {height})", self.path.display())
    }
}

impl LargeImage {
    /// Opens a file. A range that depends on all values costs one pass over them.
    ///
    /// # Errors
    /// - the file cannot be read, or is damaged;
    /// - it must be decoded whole, and has more than 1 GiB or fails as [`ReadOptions::read`].
    pub fn open(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Self> {
        let path = path.as_ref();
        let mut head = vec![];
        let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
        (&mut file).take(64).read_to_end(&mut head).map_err(|e| Error::io(path, e))?;
        let why = match format(&head) {
            Ok(ImageFormat::Tiff) => {
                let file = File::open(path).map_err(|e| Error::io(path, e))?;
                let opened = guarded(path, || Ok(Chunks::open(file, options)))?;
                match opened {
                    Ok(mut chunks) => {
                        let range = guarded(path, || chunks.resolved(options.range))?;
                        let unnamed_channel = chunks.has_unnamed_channel();
                        let (path, pixels) = (path.into(), Pixels::Chunks(Box::new(chunks)));
                        let scaled = match range {
                            ValueRange::Fixed(low, high) => Some((low, high)),
                            _ => None,
                        };
                        let decoded_whole = None;
                        return Ok(Self {
                            path,
                            pixels,
                            range,
                            scaled,
                            unnamed_channel,
                            decoded_whole,
                        });
                    }
                    Err(why) => format!("decoded as a whole: {why}"),
                }
            }
            Ok(other) => {
                let name = format!("{other:?}").to_uppercase();
                format!("decoded as a whole: a {name} is not read in parts")
            }
            // Reading the whole names what is wrong.
            Err(_) => String::new(),
        };
        let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
        if length > MAX_DECODED {
            let message =
                format!("{why}; its {length} bytes are too many, {MAX_DECODED} are the most");
            return Err(Error::file(path, message));
        }
        let Picture { image, range: scaled, unnamed_channel, .. } = options.read(path)?;
        let (path, pixels, range) = (path.into(), Pixels::Whole(image), options.range);
        Ok(Self { path, pixels, range, scaled, unnamed_channel, decoded_whole: Some(why) })
    }

    /// Height and width in pixels.
    pub fn size(&self) -> (u32, u32) {
        match &self.pixels {
            Pixels::Chunks(chunks) => (chunks.size.1, chunks.size.0),
            Pixels::Whole(image) => (image.height(), image.width()),
        }
    }

    /// Why the file is in memory as a whole; none if it is read in parts.
    pub fn decoded_whole(&self) -> Option<&str> {
        self.decoded_whole.as_deref()
    }

    /// The values that are black and white, where the samples are scaled.
    pub fn range(&self) -> Option<(f64, f64)> {
        self.scaled
    }

    /// Whether the file has a channel beside its colours that it gives no meaning; see
    /// [`Picture::unnamed_channel`](crate::sam::Picture::unnamed_channel).
    pub fn has_unnamed_channel(&self) -> bool {
        self.unnamed_channel
    }

    /// Whether it has opacity, so that regions may be transparent.
    pub fn has_alpha(&self) -> bool {
        match &self.pixels {
            Pixels::Whole(image) => image.color().has_alpha(),
            Pixels::Chunks(chunks) => chunks.has_alpha(),
        }
    }

    /// A region, its pixels as [`ReadOptions::read`] gives them.
    ///
    /// # Errors
    /// - the region has no pixel or leaves the image;
    /// - the file cannot be read or is damaged.
    pub fn region(&mut self, region: &Crop) -> Result<DynamicImage> {
        let (height, width) = self.size();
        let Crop { left, top, right, bottom } = *region;
        if left >= right || top >= bottom || right > width || bottom > height {
            let message = format!("a region {region:?} of an image of {width} x {height} pixels");
            return Err(Error::file(&self.path, message));
        }
        match &mut self.pixels {
            Pixels::Whole(image) => Ok(image.crop_imm(left, top, right - left, bottom - top)),
            Pixels::Chunks(chunks) => {
                let range = self.range;
                guarded(&self.path, || chunks.region([left, top, right, bottom], range))
            }
        }
    }
}
