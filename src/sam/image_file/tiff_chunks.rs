//! Regions of a TIFF from the strips or tiles that hold them.
//!
//! Strips that are not compressed are read row by row, for some programs write the whole image as one. Others are
//! decoded one at a time.

use super::range::{streamed_limits, ValueRange, MOST_VALUES};
use super::raster::{Raster, RasterKind, SampleType, Samples};
use super::tiff_file::{self, Page, BLACK_IS_ZERO, RGB};
use super::{colours, ReadOptions};
use image::DynamicImage;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use tiff::decoder::{Decoder, DecodingResult};
use tiff::tags::{ByteOrder, Tag};

/// A page of a TIFF whose strips or tiles are decoded one at a time.
pub(super) struct Chunks {
    decoder: Decoder<BufReader<File>>,
    /// Width and height.
    pub size: (u32, u32),
    chunk: (u32, u32),
    /// Where strips begin, if they are not compressed.
    strips: Option<Vec<u64>>,
    kind: RasterKind,
    sample_type: SampleType,
    associated: bool,
    unnamed_channel: bool,
    /// How many samples a pixel has, and the three of them that are its colours, if not all are taken.
    channels: usize,
    picked: Option<[usize; 3]>,
}

/// Rows of an image that are looked at together where strips are not compressed.
const BAND_ROWS: u32 = 64;

/// A box `[x0, y0, x1, y1]` of pixels.
type Corners = [u32; 4];

impl Chunks {
    /// A page of a file, or why it is not read in parts.
    pub fn open(file: File, options: &ReadOptions) -> Result<Self, String> {
        let mut decoder = tiff_file::open(BufReader::new(file))?;
        let pages = tiff_file::pages_of(&mut decoder)?;
        let place = match (&pages[..], options.page) {
            ([only], None) => *only,
            ([_, _, ..], Some(page)) => *pages.get(page.wrapping_sub(1)).ok_or("no such page")?,
            _ => return Err("one of its pages or channels must be chosen".into()),
        };
        decoder.seek_to_image(place).map_err(|e| tiff_file::plainly(&e))?;
        let page = Page::of(&mut decoder);
        let mut tag = |tag| decoder.find_tag_unsigned::<u16>(tag).ok().flatten().unwrap_or(1);
        let (planes, orientation) = (tag(Tag::PlanarConfiguration), tag(Tag::Orientation));
        let size = decoder.dimensions().map_err(|e| tiff_file::plainly(&e))?;
        let chunk = decoder.chunk_dimensions();
        let is_plain = page.compression == 1 && chunk.0 == size.0;
        let channels = usize::from(page.channels);
        let picked = options.channels.map(|three| page.places(three)).transpose()?;
        // The decoder drops what follows colours. Where it is not asked, all channels are there.
        let has_all = is_plain || page.photometric == BLACK_IS_ZERO;
        let (kind, channels, picked) = match (page.photometric, channels, picked) {
            (BLACK_IS_ZERO | RGB, 1.., Some(_)) if has_all => (RasterKind::Rgb, channels, picked),
            (BLACK_IS_ZERO, 1, None) => (RasterKind::Grey, 1, None),
            (RGB, 3, _) => (RasterKind::Rgb, 3, picked),
            (RGB, 4, None) if page.has_unnamed_channel() => match has_all {
                true => (RasterKind::Rgb, 4, Some([0, 1, 2])),
                false => (RasterKind::Rgb, 3, None),
            },
            (RGB, 4, None) => (RasterKind::Rgba, 4, None),
            _ => return Err(format!("{page}, is not read in parts")),
        };
        if !matches!((page.bits, page.format), (8 | 16, 1)) {
            return Err(format!("{page}, is not read in parts"));
        }
        if !matches!(page.compression, 1 | 5 | 8 | 32773 | 32946) {
            return Err(format!("{page}, is not read in parts"));
        }
        if (planes, orientation) != (1, 1) {
            return Err(format!("{page}, turned or in planes, is not read in parts"));
        }
        if chunk.0 == 0 || chunk.1 == 0 || size.0 == 0 || size.1 == 0 {
            return Err(format!("{page}, has no pixels"));
        }
        if u64::from(size.0) * u64::from(size.1) > u64::from(u32::MAX) {
            return Err(format!("{page}, has more than 2^32 - 1 pixels"));
        }
        let strips = match is_plain {
            true => decoder.find_tag_unsigned_vec(Tag::StripOffsets).ok().flatten(),
            false => None,
        };
        if strips.is_none() && chunk.0 >= size.0 && chunk.1 >= size.1 {
            return Err(format!("{page}, is one strip"));
        }
        let (sample_type, associated) = (page.sample_type(), page.has_associated_alpha());
        let unnamed_channel = page.has_unnamed_channel() && options.channels.is_none();
        Ok(Self {
            decoder,
            size,
            chunk,
            strips,
            kind,
            sample_type,
            associated,
            unnamed_channel,
            channels,
            picked,
        })
    }

    /// Whether the file has a channel without a meaning beside its colours, which is left out.
    pub fn has_unnamed_channel(&self) -> bool {
        self.unnamed_channel
    }

    /// Whether the file has opacity.
    pub fn has_alpha(&self) -> bool {
        self.kind.has_alpha()
    }

    /// A region as an image, its values scaled by `range`.
    pub fn region(&mut self, region: Corners, range: ValueRange) -> Result<DynamicImage, String> {
        let [x0, y0, x1, y1] = region;
        let samples = self.samples(region)?;
        let samples = match self.picked {
            Some(places) => tiff_file::three_of(&samples, places, self.channels),
            None => samples,
        };
        let raster = Raster::new(x1 - x0, y1 - y0, self.kind, self.sample_type, samples)
            .ok_or("fewer pixels than its size says")?;
        let image = match raster.scaled(range)? {
            Some((image, _)) => image,
            None => raster.unscaled()?,
        };
        Ok(if self.associated && self.kind.has_alpha() {
            colours::unassociated(image)
        } else {
            image
        })
    }

    fn samples(&mut self, region: Corners) -> Result<Samples, String> {
        let [x0, y0, x1, y1] = region;
        let count = (x1 - x0) as usize * (y1 - y0) as usize * self.channels;
        let mut samples = match self.sample_type {
            SampleType::Unsigned(8) => Samples::U8(vec![0; count]),
            _ => Samples::U16(vec![0; count]),
        };
        if let Some(strips) = self.strips.take() {
            let read = self.read_rows(&strips, region, &mut samples);
            self.strips = Some(strips);
            return read.map(|()| samples);
        }
        for row in y0 / self.chunk.1..y1.div_ceil(self.chunk.1) {
            for column in x0 / self.chunk.0..x1.div_ceil(self.chunk.0) {
                let (chunk, decoded) = self.chunk_at(column, row)?;
                match (&decoded, &mut samples) {
                    (DecodingResult::U8(from), Samples::U8(to)) => {
                        copy((from, chunk), (to, region), self.channels);
                    }
                    (DecodingResult::U16(from), Samples::U16(to)) => {
                        copy((from, chunk), (to, region), self.channels);
                    }
                    _ => return Err("damaged: its samples are of another type".into()),
                }
            }
        }
        Ok(samples)
    }

    /// Reads the rows of a region from strips that are not compressed.
    fn read_rows(
        &mut self,
        strips: &[u64],
        [x0, y0, x1, y1]: Corners,
        samples: &mut Samples,
    ) -> Result<(), String> {
        let is_little = self.decoder.byte_order() == ByteOrder::LittleEndian;
        let a_pixel = self.channels * if matches!(samples, Samples::U8(_)) { 1 } else { 2 };
        let mut bytes = vec![0; (x1 - x0) as usize * a_pixel];
        for (index, y) in (y0..y1).enumerate() {
            let strip = strips.get((y / self.chunk.1) as usize).ok_or("damaged: too few strips")?;
            let before = u64::from(y % self.chunk.1) * u64::from(self.size.0) + u64::from(x0);
            let place = before.checked_mul(a_pixel as u64).and_then(|n| n.checked_add(*strip));
            let place = SeekFrom::Start(place.ok_or("damaged: a strip beyond any file")?);
            let file = self.decoder.inner();
            file.seek(place)
                .and_then(|_| file.read_exact(&mut bytes))
                .map_err(|e| tiff_file::plainly(&e.into()))?;
            match samples {
                Samples::U8(to) => to[index * bytes.len()..][..bytes.len()].copy_from_slice(&bytes),
                Samples::U16(to) => {
                    let row = to[index * bytes.len() / 2..].iter_mut();
                    for (to, from) in row.zip(bytes.chunks_exact(2)) {
                        let from = [from[0], from[1]];
                        *to = match is_little {
                            true => u16::from_le_bytes(from),
                            false => u16::from_be_bytes(from),
                        };
                    }
                }
                Samples::Wide(_) => {}
            }
        }
        Ok(())
    }

    /// The samples of a strip or tile, and the pixels that it holds.
    fn chunk_at(&mut self, column: u32, row: u32) -> Result<(Corners, DecodingResult), String> {
        let across = self.size.0.div_ceil(self.chunk.0);
        let index = row * across + column;
        let (width, height) = self.decoder.chunk_data_dimensions(index);
        let (x0, y0) = (column * self.chunk.0, row * self.chunk.1);
        let decoded = self.decoder.read_chunk(index).map_err(|e| tiff_file::plainly(&e))?;
        let expected = width as usize * height as usize * self.channels;
        let found = match &decoded {
            DecodingResult::U8(samples) => samples.len(),
            DecodingResult::U16(samples) => samples.len(),
            _ => 0,
        };
        if found != expected {
            return Err(format!("damaged: a part has {found} samples, expected {expected}"));
        }
        Ok(([x0, y0, x0 + width, y0 + height], decoded))
    }

    /// `range` as a range that needs no look at the whole image: one pass over all chunks if it does.
    pub fn resolved(&mut self, range: ValueRange) -> Result<ValueRange, String> {
        let narrow = self.sample_type == SampleType::Unsigned(8);
        match range {
            ValueRange::Type | ValueRange::Fixed(..) => return Ok(range),
            ValueRange::Auto if narrow => return Ok(ValueRange::Type),
            _ => {}
        }
        let (colours, channels, picked) = (self.kind.colours(), self.channels, self.picked);
        let is_colour = |place: usize| {
            picked.map_or(place % channels < colours, |three| three.contains(&(place % channels)))
        };
        let (width, height) = self.size;
        let total = u64::from(width) * u64::from(height) * channels as u64;
        let step = (total / MOST_VALUES as u64).max(1);
        let (mut seen, mut extremes, mut sampled) = (0u64, [u16::MAX, 0], vec![]);
        let band = if self.strips.is_some() { BAND_ROWS } else { self.chunk.1 };
        for top in (0..height).step_by(band as usize) {
            let samples = self.samples([0, top, width, height.min(top.saturating_add(band))])?;
            for index in (0..samples.len()).filter(|index| is_colour(*index)) {
                let value = match &samples {
                    Samples::U8(values) => u16::from(values[index]),
                    Samples::U16(values) => values[index],
                    Samples::Wide(_) => continue,
                };
                extremes = [extremes[0].min(value), extremes[1].max(value)];
                if seen.is_multiple_of(step) {
                    sampled.push(value);
                }
                seen += 1;
            }
        }
        let raster = |values: Vec<u16>| {
            let count = values.len() as u32;
            let samples = match narrow {
                true => Samples::U8(values.iter().map(|value| *value as u8).collect()),
                false => Samples::U16(values),
            };
            Raster::new(count, 1, RasterKind::Grey, self.sample_type, samples)
                .ok_or("it has too many values")
        };
        let limits = streamed_limits(&raster(extremes.to_vec())?, &raster(sampled)?, range)?;
        Ok(limits.map_or(ValueRange::Type, |(low, high)| ValueRange::Fixed(low, high)))
    }
}

/// Copies the pixels that two boxes share; the samples of a pixel lie side by side.
fn copy<T: Copy>(from: (&[T], Corners), to: (&mut [T], Corners), channels: usize) {
    let ((from, source), (to, target)) = (from, to);
    let (x0, x1) = (source[0].max(target[0]), source[2].min(target[2]));
    let (y0, y1) = (source[1].max(target[1]), source[3].min(target[3]));
    let length = x1.saturating_sub(x0) as usize * channels;
    let place = |[left, top, right, _]: Corners, y: u32| {
        ((y - top) as usize * (right - left) as usize + (x0 - left) as usize) * channels
    };
    for y in y0..y1 {
        let (read, write) = (place(source, y), place(target, y));
        to[write..write + length].copy_from_slice(&from[read..read + length]);
    }
}
