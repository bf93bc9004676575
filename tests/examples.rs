//! The examples' command lines, as a user has them: values in what they write, what they print, errors, exit codes.
//!
//! This binary is the examples, too: called by the name of one, as the tests call it, it runs that. So what is tested is
//! never older than the sources, and nothing is built twice.
// Each example is a program of its own and holds what it shares with others.
#![allow(clippy::duplicate_mod)]

mod common;
#[path = "../examples/encode.rs"]
mod encode;
#[path = "../examples/masks.rs"]
mod masks;
#[path = "../examples/params.rs"]
mod params;
#[path = "../examples/segment.rs"]
mod segment;

use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_sam_lora::files::{read_tensors, write_tensors};
use common::model::{folder, relative_error, Tensors};
use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const NAME: &str = "CANDLE_SAM_LORA_EXAMPLE";

fn main() -> ExitCode {
    match std::env::var(NAME).as_deref() {
        Ok("encode") => encode::main(),
        Ok("params") => params::main(),
        Ok("masks") => masks::main(),
        Ok("segment") => segment::main(),
        _ => tests(),
    }
}

fn tests() -> ExitCode {
    type Test = fn(&Path) -> Result<()>;
    let trials: [(&str, Test); 18] = [
        ("params_counts_what_peft_counts", params_counts_what_peft_counts),
        ("params_says_what_is_wrong", params_says_what_is_wrong),
        ("encode_gives_the_tensors_of_pytorch", encode_gives_the_tensors_of_pytorch),
        ("encode_with_an_adapter_gives_those_of_peft", encode_with_an_adapter_gives_those_of_peft),
        ("encode_runs_an_encoder_alone", encode_runs_an_encoder_alone),
        ("encode_tells_what_of_an_adapter_is_passed_over", encode_tells_what_is_passed_over),
        ("encode_says_what_is_wrong", encode_says_what_is_wrong),
        ("masks_finds_everything_in_a_folder", masks_finds_everything_in_a_folder),
        ("masks_says_what_is_wrong", masks_says_what_is_wrong),
        ("segment_chooses_pages_and_ranges", segment_chooses_pages_and_ranges),
        ("segment_cuts_out_the_nucleus", segment_cuts_out_the_nucleus),
        ("segment_lays_transparency_on_white", segment_lays_transparency_on_white),
        ("segment_names_a_missing_processor", segment_names_a_missing_processor),
        ("segment_says_what_is_wrong", segment_says_what_is_wrong),
        ("segment_takes_several_objects", segment_takes_several_objects),
        ("segment_clips_boxes_and_doubts_fractions", segment_clips_boxes_and_doubts_fractions),
        ("segment_reads_weights_of_any_name", segment_reads_weights_of_any_name),
        ("segment_asks_for_the_base_of_an_adapter", segment_asks_for_the_base_of_an_adapter),
    ];
    let trials = trials.into_iter().map(|(name, test)| {
        Trial::test(name, move || {
            let folder = tempfile::tempdir()?;
            test(folder.path()).map_err(|error| Failed::from(format!("{error:?}")))
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// How an example ended.
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs the example in `folder`; the command line is split at spaces.
fn run(folder: &Path, example: &str, command: &str) -> Result<Ended> {
    let output = Command::new(std::env::current_exe()?)
        .env(NAME, example)
        .args(command.split_whitespace())
        .current_dir(folder)
        .output()?;
    let text = |bytes| String::from_utf8(bytes).context("not UTF-8");
    Ok(Ended { code: output.status.code(), out: text(output.stdout)?, err: text(output.stderr)? })
}

/// What a run that ends well prints.
fn succeed(folder: &Path, example: &str, command: &str) -> Result<String> {
    let Ended { code, out, err } = run(folder, example, command)?;
    ensure!(code == Some(0) && err.is_empty(), "{example} {command}: {code:?}, {err}");
    Ok(out)
}

/// A run must end with this exit code, print no more than what it loaded, and say all these words on stderr.
fn fail(folder: &Path, example: &str, command: &str, code: i32, words: &[&str]) -> Result<()> {
    let ended = run(folder, example, command)?;
    let said = words.iter().all(|word| ended.err.contains(word));
    ensure!(
        ended.code == Some(code)
            && ended.out.lines().all(|line| line.starts_with("model: "))
            && said,
        "{example} {command}: expected {code} and {words:?}, got {:?}: {}",
        ended.code,
        ended.err
    );
    Ok(())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The numbers are those of `print_trainable_parameters` in PEFT: tests/fixtures/counts.json.
fn params_counts_what_peft_counts(folder: &Path) -> Result<()> {
    for (command, expected) in [
        ("", "trainable params: 589,824 || all params: 94,325,296 || trainable%: 0.6253\n"),
        (
            "--r 16 --target-modules q,v --use-dora",
            "trainable params: 608,256 || all params: 94,343,728 || trainable%: 0.6447\n",
        ),
    ] {
        let out = succeed(folder, "params", command)?;
        ensure!(out == expected, "params {command}: {out}");
    }
    Ok(())
}

fn params_says_what_is_wrong(folder: &Path) -> Result<()> {
    let fails = |command: &str, code, words: &[&str]| fail(folder, "params", command, code, words);
    fails("--config vit_x", 1, &["error: ", "vit_x", "vit_b, vit_l, vit_h or a config.json"])?;
    fails("--r 0", 1, &["error: ", "rank", "got 0"])?;
    fails("--target-modules qq", 1, &["error: ", "matches no layer", "k_proj"])?;
    fails("--r many", 2, &["many", "--r"])?;
    fails("--ranks 3", 2, &["--ranks"])
}

/// A fixture's tensors whose names start with one of the prefixes, without these.
fn inputs(tensors: &Tensors, prefixes: &[&str]) -> Tensors {
    let wanted = |name: &str| {
        let name = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix))?;
        (name == "pixel_values" || name.starts_with("input_")).then(|| name.to_string())
    };
    tensors.iter().filter_map(|(name, t)| Some((wanted(name)?, t.clone()))).collect()
}

fn read(path: PathBuf) -> Result<Tensors> {
    Ok(read_tensors(&path, &Device::Cpu)?)
}

/// Largest relative error, of f32 against f64 (tests/sam_model.rs).
const BOUND: f64 = 2e-5;

fn compare(got: &Tensors, name: &str, expected: &Tensor) -> Result<()> {
    let got = got.get(name).with_context(|| format!("no {name} was written"))?;
    let error = relative_error(got, expected)?;
    ensure!(error < BOUND, "{name}: {error:e}");
    Ok(())
}

fn encode_gives_the_tensors_of_pytorch(here: &Path) -> Result<()> {
    let io = read(folder("tiny").join("io.safetensors"))?;
    write_tensors(here.join("in"), &inputs(&io, &["encoder/", "points_boxes/"]))?;
    let model = folder("tiny");
    let command = format!("--input in --output out --model {}", model.display());
    let out = succeed(here, "encode", &command)?;
    let written = read(here.join("out"))?;
    ensure!(
        out.starts_with("model: ") && out.ends_with(&format!("out: {} tensors\n", written.len())),
        "{out}"
    );
    let mut compared = 0;
    for (name, expected) in &io {
        let states = name.strip_prefix("encoder/").filter(|name| *name != "pixel_values");
        let masks = name.strip_prefix("points_boxes/");
        let masks = masks.filter(|name| ["pred_masks", "iou_scores"].contains(name));
        let known = states.filter(|name| !name.starts_with("attentions."));
        if let Some(name) = known.or(masks) {
            compare(&written, name, expected)?;
            compared += 1;
        }
    }
    ensure!(compared == written.len(), "{compared} of {} were compared", written.len());

    let single = succeed(here, "encode", &format!("{command} --single-mask"))?;
    let masks = &read(here.join("out"))?["pred_masks"];
    ensure!(single == out && masks.dim(2)? == 1, "{:?}", masks.dims());
    Ok(())
}

fn encode_with_an_adapter_gives_those_of_peft(here: &Path) -> Result<()> {
    let adapters = folder("").with_file_name("adapters");
    let tensors = read(adapters.join("inputs.safetensors"))?;
    write_tensors(here.join("in"), &inputs(&tensors, &[""]))?;
    for kind in ["lora_qv", "dora", "fused_qkv"] {
        let adapter = adapters.join(kind);
        let (model, adapter_shown) = (folder("tiny"), adapter.display());
        let model = model.display();
        let command = format!("--input in --output out --model {model} --adapter {adapter_shown}");
        succeed(here, "encode", &command)?;
        let (written, io) = (read(here.join("out"))?, read(adapter.join("io.safetensors"))?);
        for name in ["image_embeddings", "pred_masks", "iou_scores"] {
            compare(&written, name, &io[&format!("eval/{name}")]).context(kind)?;
        }
    }
    Ok(())
}

/// A checkpoint of transformers' SamVisionModel, by itself and under adapters of PEFT's.
fn encode_runs_an_encoder_alone(here: &Path) -> Result<()> {
    let vision = folder("").with_file_name("variants").join("vision");
    let io = read(vision.join("io.safetensors"))?;
    write_tensors(here.join("in"), &inputs(&io, &["base/"]))?;
    let command = format!("--input in --output out --model {}", vision.display());
    succeed(here, "encode", &command)?;
    let written = read(here.join("out"))?;
    ensure!(written.len() == 4, "{:?}", written.keys());
    for name in written.keys() {
        compare(&written, name, &io[&format!("base/{name}")])?;
    }
    for adapter in ["adapter_fused", "adapter_split"] {
        let adapted = format!("{command} --adapter {}", vision.join(adapter).display());
        succeed(here, "encode", &adapted)?;
        let expected = &io[&format!("{adapter}/image_embeddings")];
        compare(&read(here.join("out"))?, "image_embeddings", expected).context(adapter)?;
    }
    let counted =
        succeed(here, "params", &format!("--config {}/config.json --r 2", vision.display()))?;
    // q and v of two layers, A and B of rank 2 at a width of 8.
    ensure!(counted.starts_with("trainable params: 128 ||"), "{counted}");
    let mut prompted = inputs(&io, &["base/"]);
    prompted.insert("input_boxes".into(), Tensor::new(&[[[0f32, 0., 4., 4.]]], &Device::Cpu)?);
    write_tensors(here.join("in"), &prompted)?;
    fail(
        here,
        "encode",
        &command,
        1,
        &["in: has prompts", "no prompt encoder and no mask decoder"],
    )?;
    let image = micrograph().0;
    let segment = format!("{} --point 9,9 --model {}", image.display(), vision.display());
    fail(here, "segment", &segment, 1, &["without the prompt encoder and the mask decoder"])
}

fn encode_tells_what_is_passed_over(here: &Path) -> Result<()> {
    let adapters = folder("").with_file_name("adapters");
    let tensors = read(adapters.join("inputs.safetensors"))?;
    write_tensors(here.join("in"), &inputs(&tensors, &[""]))?;
    let adapter = here.join("adapter");
    std::fs::create_dir(&adapter)?;
    let file = "adapter_model.safetensors";
    std::fs::copy(adapters.join("lora_qv").join(file), adapter.join(file))?;
    let config = std::fs::read_to_string(adapters.join("lora_qv/adapter_config.json"))?;
    let config = config
        .replace("\"use_dora\": false", "\"use_dora\": false, \"use_superlora\": 7")
        .replace("\"task_type\": null", "\"task_type\": \"CAUSAL_LM\"")
        .replace("\"modules_to_save\": null", "\"modules_to_save\": [\"classifier\"]");
    std::fs::write(adapter.join("adapter_config.json"), config)?;
    let command =
        format!("--input in --output out --adapter adapter --model {}", folder("tiny").display());
    let Ended { code, err, .. } = run(here, "encode", &command)?;
    let lines: Vec<&str> = err.lines().collect();
    ensure!(code == Some(0) && lines.len() == 3, "{code:?}: {err}");
    for (line, words) in lines.iter().zip(["use_superlora is 7", "CAUSAL_LM", "\"classifier\""]) {
        let start = "warning: adapter/adapter_config.json: ";
        ensure!(line.starts_with(start) && line.contains(words), "{words}: {err}");
    }
    let io = read(adapters.join("lora_qv/io.safetensors"))?;
    compare(&read(here.join("out"))?, "pred_masks", &io["eval/pred_masks"])
}

fn encode_says_what_is_wrong(here: &Path) -> Result<()> {
    let fails = |command: &str, code, words: &[&str]| fail(here, "encode", command, code, words);
    let io = read(folder("tiny").join("io.safetensors"))?;
    let pixels = &io["encoder/pixel_values"];
    let input = |tensors: &[(&str, &Tensor)]| -> Result<()> {
        let named = tensors.iter().map(|(name, t)| (name.to_string(), (*t).clone()));
        Ok(write_tensors(here.join("in"), &named.collect::<Tensors>())?)
    };
    let model = folder("tiny");
    let command = format!("--input in --output out --model {}", model.display());
    fails("--input in", 2, &["--output"])?;
    fails(&command, 1, &["error: in: ", "No such file"])?;
    input(&[("pixels", pixels)])?;
    fails(&command, 1, &["error: in: has no tensor pixel_values"])?;
    input(&[("pixel_values", pixels), ("input_dots", pixels)])?;
    fails(&command, 1, &["unknown tensor input_dots", "input_points"])?;
    input(&[("pixel_values", &pixels.narrow(2, 0, 8)?)])?;
    fails(&command, 1, &["error: "])?;
    input(&[("pixel_values", pixels), ("input_labels", &io["points_boxes/input_labels"])])?;
    fails(&command, 1, &["input_labels without input_points"])?;
    input(&[("pixel_values", pixels)])?;
    fails("--input in --output out --model none", 1, &["none", "no such folder"])?;
    fails(&format!("{command} --adapter none"), 1, &["none", "no such folder"])?;
    fails(&format!("{command} --device tpu"), 1, &["tpu", "cpu, cuda"])?;
    std::fs::create_dir(here.join("old"))?;
    std::fs::write(
        here.join("old/adapter_model.bin"),
        "version https://git-lfs.github.com/spec/v1",
    )?;
    let old = ["old/adapter_model.bin: a git-LFS pointer", "git lfs pull"];
    fails(&format!("{command} --adapter old"), 1, &old)?;
    ensure!(!here.join("out").exists(), "a run that failed has written");
    Ok(())
}

/// A micrograph that the small SAM was not trained on, and the truth.
fn micrograph() -> (PathBuf, PathBuf) {
    let heldout = root().join("assets/photos/nuclei/heldout");
    let name = "nuclei_r6c0.png";
    (heldout.join("images").join(name), heldout.join("masks").join(name))
}

/// The pixels of the largest object of a mask whose values are objects.
fn largest_object(mask: &Path) -> Result<Vec<bool>> {
    let mask = image::open(mask)?.into_luma16();
    let count = |value: u16| mask.pixels().filter(|pixel| pixel.0[0] == value).count();
    let largest =
        (1..=mask.pixels().map(|pixel| pixel.0[0]).max().unwrap_or(0)).max_by_key(|v| count(*v));
    let largest = largest.context("an empty mask")?;
    Ok(mask.pixels().map(|pixel| pixel.0[0] == largest).collect())
}

fn masks_finds_everything_in_a_folder(here: &Path) -> Result<()> {
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

fn masks_says_what_is_wrong(here: &Path) -> Result<()> {
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

/// Twelve bits in sixteen are the picture of eight; a file of two pages needs a choice.
fn segment_chooses_pages_and_ranges(here: &Path) -> Result<()> {
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

fn segment_cuts_out_the_nucleus(here: &Path) -> Result<()> {
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

fn segment_lays_transparency_on_white(here: &Path) -> Result<()> {
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

fn segment_names_a_missing_processor(here: &Path) -> Result<()> {
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
fn segment_takes_several_objects(here: &Path) -> Result<()> {
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

fn segment_clips_boxes_and_doubts_fractions(here: &Path) -> Result<()> {
    let image = micrograph().0;
    let command =
        |rest: &str| format!("{} {rest} --mask m.png --overlay o.png --overwrite", image.display());
    let bytes = || std::fs::read(here.join("m.png"));
    let out = succeed(here, "segment", &command("--box -0.7,10,40,50"))?;
    ensure!(out.contains("--box -0.7,10,40,50: clipped to the image, 0,10,40,50"), "{out}");
    let clipped = bytes()?;
    succeed(here, "segment", &command("--box 0,10,40,50"))?;
    ensure!(bytes()? == clipped, "another mask");
    let out = succeed(here, "segment", &command("--point 0.6,0.5"))?;
    ensure!(out.contains("taken as pixels"), "{out}");
    let out = succeed(here, "segment", &command("--point 6,0.5"))?;
    ensure!(!out.contains("taken as pixels"), "{out}");
    Ok(())
}

/// One file of original names, without any configuration, gives the mask of the folder.
fn segment_reads_weights_of_any_name(here: &Path) -> Result<()> {
    let image = micrograph().0;
    let shipped = root().join("assets/tiny-sam");
    let mask = |model: &str| -> Result<(Vec<u8>, String)> {
        let rest =
            format!("--point 30,30 --mask m.png --overlay o.png --overwrite --model {model}");
        let out = succeed(here, "segment", &format!("{} {rest}", image.display()))?;
        Ok((std::fs::read(here.join("m.png"))?, out))
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

fn segment_asks_for_the_base_of_an_adapter(here: &Path) -> Result<()> {
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

fn segment_says_what_is_wrong(here: &Path) -> Result<()> {
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
    fails(&format!("{image} --point 1,y"), 1, &["\"y\" is no number"])?;
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
    let same = format!("{image} --point 1,1 --mask a.png --overlay a.png");
    fails(&same, 1, &["--mask and --overlay are both a.png"])?;
    std::fs::write(here.join("a.png"), "mine")?;
    fails(&format!("{image} --point 1,1 --mask a.png"), 1, &["a.png", "--overwrite"])?;
    ensure!(std::fs::read(here.join("a.png"))? == b"mine", "a.png was overwritten");
    fails(&format!("{image} --point 1,1 --model none"), 1, &["none", "no such folder"])
}
