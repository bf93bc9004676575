//! Images that move: GIF, WebP and PNG of several frames.

use image::codecs::{gif::GifDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{AnimationDecoder, DynamicImage, Frames, ImageFormat, ImageResult};
use std::io::Cursor;

/// Frames are counted up to here.
const MOST: usize = 1000;

fn frames(bytes: &[u8], format: ImageFormat) -> ImageResult<Option<Frames<'_>>> {
    let bytes = Cursor::new(bytes);
    Ok(match format {
        ImageFormat::Gif => Some(GifDecoder::new(bytes)?.into_frames()),
        ImageFormat::WebP => {
            let decoder = WebPDecoder::new(bytes)?;
            decoder.has_animation().then(|| decoder.into_frames())
        }
        ImageFormat::Png => {
            let decoder = PngDecoder::new(bytes)?;
            match decoder.is_apng()? {
                true => Some(decoder.apng()?.into_frames()),
                false => None,
            }
        }
        _ => None,
    })
}

/// How many frames there are.
pub(super) fn count(bytes: &[u8], format: ImageFormat) -> ImageResult<usize> {
    let Some(frames) = frames(bytes, format)? else { return Ok(1) };
    // A frame that is damaged ends the count; whoever reads the first one is told.
    Ok(frames.take(MOST).take_while(|frame| frame.is_ok()).count().max(1))
}

/// The frame at `index`, composed as a viewer shows it.
pub(super) fn frame(
    bytes: &[u8],
    format: ImageFormat,
    index: usize,
) -> ImageResult<Option<DynamicImage>> {
    let frame = frames(bytes, format)?.and_then(|mut frames| frames.nth(index)).transpose()?;
    Ok(frame.map(|frame| frame.into_buffer().into()))
}
