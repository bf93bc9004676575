//! A large image in tiles takes the memory of one tile, of the run lengths found and of a strip of labels.

use crate::counting;
use anyhow::{ensure, Result};
use candle_sam_lora::sam::{
    save_label_strips, Crop, GeneratedMask, LargeImage, ReadOptions, Rle, Tile, Tiling,
};
use image::DynamicImage;
use std::io::BufWriter;
use std::path::Path;
use tiff::encoder::{colortype::RGB8, TiffEncoder};

/// The scene has a disc in each square of this side, and a bar that crosses the whole image.
const PITCH: u32 = 230;
const BAR: u32 = 17;

fn on_object(x: u32, y: u32) -> bool {
    let off = |value: u32| f64::from(value % PITCH) - f64::from(PITCH / 2);
    off(x).hypot(off(y)) < 80.0
}

/// Writes a square image of strips of 16 rows.
fn write(path: &Path, side: u32) -> Result<()> {
    let mut tiff = TiffEncoder::new(BufWriter::new(std::fs::File::create(path)?))?;
    let mut image = tiff.new_image::<RGB8>(side, side)?;
    image.rows_per_strip(16)?;
    for top in (0..side).step_by(16) {
        let rows = top..side.min(top + 16);
        let pixels = rows.flat_map(|y| (0..side).map(move |x| (x, y)));
        let pixels = pixels.flat_map(|(x, y)| [if on_object(x, y) { 200 } else { 40 }; 3]);
        image.write_strip(&pixels.collect::<Vec<u8>>())?;
    }
    Ok(image.finish()?)
}

/// A mask for each disc of a window, told by its pixels, and one for the bar.
fn segment(part: &DynamicImage, tile: &Tile) -> candle_sam_lora::Result<Vec<GeneratedMask>> {
    let Crop { left, top, right, bottom } = tile.window;
    let (width, height) = (right - left, bottom - top);
    let grey = part.to_luma8();
    let mask = |inside: Vec<bool>| -> candle_sam_lora::Result<Option<GeneratedMask>> {
        let mask = Rle::from_mask(&inside, (height, width))?;
        Ok(mask.bounds().map(|bounds| GeneratedMask {
            mask,
            bounds,
            iou_score: 0.9,
            stability_score: 0.9,
            point: [0.0, 0.0],
            crop: Crop { left: 0, top: 0, right: width, bottom: height },
        }))
    };
    let mut masks = vec![];
    for row in top / PITCH..bottom.div_ceil(PITCH) {
        for column in left / PITCH..right.div_ceil(PITCH) {
            let mut inside = vec![false; grey.len()];
            for y in (row * PITCH).max(top)..((row + 1) * PITCH).min(bottom) {
                for x in (column * PITCH).max(left)..((column + 1) * PITCH).min(right) {
                    let bright = grey.get_pixel(x - left, y - top).0[0] > 100;
                    inside[((y - top) * width + x - left) as usize] = bright;
                }
            }
            masks.extend(mask(inside)?);
        }
    }
    let bar = (0..height * width).map(|place| place / width + top < BAR);
    masks.extend(mask(bar.collect())?);
    Ok(masks)
}

/// The bytes at the peak of segmenting and of writing labels, and the count of objects.
fn peak(side: u32) -> Result<(usize, usize)> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = folder.path().join("large.tif");
    write(&path, side)?;
    let tiling = Tiling { tile: 512, halo: 100, ..Tiling::default() };
    let (found, peak) = counting::peak(|| {
        let mut image = LargeImage::open(&path, &ReadOptions::default())?;
        assert!(image.decoded_whole().is_none());
        let masks = tiling.segment(&mut image, segment)?;
        save_label_strips(folder.path().join("labels.tif"), &masks, (side, side))?;
        Ok(masks.len())
    })?;
    Ok((peak, found))
}

/// The discs, whose centres all lie in the image, and the bar.
fn objects(side: u32) -> usize {
    (side.div_ceil(PITCH) as usize).pow(2) + 1
}

/// Pixels and labels of this image are 53 MB.
pub fn tiles_take_the_memory_of_one() -> Result<()> {
    let (peak, found) = peak(2_760)?;
    ensure!(found == objects(2_760), "{found} objects, expected {}", objects(2_760));
    ensure!(peak < 8 << 20, "{peak} bytes");
    Ok(())
}

/// Minutes, and 3 GB of disk; `cargo test --release --test memory -- gigabyte --ignored --nocapture`.
pub fn a_gigabyte_of_pixels_takes_the_memory_of_one_tile() -> Result<()> {
    let (peak, found) = peak(20_000)?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    println!(
        "20,000 x 20,000 pixels, {found} objects: {peak} bytes allocated at the peak; {resident}"
    );
    ensure!(found == objects(20_000), "{found} objects, expected {}", objects(20_000));
    ensure!(peak < 64 << 20, "{peak} bytes");
    Ok(())
}
