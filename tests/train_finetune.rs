//! The example `finetune`, shortened: the loss falls, everything is written, a continued run has the bits of an
//! uninterrupted one, and nobody's files are lost.

#[path = "../examples/shared/console.rs"]
#[allow(dead_code)]
mod console;
#[path = "../examples/finetune/curve.rs"]
mod curve;
#[path = "../examples/shared/draw.rs"]
mod draw;
#[path = "../examples/shared/model.rs"]
mod model;
#[path = "../examples/finetune/options.rs"]
mod options;
#[path = "../examples/finetune/output.rs"]
mod output;
#[path = "../examples/finetune/report.rs"]
mod report;
#[path = "../examples/finetune/run.rs"]
mod run;
#[path = "../examples/finetune/training.rs"]
mod training;

use candle_core::{DType, Device};
use candle_sam_lora::lora::load_adapter;
use candle_sam_lora::sam::{AttentionKind, SamConfig, SamModel};
use clap::Parser;
use options::Options;
use run::{run, Outcome};
use std::path::Path;

fn finetune(output: &Path, arguments: &[&str]) -> anyhow::Result<Outcome> {
    let mut all = vec!["finetune", "--output", output.to_str().expect("a path in Unicode")];
    all.extend_from_slice(arguments);
    run(&Options::try_parse_from(all)?)
}

const SHORT: [&str; 4] = ["--batch", "1", "--prompts", "4"];

fn short<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHORT, more].concat()
}

#[test]
fn the_loss_falls_and_everything_is_written() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let outcome = finetune(&output, &short(&["--steps", "30"]))?;
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let (first, last) = (mean(&outcome.losses[..8]), mean(&outcome.losses[22..]));
    assert!(last < 0.9 * first, "the loss went from {first} to {last}");
    let (before, after) = (outcome.before.iou, outcome.after.iou);
    assert!(after > before, "IoU {before} became {after}");

    for picture in ["loss.png", "overlays/nuclei_r6c0.png", "overlays/nuclei_r6c7.png"] {
        let picture = image::open(output.join(picture))?;
        assert!(picture.width() > 700 && picture.height() > 300);
    }
    let metrics: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(output.join("metrics.json"))?)?;
    assert_eq!(metrics["mean_iou_after"].as_f64(), Some(after));
    assert_eq!(metrics["held_out"].as_array().map(Vec::len), Some(16));

    // The adapter is one for the shipped model.
    let config = SamConfig::from_file(model::shipped_model().join("config.json"))?;
    let mut sam = SamModel::new(&config, AttentionKind::Split, DType::F32, &Device::Cpu)?;
    assert_eq!(load_adapter(&mut sam, &output.join("adapter"))?.rank, 16);
    Ok(())
}

#[test]
fn a_continued_run_writes_the_bytes_of_an_uninterrupted_one() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let box_prompts = ["--prompt", "box", "--use-dora", "--seed", "7", "--overlays", "1"];
    let arguments = |more: &[&'static str]| short(&[&box_prompts, more].concat());
    finetune(&whole, &arguments(&["--steps", "6"]))?;
    finetune(&parts, &arguments(&["--steps", "3"]))?;
    // As a kill leaves it: the state is there, the results are not.
    std::fs::remove_file(parts.join("metrics.json"))?;
    let message =
        finetune(&parts, &arguments(&["--steps", "6"])).expect_err("unfinished").to_string();
    assert!(message.contains("not finished"), "{message}");
    let other = arguments(&["--steps", "6", "--resume", "--alpha", "8"]);
    let message = finetune(&parts, &other).expect_err("other settings").to_string();
    assert!(message.contains("lora: was") && !message.contains("lr:"), "{message}");
    finetune(&parts, &arguments(&["--steps", "6", "--resume"]))?;
    let state = "state.safetensors";
    for file in [state, "metrics.json", "loss.png", "adapter/adapter_model.safetensors"] {
        assert!(
            std::fs::read(whole.join(file))? == std::fs::read(parts.join(file))?,
            "{file} differs"
        );
    }
    Ok(())
}

#[test]
fn what_cannot_be_done_is_refused_and_nothing_is_touched() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let mine = folder.path().join("mine");
    std::fs::create_dir(&mine)?;
    std::fs::write(mine.join("thesis.txt"), "years of work")?;
    let missing = folder.path().join("missing");
    for (output, arguments, expected) in [
        (&mine, vec![], "holds thesis.txt"),
        (&missing, vec!["--resume"], "--resume: there is no"),
        (&missing, vec!["--device", "cuda:99"], "cuda:99"),
        (&missing, vec!["--prompts", "0"], "a prompt at least"),
        (&missing, vec!["--save-every", "0"], "--save-every"),
        (&missing, vec!["--rank", "0"], "rank"),
        (&missing, vec!["--lr", "nan"], "lr must be finite"),
        (&missing, vec!["--model", "/nowhere"], "no such folder"),
        (&missing, vec!["--target-modules", "nothing"], "matches no linear layer"),
        (&missing, vec!["--images", "/nowhere", "--masks", "/nowhere"], "/nowhere"),
    ] {
        let message = finetune(output, &arguments).expect_err(expected).to_string();
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
    assert!(!missing.exists());
    assert_eq!(std::fs::read_dir(&mine)?.count(), 1);
    Ok(())
}
