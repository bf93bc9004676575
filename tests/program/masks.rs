//! `masks`.

use super::{fail, micrograph, root, succeed};
use anyhow::{ensure, Context, Result};
use std::path::Path;

#[test]
fn finds_everything_in_a_folder() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let photos = here.join("photos");
    std::fs::create_dir(&photos)?;
    std::fs::copy(
        root().join("assets/photos/coins/heldout/images/coins_r0c2.png"),
        photos.join("coins.png"),
    )?;
    image::RgbImage::new(40, 30).save(photos.join("black.png"))?;
    std::fs::write(photos.join(".hidden.png"), b"nothing")?;
    std::fs::write(photos.join("notes.txt"), b"nothing")?;
    std::fs::write(photos.join("coins.overlay.png"), b"nothing")?;
    let command =
        "photos --points-per-side 8 --iou 0.6 --stability 0.6 --nms 0.5 --each --output out";
    let out = succeed(here, "masks", command)?;
    ensure!(out.contains("left alone, files and folders that are no image: 1: notes.txt"), "{out}");
    ensure!(out.contains("results of this program: 1: coins.overlay.png"), "{out}");
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(here.join("out/masks.json"))?)?;
    let annotations = json["annotations"].as_array().context("no annotations")?;
    let of_coins: Vec<_> = annotations.iter().filter(|a| a["image_id"] == 2).collect();
    ensure!(json["images"][1]["file_name"] == "coins.png" && of_coins.len() >= 2, "{json}");
    ensure!(out.contains(&format!("coins.png: {} masks", of_coins.len())), "{out}");
    ensure!(out.contains(&format!("{} masks of 2 images", annotations.len())), "{out}");
    let labels = image::open(here.join("out/coins.labels.png"))?.into_luma16();
    let (width, height) = image::image_dimensions(photos.join("coins.png"))?;
    ensure!(labels.dimensions() == (width, height));
    for (index, annotation) in of_coins.iter().enumerate() {
        let one = image::open(here.join(format!("out/coins.{:04}.png", index + 1)))?.into_luma8();
        let area = one.pixels().filter(|pixel| pixel.0[0] == 255).count();
        ensure!(annotation["area"] == area, "mask {index}: {area} pixels, {annotation}");
        let seen = labels.pixels().filter(|label| usize::from(label.0[0]) == index + 1).count();
        ensure!(seen <= area);
    }
    ensure!(
        here.join("out/coins.overlay.png").exists() && here.join("out/black.overlay.png").exists()
    );
    fail(here, "masks", command, 1, &["out/masks.json", "exists already", "--overwrite"])
}

#[test]
fn says_what_is_wrong() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let fails = |command: &str, code, words: &[&str]| fail(here, "masks", command, code, words);
    let (image, _) = micrograph();
    let image = image.display();
    std::fs::create_dir(here.join("empty"))?;
    std::fs::copy(micrograph().0, here.join("nuclei_r6c0.tif"))?;
    fails("", 2, &["IMAGES"])?;
    fails("empty", 1, &["empty", "has no image"])?;
    fails("none.png", 1, &["none.png"])?;
    fails(&format!("{image} nuclei_r6c0.tif"), 1, &["the same names"])?;
    fails(&format!("{image} --points-per-side 0"), 1, &["points_per_side is 0"])?;
    fails(&format!("{image} --points-per-side {}", usize::MAX), 1, &["expected at most 4096"])?;
    for (flag, threshold) in
        [("iou", "pred_iou"), ("stability", "stability_score"), ("mask-nms", "mask_nms")]
    {
        let said = format!("{threshold}_thresh is no number");
        fails(&format!("{image} --{flag} nan"), 1, &[&said])?;
    }
    fails(&format!("{image} --nms 3"), 1, &["--nms is 3, expected 0 to 1"])?;
    let calibrated = "--calibrate-images i --calibrate-masks m --geojson";
    fails(calibrated, 1, &["--geojson has no effect without IMAGES"])?;
    fails(&format!("{image} --sheet s.jpg"), 1, &["s.jpg", "ends in .png"])?;
    let [truth, picture] = ["a.labels.png", "a.png"].map(|name| here.join(name));
    std::fs::copy(micrograph().1, &truth)?;
    std::fs::copy(micrograph().0, &picture)?;
    fails("a.png --output .", 1, &["a.labels.png: exists already", "--overwrite"])?;
    let both = "a.png a.labels.png --output . --overwrite";
    fails(both, 1, &["a.labels.png: is one of the images itself"])?;
    fails("a.png --overwrite --sheet a.png", 1, &["a.png: is one of the images itself"])?;
    for (copy, original) in [(truth, micrograph().1), (picture, micrograph().0)] {
        ensure!(std::fs::read(copy)? == std::fs::read(original)?, "replaced");
    }
    std::fs::write(here.join("file"), "")?;
    fails(&format!("{image} --output file"), 1, &["file: is a file; expected a folder"])?;
    fails(&format!("{image} --crop-layers 9"), 1, &["crop_n_layers is 9"])
}

const QUICK: &str = "--points-per-side 8 --iou 0.6 --stability 0.6 --nms 0.5";

/// A folder with two images.
fn photos(here: &Path) -> Result<()> {
    std::fs::create_dir(here.join("photos"))?;
    std::fs::copy(micrograph().0, here.join("photos/a.png"))?;
    std::fs::copy(
        root().join("assets/photos/coins/heldout/images/coins_r0c2.png"),
        here.join("photos/b.png"),
    )?;
    Ok(())
}

/// The bytes are those of a run that nothing stopped, wherever it was killed.
#[test]
fn a_killed_run_is_continued_to_the_same_bytes() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    photos(here)?;
    succeed(here, "masks", &format!("photos {QUICK} --output whole"))?;
    let whole = |name: &str| std::fs::read(here.join("whole").join(name));
    let journal = whole("masks.jsonl")?;
    let ends: Vec<usize> =
        journal.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(at, _)| at + 1).collect();
    ensure!(ends.len() == 3, "{} lines", ends.len());
    for (length, done) in [(ends[0], 0), (ends[1], 1), (ends[1] + 40, 1), (ends[2], 2)] {
        let killed = here.join(format!("killed-{length}"));
        std::fs::create_dir(&killed)?;
        std::fs::write(killed.join("masks.jsonl"), &journal[..length])?;
        for name in ["a.labels.png", "a.overlay.png", "b.labels.png", "b.overlay.png"] {
            std::fs::write(killed.join(name), whole(name)?)?;
        }
        let line = format!("photos {QUICK} --output killed-{length} --resume");
        let out = succeed(here, "masks", &line)?;
        ensure!(done == 0 || out.contains(&format!("{done} of 2 images were done")), "{out}");
        for name in ["masks.json", "masks.jsonl", "b.labels.png"] {
            ensure!(std::fs::read(killed.join(name))? == whole(name)?, "{length}: {name}");
        }
    }
    // A picture that is not whole is made again.
    let overlay = here.join("whole/b.overlay.png");
    let bytes = std::fs::read(&overlay)?;
    std::fs::write(&overlay, &bytes[..bytes.len() / 2])?;
    let out = succeed(here, "masks", &format!("photos {QUICK} --output whole --resume"))?;
    ensure!(out.contains("1 of 2 images were done") && std::fs::read(&overlay)? == bytes, "{out}");
    // It is there once, also for the run after that.
    let json = whole("masks.json")?;
    succeed(here, "masks", &format!("photos {QUICK} --output whole --resume"))?;
    ensure!(whole("masks.json")? == json, "an image is there twice");
    // An image that was changed since is made again.
    std::fs::copy(here.join("photos/a.png"), here.join("photos/b.png"))?;
    let out = succeed(here, "masks", &format!("photos {QUICK} --output whole --resume"))?;
    ensure!(out.contains("1 of 2 images were done"), "{out}");
    let stable = format!("{QUICK} --ranking iou-stability");
    for other in ["--points-per-side 4".to_string(), format!("{QUICK} --mask-nms 0.3"), stable] {
        let line = format!("photos --output whole --resume {other}");
        fail(here, "masks", &line, 1, &["masks.jsonl", "other settings (generator)"])?;
    }
    Ok(())
}

#[test]
fn a_contact_sheet_shows_all_images() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    photos(here)?;
    let line = format!("photos {QUICK} --sheet sheet.png --columns 1 --json --quiet");
    let out = succeed(here, "masks", &line)?;
    let lines: Vec<serde_json::Value> =
        out.lines().map(serde_json::from_str).collect::<std::result::Result<_, _>>()?;
    ensure!(lines.len() == 3 && lines[2]["sheets"][0] == "sheet.png", "{out}");
    ensure!(lines[0]["image"] == "photos/a.png" && lines[2]["images"] == 2, "{out}");
    let sheet = image::open(here.join("sheet.png"))?.into_rgb8();
    let (width, height) = sheet.dimensions();
    ensure!(height > width, "one column of two pictures, {width} x {height}");
    // Names are black on white, below each picture.
    let dark = |top: u32, bottom: u32| {
        let rows = top..bottom;
        rows.flat_map(|y| (0..width).map(move |x| (x, y)))
            .filter(|(x, y)| sheet.get_pixel(*x, *y).0.iter().all(|value| *value < 90))
            .count()
    };
    ensure!(dark(212, 232) > 5 && dark(height - 30, height - 8) > 5, "no names");
    Ok(())
}

/// The flags that are named keep a mask.
#[test]
fn an_image_without_masks_gets_advice() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let line = format!("{} --points-per-side 8", micrograph().0.display());
    let strict = format!("{line} --iou 0.999 --stability 0.999 --output none");
    let out = succeed(here, "masks", &strict)?;
    ensure!(out.contains(": 0 masks") && out.contains("nothing was good enough"), "{out}");
    let flags = out
        .split("; ")
        .find_map(|part| part.lines().next()?.strip_suffix(" would keep it"))
        .with_context(|| format!("no flags: {out}"))?;
    ensure!(flags.contains("--iou") && flags.contains("--stability"), "{out}");
    let out = succeed(here, "masks", &format!("{line} {flags} --output some"))?;
    ensure!(!out.contains(": 0 masks"), "{flags}: {out}");
    Ok(())
}
