//! The image processor against transformers' own (`tests/data/processor.py` made the file), and on odd images.

use crate::common::cases;
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::files;
use candle_sam_lora::sam::{convert_to_rgb, is_transparent, read_image, Frame, SamProcessor};
use image::{DynamicImage, ImageBuffer, Luma, RgbImage, RgbaImage};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SIDE: usize = 64;
const CASES: [&str; 4] = ["wide", "tall", "same", "odd"];

fn fixture() -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/processor.safetensors");
    files::read_tensors(&path, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn image(tensor: &Tensor) -> DynamicImage {
    let (height, width, _) = tensor.dims3().unwrap();
    let bytes = tensor.flatten_all().unwrap().to_vec1().unwrap();
    RgbImage::from_raw(width as u32, height as u32, bytes).unwrap().into()
}

fn pixels(processor: &SamProcessor, image: impl Into<DynamicImage>) -> Vec<f32> {
    values(&processor.preprocess(&image.into(), &Device::Cpu).unwrap().0)
}

#[test]
fn pixels_and_sizes_equal_transformers() {
    let fixture = fixture();
    let processor = SamProcessor::new(SIDE);
    for case in CASES {
        let get = |name: &str| &fixture[&format!("{case}/{name}")];
        let (found, frame) = processor.preprocess(&image(get("image")), &Device::Cpu).unwrap();
        let resized = values(get("reshaped_input_sizes"));
        assert_eq!(resized, [frame.resized.0 as f32, frame.resized.1 as f32], "{case}");
        let error = largest_difference(&found, get("pixel_values"));
        // Both round to 8 bits after each of the two passes. Pillow weighs in fixed point, which turns ties the other
        // way, and begins with the vertical pass in tall images. Either moves a value that goes into the second pass by
        // one level at most. So at most one level is seen, divided by the smallest std.
        let level = 1.0 / 255.0 / 0.224;
        let tolerance = if case == "same" { 1e-6 } else { level * 1.0001 };
        assert!(error <= tolerance, "{case}: {error} > {tolerance}");
        // And that seldom: this is 8-bit agreement, not closeness.
        let pairs: Vec<(f32, f32)> =
            values(&found).into_iter().zip(values(get("pixel_values"))).collect();
        let off = pairs.iter().filter(|(a, b)| (a - b).abs() > 1e-5).count();
        println!("{case}: largest {error}, {off} of {} values differ", pairs.len());
        let most = if case == "tall" { 0.1 } else { 0.01 };
        let share = off as f64 / pairs.len() as f64;
        assert!(share <= most, "{case}: {off} of {} values differ", pairs.len());
    }
}

#[test]
fn prompts_are_scaled_as_transformers_does() {
    let fixture = fixture();
    for case in CASES {
        let get = |name: &str| &fixture[&format!("{case}/{name}")];
        let (height, width, _) = get("image").dims3().unwrap();
        let frame = SamProcessor::new(SIDE).frame(height, width).unwrap();
        let points = frame.scale_points(get("points")).unwrap();
        let boxes = frame.scale_boxes(get("boxes")).unwrap();
        // transformers computes in f64 and rounds once, this in f32: two roundings of values up to 64.
        assert!(largest_difference(&points, get("input_points")) <= 64.0 * 2.0 * f32::EPSILON);
        assert!(largest_difference(&boxes, get("input_boxes")) <= 64.0 * 2.0 * f32::EPSILON);
        assert!(frame.scale_points(get("boxes")).unwrap_err().to_string().contains("[.., 2]"));
    }
}

#[test]
fn prompts_of_every_dtype_are_scaled_alike() {
    let frame = SamProcessor::new(SIDE).frame(3 * SIDE, 3 * SIDE).unwrap();
    let device = Device::Cpu;
    let points = Tensor::new(&[[100u32, 61], [3, 0]], &device).unwrap();
    let boxes = Tensor::new(&[[3u32, 0, 100, 61]], &device).unwrap();
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F16, DType::BF16, DType::F64] {
        let scaled = frame.scale_points(&points.to_dtype(dtype).unwrap()).unwrap();
        let third = |pixels: f64| pixels / 3.0;
        let expected = [100.0, 61.0, 3.0, 0.0].map(third);
        let scaled_boxes = frame.scale_boxes(&boxes.to_dtype(dtype).unwrap()).unwrap();
        let of_boxes = [3.0, 0.0, 100.0, 61.0].map(third);
        for (found, expected) in [(scaled, expected), (scaled_boxes, of_boxes)] {
            for (found, expected) in values(&found).iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "{dtype:?}: {found}");
            }
        }
    }
}

/// Fields are public, so a caller may set any.
#[test]
fn impossible_processors_and_frames_are_refused() {
    let (image, good) = (DynamicImage::new_rgb8(30, 20), SamProcessor::new(SIDE));
    let mask = Tensor::zeros((SIDE / 4, SIDE / 4), DType::F32, &Device::Cpu).unwrap();
    let frame = good.frame(20, 30).unwrap();
    for (processor, said) in [
        (SamProcessor { longest_edge: SIDE + 1, ..good.clone() }, "longest_edge is"),
        (SamProcessor { longest_edge: 0, ..good.clone() }, "longest_edge is 0, expected 1 to"),
        (SamProcessor::new(usize::MAX), "pad_size is 18446744073709551615, expected at most 32768"),
        (SamProcessor { image_std: [1.0, 0.0, 1.0], ..good.clone() }, "image_std positive"),
        (SamProcessor { rescale_factor: f64::NAN, ..good.clone() }, "must be finite"),
    ] {
        let preprocessed = processor.preprocess(&image, &Device::Cpu).unwrap_err().to_string();
        let resized = processor.resize_masks(&mask, &frame).unwrap_err().to_string();
        assert!(preprocessed.contains(said) && resized.contains(said), "{preprocessed} {resized}");
    }
    for (original, resized, said) in [
        ((20, 30), (SIDE + 1, 1), "a frame of"),
        ((20, 30), (0, 1), "a frame of"),
        ((1 << 33, 1), (1, 1), "expected 1 to 32768 a side"),
        ((20, 0), (1, 1), "expected 1 to 32768 a side"),
    ] {
        let error = good.resize_masks(&mask, &Frame { original, resized }).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn masks_come_back_as_transformers_brings_them() {
    let fixture = fixture();
    let processor = SamProcessor::new(SIDE);
    for case in CASES {
        let get = |name: &str| &fixture[&format!("{case}/{name}")];
        let (height, width, _) = get("image").dims3().unwrap();
        let frame = processor.frame(height, width).unwrap();
        let (low, expected) = (get("low_res_masks"), get("mask_logits"));
        let logits = processor.resize_masks(low, &frame).unwrap();
        let error = largest_difference(&logits, expected);
        println!("{case}: largest {error}");
        // Logits up to 12, each the sum of a few products: a few f32 roundings of that size.
        assert!(error <= 12.0 * 8.0 * f32::EPSILON, "{case}: {error}");
        let masks = processor.post_process_masks(low, &frame, 0.0).unwrap();
        assert_eq!(masks.dtype(), DType::U8);
        for (mask, logit) in values(&masks).iter().zip(values(expected)) {
            assert!(
                logit.abs() < 1e-5 || (*mask == 1.0) == (logit > 0.0),
                "{case}: {mask} at {logit}"
            );
        }
    }
}

#[test]
fn masks_of_any_rank_and_dtype_resize_and_wrong_ones_do_not() {
    let processor = SamProcessor::new(SIDE);
    let frame = processor.frame(20, 30).unwrap();
    let low: Vec<f32> = (0..2 * 3 * 16 * 16).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
    let low = Tensor::from_vec(low, (2, 3, 16, 16), &Device::Cpu).unwrap();
    let all = processor.resize_masks(&low, &frame).unwrap();
    assert_eq!(all.dims(), [2, 3, 20, 30]);
    let one = processor.resize_masks(&low.get(1).unwrap().get(2).unwrap(), &frame).unwrap();
    assert_eq!(values(&one), values(&all.get(1).unwrap().get(2).unwrap()));
    // Columns and rows exchanged, by strides alone.
    let turned = processor.frame(30, 20).unwrap();
    let turned = processor.resize_masks(&low.t().unwrap(), &turned).unwrap().t().unwrap();
    assert!(largest_difference(&turned, &all) < 1e-5);
    let half = processor.resize_masks(&low.to_dtype(DType::BF16).unwrap(), &frame).unwrap();
    assert_eq!((half.dtype(), half.dims()), (DType::F32, all.dims()));
    let none = Tensor::zeros((0, 3, 16, 16), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(processor.resize_masks(&none, &frame).unwrap().dims(), [0, 3, 20, 30]);
    let flat = Tensor::zeros(16, DType::F32, &Device::Cpu).unwrap();
    assert!(processor.resize_masks(&flat, &frame).unwrap_err().to_string().contains("[.., h, w]"));
    let foreign = Frame { original: (20, 30), resized: (100, 100) };
    assert!(processor.resize_masks(&low, &foreign).is_err());
}

#[test]
fn every_depth_and_channel_count_gives_the_same_pixels() {
    let processor = SamProcessor::new(SIDE);
    let grey = |x: u32, y: u32| ((3 * x + 2 * y) % 256) as u8;
    let rgb = RgbImage::from_fn(50, 40, |x, y| image::Rgb([grey(x, y); 3]));
    let expected = pixels(&processor, rgb.clone());
    let luma = ImageBuffer::from_fn(50, 40, |x, y| Luma([grey(x, y)]));
    let deep = ImageBuffer::from_fn(50, 40, |x, y| Luma([u16::from(grey(x, y)) * 257]));
    let opaque = RgbaImage::from_fn(50, 40, |x, y| {
        let v = grey(x, y);
        image::Rgba([v, v, v, 255])
    });
    assert_eq!(pixels(&processor, luma), expected);
    assert_eq!(pixels(&processor, deep), expected);
    assert_eq!(pixels(&processor, opaque), expected);
    assert_eq!(pixels(&processor, DynamicImage::from(rgb.clone()).to_rgb16()), expected);
    assert_eq!(pixels(&processor, DynamicImage::from(rgb).to_rgb32f()), expected);
    // Padding is zero: 40 of 50 rows' share of the square, below that nothing.
    assert!(expected[52 * SIDE..SIDE * SIDE].iter().all(|v| *v == 0.0));
}

/// Formats and depths, alpha of every kind, against transformers and Pillow (tests/fixtures/gen/images.py).
#[test]
fn transparent_images_are_laid_on_white() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let cases = cases("images.safetensors");
    let (mut transparent, mut found) = (0, 0);
    for case in &cases {
        let bytes: Vec<u8> = case.tensor("file").to_vec1().unwrap();
        std::fs::write(&path, bytes).unwrap();
        let image = read_image(&path).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let rgb = case.tensor("rgb");
        let (height, width, _) = rgb.dims3().unwrap();
        assert_eq!((image.height() as usize, image.width() as usize), (height, width));
        let expected: Vec<u8> = rgb.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(convert_to_rgb(&image).unwrap().into_raw(), expected, "{}", case.name);
        let processor = SamProcessor::new(SIDE);
        let opaque = RgbImage::from_raw(width as u32, height as u32, expected).unwrap();
        assert_eq!(pixels(&processor, image.clone()), pixels(&processor, opaque), "{}", case.name);
        let has_alpha = !["opaque", "unspecified", "bmp_rgb", "png_rgb_16", "png_grey_16"]
            .iter()
            .any(|name| case.name.contains(name));
        assert_eq!(is_transparent(&image), has_alpha, "{}", case.name);
        transparent += usize::from(has_alpha);
        found += 1;
    }
    assert!(found > 30 && transparent > 20, "{found} {transparent}");
}

#[test]
fn floats_beyond_their_range_are_refused() {
    let image = |value: f32| {
        DynamicImage::from(image::Rgb32FImage::from_pixel(9, 9, image::Rgb([0.5, value, 0.5])))
    };
    let white = convert_to_rgb(&image(1.0)).unwrap();
    assert_eq!(white.get_pixel(0, 0).0, [128, 255, 128]);
    for value in [1.01, -0.5, f32::NAN, f32::INFINITY, 255.0] {
        let message = convert_to_rgb(&image(value)).unwrap_err().to_string();
        assert!(message.contains(&format!("0 to 1, found {value}")), "{message}");
        let processor = SamProcessor::new(SIDE);
        assert!(processor.preprocess(&image(value), &Device::Cpu).is_err(), "{value}");
    }
}

#[test]
fn images_are_told_by_their_content_and_bad_ones_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let rgb: DynamicImage =
        RgbImage::from_fn(9, 7, |x, y| image::Rgb([x as u8, y as u8, 7])).into();
    for name in ["a.png", "a.tiff", "a.bmp", "a.webp", "a.ppm"] {
        rgb.save(path(name)).unwrap();
        assert_eq!(read_image(path(name)).unwrap().to_rgb8(), rgb.to_rgb8(), "{name}");
    }
    std::fs::copy(path("a.png"), path("disguised.jpg")).unwrap();
    assert_eq!(read_image(path("disguised.jpg")).unwrap().to_rgb8(), rgb.to_rgb8());

    let message = |path: PathBuf| read_image(path).unwrap_err().to_string();
    let png = std::fs::read(path("a.png")).unwrap();
    std::fs::write(path("cut.png"), &png[..png.len() / 2]).unwrap();
    assert!(message(path("cut.png")).contains("cut.png"));
    std::fs::write(path("empty.png"), "").unwrap();
    assert!(message(path("empty.png")).contains("cannot be read as an image"));
    assert!(message(path("missing.png")).contains("missing.png"));
    // A netpbm header alone can promise any size.
    std::fs::write(path("huge.pgm"), "P5 4000000 4000000 255\n").unwrap();
    assert!(message(path("huge.pgm")).contains("huge.pgm"));
    std::fs::write(path("large.pgm"), "P6 32768 32768 65535\n").unwrap();
    assert!(message(path("large.pgm")).contains("large.pgm"));

    let processor = SamProcessor::new(SIDE);
    for (height, width, expected) in [(0, 5, "0 pixels"), (2, 32769, "32769"), (1, 1000, "narrow")]
    {
        let message = processor.frame(height, width).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let empty = DynamicImage::from(RgbImage::new(0, 0));
    assert!(processor.preprocess(&empty, &Device::Cpu).is_err());
    assert_eq!(processor.frame(1, 1).unwrap().resized, (64, 64));
}

#[test]
fn the_configuration_of_a_folder_is_read_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let read = |side: usize| SamProcessor::load(folder.path(), side);
    assert_eq!(read(256).unwrap(), SamProcessor::new(256));
    assert_eq!(SamProcessor::config_file(folder.path()).unwrap(), None);
    let config =
        |json: &str| std::fs::write(folder.path().join("preprocessor_config.json"), json).unwrap();
    let nested = r#"{"processor_class": "SamProcessor", "image_processor": {
        "size": {"longest_edge": 60}, "pad_size": {"height": 64, "width": 64}, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.25, 0.5], "rescale_factor": 0.0039, "resample": 2, "do_pad": true}}"#;
    std::fs::write(folder.path().join("processor_config.json"), nested).unwrap();
    let processor = read(64).unwrap();
    assert_eq!((processor.longest_edge, processor.pad_size), (60, 64));
    assert_eq!((processor.image_std, processor.rescale_factor), ([0.5, 0.25, 0.5], 0.0039));
    assert_eq!(processor.frame(10, 20).unwrap().resized, (30, 60));
    let white = RgbImage::from_pixel(60, 30, image::Rgb([255; 3]));
    let white = pixels(&processor, white);
    assert!((white[0] - (255.0 * 0.0039 - 0.5) / 0.5).abs() < 1e-6);
    assert_eq!((white[60], white[30 * 64]), (0.0, 0.0));
    // As in transformers, the nested settings are before the others, and others are where nothing is nested.
    config(r#"{"size": {"longest_edge": 50}}"#);
    assert_eq!(read(64).unwrap(), processor);
    let file = || SamProcessor::config_file(folder.path()).unwrap().unwrap();
    assert!(file().ends_with("processor_config.json"));
    let older = r#"{"processor_class": "SamProcessor", "target_size": 64}"#;
    std::fs::write(folder.path().join("processor_config.json"), older).unwrap();
    assert_eq!(read(64).unwrap().longest_edge, 50);
    assert!(file().ends_with("preprocessor_config.json"));
    config("{}");
    assert_eq!(read(64).unwrap(), SamProcessor::new(64));
    // Numbers mean what transformers takes them for.
    config(r#"{"size": 50, "pad_size": 64}"#);
    assert_eq!((read(64).unwrap().longest_edge, read(64).unwrap().pad_size), (50, 64));
    for (json, expected) in [
        (r#"{"pad_size": {"height": 1024, "width": 1024}}"#, "1024 x 1024"),
        (r#"{"size": {"longest_edge": 0}}"#, "longest_edge is 0"),
        (r#"{"size": {"longest_edge": 65}}"#, "longest_edge is 65"),
        (
            r#"{"size": {"height": 64}}"#,
            "size is {\"height\":64}, expected a number or {\"longest_edge\"",
        ),
        (r#"{"size": -3}"#, "size is -3"),
        (r#"{"pad_size": 128}"#, "128 x 128"),
        (r#"{"pad_size": {"height": 64}}"#, "pad_size is {\"height\":64}, expected a number or"),
        (r#"{"image_std": [0.0, 1.0, 1.0]}"#, "image_std"),
        (r#"{"image_mean": [0.0]}"#, "length"),
        (r#"{"resample": 3}"#, "resample is 3"),
        (r#"{"do_normalize": false}"#, "do_normalize"),
        ("{", "EOF"),
    ] {
        config(json);
        let message = read(64).unwrap_err().to_string();
        assert!(
            message.contains(expected) && message.contains("preprocessor"),
            "{json}: {message}"
        );
    }
}

/// A camera that was held upright: EXIF's orientation 6 says to turn the stored image a quarter clockwise.
#[test]
fn photographs_are_turned_as_a_viewer_turns_them() {
    let stored = RgbImage::from_fn(32, 16, |x, _| image::Rgb([if x < 16 { 0 } else { 255 }; 3]));
    let mut jpeg = std::io::Cursor::new(Vec::new());
    stored.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
    let (start, rest) = jpeg.get_ref().split_at(2);
    // A TIFF of one directory of one entry: tag 0x112, one 16-bit value.
    let exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let length = (exif.len() as u16 + 2).to_be_bytes();
    let photograph = [start, b"\xff\xe1", &length, exif, rest].concat();
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, size) in
        [("plain", jpeg.get_ref(), (32, 16)), ("turned", &photograph, (16, 32))]
    {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let image = read_image(&path).unwrap().into_luma8();
        assert_eq!(image.dimensions(), size, "{name}");
        let ends = [image.get_pixel(4, 4).0[0], image.get_pixel(size.0 - 5, size.1 - 5).0[0]];
        assert!(ends[0] < 20 && ends[1] > 235, "{name}: {ends:?}");
        let other = image.get_pixel(size.0 - 5, 4).0[0];
        assert_eq!(other < 20, name == "turned", "{name}: {other}");
    }
}
