//! Masks as people have them: every spelling of one picture gives the same objects, and what is no mask is refused.

use crate::common::property;
use candle_sam_lora::sam::{Raster, RasterKind, SampleType, Samples};
use candle_sam_lora::train::{
    find_instances, interpret, read_mask, Dataset, DatasetOptions, Mask, MaskOptions, Meaning,
    IGNORED,
};
use image::{GrayImage, Luma, RgbImage, Rgba, RgbaImage};
use std::path::Path;

const SIDE: u32 = 48;

/// Labels 0 to 6: six separate blocks of 8 x 8, 7 x 7 and so on.
fn label(x: u32, y: u32) -> u32 {
    let (col, row) = (x / 16, y / 24);
    let number = 1 + col + 3 * row;
    let side = 9 - number;
    if (2..2 + side).contains(&(x % 16)) && (3..3 + side).contains(&(y % 24)) {
        number
    } else {
        0
    }
}

fn pixels() -> impl Iterator<Item = (u32, u32)> {
    (0..SIDE).flat_map(|y| (0..SIDE).map(move |x| (x, y)))
}

fn raster(kind: RasterKind, sample_type: SampleType, samples: Samples) -> Raster {
    Raster::new(SIDE, SIDE, kind, sample_type, samples).expect("a raster")
}

/// Grey of one sample a pixel.
fn grey(sample_type: SampleType, value: impl Fn(u32) -> f64) -> Raster {
    let values = pixels().map(|(x, y)| value(label(x, y)));
    let samples = match sample_type {
        SampleType::Unsigned(..=8) => Samples::U8(values.map(|v| v as u8).collect()),
        SampleType::Unsigned(16) => Samples::U16(values.map(|v| v as u16).collect()),
        _ => Samples::Wide(values.collect()),
    };
    raster(RasterKind::Grey, sample_type, samples)
}

/// Several samples of 8 bits a pixel.
fn coloured<const N: usize>(kind: RasterKind, colour: impl Fn(u32) -> [u8; N]) -> Raster {
    let samples = pixels().flat_map(|(x, y)| colour(label(x, y))).collect();
    raster(kind, SampleType::Unsigned(8), Samples::U8(samples))
}

fn areas(mask: &Mask) -> Vec<usize> {
    let mut areas: Vec<usize> = find_instances(&mask.labels, 1).iter().map(|i| i.area).collect();
    areas.sort_unstable();
    areas
}

const SIX: [usize; 6] = [9, 16, 25, 36, 49, 64];

fn read(raster: &Raster) -> Mask {
    interpret(raster, &MaskOptions::default()).expect("a mask")
}

#[test]
fn one_value_beside_the_background_is_binary() {
    use SampleType::{Float, Signed, Unsigned};
    let on = |value: f64| move |label: u32| if label > 0 { value } else { 0.0 };
    for (sample_type, value) in [
        (Unsigned(1), 1.0),
        (Unsigned(8), 1.0),
        (Unsigned(8), 128.0),
        (Unsigned(8), 254.0),
        (Unsigned(8), 255.0),
        (Unsigned(16), 255.0),
        (Unsigned(16), 65535.0),
        (Unsigned(32), 7.0),
        (Signed(16), 1.0),
        (Signed(64), -1.0),
        (Float(32), 1.0),
        (Float(32), 0.5),
        (Float(64), 255.0),
    ] {
        let mask = read(&grey(sample_type, on(value)));
        assert_eq!(
            (mask.meaning, areas(&mask)),
            (Meaning::Binary, SIX.into()),
            "{sample_type} {value}"
        );
    }
    for colour in [[255, 255, 255], [255, 0, 0], [0, 0, 1], [12, 200, 99]] {
        let mask =
            read(&coloured(RasterKind::Rgb, |label| if label > 0 { colour } else { [0; 3] }));
        assert_eq!((mask.meaning, areas(&mask)), (Meaning::Binary, SIX.into()), "{colour:?}");
    }
}

#[test]
fn labels_of_any_type_keep_their_objects() {
    use SampleType::{Float, Signed, Unsigned};
    for sample_type in [Unsigned(8), Unsigned(16), Unsigned(32), Signed(32), Signed(64), Float(32)]
    {
        let mask = read(&grey(sample_type, f64::from));
        assert_eq!((mask.meaning, areas(&mask)), (Meaning::Labels, SIX.into()), "{sample_type}");
        assert_eq!(mask.labels.get_pixel(3, 4).0[0], 1, "labels keep their values");
    }
    // Ids beyond 32 bits, and none beyond what is exact.
    let wide = |factor: f64| grey(Unsigned(64), move |label| f64::from(label) * factor);
    assert_eq!(areas(&read(&wide(1e12))), SIX);
    let error = interpret(&wide(1e17), &MaskOptions::default()).unwrap_err();
    assert!(error.contains("beyond 2^53"), "{error}");
}

#[test]
fn palettes_go_by_index() {
    let samples = || Samples::U8(pixels().map(|(x, y)| label(x, y) as u8).collect());
    let mask = read(&raster(RasterKind::Palette, SampleType::Unsigned(8), samples()));
    assert_eq!((mask.meaning, areas(&mask)), (Meaning::Palette, SIX.into()));
}

/// A picture with a palette whose colours say something else than its indices.
#[test]
fn palettes_of_png_files_go_by_index() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for (name, palette) in [("white", [255u8; 21]), ("black", [0; 21])] {
        for depth in [png::BitDepth::Four, png::BitDepth::Eight] {
            let path = folder.path().join(name);
            let mut encoder = png::Encoder::new(std::fs::File::create(&path)?, SIDE, SIDE);
            encoder.set_color(png::ColorType::Indexed);
            encoder.set_depth(depth);
            encoder.set_palette(palette.to_vec());
            let values: Vec<u8> = pixels().map(|(x, y)| label(x, y) as u8).collect();
            let packed = match depth {
                png::BitDepth::Four => {
                    values.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
                }
                _ => values,
            };
            encoder.write_header()?.write_image_data(&packed)?;
            let mask = read_mask(&path, &MaskOptions::default())?;
            assert_eq!((mask.meaning, areas(&mask)), (Meaning::Palette, SIX.into()), "{name}");
        }
    }
    Ok(())
}

#[test]
fn opacity_says_what_colours_do_not() {
    let opaque = |label: u32| if label > 0 { 255 } else { 0 };
    for black_or_white in [0, 255] {
        let grey = coloured(RasterKind::GreyAlpha, |label| [black_or_white, opaque(label)]);
        let rgb = |label| [black_or_white, black_or_white, black_or_white, opaque(label)];
        for raster in [grey, coloured(RasterKind::Rgba, rgb)] {
            let mask = read(&raster);
            assert_eq!((mask.meaning, areas(&mask)), (Meaning::Opacity, SIX.into()));
        }
    }
    // Colours on transparent ground of any colour; black ones where there is no other.
    let rgba = |label: u32| match label {
        0 => [9, 99, 200, 0],
        label => [label as u8 * 30, 0, 0, 255],
    };
    assert_eq!(areas(&read(&coloured(RasterKind::Rgba, rgba))), SIX);
    let black = |label: u32| if label > 0 { [0, 0, 0, 255] } else { [255, 255, 255, 0] };
    assert_eq!(areas(&read(&coloured(RasterKind::Rgba, black))), SIX);
    // An opaque channel says nothing.
    let opaque = coloured(RasterKind::GreyAlpha, |label| [label as u8, 255]);
    assert_eq!((read(&opaque).meaning, areas(&read(&opaque))), (Meaning::Labels, SIX.into()));
}

#[test]
fn what_is_to_be_ignored_is_no_object() {
    use SampleType::{Signed, Unsigned};
    // The sixth block is the one to be ignored.
    let five = &SIX[1..];
    let with = |value: f64| move |label: u32| if label == 6 { value } else { f64::from(label) };
    for (raster, value) in [
        (grey(Unsigned(8), with(255.0)), 255),
        (grey(Unsigned(16), with(65535.0)), 65535),
        (grey(Signed(32), with(-1.0)), -1),
    ] {
        let mask = read(&raster);
        assert_eq!((mask.ignored.as_slice(), areas(&mask)), (&[value][..], five.to_vec()));
        let left: usize = mask.labels.pixels().filter(|pixel| pixel.0[0] == IGNORED).count();
        assert_eq!(left, 9);
        let all = MaskOptions { ignore: Some(vec![]), ..Default::default() };
        assert_eq!(areas(&interpret(&raster, &all).expect("a mask")), SIX);
    }
    // Beside large labels, or in wider types, 255 is a label as any other.
    for raster in [
        grey(Unsigned(8), |label| [0.0, 40.0, 80.0, 120.0, 160.0, 200.0, 255.0][label as usize]),
        grey(Unsigned(16), with(255.0)),
    ] {
        assert_eq!(areas(&read(&raster)), SIX);
    }
    let named = MaskOptions { ignore: Some(vec![2, 6]), ..Default::default() };
    assert_eq!(
        areas(&interpret(&grey(Unsigned(8), f64::from), &named).expect("a mask")),
        [16, 25, 36, 64]
    );
    // VOC's contours, as colours.
    let voc = |label: u32| match label {
        0 => [0, 0, 0],
        6 => [224, 224, 192],
        label => {
            [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [64, 0, 0]][label as usize - 1]
        }
    };
    assert_eq!(areas(&read(&coloured(RasterKind::Rgb, voc))), five);
}

#[test]
fn the_background_is_told_or_asked_for() {
    use SampleType::{Float, Signed, Unsigned};
    let on = |ground: f64| move |label: u32| if label > 0 { f64::from(label) } else { ground };
    for (raster, ground) in [
        (grey(Unsigned(16), on(65535.0)), 65535),
        (grey(Unsigned(8), on(255.0)), 255),
        (grey(Signed(32), on(-1.0)), -1),
        (grey(Float(32), on(-1.0)), -1),
    ] {
        let mask = read(&raster);
        assert_eq!((mask.background, areas(&mask)), (Some(ground), SIX.into()));
    }
    let white = |label: u32| if label > 0 { [label as u8 * 30, 9, 0] } else { [255; 3] };
    assert_eq!(areas(&read(&coloured(RasterKind::Rgb, white))), SIX);
    // Dark objects on white, and labels from 1: nobody knows, and the error says how to tell.
    for (raster, background) in [
        (grey(Unsigned(8), |label| if label > 0 { 0.0 } else { 255.0 }), 255),
        (grey(Unsigned(8), |label| f64::from(label + 1)), 1),
    ] {
        let error = interpret(&raster, &MaskOptions::default()).unwrap_err();
        assert!(error.contains(&format!("--background {background}")), "{error}");
        let told = MaskOptions { background: Some(background), ..Default::default() };
        assert_eq!(areas(&interpret(&raster, &told).expect("a mask")), SIX);
    }
    for value in [1.0, 255.0] {
        let error = interpret(&grey(Unsigned(8), |_| value), &MaskOptions::default()).unwrap_err();
        assert!(error.contains("is the whole image"), "{error}");
    }
    // Errors name the values of the file, not the steps that fractions become.
    for (value, expected) in
        [(0.25, "of the value 0.25, is the whole"), (f64::INFINITY, "infinite")]
    {
        let error = interpret(&grey(Float(32), |_| value), &MaskOptions::default()).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(read(&grey(Unsigned(8), |_| 0.0)).meaning, Meaning::Empty);
}

#[test]
fn classes_have_parts_when_asked() {
    let classes = grey(SampleType::Unsigned(8), |label| f64::from(label.min(1) + label / 4));
    let mask = read(&classes);
    assert_eq!(
        (areas(&mask).len(), mask.scattered),
        (2, 1),
        "each value one object, and said of the one with several parts of 20 pixels"
    );
    let parts = MaskOptions { parts: true, ..Default::default() };
    let mask = interpret(&classes, &parts).expect("a mask");
    assert_eq!((mask.meaning, areas(&mask)), (Meaning::Parts, SIX.into()));
}

#[test]
fn numbers_that_are_none_are_background_and_said() {
    let raster =
        grey(SampleType::Float(32), |label| if label > 0 { f64::from(label) } else { f64::NAN });
    let mask = read(&raster);
    assert_eq!(areas(&mask), SIX);
    assert!(mask.remarks.iter().any(|remark| remark.contains("no number")), "{:?}", mask.remarks);
}

#[test]
fn probabilities_are_cut_at_half() {
    let mask = read(&grey(SampleType::Float(32), |label| if label > 0 { 0.98 } else { 0.02 }));
    assert_eq!((mask.meaning, areas(&mask)), (Meaning::Soft, SIX.into()));
}

#[test]
fn colours_are_named_as_users_write_them() {
    let odd =
        coloured(RasterKind::Rgb, |label| if label > 0 { [200, 30, 40] } else { [10, 20, 30] });
    let error = interpret(&odd, &MaskOptions::default()).unwrap_err();
    assert!(error.contains("--background #0a141e"), "{error}");
    let background = MaskOptions::parse_value("#0a141e").ok();
    let told = MaskOptions { background, ..Default::default() };
    assert_eq!(areas(&interpret(&odd, &told).expect("a mask")), SIX);
}

/// Folders of one image and one mask.
fn folders(root: &Path) -> anyhow::Result<(std::path::PathBuf, std::path::PathBuf)> {
    let (images, masks) = (root.join("images"), root.join("masks"));
    std::fs::create_dir_all(&images)?;
    std::fs::create_dir_all(&masks)?;
    let picture = RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let noise = (x * 37 + y * 91 + x * y) % 53;
        image::Rgb([(30 + 20 * label(x, y) + noise) as u8, noise as u8, 9])
    });
    picture.save(images.join("a.png"))?;
    picture.save(images.join("b.png"))?;
    for name in ["a.png", "b.png"] {
        GrayImage::from_fn(SIDE, SIDE, |x, y| Luma([u8::from(label(x, y) > 0)]))
            .save(masks.join(name))?;
    }
    Ok((images, masks))
}

#[test]
fn a_run_is_told_what_was_understood() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = folders(folder.path())?;
    let dataset = Dataset::open(&images, &masks, &DatasetOptions::min_area(20))?;
    let lines = dataset.summary().lines();
    let first = "8 objects in 2 masks (binary, parts taken as objects), area 25 / 49 / 64 pixels";
    assert_eq!(lines[0], first);
    assert!(lines[1].contains("smaller than 20 pixels: 4 objects"), "{lines:?}");
    Ok(())
}

#[test]
fn photographs_are_no_masks() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = folders(folder.path())?;
    std::fs::copy(images.join("a.png"), masks.join("a.png"))?;
    let options = DatasetOptions::min_area(1);
    let error = Dataset::open(&images, &masks, &options).expect_err("a photograph").to_string();
    assert!(error.contains("a.png") && error.contains("as in a photograph"), "{error}");
    let error = Dataset::open(&images, &images, &options).expect_err("one folder").to_string();
    assert!(error.contains("is the folder of the images too"), "{error}");
    Ok(())
}

#[test]
fn images_without_objects_are_left_out_and_counted() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = folders(folder.path())?;
    GrayImage::new(SIDE, SIDE).save(masks.join("a.png"))?;
    let dataset = Dataset::open(&images, &masks, &DatasetOptions::min_area(9))?;
    assert_eq!(dataset.len(), 1);
    let lines = dataset.summary().lines();
    assert_eq!(lines[1], "left out, without an object: 1 image: a.png");
    let strict = DatasetOptions { strict: true, ..DatasetOptions::min_area(9) };
    let error = Dataset::open(&images, &masks, &strict).expect_err("strict").to_string();
    assert!(error.contains("a.png: the mask is empty"), "{error}");
    let large = Dataset::open(&images, &masks, &DatasetOptions::min_area(99)).expect_err("large");
    let large = large.to_string();
    assert!(
        large.contains("no image has an instance of 99 pixels") && large.contains("b.png"),
        "{large}"
    );
    Ok(())
}

#[test]
fn all_that_is_wrong_is_listed_at_once() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = folders(folder.path())?;
    std::fs::write(
        masks.join("a.png"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )?;
    GrayImage::new(3, 3).save(masks.join("b.png"))?;
    std::fs::copy(images.join("a.png"), images.join("c.png"))?;
    let error = Dataset::open(&images, &masks, &DatasetOptions::min_area(1))
        .expect_err("faults")
        .to_string();
    for expected in ["3 faults", "c.png: has no mask", "git lfs pull", "the mask is (3, 3) pixels"]
    {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    Ok(())
}

#[test]
fn masks_of_the_stored_pixels_hint_at_exif() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = (folder.path().join("i"), folder.path().join("m"));
    std::fs::create_dir(&images)?;
    std::fs::create_dir(&masks)?;
    let mut jpeg = std::io::Cursor::new(Vec::new());
    RgbImage::new(32, 16).write_to(&mut jpeg, image::ImageFormat::Jpeg)?;
    let (start, rest) = jpeg.get_ref().split_at(2);
    for (orientation, expected) in [(6u8, None), (3, Some("1 image turned as EXIF says"))] {
        let mut exif =
            b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0".to_vec();
        exif[25] = orientation;
        let length = (exif.len() as u16 + 2).to_be_bytes();
        std::fs::write(images.join("a.jpg"), [start, b"\xff\xe1", &length, &exif, rest].concat())?;
        GrayImage::from_fn(32, 16, |x, _| Luma([u8::from(x < 9)])).save(masks.join("a.png"))?;
        match (Dataset::open(&images, &masks, &DatasetOptions::min_area(1)), expected) {
            (Ok(dataset), Some(expected)) => {
                let lines = dataset.summary().lines().join("\n");
                assert!(lines.contains(expected), "{lines}");
            }
            (Err(error), None) => {
                assert!(
                    error
                        .to_string()
                        .contains("stored as 32 x 16 pixels and its EXIF data turn it"),
                    "{error}"
                );
            }
            (other, _) => panic!("orientation {orientation}: {:?}", other.map(|d| d.len())),
        }
    }
    Ok(())
}

#[test]
fn masks_of_other_files_are_read_as_theirs() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let on = |x, y| if label(x, y) > 0 { 255 } else { 0 };
    GrayImage::from_fn(SIDE, SIDE, |x, y| Luma([on(x, y)])).save(at("a.bmp"))?;
    RgbaImage::from_fn(SIDE, SIDE, |x, y| Rgba([on(x, y), on(x, y), on(x, y), 255]))
        .save(at("a.gif"))?;
    RgbImage::from_fn(SIDE, SIDE, |x, y| image::Rgb([on(x, y); 3])).save(at("a.webp"))?;
    GrayImage::from_fn(SIDE, SIDE, |x, y| Luma([on(x, y)])).save(at("a.pgm"))?;
    for name in ["a.bmp", "a.gif", "a.webp", "a.pgm"] {
        let mask = read_mask(at(name), &MaskOptions::default())?;
        assert_eq!((mask.meaning, areas(&mask)), (Meaning::Binary, SIX.into()), "{name}");
    }
    Ok(())
}

use proptest::prelude::*;

proptest! {
    #![proptest_config(property::config(500))]

    /// Whatever the pixels: labels of their size, the same each time, or a message.
    #[test]
    fn any_pixels_end_well(
        width in 1usize..20,
        kind in 0usize..5,
        palette in proptest::collection::vec(prop_oneof![
            -3i64..300, Just(255), Just(65535), Just(-1), any::<i64>(), Just(i64::from(u32::MAX)),
        ], 1..9),
        fractions in any::<bool>(),
        sample in 0usize..4,
        places in proptest::collection::vec(any::<u8>(), 0..900),
        ignore in proptest::option::of(proptest::collection::vec(-2i64..260, 0..3)),
        background in proptest::option::of(-1i64..256),
        parts in any::<bool>(),
    ) {
        let kind = [
            RasterKind::Grey, RasterKind::Palette, RasterKind::GreyAlpha, RasterKind::Rgb, RasterKind::Rgba,
        ][kind];
        let channels = kind.colours() + usize::from(kind.has_alpha());
        let height = places.len() / (width * channels);
        // Runs of one value make areas, as masks have them.
        let values = (0..width * height * channels).map(|i| palette[usize::from(places[i / 3]) % palette.len()]);
        let (sample_type, samples) = match sample {
            0 => (SampleType::Unsigned(8), Samples::U8(values.map(|v| v as u8).collect())),
            1 => (SampleType::Unsigned(16), Samples::U16(values.map(|v| v as u16).collect())),
            2 => (SampleType::Signed(64), Samples::Wide(values.map(|v| v as f64).collect())),
            _ => {
                let divisor = if fractions { 7.0 } else { 1.0 };
                (SampleType::Float(64), Samples::Wide(values.map(|v| v as f64 / divisor).collect()))
            }
        };
        let raster = Raster::new(width as u32, height as u32, kind, sample_type, samples).expect("a raster");
        let options = MaskOptions { ignore, background, parts, page: None };
        if let Ok(mask) = interpret(&raster, &options) {
            prop_assert_eq!(mask.labels.dimensions(), (width as u32, height as u32));
            let found = find_instances(&mask.labels, 1);
            prop_assert_eq!(found.is_empty(), mask.meaning == Meaning::Empty);
            let inside: usize = found.iter().map(|instance| instance.area).sum();
            let outside = mask.labels.pixels().filter(|pixel| [0, IGNORED].contains(&pixel.0[0]));
            prop_assert_eq!(inside + outside.count(), mask.labels.len());
        }
    }
}
