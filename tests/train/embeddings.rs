//! Embeddings that are computed once give the bits of embeddings that are computed in every step.

use crate::common::finetune::{finetune, SHORT};
use candle_core::{DType, Device};
use candle_sam_lora::sam::{AttentionKind, SamModel, SamProcessor};
use candle_sam_lora::train::{Dataset, DatasetOptions, FlipRotate, KeptEmbeddings, Sample};
use std::collections::BTreeMap;
use std::path::Path;

/// The decoder alone, and nothing that is not compared.
const DECODER: [&str; 10] =
    ["--batch", "1", "--prompts", "4", "--train", "decoder", "--overlays", "0", "--automatic", "0"];

/// Arguments for four micrographs, two of them held out, which come again and again.
fn four_images(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut arguments = vec!["--val-fraction".to_string(), "0.5".into()];
    for part in ["images", "masks"] {
        let to = folder.join(part);
        std::fs::create_dir(&to)?;
        for name in ["nuclei_r0c0.png", "nuclei_r0c1.png", "nuclei_r0c2.png", "nuclei_r0c3.png"] {
            let from = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/photos/nuclei/train");
            std::fs::copy(Path::new(from).join(part).join(name), to.join(name))?;
        }
        arguments.extend([format!("--{part}"), to.to_string_lossy().into_owned()]);
    }
    Ok(arguments)
}

/// The bytes of all that a run computed, scores of held-out images included.
fn bytes(output: &Path) -> anyhow::Result<[Vec<u8>; 3]> {
    let read = |name: &str| std::fs::read(output.join(name));
    let state = read("state.safetensors")?;
    Ok([state, read("adapter/adapter_model.safetensors")?, read("metrics.json")?])
}

#[test]
fn kept_embeddings_change_no_bit() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let kept = at("kept");
    let kept = kept.to_str().expect("a path in Unicode");
    let images = four_images(folder.path())?;
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let mixed = ["--prompt", "mixed", "--corrections", "1", "--steps", "12", "--eval-every", "6"];
    for (name, more) in [
        ("still", vec!["--no-augment"]),
        ("turned", vec![]),
        ("bf16", vec!["--dtype", "bf16"]),
        ("two", vec!["--accumulate", "2"]),
    ] {
        let run = |how: &str, embeddings: &[&str]| {
            let output = at(&format!("{name}-{how}"));
            let all = [&DECODER[..], &images, &mixed, &more, embeddings].concat();
            finetune(&output, &all)?;
            bytes(&output)
        };
        let plain = run("none", &["--embeddings", "none"])?;
        for (how, embeddings) in [
            ("default", vec![]),
            ("memory", vec!["--embeddings", "memory"]),
            ("folder", vec!["--embeddings", kept]),
            // The files of the run before.
            ("again", vec!["--embeddings", kept]),
            ("recomputed", vec!["--embeddings", "memory", "--symmetries", "recomputed"]),
        ] {
            if (name, how) != ("still", "recomputed") {
                assert!(run(how, &embeddings)? == plain, "{name}: {how}");
            }
        }
    }
    Ok(())
}

/// An adapter that is not trained, with dropout while it was: it is part of the encoder, and its files are its own.
#[test]
fn a_frozen_adapter_is_part_of_the_embedding() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let kept = at("kept");
    let kept = ["--embeddings", kept.to_str().expect("a path in Unicode")];
    let arguments = ["--steps", "4", "--overlays", "0", "--automatic", "0"];
    finetune(&at("adapters"), &[&SHORT[..], &arguments].concat())?;
    let adapter = at("adapters").join("adapter");
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-sam");
    let adapter = adapter.to_str().expect("a path in Unicode");
    let on = ["--adapter", adapter, "--model", shipped, "--steps", "4", "--no-augment"];
    let on = [&DECODER[..], &on].concat();
    let run = |name: &str, arguments: &[&str]| {
        finetune(&at(name), arguments)?;
        bytes(&at(name))
    };
    let plain = run("plain", &[&on[..], &["--embeddings", "none"]].concat())?;
    // Files of the model without the adapter are there first.
    let without = [&DECODER[..], &["--steps", "4", "--no-augment"], &kept].concat();
    run("without", &without)?;
    assert!(run("with", &[&on[..], &kept].concat())? == plain);
    Ok(())
}

#[test]
fn a_continued_run_with_embeddings_has_the_same_bytes() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let kept = at("kept");
    let kept = ["--embeddings", kept.to_str().expect("a path in Unicode")];
    let steps = |steps: &'static str, more: &[&'static str]| {
        [&DECODER[..], &["--save-every", "2", "--ema", "0.5", "--steps", steps], more].concat()
    };
    finetune(&at("whole"), &steps("6", &[]))?;
    finetune(&at("parts"), &[&steps("3", &[])[..], &kept].concat())?;
    // Bytes of an embedding that rot meanwhile.
    let files: BTreeMap<_, _> = std::fs::read_dir(at("kept"))?
        .map(|entry| entry.map(|entry| (entry.file_name(), entry.path())))
        .collect::<std::io::Result<_>>()?;
    assert!(!files.is_empty());
    for path in files.values() {
        let mut rotten = std::fs::read(path)?;
        let last = rotten.len() - 3;
        rotten[last] ^= 0x40;
        std::fs::write(path, rotten)?;
    }
    std::fs::remove_file(at("parts").join("metrics.json"))?;
    finetune(&at("parts"), &[&steps("6", &["--resume"])[..], &kept].concat())?;
    assert!(bytes(&at("whole"))? == bytes(&at("parts"))?);
    Ok(())
}

#[test]
fn embeddings_of_a_trained_encoder_are_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    for train in ["adapters", "all"] {
        let arguments = ["--steps", "1", "--train", train, "--embeddings", "memory"];
        let message = finetune(&output, &arguments).expect_err("trained").to_string();
        assert!(message.contains("--embeddings: the image encoder is trained"), "{message}");
        assert!(!output.exists());
    }
    Ok(())
}

/// Two data sets, each with an image 0.
#[test]
fn kept_embeddings_are_of_the_pixels_that_are_given() -> anyhow::Result<()> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let folder = assets.join("tiny-sam");
    let model = SamModel::from_pretrained(&folder, AttentionKind::Fused, DType::F32, &Device::Cpu)?;
    let processor = SamProcessor::load(&folder, model.config().vision_config.image_size)?;
    let kept = KeptEmbeddings::in_memory(&model, &processor);
    let heldout = assets.join("photos/coins/heldout");
    let options = DatasetOptions::min_area(20);
    let dataset = Dataset::open(heldout.join("images"), heldout.join("masks"), &options)?;
    let samples = [dataset.load(0)?, dataset.load(1)?];
    let values = |kept: &KeptEmbeddings<'_>, sample: &Sample| -> anyhow::Result<Vec<f32>> {
        let embedding = kept.get(0, FlipRotate::NONE, sample)?;
        Ok(embedding.tensor.flatten_all()?.to_vec1()?)
    };
    for sample in [&samples[0], &samples[1], &samples[0]] {
        let alone = values(&KeptEmbeddings::in_memory(&model, &processor), sample)?;
        assert!(values(&kept, sample)? == alone, "{}", sample.name);
    }
    Ok(())
}
