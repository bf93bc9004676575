//! Folders of images and masks, prompts drawn from them, and what is refused.

use candle_sam_lora::train::{
    find_instances, jittered_box, mask_on_grid, random_point, sample_indices, Dataset,
    DatasetOptions, FlipRotate, LabelImage, PromptKind, StepRng,
};
use image::{GrayImage, ImageBuffer, Luma, RgbImage};
use std::path::Path;

/// A label at each pixel of a 12 x 10 image: a 6 x 5 block of 7 and a 3 x 3 one of 300.
fn blocks() -> LabelImage {
    LabelImage::from_fn(12, 10, |x, y| {
        let in_first = (1..7).contains(&x) && (2..7).contains(&y);
        let in_second = x >= 9 && y >= 7;
        Luma([if in_first {
            7
        } else if in_second {
            300
        } else {
            0
        }])
    })
}

fn folders(root: &Path) -> anyhow::Result<(std::path::PathBuf, std::path::PathBuf)> {
    let (images, masks) = (root.join("images"), root.join("masks"));
    std::fs::create_dir_all(&images)?;
    std::fs::create_dir_all(&masks)?;
    Ok((images, masks))
}

#[test]
fn labels_of_16_bits_colours_and_binary_parts_become_instances() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = folders(folder.path())?;
    let labels = blocks();
    for name in ["binary", "colour", "labels"] {
        RgbImage::from_pixel(12, 10, image::Rgb([9, 8, 7]))
            .save(images.join(format!("{name}.png")))?;
    }
    let white = |v: u32| if v > 0 { 255 } else { 0 };
    GrayImage::from_fn(12, 10, |x, y| Luma([white(labels.get_pixel(x, y).0[0])]))
        .save(masks.join("binary.png"))?;
    RgbImage::from_fn(12, 10, |x, y| {
        image::Rgb([white(labels.get_pixel(x, y).0[0]), labels.get_pixel(x, y).0[0] as u8, 0])
    })
    .save(masks.join("colour.tif"))?;
    ImageBuffer::<Luma<u16>, _>::from_fn(12, 10, |x, y| Luma([labels.get_pixel(x, y).0[0] as u16]))
        .save(masks.join("labels.png"))?;
    std::fs::write(masks.join("SOURCES.md"), "no image")?;
    std::fs::create_dir(images.join("more"))?;
    let dataset = Dataset::open(&images, &masks, &DatasetOptions::min_area(9))?;
    assert_eq!(dataset.len(), 3);
    for index in 0..3 {
        let sample = dataset.load(index)?;
        let found: Vec<_> = sample.instances.iter().map(|i| (i.area, i.bounds)).collect();
        assert_eq!(found.len(), 2, "{}", sample.name);
        assert!(
            found.contains(&(30, [1, 2, 6, 6])) && found.contains(&(9, [9, 7, 11, 9])),
            "{found:?}"
        );
    }
    let lines = dataset.summary().lines().join("\n");
    assert!(
        lines.contains("left alone, files and folders beside images and masks: 2: "),
        "{lines}"
    );
    assert!(lines.contains("more") && lines.contains("SOURCES.md"), "{lines}");
    // The smaller instance goes when more pixels are asked for.
    assert_eq!(
        Dataset::open(&images, &masks, &DatasetOptions::min_area(10))?.load(0)?.instances.len(),
        1
    );
    let (rest, held_out) = dataset.split(0.3, 1)?;
    assert_eq!((rest.len(), held_out.len()), (2, 1));
    Ok(())
}

/// Training sees what `SamProcessor` and `segment` see.
#[test]
fn transparent_images_are_on_white_and_counted() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = folders(folder.path())?;
    let alpha = |x: u32| if x < 6 { 0 } else { 128 };
    image::RgbaImage::from_fn(12, 10, |x, _| image::Rgba([10, 200, 0, alpha(x)]))
        .save(images.join("clear.png"))?;
    RgbImage::from_pixel(12, 10, image::Rgb([9, 8, 7])).save(images.join("opaque.png"))?;
    for name in ["clear.png", "opaque.png"] {
        let label = |x, y| Luma([blocks().get_pixel(x, y).0[0] as u16]);
        ImageBuffer::<Luma<u16>, _>::from_fn(12, 10, label).save(masks.join(name))?;
    }
    let dataset = Dataset::open(&images, &masks, &DatasetOptions::min_area(9))?;
    assert_eq!((dataset.len(), dataset.transparent()), (2, 1));
    let sample = dataset.load(0)?;
    assert!(sample.transparent && sample.image.get_pixel(0, 0).0 == [255; 3]);
    // (10 * 128 + 255 * 127) / 255 and so on, rounded.
    assert_eq!(sample.image.get_pixel(9, 9).0, [132, 227, 127]);
    assert!(!dataset.load(1)?.transparent);
    let (rest, held_out) = dataset.split(0.5, 1)?;
    assert_eq!(rest.transparent() + held_out.transparent(), 1);
    Ok(())
}

#[test]
fn prompts_lie_inside_and_boxes_around() {
    let labels = blocks();
    let all = find_instances(&labels, 1);
    let mut seen = std::collections::BTreeSet::new();
    for step in 0..400 {
        let mut draws = StepRng::new(1, "prompt", step);
        let [x, y] = random_point(&labels, &all[0], &mut draws);
        assert_eq!(labels.get_pixel(x as u32, y as u32).0[0], all[0].label, "({x}, {y})");
        seen.insert((x as u32, y as u32));
        let [x0, y0, x1, y1] = jittered_box(&labels, &all[1], 2.0, &mut draws);
        assert!(0.0 <= x0 && x0 <= x1 && x1 <= 11.0 && 0.0 <= y0 && y0 <= y1 && y1 <= 9.0);
    }
    assert_eq!(seen.len(), all[0].area, "every pixel is drawn");
    let fixed = PromptKind::Point.fixed(&labels, &all[0]);
    assert_eq!((fixed.len(), &fixed), (5, &PromptKind::Point.fixed(&labels, &all[0])));
    assert_eq!(
        jittered_box(&labels, &all[0], 0.0, &mut StepRng::new(1, "b", 0)),
        [1.0, 2.0, 6.0, 6.0]
    );
}

#[test]
fn targets_are_the_nearest_pixels() {
    let labels = blocks();
    let same: Vec<f32> = labels.pixels().map(|p| f32::from(u8::from(p.0[0] == 7))).collect();
    assert_eq!(mask_on_grid(&labels, 7, 10, 12, (1.0, 1.0)), same);
    // Halved: result pixel (r, c) has its centre on the corner of source pixels, and takes the lower right one.
    let halved: Vec<f32> =
        (0..5 * 6).map(|i| same[(2 * (i / 6) + 1) * 12 + 2 * (i % 6) + 1]).collect();
    assert_eq!(mask_on_grid(&labels, 7, 5, 6, (2.0, 2.0)), halved);
    let doubled: Vec<f32> = (0..20 * 24).map(|i| same[(i / 24 / 2) * 12 + (i % 24) / 2]).collect();
    assert_eq!(mask_on_grid(&labels, 7, 20, 24, (0.5, 0.5)), doubled);
}

#[test]
fn the_order_is_a_function_of_seed_and_step_and_covers_every_epoch() {
    let order: Vec<usize> = (0..10).flat_map(|step| sample_indices(5, 2, 3, step)).collect();
    assert_eq!(order[14..16], sample_indices(5, 2, 3, 7)[..]);
    for epoch in order.chunks(5) {
        let mut epoch = epoch.to_vec();
        epoch.sort_unstable();
        assert_eq!(epoch, [0, 1, 2, 3, 4]);
    }
    let mut last = [u64::MAX - 1, u64::MAX].map(|step| sample_indices(4, 2, 3, step)).concat();
    last.sort_unstable();
    assert_eq!(last, [0, 1, 2, 3], "the last epoch has every image once, too");
    assert_ne!(order, (0..10).flat_map(|step| sample_indices(5, 2, 4, step)).collect::<Vec<_>>());
}

#[test]
fn symmetries_move_image_and_labels_together() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = folders(folder.path())?;
    let labels = blocks();
    let gray = |x, y| labels.get_pixel(x, y).0[0] as u8;
    RgbImage::from_fn(12, 10, |x, y| image::Rgb([gray(x, y); 3])).save(images.join("a.png"))?;
    GrayImage::from_fn(12, 10, |x, y| Luma([gray(x, y)])).save(masks.join("a.png"))?;
    let sample = Dataset::open(&images, &masks, &DatasetOptions::min_area(1))?.load(0)?;
    let mut seen = std::collections::BTreeSet::new();
    for step in 0..100 {
        let turned = FlipRotate::draw(&mut StepRng::new(2, "symmetry", step)).apply(sample.clone());
        assert!(turned
            .image
            .pixels()
            .zip(turned.layers[0].pixels())
            .all(|(i, l)| u32::from(i.0[0]) == l.0[0]));
        assert_eq!(turned.instances, find_instances(&turned.layers[0], 1));
        seen.insert(turned.layers[0].clone().into_raw());
    }
    assert_eq!(seen.len(), 8);
    Ok(())
}

#[test]
fn bad_folders_and_files_are_named() -> anyhow::Result<()> {
    type Spoil = fn(&Path, &Path) -> anyhow::Result<()>;
    let full =
        |value: u8| GrayImage::from_fn(4, 4, move |x, _| Luma([if x > 0 { value } else { 0 }]));
    let cases: [(&str, &str, Spoil); 8] = [
        ("a.png", "has no mask", |_, masks| Ok(std::fs::remove_file(masks.join("a.png"))?)),
        ("c.png", "has no image", |_, masks| Ok(GrayImage::new(4, 4).save(masks.join("c.png"))?)),
        ("b.png", "one object, of the value 1, is the whole image", |_, masks| {
            Ok(GrayImage::from_pixel(4, 4, Luma([1])).save(masks.join("b.png"))?)
        }),
        ("b.png", "the mask is (3, 4) pixels", |_, masks| {
            Ok(GrayImage::from_fn(3, 4, |x, _| Luma([x as u8 % 2])).save(masks.join("b.png"))?)
        }),
        ("a.png", "cannot be read as an image", |images, _| {
            let bytes = std::fs::read(images.join("a.png"))?;
            Ok(std::fs::write(images.join("a.png"), &bytes[..bytes.len() / 2])?)
        }),
        ("b.jpg", "without loss", |_, masks| {
            std::fs::remove_file(masks.join("b.png"))?;
            Ok(GrayImage::from_pixel(4, 4, Luma([1])).save(masks.join("b.jpg"))?)
        }),
        ("a.", "the same stem", |images, _| Ok(GrayImage::new(4, 4).save(images.join("a.bmp"))?)),
        ("images", "the folder has no image", |images, _| {
            Ok(["a.png", "b.png"].iter().try_for_each(|f| std::fs::remove_file(images.join(f)))?)
        }),
    ];
    for (file, expected, spoil) in cases {
        let folder = tempfile::tempdir()?;
        let (images, masks) = folders(folder.path())?;
        for name in ["a.png", "b.png"] {
            GrayImage::new(4, 4).save(images.join(name))?;
            full(1).save(masks.join(name))?;
        }
        assert_eq!(Dataset::open(&images, &masks, &DatasetOptions::min_area(5))?.len(), 2);
        spoil(&images, &masks)?;
        let message = Dataset::open(&images, &masks, &DatasetOptions::min_area(5))
            .expect_err(expected)
            .to_string();
        assert!(message.contains(file) && message.contains(expected), "{expected}: {message}");
    }
    assert!(Dataset::open(
        Path::new("/nowhere"),
        Path::new("/nowhere"),
        &DatasetOptions::min_area(1)
    )
    .is_err());
    Ok(())
}
