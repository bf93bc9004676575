//! A mask as a PNG that holds what it was made with.

use super::super::photo::is_whole;
use super::super::settings;
use crate::{write_atomic, Error, Result};
use image::GrayImage;
use png::{BitDepth, ColorType, Decoder, Encoder, EncodingError};
use serde_json::Value;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// The keyword of the PNG's text that holds the settings' checksums as JSON.
const KEYWORD: &str = "candle-sam-lora settings";

/// Writes a mask of these settings, atomically.
pub fn write(path: &Path, mask: &GrayImage, settings: &Value) -> Result<()> {
    let bytes = encode(mask, settings)
        .map_err(|e| Error::file(path, format!("cannot be written as PNG: {e}")))?;
    write_atomic(path, |file| file.write_all(&bytes))
}

fn encode(mask: &GrayImage, settings: &Value) -> std::result::Result<Vec<u8>, EncodingError> {
    let mut bytes = vec![];
    let mut encoder = Encoder::new(&mut bytes, mask.width(), mask.height());
    encoder.set_color(ColorType::Grayscale);
    encoder.set_depth(BitDepth::Eight);
    encoder.add_text_chunk(KEYWORD.into(), settings::checksums(settings).to_string())?;
    let mut writer = encoder.write_header()?;
    writer.write_image_data(mask)?;
    writer.finish()?;
    Ok(bytes)
}

/// Whether a whole mask of these settings is there.
///
/// # Errors
/// - it is there, with other settings or none.
pub fn is_there(path: &Path, settings: &Value) -> anyhow::Result<bool> {
    if !is_whole(path) {
        return Ok(false);
    }
    let kept = kept(path).unwrap_or_default();
    settings::check(path, &kept, &settings::checksums(settings))?;
    Ok(true)
}

/// The checksums that a PNG holds, if it holds some.
fn kept(path: &Path) -> Option<Value> {
    let reader = Decoder::new(BufReader::new(File::open(path).ok()?)).read_info().ok()?;
    let texts = &reader.info().uncompressed_latin1_text;
    let text = texts.iter().find(|text| text.keyword == KEYWORD)?;
    serde_json::from_str(&text.text).ok()
}
