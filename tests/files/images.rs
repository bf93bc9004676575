//! Image files of every depth, with pages, cut off, or none at all.

use candle_sam_lora::sam::{read_image, Channels, Crop, LargeImage, ReadOptions, ValueRange};
use image::{DynamicImage, ImageFormat, RgbImage};
use std::path::{Path, PathBuf};
use tiff::encoder::{colortype, Compression, TiffEncoder};
use tiff::tags::Tag;

const SIDE: u32 = 16;

/// 0 to 255 over the image.
fn ramp() -> impl Iterator<Item = u32> {
    0..SIDE * SIDE
}

/// A TIFF of one grey page for each function.
fn write<C: colortype::ColorType>(
    path: &Path,
    pages: &[&dyn Fn(u32) -> C::Inner],
) -> anyhow::Result<PathBuf>
where
    [C::Inner]: tiff::encoder::TiffValue,
{
    let mut encoder = TiffEncoder::new(std::fs::File::create(path)?)?;
    for value in pages {
        let values: Vec<C::Inner> = ramp().map(value).collect();
        encoder.write_image::<C>(SIDE, SIDE, &values)?;
    }
    Ok(path.to_path_buf())
}

fn levels(path: &Path, options: ReadOptions) -> anyhow::Result<Vec<u8>> {
    Ok(candle_sam_lora::sam::convert_to_rgb(&options.read(path)?.image)?
        .pixels()
        .map(|p| p.0[0])
        .collect())
}

/// How far the levels are from 0 to 255 at most.
fn off(path: &Path) -> anyhow::Result<u32> {
    let levels = levels(path, ReadOptions::default())?;
    Ok(levels
        .into_iter()
        .zip(ramp())
        .map(|(level, v)| u32::from(level).abs_diff(v))
        .max()
        .unwrap_or(999))
}

#[test]
fn the_same_picture_at_every_depth_is_the_same() -> anyhow::Result<()> {
    use colortype::{Gray16, Gray32, Gray32Float, Gray64, Gray64Float, Gray8, GrayI16, GrayI32};
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let part = |v: u32| f64::from(v) / 255.0;
    for path in [
        write::<Gray8>(&at("u8.tif"), &[&|v| v as u8])?,
        write::<Gray16>(&at("u16.tif"), &[&|v| v as u16 * 257])?,
        write::<Gray16>(&at("12bit.tif"), &[&|v| (part(v) * 4095.0) as u16])?,
        write::<Gray16>(&at("camera.tif"), &[&|v| (100.0 + part(v) * 800.0) as u16])?,
        write::<Gray32>(&at("u32.tif"), &[&|v| v * 16_000_000])?,
        write::<Gray64>(&at("u64.tif"), &[&|v| u64::from(v) << 40])?,
        write::<GrayI16>(&at("ct.tif"), &[&|v| (part(v) * 4000.0 - 1000.0) as i16])?,
        write::<GrayI32>(&at("i32.tif"), &[&|v| v as i32 * 257])?,
        write::<Gray32Float>(&at("unit.tif"), &[&|v| part(v) as f32])?,
        write::<Gray32Float>(&at("255.tif"), &[&|v| v as f32])?,
        write::<Gray32Float>(&at("signed.tif"), &[&|v| part(v) as f32 * 2.0 - 1.0])?,
        write::<Gray64Float>(&at("f64.tif"), &[&|v| part(v) * 1e-6])?,
    ] {
        let off = off(&path)?;
        assert!(off <= 2, "{}: off by {off} of 255", path.display());
    }
    Ok(())
}

#[test]
fn the_range_is_told_and_can_be_given() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path =
        write::<colortype::Gray16>(&folder.path().join("a.tif"), &[&|v| 100 + 3 * v as u16])?;
    let read = |range| ReadOptions { range, ..Default::default() }.read(&path);
    assert_eq!(read(ValueRange::Auto)?.range, Some((100.0, 865.0)));
    assert_eq!(read(ValueRange::MinMax)?.range, Some((100.0, 865.0)));
    assert_eq!(read(ValueRange::Fixed(0.0, 1000.0))?.range, Some((0.0, 1000.0)));
    assert_eq!(read(ValueRange::Type)?.range, None);
    let options = |range| ReadOptions { range, ..Default::default() };
    assert_eq!(levels(&path, options(ValueRange::Fixed(0.0, 1000.0)))?[255], 221);
    assert_eq!(levels(&path, options(ValueRange::Type))?[255], 3);
    Ok(())
}

#[test]
fn samples_that_are_no_numbers_are_black_and_counted() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let value = |v: u32| if v < 2 { f32::NAN } else { v as f32 / 255.0 };
    let path = write::<colortype::Gray32Float>(&folder.path().join("a.tif"), &[&value])?;
    let picture = ReadOptions::default().read(&path)?;
    assert_eq!(picture.not_numbers, ramp().filter(|v| *v < 2).count());
    assert_eq!(levels(&path, ReadOptions::default())?[..3], [0, 0, 2]);
    Ok(())
}

#[test]
fn pages_and_channels_are_chosen_or_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("stack.tif");
    write::<colortype::Gray8>(&path, &[&|_| 0, &|v| v as u8, &|_| 9])?;
    let message = read_image(&path).expect_err("pages").to_string();
    assert!(message.contains("stack.tif") && message.contains("it has 3 pages"), "{message}");
    let page = |page| ReadOptions { page: Some(page), ..Default::default() };
    assert_eq!(levels(&path, page(2))?[77], 77);
    assert_eq!(levels(&path, page(3))?[77], 9);
    for absent in [0, 4] {
        assert!(levels(&path, page(absent)).is_err(), "{absent}");
    }
    let path = folder.path().join("moving.gif");
    let mut encoder = image::codecs::gif::GifEncoder::new(std::fs::File::create(&path)?);
    for value in [0, 200] {
        let frame =
            image::RgbaImage::from_pixel(SIDE, SIDE, image::Rgba([value, value, value, 255]));
        encoder.encode_frame(image::Frame::new(frame))?;
    }
    drop(encoder);
    let message = read_image(&path).expect_err("frames").to_string();
    assert!(message.contains("it has 2 frames"), "{message}");
    assert!(levels(&path, page(2))?[0] > 190);
    Ok(())
}

/// Aerial pictures hold infrared light in a fourth channel. It is no opacity, whether read in whole or in parts.
#[test]
fn a_channel_without_a_meaning_is_left_out_and_can_be_chosen() -> anyhow::Result<()> {
    fn write<C: colortype::ColorType>(
        path: &Path,
        (photometric, extra, compression): (u16, u16, Compression),
        values: &[C::Inner],
    ) -> anyhow::Result<()>
    where
        [C::Inner]: tiff::encoder::TiffValue,
    {
        let encoder = TiffEncoder::new(std::fs::File::create(path)?)?;
        let mut encoder = encoder.with_compression(compression);
        let mut image = encoder.new_image::<C>(SIDE, SIDE)?;
        image.rows_per_strip(4)?;
        image.encoder().write_tag(Tag::PhotometricInterpretation, photometric)?;
        image.encoder().write_tag(Tag::ExtraSamples, extra)?;
        Ok(image.write_data(values)?)
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("infrared.tif");
    let values: Vec<u8> = ramp().flat_map(|v| [v as u8, 200 - v as u8 / 2, 7, v as u8]).collect();
    let wide: Vec<u16> = values.iter().map(|v| u16::from(*v) * 257).collect();
    let expected = image::RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let place = 4 * (y * SIDE + x) as usize;
        image::Rgb([values[place], values[place + 1], values[place + 2]])
    });
    let page = |page| ReadOptions { page: Some(page), ..Default::default() };
    let infrared = |channels| ReadOptions { channels: Some(channels), ..Default::default() };
    let all = Crop { left: 0, top: 0, right: SIDE, bottom: SIDE };
    const GREY: u16 = 1;
    const RGB: u16 = 2;
    for (is_wide, tags) in [
        (false, (RGB, 0, Compression::Uncompressed)),
        (false, (RGB, 0, Compression::Lzw)),
        (true, (RGB, 0, Compression::Uncompressed)),
        (true, (RGB, 0, Compression::Lzw)),
        (false, (RGB, 2, Compression::Uncompressed)),
        (false, (GREY, 0, Compression::Uncompressed)),
        (true, (GREY, 0, Compression::Lzw)),
    ] {
        match is_wide {
            true => write::<colortype::RGBA16>(&path, tags, &wide)?,
            false => write::<colortype::RGBA8>(&path, tags, &values)?,
        }
        let (photometric, extra, _) = tags;
        if extra == 0 {
            let options = infrared("4,1,2".parse().map_err(anyhow::Error::msg)?);
            let picture = options.read(&path)?.image.to_rgb8();
            let first = |place: usize| [values[place + 3], values[place], values[place + 1]];
            assert!((0..256).all(|p| picture.as_raw()[3 * p..3 * p + 3] == first(4 * p)));
            let part = LargeImage::open(&path, &options)?.region(&all)?.to_rgb8();
            assert_eq!(part, picture, "{is_wide} {photometric}");
            let message = infrared(Channels([1, 2, 5])).read(&path).expect_err("5").to_string();
            assert!(message.contains("--channels 1,2,5: there is no channel 5"), "{message}");
        }
        if photometric == GREY {
            let message = read_image(&path).expect_err("of four channels").to_string();
            assert!(message.contains("(--page 1 to 4), or three"), "{message}");
            assert_eq!(levels(&path, page(4))?, ramp().map(|v| v as u8).collect::<Vec<_>>());
            continue;
        }
        let picture = ReadOptions::default().read(&path)?;
        let mut large = LargeImage::open(&path, &ReadOptions::default())?;
        assert!(large.decoded_whole().is_none(), "{:?}", large.decoded_whole());
        let part = large.region(&all)?.to_rgba8();
        assert_eq!(part, picture.image.to_rgba8(), "{is_wide} {extra}");
        assert_eq!(picture.unnamed_channel, extra == 0);
        assert_eq!(large.has_unnamed_channel(), extra == 0);
        assert_eq!(large.has_alpha(), extra == 2);
        if extra == 2 {
            assert_eq!(part.as_raw(), &values);
            let message = levels(&path, page(2)).expect_err("of one page").to_string();
            assert!(message.contains("there is no 2 among its pages: it has 1"), "{message}");
            continue;
        }
        assert_eq!(picture.image.to_rgb8(), expected, "{is_wide}");
        assert_eq!(levels(&path, page(4))?, ramp().map(|v| v as u8).collect::<Vec<_>>());
        let message = levels(&path, page(5)).expect_err("of four channels").to_string();
        assert!(message.contains("--page 1 to 4"), "{message}");
    }
    Ok(())
}

#[test]
fn a_preview_is_not_taken_for_the_image() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("camera.dng");
    let mut encoder = TiffEncoder::new(std::fs::File::create(&path)?)?;
    let mut preview = encoder.new_image::<colortype::Gray8>(SIDE, SIDE)?;
    preview.encoder().write_tag(Tag::NewSubfileType, 1u32)?;
    preview.encoder().write_tag(Tag::SubIfd, 8u32)?;
    preview.write_data(&ramp().map(|v| v as u8).collect::<Vec<_>>())?;
    let message = read_image(&path).expect_err("a preview").to_string();
    assert!(message.contains("camera.dng") && message.contains("it is a preview"), "{message}");
    Ok(())
}

#[test]
fn bitmaps_of_netpbm_are_read() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("cells.pbm");
    // 1 is black there.
    std::fs::write(&path, "P1\n2 2\n0 1\n1 0\n")?;
    let picture = candle_sam_lora::sam::read_image(&path)?.to_luma8();
    assert_eq!(picture.into_raw(), [255, 0, 0, 255]);
    Ok(())
}

#[test]
fn cut_and_other_files_are_named() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("x.png");
    let mut jpeg = std::io::Cursor::new(Vec::new());
    let picture = RgbImage::from_fn(64, 64, |x, y| image::Rgb([(x * y) as u8, x as u8, y as u8]));
    DynamicImage::from(picture).write_to(&mut jpeg, ImageFormat::Jpeg)?;
    let jpeg = jpeg.into_inner();
    let wide = b"P5 33000 100 255\n";
    let many = b"P6 32768 32768 255\n";
    for (bytes, expected) in [
        (&jpeg[..jpeg.len() / 3], "the JPEG is cut off"),
        (&jpeg[..jpeg.len() - 3], "the JPEG is cut off"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML page"),
        (b"", "0 bytes"),
        (b"what is this?", "\"what is this\", are those of no PNG, JPEG, TIFF"),
        (b"ZISRAWFILE\0\0\0\0", "a CZI file of Zeiss"),
        (wide, "33000 x 100 pixels; a side may have 32768"),
        (many, "3221225472 bytes decoded; 1073741824 (1 GiB)"),
    ] {
        std::fs::write(&path, bytes)?;
        let message = read_image(&path).expect_err(expected).to_string();
        assert!(message.contains("x.png") && message.contains(expected), "{expected}: {message}");
    }
    std::fs::write(&path, &jpeg)?;
    assert_eq!(read_image(&path)?.width(), 64);
    Ok(())
}

/// A TIFF whose only strip is a JPEG of 64 x 64 greys, of which the last `cut` bytes are not there.
fn tiff_of_jpeg(cut: usize) -> anyhow::Result<Vec<u8>> {
    let mut jpeg = std::io::Cursor::new(Vec::new());
    let picture = image::GrayImage::from_fn(64, 64, |x, y| image::Luma([(x * y) as u8]));
    DynamicImage::from(picture).write_to(&mut jpeg, ImageFormat::Jpeg)?;
    let jpeg = jpeg.into_inner();
    // Width, height, bits, compression, colours, offset, channels, rows of a strip, length.
    let tags = [256u16, 257, 258, 259, 262, 273, 277, 278, 279];
    let offset = 8 + 2 + 12 * tags.len() as u32 + 4;
    let values = [64, 64, 8, 7, 1, offset, 1, 64, jpeg.len() as u32];
    let mut tiff = b"II*\0\x08\0\0\0".to_vec();
    tiff.extend((tags.len() as u16).to_le_bytes());
    for (tag, value) in tags.iter().zip(values) {
        const LONG: u16 = 4;
        tiff.extend(tag.to_le_bytes().into_iter().chain(LONG.to_le_bytes()));
        tiff.extend(1u32.to_le_bytes().into_iter().chain(value.to_le_bytes()));
    }
    tiff.extend([0; 4]);
    tiff.extend(&jpeg[..jpeg.len() - cut]);
    Ok(tiff)
}

#[test]
fn a_jpeg_that_is_cut_within_a_tiff_is_an_error() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("x.tif");
    std::fs::write(&path, tiff_of_jpeg(0)?)?;
    assert_eq!(read_image(&path)?.width(), 64);
    for cut in [1, 30, 300] {
        std::fs::write(&path, tiff_of_jpeg(cut)?)?;
        let message = read_image(&path).expect_err("cut").to_string();
        assert!(message.contains("one of the JPEGs within ends early"), "{cut}: {message}");
    }
    Ok(())
}
