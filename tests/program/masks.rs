//! `masks`.

use super::{fail, micrograph, root, succeed};
use anyhow::{ensure, Context, Result};

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
    let command =
        "photos --points-per-side 8 --iou 0.6 --stability 0.6 --nms 0.5 --each --output out";
    let out = succeed(here, "masks", command)?;
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
    fails(&format!("{image} --crop-layers 9"), 1, &["crop_n_layers is 9"])
}
