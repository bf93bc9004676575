//! PNGs by their values: indices of palettes, greys of 1 to 16 bits as they are stored.

use super::limits::{check_size, unpacked, MAX_DECODED};
use super::raster::{Raster, RasterKind, SampleType, Samples};
use image::metadata::Orientation;
use png::{BitDepth, ColorType, Transformations};
use std::io::Cursor;

/// The stored pixels of a PNG.
///
/// # Errors
/// - the file is damaged, or too large.
pub(super) fn decode(bytes: &[u8]) -> Result<Raster, String> {
    let damaged = |e: png::DecodingError| format!("the PNG is damaged or cut off ({e})");
    let limits = png::Limits { bytes: MAX_DECODED as usize };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(damaged)?;
    let (width, height) = reader.info().size();
    check_size(width, height, 8)?;
    let (colour, depth) = reader.output_color_type();
    let orientation = reader.info().exif_metadata.as_deref().and_then(Orientation::from_exif_chunk);
    let size = reader.output_buffer_size().ok_or("it is too large to decode")?;
    let mut rows = vec![0; size];
    reader.next_frame(&mut rows).map_err(damaged)?;
    let bits = depth as u8;
    let samples = match depth {
        BitDepth::Eight => Samples::U8(rows),
        BitDepth::Sixteen => {
            let pairs = rows.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
            Samples::U16(pairs.collect())
        }
        BitDepth::One | BitDepth::Two | BitDepth::Four => {
            Samples::U8(unpacked(&rows, width as usize, bits))
        }
    };
    let kind = match colour {
        ColorType::Grayscale => RasterKind::Grey,
        ColorType::Indexed => RasterKind::Palette,
        ColorType::GrayscaleAlpha => RasterKind::GreyAlpha,
        ColorType::Rgb => RasterKind::Rgb,
        ColorType::Rgba => RasterKind::Rgba,
    };
    let raster = Raster::new(width, height, kind, SampleType::Unsigned(bits), samples)
        .ok_or("it has fewer pixels than its size says")?;
    Ok(Raster { orientation: orientation.unwrap_or(Orientation::NoTransforms), ..raster })
}
