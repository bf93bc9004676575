//! `segment`.

use super::{fail, folder, micrograph, read, root, run, succeed};
use crate::common::model::Tensors;
use anyhow::{ensure, Context, Result};
use candle_sam_lora::files::write_tensors;
use std::path::Path;

/// The pixels of the largest object of a mask whose values are objects.
fn largest_object(mask: &Path) -> Result<Vec<bool>> {
    let mask = image::open(mask)?.into_luma16();
    let count = |value: u16| mask.pixels().filter(|pixel| pixel.0[0] == value).count();
    let largest =
        (1..=mask.pixels().map(|pixel| pixel.0[0]).max().unwrap_or(0)).max_by_key(|v| count(*v));
    let largest = largest.context("an empty mask")?;
    Ok(mask.pixels().map(|pixel| pixel.0[0] == largest).collect())
}

/// Twelve bits in sixteen are the picture of eight; a file of two pages needs a choice.
#[test]
fn chooses_pages_and_ranges() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let (image, _) = micrograph();
    let picture = image::open(image)?.into_luma8();
    let deep = image::ImageBuffer::<image::Luma<u16>, Vec<u16>>::from_fn(
        picture.width(),
        picture.height(),
        |x, y| image::Luma([u16::from(picture.get_pixel(x, y).0[0]) * 8]),
    );
    deep.save(here.join("deep.png"))?;
    let prompt = "--point 30,30 --overwrite";
    let out = succeed(here, "segment", &format!("deep.png {prompt} --range 0,2040"))?;
    ensure!(out.contains("deep.png: 16-bit, values 0 to 2040 are black to white"), "{out}");
    picture.save(here.join("plain.png"))?;
    let plain = succeed(here, "segment", &format!("plain.png {prompt}"))?;
    ensure!(!plain.contains("black to white"), "{plain}");
    let score =
        |out: &str| out.lines().find(|line| line.contains("expected IoU")).map(str::to_string);
    ensure!(score(&out).is_some() && score(&out) == score(&plain), "{out}{plain}");
    let mut pages = tiff::encoder::TiffEncoder::new(std::fs::File::create(here.join("two.tif"))?)?;
    for factor in [0, 1] {
        let values: Vec<u8> = picture.iter().map(|value| value * factor).collect();
        pages.write_image::<tiff::encoder::colortype::Gray8>(
            picture.width(),
            picture.height(),
            &values,
        )?;
    }
    fail(here, "segment", &format!("two.tif {prompt}"), 1, &["two.tif", "--page"])?;
    let second = succeed(here, "segment", &format!("two.tif {prompt} --page 2"))?;
    ensure!(score(&second) == score(&plain), "{second}{plain}");
    Ok(())
}

#[test]
fn takes_sam_hq_and_says_so() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let (image, _) = micrograph();
    let model = root().join("tests/fixtures/models/hq/original.safetensors");
    let (image, model) = (image.display(), model.display());
    // The width of the fixture's mask decoder is no published one, so its heads are in the folder's configuration.
    let line = format!("{image} --point 30,30 --model {model}");
    let out = succeed(here, "segment", &line)?;
    ensure!(out.contains("model: SAM-HQ, "), "{out}");
    let refused = run(here, "segment", &format!("{line} --overwrite --embeddings kept"))?;
    ensure!(refused.code == Some(1) && refused.err.contains("cannot be kept"), "{}", refused.err);
    Ok(())
}

#[test]
fn cuts_out_the_nucleus() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let (image, truth) = micrograph();
    let truth = largest_object(&truth)?;
    let (width, height) = image::image_dimensions(&image)?;
    let at = |index: usize| (index % width as usize, index / width as usize);
    let pixels = || truth.iter().enumerate().filter(|(_, inside)| **inside).map(|(i, _)| at(i));
    let (xs, ys): (Vec<_>, Vec<_>) = pixels().unzip();
    let middle = |values: &[usize]| values.iter().sum::<usize>() / values.len();
    let bound =
        |values: &[usize]| (*values.iter().min().unwrap_or(&0), *values.iter().max().unwrap_or(&0));
    let (point, (x0, x1), (y0, y1)) = ((middle(&xs), middle(&ys)), bound(&xs), bound(&ys));
    let image = image.display();
    for (prompt, least) in [
        (format!("--point {},{}", point.0, point.1), 0.8),
        (format!("--box {x0},{y0},{x1},{y1} --multimask"), 0.8),
    ] {
        let command = format!("{image} {prompt} --mask mask.png --overlay overlay.png --overwrite");
        let out = succeed(here, "segment", &command)?;
        let mask = image::open(here.join("mask.png"))?.into_luma8();
        ensure!(mask.dimensions() == (width, height), "{:?}", mask.dimensions());
        ensure!(mask.pixels().all(|pixel| [0, 255].contains(&pixel.0[0])), "not 0 and 255");
        let found: Vec<bool> = mask.pixels().map(|pixel| pixel.0[0] > 0).collect();
        let area = found.iter().filter(|inside| **inside).count();
        ensure!(out.contains(&format!(", {area} pixels (")), "{area}: {out}");
        let both = found.iter().zip(&truth).filter(|(a, b)| **a && **b).count();
        let iou = both as f64 / (area + xs.len() - both) as f64;
        println!("{prompt}: IoU {iou:.3} of the largest nucleus; {out}");
        ensure!(iou > least, "{prompt}: IoU {iou}");

        // The overlay differs from the image where the mask and the prompt are, and hardly elsewhere.
        let (before, after) = (
            image::open(image.to_string())?.into_rgb8(),
            image::open(here.join("overlay.png"))?.into_rgb8(),
        );
        let changed = before.pixels().zip(after.pixels()).map(|(a, b)| a != b);
        let inside = changed.zip(&found).filter(|(changed, inside)| *changed && **inside).count();
        ensure!(2 * inside > area, "{inside} of {area} pixels are marked");
    }
    Ok(())
}

#[test]
fn lays_transparency_on_white() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let image = image::open(micrograph().0)?.into_rgb8();
    let (width, height) = image.dimensions();
    let clear = image::RgbaImage::from_fn(width, height, |x, y| {
        let [r, g, b] = image.get_pixel(x, y).0;
        image::Rgba([r, g, b, if x < width / 2 { 0 } else { 255 }])
    });
    let white = image::RgbImage::from_fn(width, height, |x, y| match x < width / 2 {
        true => image::Rgb([255; 3]),
        false => *image.get_pixel(x, y),
    });
    clear.save(here.join("clear.png"))?;
    white.save(here.join("white.png"))?;
    let prompt = format!("--point {},{}", 3 * width / 4, height / 2);
    let out = succeed(here, "segment", &format!("clear.png {prompt}"))?;
    let said = "clear.png: transparent pixels are laid on white\n";
    let rest = out.strip_prefix(said).with_context(|| format!("not said: {out}"))?;
    let expected = succeed(here, "segment", &format!("white.png {prompt}"))?;
    ensure!(rest.replace("clear", "white") == expected, "{rest}, on white {expected}");
    for file in ["mask", "overlay"] {
        let bytes = |name: &str| std::fs::read(here.join(format!("{name}.{file}.png")));
        ensure!(bytes("clear")? == bytes("white")?, "another {file}");
    }
    Ok(())
}

#[test]
fn names_a_missing_processor() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let model = root().join("assets/tiny-sam");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(model.join(file), here.join(file))?;
    }
    let command = format!("{} --point 9,9 --overwrite --model", micrograph().0.display());
    let said = "neither processor_config.json nor preprocessor_config.json";
    let without = succeed(here, "segment", &format!("{command} {}", here.display()))?;
    ensure!(without.contains(said), "{without}");
    let with = succeed(here, "segment", &format!("{command} {}", model.display()))?;
    ensure!(!with.contains(said), "{with}");
    Ok(())
}

/// Each object has the mask that it has alone.
#[test]
fn takes_several_objects() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let image = micrograph().0;
    let mask = |prompts: &str| -> Result<Vec<u8>> {
        let command =
            format!("{} {prompts} --mask m.png --overlay o.png --overwrite", image.display());
        succeed(here, "segment", &command)?;
        Ok(image::open(here.join("m.png"))?.into_luma8().into_raw())
    };
    let (first, second) = (mask("--box 4,4,30,30")?, mask("--point 45,45 --point 60,3,0")?);
    let both = mask("--box 4,4,30,30 --point 45,45,1,2 --point 60,3,0,2")?;
    let expected = first.iter().zip(&second).map(|(a, b)| match (a, b) {
        (_, 255) => 2,
        (255, _) => 1,
        _ => 0,
    });
    ensure!(both.iter().copied().eq(expected), "the masks differ from those of one object");
    ensure!(both.contains(&1) && both.contains(&2), "an object is missing");
    Ok(())
}

#[test]
fn clips_boxes_and_doubts_fractions() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let image = micrograph().0;
    let command =
        |rest: &str| format!("{} {rest} --mask m.png --overlay o.png --overwrite", image.display());
    let pixels = || image::open(here.join("m.png"));
    let out = succeed(here, "segment", &command("--box -0.7,10,40,50"))?;
    ensure!(out.contains("--box -0.7,10,40,50: clipped to the image, 0,10,40,50"), "{out}");
    let clipped = pixels()?;
    succeed(here, "segment", &command("--box 0,10,40,50"))?;
    ensure!(pixels()? == clipped, "another mask");
    let out = succeed(here, "segment", &command("--point 0.6,0.5"))?;
    ensure!(out.contains("taken as pixels"), "{out}");
    let out = succeed(here, "segment", &command("--point 6,0.5"))?;
    ensure!(!out.contains("taken as pixels"), "{out}");
    Ok(())
}

/// One file of original names, without any configuration, gives the mask of the folder.
#[test]
fn reads_weights_of_any_name() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let image = micrograph().0;
    let shipped = root().join("assets/tiny-sam");
    let mask = |model: &str| -> Result<(image::DynamicImage, String)> {
        let rest =
            format!("--point 30,30 --mask m.png --overlay o.png --overwrite --model {model}");
        let out = succeed(here, "segment", &format!("{} {rest}", image.display()))?;
        Ok((image::open(here.join("m.png"))?, out))
    };
    let expected = mask(&shipped.display().to_string())?.0;
    let tensors = read(shipped.join("model.safetensors"))?;
    let names: Vec<&str> = tensors.keys().map(String::as_str).collect();
    let original = candle_sam_lora::sam::checkpoint::to_original(&names);
    let wrapped = original.iter().zip(tensors.values());
    let wrapped: Tensors = wrapped.map(|(name, t)| (format!("module.{name}"), t.clone())).collect();
    std::fs::create_dir(here.join("weights"))?;
    write_tensors(here.join("weights/my_sam.safetensors"), &wrapped)?;
    for model in ["weights", "weights/my_sam.safetensors"] {
        let (found, out) = mask(model)?;
        ensure!(found == expected, "{model}: another mask");
        for words in ["my_sam.safetensors", "below \"module.\"", "sizes told from the tensors"] {
            ensure!(out.contains(words), "{words}: {out}");
        }
    }
    Ok(())
}

#[test]
fn asks_for_the_base_of_an_adapter() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let image = micrograph().0;
    let adapter = folder("").with_file_name("adapters").join("lora_qv");
    let here_too = here.join("adapter");
    std::fs::create_dir(&here_too)?;
    let file = "adapter_model.safetensors";
    std::fs::copy(adapter.join(file), here_too.join(file))?;
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(adapter.join("adapter_config.json"))?)?;
    let with_base = |base: serde_json::Value| -> Result<()> {
        let mut config = config.clone();
        config["base_model_name_or_path"] = base;
        Ok(std::fs::write(here_too.join("adapter_config.json"), config.to_string())?)
    };
    let command = format!("{} --point 9,9 --adapter adapter", image.display());
    with_base("some-lab/their-sam-of-nowhere/x".into())?;
    fail(here, "segment", &command, 1, &["some-lab/their-sam-of-nowhere/x", "--model"])?;
    with_base(serde_json::Value::Null)?;
    fail(here, "segment", &command, 1, &["does not name its base model", "--model"])?;
    with_base(folder("tiny").display().to_string().into())?;
    let out = succeed(here, "segment", &command)?;
    ensure!(out.contains("base model") && out.contains("adapter: "), "{out}");
    Ok(())
}

#[test]
fn says_what_is_wrong() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let fails = |command: &str, code, words: &[&str]| fail(here, "segment", command, code, words);
    let image = micrograph().0;
    let (width, height) = image::image_dimensions(&image)?;
    let image = image.display();
    fails("", 2, &["<IMAGE>"])?;
    fails("none.png --point 1,1", 1, &["error: none.png", "No such file"])?;
    std::fs::write(here.join("text.png"), "no image")?;
    fails("text.png --point 1,1", 1, &["error: ", "text.png"])?;
    fails(&image.to_string(), 1, &["--point X,Y", "--box X0,Y0,X1,Y1"])?;
    fails(&format!("{image} --point 1"), 1, &["--point 1", "expected X,Y"])?;
    fails(&format!("{image} --point 1,2,3"), 1, &["label of 0 or 1"])?;
    fails(&format!("{image} --point 1,y"), 1, &["--point \"1,y\"", "got \"y\""])?;
    fails(&format!("{image} --point -1,2"), 1, &["outside", &format!("{width} x {height}")])?;
    fails(&format!("{image} --box 9,9,3,3"), 1, &["--box", "X0 < X1"])?;
    let beyond = format!("{image} --box {0},0,{1},{height}", width + 1, width + 9);
    fails(&beyond, 1, &["--box", "outside the image"])?;
    fails(&format!("{image} --point 1,2,1,3"), 1, &["object 1 of 3 has neither"])?;
    let whole = format!("{image} --box 0,0,{width},{height} --mask b.png --overlay c.png");
    succeed(here, "segment", &whole)?;
    std::fs::copy(micrograph().0, here.join("own.png"))?;
    let own = "own.png --point 1,1 --overwrite --mask ./own.png";
    fails(own, 1, &["own.png: is the image itself"])?;
    ensure!(std::fs::read(here.join("own.png"))? == std::fs::read(micrograph().0)?, "overwritten");
    fails(&format!("{image} --point 1,1 --mask a.jpg"), 1, &["a.jpg", "ends in .png"])?;
    let png = format!("--adapter own.png --point 1,1 {image}");
    fails(&png, 1, &["own.png: it is a PNG image"])?;
    let same = format!("{image} --point 1,1 --mask a.png --overlay a.png");
    fails(&same, 1, &["--mask and --overlay are both a.png"])?;
    std::fs::create_dir(here.join("x"))?;
    let same = format!("{image} --point 1,1 --mask x/../c.png --overlay c.png --overwrite");
    fails(&same, 1, &["--mask and --overlay are both"])?;
    let output = format!("{image} --point 1,1 --mask d.png --overlay e.png --output x");
    fails(&output, 1, &["--output has no effect"])?;
    std::fs::write(here.join("a.png"), "mine")?;
    fails(&format!("{image} --point 1,1 --mask a.png"), 1, &["a.png", "--overwrite"])?;
    ensure!(std::fs::read(here.join("a.png"))? == b"mine", "a.png was overwritten");
    fails(&format!("{image} --point 1,1 --model none"), 1, &["none", "no such file or folder"])
}

/// Each image of a folder gets the prompts; what is there and whole is not made again.
#[test]
fn takes_a_folder_and_goes_on_with_it() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    std::fs::create_dir(here.join("photos"))?;
    let image = micrograph().0;
    for name in ["a.png", "b.png"] {
        std::fs::copy(&image, here.join("photos").join(name))?;
    }
    let command = "photos --point 30,30 --output out";
    let out = succeed(here, "segment", command)?;
    ensure!(out.contains("a.png: expected IoU") && out.contains("b.png: expected IoU"), "{out}");
    let mask = here.join("out/b.mask.png");
    let whole = std::fs::read(&mask)?;
    ensure!(std::fs::read(here.join("out/a.mask.png"))? == whole);
    fail(here, "segment", command, 1, &["out/a.mask.png", "exists already"])?;
    std::fs::write(&mask, &whole[..whole.len() / 2])?;
    let out = succeed(here, "segment", &format!("{command} --resume"))?;
    ensure!(out.contains("1 of 2 results are there already") && !out.contains("a.png"), "{out}");
    ensure!(std::fs::read(&mask)? == whole, "another mask");
    for (other, told) in [
        ("--point 9,30", "(prompts)"),
        ("--point 30,30 --multimask", "(multimask)"),
        ("--point 30,30 --dtype bf16", "(backend)"),
    ] {
        let line = format!("photos {other} --output out --resume");
        fail(here, "segment", &line, 1, &["out/a.mask.png", "other settings", told])?;
    }
    image::open(&mask)?.save(&mask)?;
    let resumed = format!("{command} --resume");
    fail(here, "segment", &resumed, 1, &["out/b.mask.png", "prompts, "])?;
    ensure!(!whole.windows(6).any(|bytes| bytes == b"photos"), "a folder's name in a mask");
    fail(here, "segment", "photos --point 1,1 --mask m.png", 1, &["are for one image"])
}
