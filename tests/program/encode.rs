//! `encode`.

use super::{fail, folder, micrograph, read, run, succeed, Ended};
use crate::common::model::{relative_error, Tensors};
use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_sam_lora::files::write_tensors;

/// A fixture's tensors whose names start with one of the prefixes, without these.
pub fn inputs(tensors: &Tensors, prefixes: &[&str]) -> Tensors {
    let wanted = |name: &str| {
        let name = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix))?;
        (name == "pixel_values" || name.starts_with("input_")).then(|| name.to_string())
    };
    tensors.iter().filter_map(|(name, t)| Some((wanted(name)?, t.clone()))).collect()
}

/// Largest relative error, of f32 against f64 (tests/sam/model.rs).
const BOUND: f64 = 2e-5;

/// A written tensor must be the expected one.
pub fn compare(got: &Tensors, name: &str, expected: &Tensor) -> Result<()> {
    let got = got.get(name).with_context(|| format!("no {name} was written"))?;
    let error = relative_error(got, expected)?;
    ensure!(error < BOUND, "{name}: {error:e}");
    Ok(())
}

#[test]
fn gives_the_tensors_of_pytorch() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
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

/// The weights in int8 are told of, and change the results a little.
#[test]
fn quantizes_and_says_so() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let io = read(folder("tiny").join("io.safetensors"))?;
    write_tensors(here.join("in"), &inputs(&io, &["encoder/"]))?;
    let model = folder("tiny");
    for dtype in ["f32", "bf16"] {
        let command = format!(
            "--input in --output out --model {} --quantize int8 --dtype {dtype}",
            model.display()
        );
        let out = succeed(here, "encode", &command)?;
        ensure!(out.lines().any(|line| line.starts_with("int8: ")), "{out}");
        let got = &read(here.join("out"))?["image_embeddings"];
        let error = relative_error(got, &io["encoder/image_embeddings"])?;
        ensure!(error > BOUND && error < 0.1, "{dtype}: {error:e}");
    }
    let line = "--input in --output out --quantize int8 --device cuda:0";
    let words = if cfg!(feature = "cuda") { ["--quantize", "cpu"] } else { ["cuda", ""] };
    fail(here, "encode", line, 1, &words)
}

#[test]
fn with_an_adapter_gives_those_of_peft() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
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
#[test]
fn runs_an_encoder_alone() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
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

#[test]
fn tells_what_is_passed_over() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
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
        .replace("\"rank_pattern\": {}", "\"rank_pattern\": {\"zzz\": 2}")
        .replace("\"modules_to_save\": null", "\"modules_to_save\": [\"classifier\"]");
    std::fs::write(adapter.join("adapter_config.json"), config)?;
    let command =
        format!("--input in --output out --adapter adapter --model {}", folder("tiny").display());
    let Ended { code, err, .. } = run(here, "encode", &command)?;
    let lines: Vec<&str> = err.lines().collect();
    ensure!(code == Some(0) && lines.len() == 4, "{code:?}: {err}");
    for (line, words) in lines.iter().zip([
        "use_superlora is 7",
        "CAUSAL_LM",
        "\"classifier\"",
        "layer matches \"zzz\"",
    ]) {
        let start = "warning: adapter/adapter_config.json: ";
        ensure!(line.starts_with(start) && line.contains(words), "{words}: {err}");
    }
    let io = read(adapters.join("lora_qv/io.safetensors"))?;
    compare(&read(here.join("out"))?, "pred_masks", &io["eval/pred_masks"])
}

#[test]
fn says_what_is_wrong() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
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
    std::fs::write(here.join("own"), "mine")?;
    fails("--input own --output ./own", 1, &["./own: --input and --output are one file"])?;
    fails(&command, 1, &["error: in: ", "No such file"])?;
    input(&[("pixels", pixels)])?;
    fails(&command, 1, &["error: in: has no tensor pixel_values"])?;
    input(&[("pixel_values", pixels), ("input_dots", pixels)])?;
    fails(&command, 1, &["unknown tensor input_dots", "input_points"])?;
    input(&[("pixel_values", &pixels.narrow(2, 0, 8)?)])?;
    fails(&command, 1, &["error: "])?;
    input(&[("pixel_values", &(pixels.zeros_like()? / 0.0)?)])?;
    fails(&command, 1, &["error: in: pixel_values has values that are not finite"])?;
    input(&[("pixel_values", &pixels.to_dtype(candle_core::DType::U8)?)])?;
    fails(&command, 1, &["error: in: pixel_values are u8; expected normalised floats"])?;
    input(&[("pixel_values", pixels), ("input_labels", &io["points_boxes/input_labels"])])?;
    fails(&command, 1, &["input_labels without input_points"])?;
    input(&[("pixel_values", &(pixels * 100.0)?)])?;
    let out = succeed(here, "encode", &command)?;
    ensure!(out.contains("in: pixel_values reach "), "{out}");
    std::fs::remove_file(here.join("out"))?;
    input(&[("pixel_values", pixels)])?;
    fails("--input in --output out --model none", 1, &["none", "no such file or folder"])?;
    fails(&format!("{command} --adapter none"), 1, &["none", "no such file or folder"])?;
    fails(&format!("{command} --device tpu"), 1, &["tpu", "cpu, cuda"])?;
    std::fs::create_dir(here.join("old"))?;
    std::fs::write(
        here.join("old/adapter_model.bin"),
        "version https://git-lfs.github.com/spec/v1",
    )?;
    let old = ["old/adapter_model.bin: it is a git-LFS pointer", "git lfs pull"];
    fails(&format!("{command} --adapter old"), 1, &old)?;
    ensure!(!here.join("out").exists(), "a run that failed has written");
    Ok(())
}

/// A folder of files, in f32 and bf16; what is there and whole is not made again.
#[test]
fn takes_a_folder_and_goes_on_with_it() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let io = read(folder("tiny").join("io.safetensors"))?;
    std::fs::create_dir(here.join("in"))?;
    for name in ["a", "b"] {
        let tensors = inputs(&io, &["encoder/"]);
        write_tensors(here.join(format!("in/{name}.safetensors")), &tensors)?;
    }
    let command = format!("--input in --output out --model {}", folder("tiny").display());
    let out = succeed(here, "encode", &command)?;
    ensure!(out.contains("out/a.safetensors: ") && out.contains("out/b.safetensors: "), "{out}");
    let whole = std::fs::read(here.join("out/b.safetensors"))?;
    compare(
        &read(here.join("out/b.safetensors"))?,
        "image_embeddings",
        &io["encoder/image_embeddings"],
    )?;
    std::fs::write(here.join("out/b.safetensors"), &whole[..whole.len() - 9])?;
    let out = succeed(here, "encode", &format!("{command} --resume"))?;
    ensure!(out.contains("1 of 2 results are there already") && !out.contains("out/a"), "{out}");
    ensure!(std::fs::read(here.join("out/b.safetensors"))? == whole, "another file");
    for (other, told) in [("--dtype bf16", "(backend)"), ("--single-mask", "(single-mask)")] {
        let line = format!("{command} {other} --resume");
        fail(here, "encode", &line, 1, &["out/a.safetensors", "other settings", told])?;
    }
    fail(here, "encode", "--input in --output in --model none", 1, &["are one folder"])?;

    let out = succeed(here, "encode", &format!("{command} --single-mask"))?;
    ensure!(out.contains("in/a.safetensors: has no prompts; --single-mask has no effect"), "{out}");
    succeed(here, "encode", &format!("{command} --dtype bf16"))?;
    let rough = &read(here.join("out/b.safetensors"))?["image_embeddings"];
    let error = relative_error(rough, &io["encoder/image_embeddings"])?;
    // bf16 has 8 bits: a step is 2^-8, and there are a few layers of them.
    ensure!(error > BOUND && error < 0.1, "bf16: {error:e}");
    Ok(())
}
