//! Large images in tiles: regions equal those of the whole, stitched masks are the objects, labels in strips those of
//! the whole.

use crate::common::model::shipped;
use anyhow::{ensure, Context, Result};
use candle_sam_lora::sam::{
    label_image, read_image, save_label_strips, AttentionKind, Crop, GeneratedMask, LargeImage,
    MaskGenerator, ReadOptions, Rle, SamPredictor, Tile, Tiling, ValueRange,
};
use image::{DynamicImage, Rgb, RgbImage};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use tiff::encoder::{colortype, Compression, Predictor, TiffEncoder};
use tiff::tags::Tag;

type Size = (u32, u32);

fn scratch(name: &str) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tiles");
    std::fs::create_dir_all(&folder)?;
    Ok(folder.join(name))
}

fn encoder(path: &Path) -> Result<TiffEncoder<BufWriter<std::fs::File>>> {
    Ok(TiffEncoder::new(BufWriter::new(std::fs::File::create(path)?))?)
}

/// Writes RGB pixels in strips.
fn write_rgb(
    path: &Path,
    samples: &[u8],
    (height, width): Size,
    (rows, compression): (u32, Compression),
) -> Result<()> {
    let mut tiff = encoder(path)?.with_compression(compression);
    if compression == Compression::Lzw {
        tiff = tiff.with_predictor(Predictor::Horizontal);
    }
    let mut image = tiff.new_image::<colortype::RGB8>(width, height)?;
    image.rows_per_strip(rows)?;
    // `write_strip` would not compress.
    Ok(image.write_data(samples)?)
}

/// Samples without a pattern that strips or tiles could share.
fn noise(count: usize, top: u32) -> impl Iterator<Item = u32> {
    let mix = |index: u32| index.wrapping_mul(2_654_435_761).rotate_left(11) ^ index;
    (0..count as u32).map(move |index| mix(index) % (top + 1))
}

/// TIFFs of strips of 5 rows, one of them a BigTIFF, of one strip, and of tiles of 16 x 16 pixels.
fn write_all(size: Size) -> Result<Vec<(PathBuf, ReadOptions)>> {
    let (height, width) = size;
    let pixels = (height * width) as usize;
    let mut files = vec![];
    let colours: Vec<u8> = noise(pixels * 3, 255).map(|v| v as u8).collect();
    for (name, compression) in [
        ("plain", Compression::Uncompressed),
        ("lzw", Compression::Lzw),
        ("deflate", Compression::Deflate(Default::default())),
        ("packbits", Compression::Packbits),
    ] {
        let path = scratch(&format!("{name}.tif"))?;
        write_rgb(&path, &colours, size, (5, compression))?;
        files.push((path, ReadOptions::default()));
    }
    for (name, top) in [("wide", 65535), ("narrow", 900)] {
        let path = scratch(&format!("{name}.tif"))?;
        let mut tiff = encoder(&path)?;
        let mut image = tiff.new_image::<colortype::Gray16>(width, height)?;
        image.rows_per_strip(5)?;
        let samples: Vec<u16> = noise(pixels, top).map(|v| v as u16).collect();
        for strip in samples.chunks(5 * width as usize) {
            image.write_strip(strip)?;
        }
        image.finish()?;
        for range in [
            ValueRange::Auto,
            ValueRange::Type,
            ValueRange::MinMax,
            ValueRange::Percentile,
            ValueRange::Fixed(10.0, 300.0),
        ] {
            files.push((path.clone(), ReadOptions { range, ..Default::default() }));
        }
    }
    let path = scratch("single.tif")?;
    write_rgb(&path, &colours, size, (height, Compression::Uncompressed))?;
    files.push((path, ReadOptions::default()));
    let path = scratch("big.tif")?;
    let file = BufWriter::new(std::fs::File::create(&path)?);
    let mut image_file = TiffEncoder::new_big(file)?;
    let mut image = image_file.new_image::<colortype::RGB8>(width, height)?;
    image.rows_per_strip(5)?;
    image.write_data(&colours)?;
    drop(image_file);
    files.push((path, ReadOptions::default()));
    let path = scratch("tiled.tif")?;
    write_tiles(&path, size, 16)?;
    files.push((path, ReadOptions::default()));
    Ok(files)
}

/// A TIFF of grey tiles, those at the right and lower sides filled up.
fn write_tiles(path: &Path, (height, width): Size, side: u32) -> Result<()> {
    let samples: Vec<u8> = noise((height * width) as usize, 255).map(|v| v as u8).collect();
    let mut tiff = encoder(path)?;
    let mut directory = tiff.image_directory()?;
    let (mut offsets, mut lengths) = (vec![], vec![]);
    for top in (0..height).step_by(side as usize) {
        for left in (0..width).step_by(side as usize) {
            let places = (0..side * side).map(|place| (top + place / side, left + place % side));
            let tile = places.map(|(y, x)| match y < height && x < width {
                true => samples[(y * width + x) as usize],
                false => 77,
            });
            let tile: Vec<u8> = tile.collect();
            offsets.push(directory.write_data(&tile[..])? as u32);
            lengths.push(side * side);
        }
    }
    directory.write_tag(Tag::ImageWidth, width)?;
    directory.write_tag(Tag::ImageLength, height)?;
    for (tag, value) in [
        (Tag::BitsPerSample, 8u16),
        (Tag::Compression, 1),
        (Tag::PhotometricInterpretation, 1),
        (Tag::SamplesPerPixel, 1),
    ] {
        directory.write_tag(tag, value)?;
    }
    directory.write_tag(Tag::TileWidth, side)?;
    directory.write_tag(Tag::TileLength, side)?;
    directory.write_tag(Tag::TileOffsets, &offsets[..])?;
    directory.write_tag(Tag::TileByteCounts, &lengths[..])?;
    directory.finish()?;
    Ok(())
}

#[test]
fn regions_equal_those_of_the_whole() -> Result<()> {
    let (height, width) = (43, 70);
    for (path, options) in write_all((height, width))? {
        let name = format!("{} {:?}", path.display(), options.range);
        let whole = options.read(&path)?.image;
        let mut image = LargeImage::open(&path, &options)?;
        ensure!(image.decoded_whole().is_none(), "{name}: {:?}", image.decoded_whole());
        ensure!(image.size() == (height, width), "{name}");
        for [left, top, right, bottom] in
            [[0, 0, width, height], [3, 4, 5, 6], [15, 9, 49, 33], [69, 42, 70, 43]]
        {
            let part = image.region(&Crop { left, top, right, bottom })?;
            let expected = whole.crop_imm(left, top, right - left, bottom - top);
            ensure!(part == expected, "{name}: {left} {top} {right} {bottom}");
        }
        for [left, top, right, bottom] in [[0, 0, 71, 43], [5, 5, 5, 9], [9, 9, 3, 12]] {
            ensure!(image.region(&Crop { left, top, right, bottom }).is_err(), "{name}");
        }
    }
    Ok(())
}

#[test]
fn other_files_are_decoded_whole() -> Result<()> {
    let picture = DynamicImage::from(RgbImage::from_fn(30, 20, |x, y| Rgb([x as u8, y as u8, 9])));
    let (png, strip) = (scratch("whole.png")?, scratch("one_strip.tif")?);
    picture.save(&png)?;
    write_rgb(&strip, picture.as_bytes(), (20, 30), (20, Compression::Lzw))?;
    for (path, words) in [(&png, "a PNG is not read in parts"), (&strip, "is one strip")] {
        let mut image = LargeImage::open(path, &ReadOptions::default())?;
        let why = image.decoded_whole().context("read in parts")?;
        ensure!(why.contains(words), "{why}");
        let part = image.region(&Crop { left: 3, top: 2, right: 20, bottom: 11 })?;
        ensure!(part == read_image(path)?.crop_imm(3, 2, 17, 9));
    }
    let text = scratch("text.tif")?;
    std::fs::write(&text, "no image at all")?;
    let error = LargeImage::open(&text, &ReadOptions::default()).err().context("opened")?;
    ensure!(error.to_string().contains("text.tif"), "{error}");
    Ok(())
}

#[test]
fn damaged_parts_are_errors() -> Result<()> {
    let path = scratch("damaged.tif")?;
    write_tiles(&path, (40, 40), 16)?;
    let bytes = std::fs::read(&path)?;
    let mut failed = 0;
    for length in (0..bytes.len()).step_by(37) {
        std::fs::write(&path, &bytes[..length])?;
        let opened = LargeImage::open(&path, &ReadOptions::default());
        let all = Crop { left: 0, top: 0, right: 40, bottom: 40 };
        if let Err(error) = opened.and_then(|mut image| image.region(&all)) {
            ensure!(error.to_string().contains("damaged.tif"), "{error}");
            failed += 1;
        }
    }
    ensure!(failed == bytes.len().div_ceil(37), "a file that is cut off was read");
    // The directory is at the end: whatever it claims, there is an image or an error.
    for place in (bytes.len() - 200..bytes.len()).chain(0..8) {
        for flip in [1, 16, 128, 255] {
            let mut damaged = bytes.clone();
            damaged[place] ^= flip;
            std::fs::write(&path, &damaged)?;
            let opened = LargeImage::open(&path, &ReadOptions::default());
            let region = opened.and_then(|mut image| {
                let (height, width) = image.size();
                let (right, bottom) = (width.min(64), height.min(64));
                image.region(&Crop { left: 0, top: 0, right, bottom })
            });
            if let Err(error) = region {
                ensure!(error.to_string().contains("damaged.tif"), "{error}");
            }
        }
    }
    Ok(())
}

/// A mask with the scores of its quality.
fn found(mask: Rle, iou_score: f32) -> Result<GeneratedMask> {
    let (height, width) = mask.size();
    Ok(GeneratedMask {
        bounds: mask.bounds().context("an empty mask")?,
        mask,
        iou_score,
        stability_score: 0.9,
        point: [0.0, 0.0],
        crop: Crop { left: 0, top: 0, right: width, bottom: height },
    })
}

/// The objects of a synthetic scene, as a function of the place.
struct Scene {
    size: Size,
    objects: Vec<Box<dyn Fn(f64, f64) -> bool>>,
}

impl Scene {
    fn disc(x: f64, y: f64, radius: f64) -> Box<dyn Fn(f64, f64) -> bool> {
        Box::new(move |px, py| (px - x).hypot(py - y) < radius)
    }

    /// Masks of a perfect model for the objects in a window.
    fn segment(&self, window: &Crop) -> Result<Vec<GeneratedMask>> {
        let (height, width) = (window.height(), window.width());
        let mut masks = vec![];
        for object in &self.objects {
            let inside: Vec<bool> = (0..height * width)
                .map(|place| (place % width + window.left, place / width + window.top))
                .map(|(x, y)| object(f64::from(x) + 0.5, f64::from(y) + 0.5))
                .collect();
            if inside.contains(&true) {
                masks.push(found(Rle::from_mask(&inside, (height, width))?, 0.9)?);
            }
        }
        Ok(masks)
    }

    fn image(&self) -> LargeImage {
        DynamicImage::new_luma8(self.size.1, self.size.0).into()
    }

    fn stitched(&self, tiling: &Tiling) -> Result<Vec<GeneratedMask>> {
        let segment = |part: &DynamicImage, tile: &Tile| {
            assert_eq!((part.width(), part.height()), (tile.window.width(), tile.window.height()));
            self.segment(&tile.window).map_err(candle_core::Error::wrap).map_err(Into::into)
        };
        Ok(tiling.segment(&mut self.image(), segment)?)
    }
}

/// Discs within a core, across a border, on a corner of four tiles, in a halo alone, larger than a window. A bar runs
/// through all tiles, and a ring has a hole.
fn scene() -> Scene {
    let disc = Scene::disc;
    Scene {
        size: (150, 200),
        objects: vec![
            disc(25.0, 25.0, 9.0),
            disc(50.0, 20.0, 8.0),
            disc(100.0, 50.0, 7.0),
            disc(57.0, 75.0, 3.0),
            disc(95.0, 100.0, 45.0),
            Box::new(|x, y| (y - 140.0).abs() < 4.0 && x > 5.0),
            Box::new(|x, y| (8.0..16.0).contains(&(x - 150.0).hypot(y - 50.0))),
            disc(150.0, 50.0, 5.0),
        ],
    }
}

#[test]
fn stitched_masks_are_the_objects() -> Result<()> {
    let scene = scene();
    let whole = Crop { left: 0, top: 0, right: 200, bottom: 150 };
    let expected = scene.segment(&whole)?;
    for (tile, halo) in [(50, 12), (50, 25), (64, 20), (37, 18), (100, 10), (150, 6)] {
        let masks = scene.stitched(&Tiling { tile, halo, ..Tiling::default() })?;
        ensure!(masks.len() == expected.len(), "{} masks, {tile} {halo}", masks.len());
        for object in &expected {
            let same = masks.iter().find(|mask| mask.mask == object.mask);
            let same =
                same.with_context(|| format!("{:?} is lost, {tile} {halo}", object.bounds))?;
            ensure!(same.bounds == object.bounds);
        }
    }
    Ok(())
}

/// The best of the views that show an object whole stays; a noisy view does not make a second object.
#[test]
fn complete_views_are_kept_once() -> Result<()> {
    let scene = Scene { size: (60, 100), objects: vec![Scene::disc(50.0, 30.0, 10.0)] };
    let tiling = Tiling { tile: 50, halo: 15, ..Tiling::default() };
    let mut calls = 0;
    let masks = tiling.segment(&mut scene.image(), |_, tile| {
        calls += 1;
        let disc = Scene::disc(50.0, 30.0, if calls == 2 { 9.0 } else { 10.0 });
        let seen = Scene { size: scene.size, objects: vec![disc] };
        let mut masks = seen.segment(&tile.window).map_err(candle_core::Error::wrap)?;
        masks.iter_mut().for_each(|mask| mask.iou_score = if calls == 2 { 0.95 } else { 0.9 });
        Ok(masks)
    })?;
    ensure!(calls == 4 && masks.len() == 1, "{} masks", masks.len());
    ensure!(masks[0].iou_score == 0.95 && masks[0].bounds == [41, 21, 58, 38], "{:?}", masks[0]);
    Ok(())
}

/// Parts and wholes that look alike in the overlap stay apart.
#[test]
fn nested_objects_stay_apart() -> Result<()> {
    let bar = |from: f64, to: f64| -> Box<dyn Fn(f64, f64) -> bool> {
        Box::new(move |x, y| x >= from && x < to && (y - 20.0).abs() < 6.0)
    };
    let scene = Scene { size: (40, 200), objects: vec![bar(10.0, 190.0), bar(70.0, 130.0)] };
    let masks = scene.stitched(&Tiling { tile: 100, halo: 16, ..Tiling::default() })?;
    let bounds: Vec<[u32; 4]> = masks.iter().map(|mask| mask.bounds).collect();
    ensure!(bounds == [[10, 14, 189, 25], [70, 14, 129, 25]], "{bounds:?}");
    Ok(())
}

#[test]
fn masks_of_another_size_are_refused() -> Result<()> {
    let mut image: LargeImage = DynamicImage::new_luma8(40, 30).into();
    let tiling = Tiling { tile: 20, halo: 2, ..Tiling::default() };
    let wrong = tiling.segment(&mut image, |_, _| {
        let mask = Rle::from_mask(&[true; 6], (2, 3))?;
        Ok(vec![found(mask, 0.5).map_err(candle_core::Error::wrap)?])
    });
    let error = wrong.err().context("accepted")?.to_string();
    ensure!(error.contains("(2, 3)") && error.contains("its window"), "{error}");
    Ok(())
}

/// Keeps masks however poor.
fn everything() -> MaskGenerator {
    let (pred_iou_thresh, stability_score_thresh) = (0.0, 0.5);
    let usual = MaskGenerator::default();
    MaskGenerator { pred_iou_thresh, stability_score_thresh, points_per_side: 6, ..usual }
}

fn picture(size: Size) -> DynamicImage {
    let scene = scene();
    let image = RgbImage::from_fn(size.1, size.0, |x, y| {
        let place = (f64::from(x) + 0.5, f64::from(y) + 0.5);
        let index = scene.objects.iter().rposition(|object| object(place.0, place.1));
        index.map_or(Rgb([30, 40, 50]), |index| {
            Rgb([120 + 15 * index as u8, 240 - 20 * index as u8, 200])
        })
    });
    image.into()
}

fn same(a: &[GeneratedMask], b: &[GeneratedMask]) -> bool {
    let facts = |m: &GeneratedMask| (m.bounds, m.iou_score, m.stability_score, m.point, m.crop);
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.mask == b.mask && facts(a) == facts(b))
}

#[test]
fn one_tile_equals_the_whole() -> Result<()> {
    let model = shipped(AttentionKind::Fused)?;
    let predictor = SamPredictor::new(&model);
    let image = picture((96, 120));
    let generator = everything();
    let expected = generator.generate_counted(&predictor, &image, |_, _| {})?;
    ensure!(!expected.masks.is_empty());
    let path = scratch("one_tile.tif")?;
    write_rgb(&path, image.as_bytes(), (96, 120), (7, Compression::Uncompressed))?;
    let tiling = Tiling { tile: 120, halo: 30, ..Tiling::default() };
    for mut large in [image.into(), LargeImage::open(&path, &ReadOptions::default())?] {
        let found = generator.generate_tiled(&predictor, &mut large, &tiling, |_, _| {})?;
        ensure!(same(&found.masks, &expected.masks), "other masks");
        ensure!(found.statistics == expected.statistics, "{}", found.statistics);
    }
    Ok(())
}

#[test]
fn tiles_of_a_model_are_deterministic() -> Result<()> {
    let model = shipped(AttentionKind::Fused)?;
    let predictor = SamPredictor::new(&model);
    let generator = everything();
    let tiling = Tiling { tile: 100, halo: 20, ..Tiling::default() };
    let mut image: LargeImage = picture((150, 200)).into();
    let mut progress = vec![];
    let first = generator
        .generate_tiled(&predictor, &mut image, &tiling, |done, of| progress.push((done, of)))?;
    ensure!(progress == [(1, 4), (2, 4), (3, 4), (4, 4)], "{progress:?}");
    let second = generator.generate_tiled(&predictor, &mut image, &tiling, |_, _| {})?;
    ensure!(!first.masks.is_empty() && same(&first.masks, &second.masks));
    let counts = &first.statistics;
    let dropped =
        counts.low_iou + counts.unstable + counts.cut_off + counts.doubles + counts.united;
    ensure!(dropped + first.masks.len() == counts.candidates, "{counts}");
    ensure!(first.masks.iter().all(|mask| mask.mask.size() == (150, 200)));
    Ok(())
}

#[test]
fn label_strips_are_the_label_image() -> Result<()> {
    let masks = scene().stitched(&Tiling { tile: 50, halo: 15, ..Tiling::default() })?;
    let size = (150, 200);
    let path = scratch("labels.tif")?;
    save_label_strips(&path, &masks, size)?;
    let file = std::fs::File::open(&path)?;
    let mut decoder = tiff::decoder::Decoder::new(file)?;
    ensure!(decoder.strip_count()? == 3);
    let tiff::decoder::DecodingResult::U32(labels) = decoder.read_image()? else {
        anyhow::bail!("not 32 bits")
    };
    ensure!(labels == label_image(&masks, size));
    ensure!(labels[50 * 200 + 150] > 0 && labels[0] == 0);
    ensure!(save_label_strips(scratch("labels.png")?, &masks, size).is_err());
    Ok(())
}
