//! Limits on images, and samples taken out of bytes.

/// No side of an image may be longer, in pixels.
pub(crate) const MAX_SIDE: u32 = 1 << 15;
/// No image may need more memory to decode, in bytes.
pub(super) const MAX_DECODED: u64 = 1 << 30;

/// No file may be longer, in bytes.
pub(super) const MAX_FILE: u64 = 4 << 30;

/// The program's flags that choose a page of an image, its channels, and a page of a mask.
pub(super) const PAGE: &str = "--page";
pub(super) const CHANNELS: &str = "--channels";
pub(super) const MASK_PAGE: &str = "--mask-page";

/// Refuses sizes beyond the limits.
pub(super) fn check_size(width: u32, height: u32, a_pixel: u64) -> Result<(), String> {
    if width.max(height) > MAX_SIDE {
        return Err(format!("it is {width} x {height} pixels; a side may have {MAX_SIDE} at most"));
    }
    let decoded = u64::from(width) * u64::from(height) * a_pixel;
    match decoded > MAX_DECODED {
        true => Err(format!(
            "its {width} x {height} pixels take {decoded} bytes decoded; {MAX_DECODED} (1 GiB) are the most"
        )),
        false => Ok(()),
    }
}

/// Samples of fewer than 8 bits, the rows of which begin at whole bytes, the highest bits first.
pub(super) fn unpacked(rows: &[u8], width: usize, bits: u8) -> Vec<u8> {
    let bits = usize::from(bits.clamp(1, 8));
    let length = (width * bits).div_ceil(8).max(1);
    let sample = |row: &[u8], x: usize| {
        let place = x * bits;
        // Samples of 1, 2 and 4 bits lie within a byte; others may lie in two.
        let pair =
            u16::from_be_bytes([row[place / 8], row.get(place / 8 + 1).copied().unwrap_or(0)]);
        ((pair >> (16 - bits - place % 8)) & ((1 << bits) - 1)) as u8
    };
    rows.chunks_exact(length).flat_map(|row| (0..width).map(move |x| sample(row, x))).collect()
}
