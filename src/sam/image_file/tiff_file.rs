//! TIFFs of any depth: integers of 1 to 64 bits, floats of 16 to 64, palettes, JPEG and YCbCr, pages.

use super::channels::{Channels, Chosen};
use super::jpeg::is_complete;
use super::limits::{check_size, unpacked, CHANNELS, MASK_PAGE, MAX_DECODED, PAGE};
use super::raster::{Raster, RasterKind, SampleType, Samples};
use image::metadata::Orientation;
use std::io::{Cursor, Read, Seek};
use tiff::decoder::{Decoder, DecodingResult, Limits};
use tiff::tags::Tag;

type Bytes<'a> = Decoder<Cursor<&'a [u8]>>;

/// A file or its bytes.
pub(super) trait Source: Read + Seek {}

impl<R: Read + Seek> Source for R {}

const WHITE_IS_ZERO: u16 = 0;
pub(super) const BLACK_IS_ZERO: u16 = 1;
pub(super) const RGB: u16 = 2;
const PALETTE: u16 = 3;
const YCBCR: u16 = 6;
/// A value of the tag Compression.
const JPEG: u16 = 7;

/// Tags of a page.
pub(super) struct Page {
    pub photometric: u16,
    pub bits: u16,
    pub format: u16,
    pub channels: u16,
    pub compression: u16,
    extra: Vec<u16>,
}

impl Page {
    pub fn of(decoder: &mut Decoder<impl Source>) -> Self {
        let mut tag = |tag, absent| decoder.find_tag_unsigned(tag).ok().flatten().unwrap_or(absent);
        let photometric = tag(Tag::PhotometricInterpretation, BLACK_IS_ZERO);
        let (channels, compression) = (tag(Tag::SamplesPerPixel, 1), tag(Tag::Compression, 1));
        let mut first = |tag, absent| {
            let values = decoder.find_tag_unsigned_vec::<u16>(tag).ok().flatten();
            values.and_then(|values| values.first().copied()).unwrap_or(absent)
        };
        let (bits, format) = (first(Tag::BitsPerSample, 1), first(Tag::SampleFormat, 1));
        let extra = decoder.find_tag_unsigned_vec(Tag::ExtraSamples).ok().flatten();
        let extra = extra.unwrap_or_default();
        Self { photometric, bits, format, channels, compression, extra }
    }

    pub fn sample_type(&self) -> SampleType {
        let bits = self.bits.min(255) as u8;
        match self.format {
            2 => SampleType::Signed(bits),
            3 => SampleType::Float(bits),
            _ => SampleType::Unsigned(bits),
        }
    }

    /// Why its channels are no image, and what helps.
    fn too_many_channels(&self, channels: usize, flag: &str) -> String {
        let three = match flag == PAGE {
            true => format!(", or three as red, green and blue ({CHANNELS} R,G,B)"),
            false => String::new(),
        };
        format!(
            "{self}: its {channels} channels are neither grey, with or without opacity, nor colours; choose one \
             ({flag} 1 to {channels}){three}"
        )
    }

    /// Whether the first extra channel is opacity.
    fn has_alpha(&self) -> bool {
        matches!(self.extra.first(), Some(1 | 2))
    }

    /// Whether a channel follows the colours that the file gives no meaning: infrared light, say.
    pub fn has_unnamed_channel(&self) -> bool {
        self.photometric == RGB && self.channels == 4 && self.extra.first() == Some(&0)
    }

    /// The places of the chosen channels.
    ///
    /// # Errors
    /// - its samples are no brightnesses, or there is no such channel.
    pub fn places(&self, chosen: Channels) -> Result<[usize; 3], String> {
        match self.photometric {
            BLACK_IS_ZERO | RGB => chosen.places(self.channels.into()),
            _ => Err(format!("{self}: its channels are no brightnesses to choose from")),
        }
        .map_err(|why| format!("{CHANNELS} {chosen}: {why}"))
    }

    /// Whether there are more channels than colours and opacity.
    fn has_unknown_channels(&self) -> bool {
        self.photometric == RGB && (self.channels > 4 || self.has_unnamed_channel())
    }

    /// Whether colours are multiplied by the opacity.
    pub fn has_associated_alpha(&self) -> bool {
        self.extra.first() == Some(&1)
    }
}

impl std::fmt::Display for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let colours = match self.photometric {
            WHITE_IS_ZERO | BLACK_IS_ZERO => "grey",
            RGB => "RGB",
            PALETTE => "palette",
            5 => "CMYK",
            YCBCR => "YCbCr",
            8..=10 => "CIELab",
            _ => "unknown colours",
        };
        let compression = match self.compression {
            1 => "not compressed",
            2 | 3 => "compressed as fax group 3",
            4 => "compressed as fax group 4",
            5 => "compressed with LZW",
            6 => "compressed with JPEG of the old kind",
            7 => "compressed with JPEG",
            8 | 32946 => "compressed with deflate",
            32773 => "compressed with PackBits",
            34712 | 33003 | 33005 => "compressed with JPEG 2000",
            34925 => "compressed with LZMA",
            34933 => "compressed with PNG",
            50000 => "compressed with Zstandard",
            50001 => "compressed with WebP",
            _ => "of an unknown compression",
        };
        let plural = if self.channels == 1 { "" } else { "s" };
        let (channels, sample) = (self.channels, self.sample_type());
        write!(f, "a TIFF of {channels} {sample} channel{plural}, {colours}, {compression}")
    }
}

/// The places of a TIFF's pages among its images; previews and masks of other pages are none.
///
/// # Errors
/// - the file is no TIFF or damaged;
/// - its pages are previews of an image within them;
/// - one page holds a stack, as ImageJ writes large ones.
pub(super) fn pages(bytes: &[u8]) -> Result<Vec<usize>, String> {
    pages_of(&mut open(Cursor::new(bytes))?)
}

/// As [`pages`], of a file at its first image.
pub(super) fn pages_of(decoder: &mut Decoder<impl Source>) -> Result<Vec<usize>, String> {
    let stack = stack(decoder);
    let has_inner = decoder.find_tag(Tag::SubIfd).ok().flatten().is_some();
    let (mut pages, mut place) = (vec![], 0);
    loop {
        let kind: u32 = decoder.find_tag_unsigned(Tag::NewSubfileType).ok().flatten().unwrap_or(0);
        if kind & 0b101 == 0 {
            pages.push(place);
        }
        place += 1;
        if !decoder.more_images() {
            break;
        }
        if decoder.next_image().is_err() {
            pages.push(place);
            break;
        }
    }
    if pages.is_empty() && has_inner {
        return Err("it is a preview, and the image itself is hidden within it, as in a camera's raw file (DNG, NEF): \
                    develop it into TIFF or PNG"
            .into());
    }
    if pages.is_empty() {
        pages.push(0);
    }
    match stack {
        Some(count) if pages.len() == 1 && count > 1 => Err(format!(
            "it is an ImageJ stack of {count} images in one page; save them one by one"
        )),
        _ => Ok(pages),
    }
}

/// How many images ImageJ says that the file has.
fn stack(decoder: &mut Decoder<impl Source>) -> Option<usize> {
    let text = decoder.get_tag_ascii_string(Tag::ImageDescription).ok()?;
    let text = text.strip_prefix("ImageJ=")?;
    text.lines().find_map(|line| line.strip_prefix("images="))?.trim().parse().ok()
}

/// Whether the colours of the first page are multiplied by its alpha.
pub(super) fn has_associated_alpha(bytes: &[u8]) -> bool {
    open(Cursor::new(bytes)).is_ok_and(|mut decoder| Page::of(&mut decoder).has_associated_alpha())
}

/// Whether a page has a channel that the file gives no meaning beside its colours.
pub(super) fn has_unnamed_channel(bytes: &[u8], place: usize) -> bool {
    at(bytes, place).is_ok_and(|mut decoder| Page::of(&mut decoder).has_unnamed_channel())
}

/// Refuses what decoders pass over. They drop channels after the fourth, where none is wanted. They fill what is
/// missing of a JPEG that is cut off with grey.
pub(super) fn check_whole(bytes: &[u8], place: usize, chosen: Chosen) -> Result<(), String> {
    let mut decoder = at(bytes, place)?;
    let page = Page::of(&mut decoder);
    if page.channels > 4 && matches!(chosen, Chosen::All) {
        return Err(page.too_many_channels(page.channels.into(), PAGE));
    }
    if page.compression != JPEG {
        return Ok(());
    }
    let mut tag = |tag| decoder.find_tag_unsigned_vec::<u64>(tag).ok().flatten();
    let offsets = tag(Tag::StripOffsets).or_else(|| tag(Tag::TileOffsets)).unwrap_or_default();
    let lengths = tag(Tag::StripByteCounts).or_else(|| tag(Tag::TileByteCounts));
    let is_whole = |(offset, length): (u64, u64)| {
        let end = offset.checked_add(length).and_then(|end| usize::try_from(end).ok());
        let part = end.and_then(|end| bytes.get(offset as usize..end));
        length == 0 || part.is_some_and(is_complete)
    };
    match offsets.into_iter().zip(lengths.unwrap_or_default()).all(is_whole) {
        true => Ok(()),
        false => Err("the TIFF is cut off: one of the JPEGs within ends early".into()),
    }
}

/// How a page is to be read.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// The page's place among the images of the file.
    pub place: usize,
    /// The channels that are wanted.
    pub chosen: Chosen,
    /// Whether the values count, not the colours they mean: indices stay, and 0 stays 0.
    pub values: bool,
}

/// The pixels of a page, and whether its colours are multiplied by its alpha.
///
/// # Errors
/// - it is of a kind that is not read, or damaged;
/// - it has channels of unknown meaning, and none was chosen.
pub(super) fn decode(mut bytes: Vec<u8>, wanted: Wanted) -> Result<(Raster, bool), String> {
    let (page, place) = {
        let mut decoder = at(&bytes, wanted.place)?;
        (Page::of(&mut decoder), decoder.ifd_pointer().map_or(0, |pointer| pointer.0))
    };
    if wanted.values && matches!(page.compression, 6 | 7) {
        return Err("a mask must be stored without loss, not with JPEG".into());
    }
    // The decoder inverts where 0 is white, reads no palettes, and drops what follows the colours. It takes all of
    // these for plain grey here, perhaps of several channels.
    if matches!(page.photometric, WHITE_IS_ZERO | PALETTE) || page.has_unknown_channels() {
        set_photometric(&mut bytes, place, BLACK_IS_ZERO);
    }
    let mut decoder = at(&bytes, wanted.place)?;
    let failed = |e: tiff::TiffError| format!("{page}: {}", plainly(&e));
    let (width, height) = decoder.dimensions().map_err(failed)?;
    let bytes_a_sample = if page.bits <= 16 && page.format == 1 { 2 } else { 8 };
    check_size(width, height, u64::from(page.channels) * bytes_a_sample)?;
    let map = if page.photometric == PALETTE && !wanted.values {
        Some(decoder.get_tag_u16_vec(Tag::ColorMap).map_err(failed)?)
    } else {
        None
    };
    let orientation: u16 = decoder.find_tag_unsigned(Tag::Orientation).ok().flatten().unwrap_or(1);
    let mut decoded = DecodingResult::U8(vec![]);
    let layout = decoder.read_image_to_buffer(&mut decoded).map_err(failed)?;
    let pixels = width as usize * height as usize;
    let mut samples = match (samples(decoded), page.bits) {
        (Samples::U8(rows), 1..=7) if page.channels == 1 => {
            Samples::U8(unpacked(&rows, width as usize, page.bits as u8))
        }
        (samples, _) => samples,
    };
    let channels = samples.len() / pixels.max(1);
    if channels == 0 || channels * pixels != samples.len() {
        return Err(format!("{page}: {} samples in {pixels} pixels", samples.len()));
    }
    if layout.planes > 1 {
        samples =
            picked(&samples, (0..pixels).flat_map(|p| (0..channels).map(move |c| c * pixels + p)));
    }
    let known = match (page.photometric, channels) {
        (PALETTE, 1) if wanted.values => Some(RasterKind::Palette),
        (WHITE_IS_ZERO | BLACK_IS_ZERO | PALETTE, 1) => Some(RasterKind::Grey),
        (WHITE_IS_ZERO | BLACK_IS_ZERO, 2) if page.has_alpha() => Some(RasterKind::GreyAlpha),
        (BLACK_IS_ZERO | RGB | YCBCR, 3) => Some(RasterKind::Rgb),
        (RGB, 4) if !page.has_unnamed_channel() => Some(RasterKind::Rgba),
        _ => None,
    };
    let kind = match (known, wanted.chosen) {
        (Some(kind), Chosen::All | Chosen::One(0)) => kind,
        (Some(_), Chosen::One(channel)) => {
            return Err(format!("there is no {} among its pages: it has 1", channel + 1));
        }
        (None, Chosen::One(channel)) if channel < channels => {
            samples = picked(&samples, (0..pixels).map(|p| p * channels + channel));
            RasterKind::Grey
        }
        (_, Chosen::Three(three)) => {
            let places = page.places(three)?;
            samples = three_of(&samples, places, channels);
            RasterKind::Rgb
        }
        (None, Chosen::All) if page.has_unnamed_channel() => {
            samples = three_of(&samples, [0, 1, 2], channels);
            RasterKind::Rgb
        }
        (None, _) => {
            let flag = if wanted.values { MASK_PAGE } else { PAGE };
            return Err(page.too_many_channels(channels, flag));
        }
    };
    if let (YCBCR, Samples::U8(values)) = (page.photometric, &mut samples) {
        values.chunks_exact_mut(3).for_each(to_rgb);
    }
    let (kind, sample_type, samples) = match map {
        Some(map) => (RasterKind::Rgb, SampleType::Unsigned(8), coloured(&samples, &map)),
        None => (kind, page.sample_type(), samples),
    };
    let raster = Raster::new(width, height, kind, sample_type, samples)
        .ok_or_else(|| format!("{page}: fewer pixels than its size says"))?;
    let orientation = Orientation::from_exif(orientation.min(255) as u8);
    Ok((
        Raster {
            orientation: orientation.unwrap_or(Orientation::NoTransforms),
            white_is_zero: page.photometric == WHITE_IS_ZERO && !wanted.values,
            ..raster
        },
        page.has_associated_alpha() && kind.has_alpha(),
    ))
}

pub(super) fn open<R: Source>(source: R) -> Result<Decoder<R>, String> {
    let mut limits = Limits::default();
    limits.decoding_buffer_size = MAX_DECODED as usize;
    limits.intermediate_buffer_size = MAX_DECODED as usize;
    limits.ifd_value_size = 16 << 20;
    let decoder = Decoder::new(source).map_err(|e| plainly(&e))?;
    Ok(decoder.with_limits(limits))
}

fn at(bytes: &[u8], place: usize) -> Result<Bytes<'_>, String> {
    let mut decoder = open(Cursor::new(bytes))?;
    if place > 0 {
        decoder.seek_to_image(place).map_err(|e| plainly(&e))?;
    }
    Ok(decoder)
}

pub(super) fn plainly(error: &tiff::TiffError) -> String {
    match error {
        tiff::TiffError::LimitsExceeded => {
            format!("it takes more than {MAX_DECODED} bytes (1 GiB) to decode")
        }
        tiff::TiffError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            "the file ends early".into()
        }
        tiff::TiffError::UnsupportedError(_) => "this kind is not read".into(),
        other => format!("damaged: {other}"),
    }
}

fn samples(decoded: DecodingResult) -> Samples {
    fn wide<T: Into<f64>>(values: Vec<T>) -> Samples {
        Samples::Wide(values.into_iter().map(Into::into).collect())
    }
    match decoded {
        DecodingResult::U8(values) => Samples::U8(values),
        DecodingResult::U16(values) => Samples::U16(values),
        DecodingResult::U32(values) => wide(values),
        DecodingResult::U64(values) => {
            Samples::Wide(values.into_iter().map(|value| value as f64).collect())
        }
        DecodingResult::I8(values) => wide(values),
        DecodingResult::I16(values) => wide(values),
        DecodingResult::I32(values) => wide(values),
        DecodingResult::I64(values) => {
            Samples::Wide(values.into_iter().map(|value| value as f64).collect())
        }
        DecodingResult::F16(values) => wide(values),
        DecodingResult::F32(values) => wide(values),
        DecodingResult::F64(values) => wide(values),
    }
}

/// Three of some channels.
pub(super) fn three_of(samples: &Samples, places: [usize; 3], channels: usize) -> Samples {
    let pixels = samples.len() / channels;
    picked(samples, (0..pixels).flat_map(|p| places.map(|place| p * channels + place)))
}

fn picked(samples: &Samples, places: impl Iterator<Item = usize>) -> Samples {
    match samples {
        Samples::U8(values) => Samples::U8(places.map(|place| values[place]).collect()),
        Samples::U16(values) => Samples::U16(places.map(|place| values[place]).collect()),
        Samples::Wide(values) => Samples::Wide(places.map(|place| values[place]).collect()),
    }
}

/// The colours of indices; the map holds all reds, all greens, all blues, of 16 bits.
fn coloured(indices: &Samples, map: &[u16]) -> Samples {
    let count = map.len() / 3;
    let colour = |index: usize, channel: usize| {
        let value = map.get(channel * count + index).copied().unwrap_or(0);
        if index < count {
            (value >> 8) as u8
        } else {
            0
        }
    };
    let indices = (0..indices.len()).map(|place| indices.get(place) as usize);
    Samples::U8(indices.flat_map(|index| (0..3).map(move |c| colour(index, c))).collect())
}

/// JFIF's YCbCr.
fn to_rgb(pixel: &mut [u8]) {
    if let [y, cb, cr] = pixel {
        let (luma, blue, red) = (f32::from(*y), f32::from(*cb) - 128.0, f32::from(*cr) - 128.0);
        let level = |value: f32| value.round().clamp(0.0, 255.0) as u8;
        *y = level(luma + 1.402 * red);
        *cb = level(luma - 0.344_136 * blue - 0.714_136 * red);
        *cr = level(luma + 1.772 * blue);
    }
}

/// Writes the tag PhotometricInterpretation of the directory at `place`.
fn set_photometric(bytes: &mut [u8], place: u64, value: u16) {
    const PHOTOMETRIC: u16 = 262;
    let little = bytes.starts_with(b"II");
    let number = |b: &[u8]| match (little, b) {
        (true, [a, b]) => u16::from_le_bytes([*a, *b]),
        (_, [a, b]) => u16::from_be_bytes([*a, *b]),
        _ => 0,
    };
    let big = number(bytes.get(2..4).unwrap_or(&[])) == 43;
    // Count of entries, size of one, and where its value begins.
    let (head, size, inside) = if big { (8, 20, 12) } else { (2, 12, 8) };
    let Ok(start) = usize::try_from(place) else { return };
    let Some(entries) = start.checked_add(head).and_then(|start| bytes.get_mut(start..)) else {
        return;
    };
    for entry in entries.chunks_exact_mut(size) {
        match number(&entry[..2]) {
            PHOTOMETRIC => {
                let value = if little { value.to_le_bytes() } else { value.to_be_bytes() };
                return entry[inside..inside + 2].copy_from_slice(&value);
            }
            // Tags are in ascending order.
            tag if tag > PHOTOMETRIC => return,
            _ => {}
        }
    }
}
