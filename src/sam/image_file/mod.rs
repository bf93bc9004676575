//! Image files: pictures for a model, and the stored values of masks.

mod channels;
mod colours;
mod folder;
mod frames;
mod jpeg;
mod large;
mod limits;
mod png_file;
mod range;
mod raster;
mod tiff_chunks;
mod tiff_file;

pub use channels::Channels;
pub use colours::{convert_to_rgb, is_transparent};
pub(crate) use folder::{has_image_ending, is_image, ImageFolder};
pub use large::LargeImage;
pub(crate) use limits::MAX_SIDE;
pub use range::ValueRange;
pub use raster::{Raster, RasterKind, SampleType, Samples};

use crate::file_kind::stand_in;
use crate::{Error, Result};
use channels::Chosen;
use image::codecs::bmp::BmpDecoder;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, ImageResult};
use limits::{check_size, CHANNELS, MASK_PAGE, MAX_DECODED, MAX_FILE, PAGE};
use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

/// How image files are read.
///
/// [Example](crate::sam::read_image)
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct ReadOptions {
    /// Which values are black and white.
    pub range: ValueRange,
    /// The page, frame or channel to read, from 1, of a file that has several. Without it such a file is an error.
    pub page: Option<usize>,
    /// The channels of a TIFF that become red, green and blue. `page` is a page then, and no channel.
    pub channels: Option<Channels>,
}

/// An image as a viewer shows it, and how it came to be.
///
/// [Example](crate::sam::read_image)
#[derive(Clone, Debug)]
pub struct Picture {
    /// The image.
    pub image: DynamicImage,
    /// The values that became black and white, where the samples were scaled.
    pub range: Option<(f64, f64)>,
    /// The type of the samples in the file.
    pub sample_type: SampleType,
    /// Samples that are no numbers, which became black.
    pub not_numbers: usize,
    /// Whether a TIFF has a channel beside its colours that it gives no meaning. It is left out; as `page` it can be
    /// chosen.
    pub unnamed_channel: bool,
    /// Width and height before it was turned as its EXIF data say; `None` if it was not turned.
    pub stored: Option<(u32, u32)>,
    /// How its EXIF data turned it.
    pub(crate) orientation: Orientation,
}

/// Reads an image with the default options: see [`ReadOptions::read`].
///
/// ```
/// use candle_sam_lora::sam::{convert_to_rgb, is_transparent, read_image, Raster, ReadOptions, ValueRange};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let path = "assets/photos/nuclei/heldout/images/nuclei_r6c0.png";
/// let image = read_image(path)?;
/// assert!(!is_transparent(&image));
/// assert_eq!(convert_to_rgb(&image)?.dimensions(), (image.width(), image.height()));
///
/// let options = ReadOptions { range: ValueRange::MinMax, ..ReadOptions::default() };
/// let picture = options.read(path)?; // and how it was read
/// assert_eq!(picture.image.width(), image.width());
/// let stored = Raster::read(path, None)?; // the values in the file
/// assert_eq!(stored.samples.len(), stored.channels() * (stored.width * stored.height) as usize);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - as [`ReadOptions::read`].
pub fn read_image(path: impl AsRef<Path>) -> Result<DynamicImage> {
    Ok(ReadOptions::default().read(path)?.image)
}

impl ReadOptions {
    /// Reads an image, its format told by its content rather than its name. Turns it as its EXIF data say, so that its
    /// pixels are where a viewer shows them. A TIFF's associated alpha comes back unassociated. Samples that
    /// [`ValueRange`] scales come back as 8 bits, others as they are.
    ///
    /// # Errors
    /// - the file cannot be read, is no image, is damaged or cut off;
    /// - it has several pages, frames or unknown channels, and none is chosen;
    /// - it is larger than 32768 pixels a side or 1 GiB decoded.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Picture> {
        let path = path.as_ref();
        self.read_bytes(path, read_file(path)?)
    }

    /// As [`read`](Self::read), of a file whose bytes are at hand.
    pub(crate) fn read_bytes(&self, path: &Path, bytes: Vec<u8>) -> Result<Picture> {
        guarded(path, || self.decode(bytes))
    }

    fn decode(&self, bytes: Vec<u8>) -> std::result::Result<Picture, String> {
        let format = format(&bytes)?;
        let page = self.select(&bytes, format, PAGE)?;
        let unnamed_channel = format == ImageFormat::Tiff
            && matches!(page.1, Chosen::All)
            && tiff_file::has_unnamed_channel(&bytes, page.0);
        let (mut image, orientation, sample_type, (range, not_numbers)) = match self
            .raster(&bytes, format, page)?
        {
            Decoded::Plain(image, orientation) => {
                let raster = self.may_scale(&image).then(|| Raster::from_decoded(&image)).flatten();
                let sample_type =
                    raster.as_ref().map_or(SampleType::Unsigned(8), |raster| raster.sample_type);
                // Floats of 0 to 1 stay floats, which are laid on white before they are rounded.
                let not_numbers = raster.as_ref().map_or(0, Raster::not_numbers);
                let is_float = raster.as_ref().is_some_and(Raster::is_finite_float);
                let scaled = raster.map(|r| r.scaled(self.range)).transpose()?.flatten();
                let scaled = scaled.filter(|(_, range)| !(is_float && *range == (0.0, 1.0)));
                let (image, range) = scaled.map_or((image, None), |(image, r)| (image, Some(r)));
                (image, orientation, sample_type, (range, not_numbers))
            }
            Decoded::Tiff => {
                let (place, chosen) = page;
                let wanted = tiff_file::Wanted { place, chosen, values: false };
                let (raster, associated) = tiff_file::decode(bytes, wanted)?;
                let (image, range) = match raster.scaled(self.range)? {
                    Some((image, range)) => (image, Some(range)),
                    None => (raster.unscaled()?, None),
                };
                let image = if associated { colours::unassociated(image) } else { image };
                (image, raster.orientation, raster.sample_type, (range, raster.not_numbers()))
            }
        };
        let stored = (image.width(), image.height());
        image.apply_orientation(orientation);
        // Floats that fill 0 to 1 are not scaled, nor are the samples of 8 bits.
        let range = range
            .filter(|range| !(matches!(sample_type, SampleType::Float(_)) && *range == (0.0, 1.0)));
        let turned = orientation != Orientation::NoTransforms;
        let stored = turned.then_some(stored);
        Ok(Picture { image, range, sample_type, not_numbers, unnamed_channel, stored, orientation })
    }

    /// Whether the samples may be scaled; those of 8 bits only where it is asked for.
    fn may_scale(&self, image: &DynamicImage) -> bool {
        let is_narrow = image.color().bytes_per_pixel() == image.color().channel_count();
        !is_narrow || !matches!(self.range, ValueRange::Auto | ValueRange::Type)
    }

    /// Decodes what `image` reads, but leaves other TIFFs to be read here.
    fn raster(
        &self,
        bytes: &[u8],
        format: ImageFormat,
        (place, chosen): (usize, Chosen),
    ) -> std::result::Result<Decoded, String> {
        let is_tiff = format == ImageFormat::Tiff;
        if format == ImageFormat::Jpeg && !jpeg::is_complete(bytes) {
            return Err("the JPEG is cut off: its data end before the image does".into());
        }
        if is_tiff {
            tiff_file::check_whole(bytes, place, chosen)?;
        }
        if is_tiff && (place > 0 || !matches!(chosen, Chosen::All)) {
            return Ok(Decoded::Tiff);
        }
        if place > 0 {
            let frame = frames::frame(bytes, format, place).map_err(|e| plainly(&e, format))?;
            let frame = frame.ok_or("it has no such frame")?;
            return Ok(Decoded::Plain(frame, Orientation::NoTransforms));
        }
        match decode_plain(bytes, format) {
            Ok((image, orientation)) => {
                let associated = is_tiff && image.color().has_alpha();
                let image = match associated && tiff_file::has_associated_alpha(bytes) {
                    true => colours::unassociated(image),
                    false => image,
                };
                Ok(Decoded::Plain(image, orientation))
            }
            Err(Failed::Unsupported(_)) if is_tiff => Ok(Decoded::Tiff),
            Err(Failed::Unsupported(why) | Failed::Other(why)) => Err(why),
        }
    }

    /// The place of the wanted page, and the wanted channels of a TIFF. Errors name `flag`.
    fn select(
        &self,
        bytes: &[u8],
        format: ImageFormat,
        flag: &str,
    ) -> std::result::Result<(usize, Chosen), String> {
        let is_tiff = format == ImageFormat::Tiff;
        let chosen = match self.channels {
            Some(_) if !is_tiff => return Err(format!("{CHANNELS} is for TIFFs alone")),
            Some(channels) => Chosen::Three(channels),
            None => Chosen::All,
        };
        let places = match format {
            ImageFormat::Tiff => tiff_file::pages(bytes)?,
            _ => (0..frames::count(bytes, format).map_err(|e| plainly(&e, format))?).collect(),
        };
        let what = if is_tiff { "pages" } else { "frames" };
        match (places.len(), self.page) {
            (1, None) => Ok((places[0], chosen)),
            (1, Some(1)) if !is_tiff => Ok((0, chosen)),
            (1, Some(page)) if page > 0 && is_tiff && self.channels.is_none() => {
                Ok((places[0], Chosen::One(page - 1)))
            }
            (count, None) => {
                Err(format!("it has {count} {what}; choose one ({flag} 1 to {count})"))
            }
            (count, Some(page)) => places
                .get(page.wrapping_sub(1))
                .map(|place| (*place, chosen))
                .ok_or(format!("there is no {page} among its {what}: it has {count}")),
        }
    }
}

enum Decoded {
    Plain(DynamicImage, Orientation),
    /// To be decoded here.
    Tiff,
}

enum Failed {
    Unsupported(String),
    Other(String),
}

impl Raster {
    /// Reads the stored values of a mask: indices of palettes, and no inversion where a TIFF says that 0 is white.
    ///
    /// # Errors
    /// - as [`ReadOptions::read`];
    /// - the file is compressed with loss.
    pub fn read(path: impl AsRef<Path>, page: Option<usize>) -> Result<Self> {
        let path = path.as_ref();
        Self::read_bytes(path, read_file(path)?, page)
    }

    /// As [`read`](Self::read), of a file whose bytes are at hand.
    pub(crate) fn read_bytes(path: &Path, bytes: Vec<u8>, page: Option<usize>) -> Result<Self> {
        guarded(path, || Self::decode(bytes, page))
    }

    fn decode(bytes: Vec<u8>, page: Option<usize>) -> std::result::Result<Self, String> {
        let format = format(&bytes)?;
        if format == ImageFormat::Jpeg {
            return Err("a mask must be stored without loss, as PNG or TIFF, not as JPEG".into());
        }
        let options = ReadOptions { range: ValueRange::Type, page, channels: None };
        let (place, chosen) = options.select(&bytes, format, MASK_PAGE)?;
        match format {
            ImageFormat::Tiff => {
                let wanted = tiff_file::Wanted { place, chosen, values: true };
                Ok(tiff_file::decode(bytes, wanted)?.0)
            }
            ImageFormat::Png if place == 0 => png_file::decode(&bytes),
            ImageFormat::Bmp => indexed_bmp(&bytes),
            _ => match options.raster(&bytes, format, (place, Chosen::All))? {
                Decoded::Plain(image, orientation) => Self::from_decoded(&image)
                    .map(|raster| Self { orientation, ..raster })
                    .ok_or("its pixels are of no kind that a mask has".into()),
                Decoded::Tiff => Err("it is no mask".into()),
            },
        }
    }

    /// The image of these samples as they are.
    fn unscaled(&self) -> std::result::Result<DynamicImage, String> {
        let level = |value: u16, white: u16| if self.white_is_zero { white - value } else { value };
        let image = match (&self.samples, self.kind) {
            (Samples::U8(values), kind) => {
                let white = match self.sample_type {
                    SampleType::Unsigned(bits @ 1..=7) => (1u16 << bits) - 1,
                    _ => 255,
                };
                // Fewer bits are spread over 8.
                let spread = |v: &u8| (level(u16::from(*v).min(white), white) * 255 / white) as u8;
                let values = values.iter().map(spread).collect();
                match kind {
                    RasterKind::Grey | RasterKind::Palette => {
                        buffer(self, values).map(DynamicImage::ImageLuma8)
                    }
                    RasterKind::GreyAlpha => buffer(self, values).map(DynamicImage::ImageLumaA8),
                    RasterKind::Rgb => buffer(self, values).map(DynamicImage::ImageRgb8),
                    RasterKind::Rgba => buffer(self, values).map(DynamicImage::ImageRgba8),
                }
            }
            (Samples::U16(values), kind) => {
                let values = values.iter().map(|v| level(*v, u16::MAX)).collect();
                match kind {
                    RasterKind::Grey | RasterKind::Palette => {
                        buffer(self, values).map(DynamicImage::ImageLuma16)
                    }
                    RasterKind::GreyAlpha => buffer(self, values).map(DynamicImage::ImageLumaA16),
                    RasterKind::Rgb => buffer(self, values).map(DynamicImage::ImageRgb16),
                    RasterKind::Rgba => buffer(self, values).map(DynamicImage::ImageRgba16),
                }
            }
            (Samples::Wide(_), _) => None,
        };
        image.ok_or("its pixels cannot be shown".into())
    }
}

fn buffer<P: image::Pixel>(
    raster: &Raster,
    values: Vec<P::Subpixel>,
) -> Option<image::ImageBuffer<P, Vec<P::Subpixel>>> {
    image::ImageBuffer::from_raw(raster.width, raster.height, values)
}

/// The indices of a BMP with a palette of colours; a palette of greys and other BMPs by their values.
fn indexed_bmp(bytes: &[u8]) -> std::result::Result<Raster, String> {
    let failed = |e: ImageError| plainly(&e, ImageFormat::Bmp);
    let mut decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    check_size(width, height, 4)?;
    let is_grey = |[red, green, blue]: &[u8; 3]| red == green && green == blue;
    let indexed = decoder.get_palette().is_some_and(|palette| !palette.iter().all(is_grey));
    decoder.set_indexed_color(indexed);
    if !indexed {
        let image = DynamicImage::from_decoder(decoder).map_err(failed)?;
        return Raster::from_decoded(&image)
            .ok_or("its pixels are of no kind that a mask has".into());
    }
    let mut indices = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut indices).map_err(failed)?;
    Raster::new(width, height, RasterKind::Palette, SampleType::Unsigned(8), Samples::U8(indices))
        .ok_or("it has fewer pixels than its size says".into())
}

fn decode_plain(
    bytes: &[u8],
    format: ImageFormat,
) -> std::result::Result<(DynamicImage, Orientation), Failed> {
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(MAX_DECODED);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits.clone());
    let failed = |e: ImageError| match e {
        ImageError::Unsupported(_) => Failed::Unsupported(plainly(&e, format)),
        e => Failed::Other(plainly(&e, format)),
    };
    let mut decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    let a_pixel = u64::from(decoder.color_type().bytes_per_pixel());
    check_size(width, height, a_pixel).map_err(Failed::Other)?;
    let decode = || -> ImageResult<(DynamicImage, Orientation)> {
        limits.reserve(decoder.total_bytes())?;
        decoder.set_limits(limits.clone())?;
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        Ok((DynamicImage::from_decoder(decoder)?, orientation))
    };
    decode().map_err(failed)
}

/// The bytes of an image file.
///
/// # Errors
/// - the file cannot be read, or has more than 4 GiB.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let read = || {
        let file = File::open(path)?;
        let found = file.metadata()?;
        // Devices may have no end.
        let most = if found.is_file() { MAX_FILE } else { MAX_DECODED };
        let mut bytes = Vec::with_capacity(found.len().min(most) as usize);
        file.take(most + 1).read_to_end(&mut bytes).map(|_| (bytes, most))
    };
    let (bytes, most) = read().map_err(|e| Error::io(path, e))?;
    match bytes.len() as u64 > most {
        true => Err(Error::file(path, format!("is no image: it has more than {most} bytes"))),
        false => Ok(bytes),
    }
}

fn format(bytes: &[u8]) -> std::result::Result<ImageFormat, String> {
    let unknown = || {
        const SHOWN: usize = 12;
        let first = bytes[..bytes.len().min(SHOWN)].escape_ascii();
        let other = || {
            format!("its first bytes, \"{first}\", are those of no PNG, JPEG, TIFF, BMP, WebP, GIF or PNM")
        };
        stand_in(bytes).unwrap_or_else(other)
    };
    // BigTIFF, for files beyond 4 GiB.
    if bytes.starts_with(b"II+\0") || bytes.starts_with(b"MM\0+") {
        return Ok(ImageFormat::Tiff);
    }
    let format = image::guess_format(bytes).map_err(|_| unknown())?;
    match format.reading_enabled() {
        true => Ok(format),
        false => Err(unknown()),
    }
}

/// The error of a decoder, in words about the file.
fn plainly(error: &ImageError, format: ImageFormat) -> String {
    let name = format!("{format:?}").to_uppercase();
    match error {
        ImageError::Limits(_) => {
            format!("it takes more than {MAX_DECODED} bytes (1 GiB) to decode")
        }
        ImageError::Unsupported(e) => format!("the {name} is of a kind that is not read: {e}"),
        error => {
            let why = std::error::Error::source(error).map_or(error.to_string(), |e| e.to_string());
            format!("the {name} is damaged or cut off ({why})")
        }
    }
}

/// The result of a decoder. Some panic on damaged files, as the one for PNG does on a palette that ends within a
/// colour. That is no reason to end the process, for a decoder has seen nothing but its file.
fn guarded<T>(path: &Path, decode: impl FnOnce() -> std::result::Result<T, String>) -> Result<T> {
    let failed = |why: &str| Error::file(path, format!("cannot be read as an image: {why}"));
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(decoded) => decoded.map_err(|why| failed(&why)),
        Err(_) => Err(failed("its decoder panicked")),
    }
}
