//! The command `finetune`, shortened: the loss falls, everything is written, a continued run has the bits of an
//! uninterrupted one, and nobody's files are lost.

use crate::common::finetune::{finetune, SHORT};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_sam_lora::cli::finetune::{Options, Outcome};
use candle_sam_lora::lora::load_adapter;
use candle_sam_lora::sam::{AttentionKind, Ranking, SamConfig, SamModel};
use candle_sam_lora::train::{BatchConfig, Decay};
use clap::Parser;
use std::path::Path;

/// Few points of held-out images, too.
fn short<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHORT[..], &["--automatic", "4"], more].concat()
}

#[test]
fn the_loss_falls_and_everything_is_written() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let outcome = finetune(&output, &short(&["--steps", "30"]))?;
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let (first, last) = (mean(&outcome.losses[..8]), mean(&outcome.losses[22..]));
    assert!(last < 0.9 * first, "the loss went from {first} to {last}");
    let (before, after) = (outcome.before.objects.iou, outcome.after.objects.iou);
    assert!(after > before, "IoU {before} became {after}");

    for picture in ["loss.png", "overlays/nuclei_r6c0.png", "overlays/nuclei_r6c7.png"] {
        let picture = image::open(output.join(picture))?;
        assert!(picture.width() > 700 && picture.height() > 300);
    }
    let metrics: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(output.join("metrics.json"))?)?;
    assert_eq!(metrics["mean_iou_after"].as_f64(), Some(after));
    assert_eq!(metrics["held_out"].as_array().map(Vec::len), Some(16));
    assert_eq!(metrics["automatic"]["nms"].as_f64(), Some(0.3));
    assert_eq!(metrics["automatic"]["ranking"], "iou");

    // The adapter is one for the shipped model.
    let config =
        SamConfig::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny-sam/config.json"))?;
    let mut sam =
        SamModel::new(&config, AttentionKind::Split, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    assert_eq!(load_adapter(&mut sam, output.join("adapter"))?.rank, 16);
    Ok(())
}

/// docs/training.md names the flags of the default, and those of adapters alone.
#[test]
fn the_guide_names_the_default_recipe() -> anyhow::Result<()> {
    let guide = include_str!("../../docs/training.md");
    let after = |words: &str| {
        let found = guide.split_once(words).and_then(|(_, rest)| rest.split_once('`'));
        found.map(|(flags, _)| flags).ok_or_else(|| anyhow::anyhow!("no {words}"))
    };
    let options = |flags: &str| {
        Options::try_parse_from(
            [&["finetune"], &*flags.split_whitespace().collect::<Vec<_>>()].concat(),
        )
    };
    let default = options(after("The default is `")?)?;
    assert_eq!(format!("{default:?}"), format!("{:?}", options("")?));
    let plain = options(after("*plain*: `")?)?;
    assert_eq!(plain.batch(), BatchConfig { images: 2, prompts: 6, ..BatchConfig::default() });
    assert_eq!(plain.train.names(), ["adapters"]);
    assert_eq!(plain.trainer().schedule.decay, Decay::Constant);
    Ok(())
}

/// An alternative that is no prompt's best learns no shape, though the loss follows it by its true IoU.
#[test]
fn a_step_may_leave_alternatives_out() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let few = "--batch 1 --prompts 1 --steps 1 --automatic 0 --overlays 0 --train decoder";
    let loss = ["--loss", "bce=1,dice=1,iou=1,multimask=1"];
    let arguments: Vec<&str> = few.split(' ').chain(loss).collect();
    let outcome = finetune(&folder.path().join("run"), &arguments)?;
    assert_eq!(outcome.losses.len(), 1);
    Ok(())
}

/// An image encoder alone is no model to train with masks.
#[test]
fn an_encoder_alone_is_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let vision = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/variants/vision");
    let arguments = short(&["--steps", "1", "--model", vision]);
    let message =
        finetune(&folder.path().join("run"), &arguments).expect_err("refused").to_string();
    assert!(message.contains("without the prompt encoder and the mask decoder"), "{message}");
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
    assert!(message.ends_with("\n  lora.lora_alpha: was 32, is 8"), "{message}");
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

/// A run with everything, killed between two writings of its state, which then is the one before.
#[test]
fn a_killed_run_with_everything_is_continued_to_the_same_bytes() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let everything = short(&[
        "--steps",
        "6",
        "--save-every",
        "2",
        "--eval-every",
        "3",
        "--accumulate",
        "2",
        "--max-grad-norm",
        "0.1",
        "--lr-schedule",
        "cosine",
        "--warmup-steps",
        "2",
        "--gradient-checkpointing",
        "--prompt",
        "mixed",
        "--corrections",
        "2",
        "--mask-probability",
        "0.5",
        "--mask-rounds",
        "1",
        "--train",
        "all",
        "--tensorboard",
        "--overlays",
        "0",
    ]);
    let outcome = finetune(&whole, &everything)?;
    let steps: Vec<u64> = outcome.evaluations.iter().map(|evaluated| evaluated.step).collect();
    assert_eq!(steps, [3, 6]);
    assert_eq!(outcome.evaluations[1].scores, outcome.after);

    std::fs::create_dir(&killed)?;
    std::fs::copy(whole.join("state.previous.safetensors"), killed.join("state.safetensors"))?;
    let table = std::fs::read_to_string(whole.join("metrics.csv"))?;
    std::fs::write(killed.join("metrics.csv"), &table[..table.len() - 9])?;
    finetune(&killed, &[&everything[..], &["--resume"]].concat())?;
    for file in
        ["state.safetensors", "metrics.json", "metrics.csv", "adapter/adapter_model.safetensors"]
    {
        assert!(
            std::fs::read(whole.join(file))? == std::fs::read(killed.join(file))?,
            "{file} differs"
        );
    }
    // Warm-up, then the cosine; norms before clipping; two evaluations, the last of them at the end.
    let rows: Vec<Vec<&str>> = table.lines().skip(1).map(|row| row.split(',').collect()).collect();
    let rates: Vec<&str> = rows.iter().map(|row| row[2]).collect();
    assert_eq!(rates[..3], ["0", "0.0005", "0.001"]);
    assert!(rows.iter().all(|row| row[3].parse::<f64>().is_ok_and(|norm| norm > 0.0)));
    assert!(rows.iter().zip(1..).all(|(row, step)| row[4].is_empty() == (step % 3 != 0)));
    let best = std::fs::read(whole.join("best/adapter_model.safetensors"))?;
    let last = std::fs::read(whole.join("adapter/adapter_model.safetensors"))?;
    let last_is_best =
        outcome.evaluations[1].scores.objects.iou > outcome.evaluations[0].scores.objects.iou;
    assert_eq!(best == last, last_is_best);
    assert_eq!(std::fs::read_dir(whole.join("tensorboard"))?.count(), 1);

    // Without checkpointing the bits are the same; it is no setting of the run.
    let plain = folder.path().join("plain");
    let plainly: Vec<&str> =
        everything.into_iter().filter(|argument| *argument != "--gradient-checkpointing").collect();
    finetune(&plain, &plainly)?;
    assert!(
        std::fs::read(plain.join("state.safetensors"))?
            == std::fs::read(whole.join("state.safetensors"))?
    );
    Ok(())
}

/// The tensors of a run's adapter by the part they belong to: LoRA, decoder, prompt encoder.
fn parts(output: &Path) -> anyhow::Result<[std::collections::BTreeMap<String, Vec<f32>>; 3]> {
    let file = output.join("adapter/adapter_model.safetensors");
    let mut parts: [std::collections::BTreeMap<String, Vec<f32>>; 3] = Default::default();
    for (name, tensor) in candle_sam_lora::files::read_tensors(file, &Device::Cpu)? {
        let part = match &name {
            name if name.contains("lora_") => 0,
            name if name.contains("mask_decoder.") => 1,
            _ => 2,
        };
        parts[part].insert(name, tensor.flatten_all()?.to_vec1()?);
    }
    Ok(parts)
}

/// Whatever is trained moves, whatever is not stays, and an adapter is gone on from.
#[test]
fn parts_are_trained_alone_and_together() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let two = |more: &[&'static str]| {
        short(&[&["--steps", "2", "--overlays", "0", "--mask-rounds", "1"], more].concat())
    };
    finetune(&at("still"), &two(&["--train", "all", "--lr", "0"]))?;
    let still = parts(&at("still"))?;
    assert!(still.iter().all(|part| !part.is_empty()));
    for (train, moved) in [
        ("adapters", [true, false, false]),
        ("decoder", [false, true, false]),
        ("prompt-encoder", [false, false, true]),
        ("prompt-encoder,decoder", [false, true, true]),
        ("all", [true, true, true]),
    ] {
        finetune(&at(train), &two(&["--train", train, "--prompt", "mixed"]))?;
        let found = parts(&at(train))?;
        for ((found, still), moved) in found.iter().zip(&still).zip(moved) {
            // Parts that are saved with the adapter are those that are trained whole.
            let changed = found.iter().filter(|(name, values)| still[*name] != **values).count();
            assert_eq!(changed > 0, moved, "{train}: {changed} tensors moved");
        }
    }
    let all = serde_json::from_str::<serde_json::Value>(&std::fs::read_to_string(
        at("all").join("metrics.json"),
    )?)?;
    let adapter = at("all").join("adapter");
    let adapter = adapter.to_str().expect("a path in Unicode");
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-sam");
    let on = two(&["--train", "adapters", "--model", shipped, "--adapter"]);
    let outcome = finetune(&at("on"), &[&on[..], &[adapter]].concat())?;
    assert_eq!(Some(outcome.before.objects.iou), all["after"]["iou"].as_f64());
    let (before, after) = (parts(&at("all"))?, parts(&at("on"))?);
    assert!(before[0] != after[0] && before[1..] == after[1..]);
    let message = finetune(&at("rank"), &["--adapter", adapter, "--rank", "4"]);
    assert!(message.expect_err("its rank is that of the adapter").to_string().contains("--rank"));
    Ok(())
}

#[test]
fn a_run_that_gets_no_better_stops() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let still =
        ["--steps", "9", "--lr", "0", "--eval-every", "1", "--patience", "2", "--overlays", "0"];
    let outcome = finetune(&output, &short(&still))?;
    assert_eq!((outcome.losses.len(), outcome.evaluations.len()), (3, 3));
    assert!(output.join("metrics.json").exists());
    Ok(())
}

#[test]
fn a_loss_that_is_no_number_keeps_the_last_good_adapter() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    // Nothing follows the last step.
    let wild = ["--steps", "1", "--lr", "1e38", "--overlays", "0", "--automatic", "0"];
    let message = finetune(&output, &[&SHORT[..], &wild].concat()).expect_err("wild").to_string();
    assert!(message.contains("is no longer finite"), "{message}");
    assert!(message.contains("the adapter as it was after step 0, in adapter/"), "{message}");
    let wild = ["--steps", "9", "--lr", "1e30", "--overlays", "0", "--overwrite"];
    let message = finetune(&output, &short(&wild)).expect_err("a wild learning rate").to_string();
    assert!(
        message.contains("train: step 2: the loss is")
            || message.contains("adamw: step 2: the gradient"),
        "{message}"
    );
    assert!(message.contains("the adapter as it was after step 0, in adapter/"), "{message}");
    assert!(!output.join("metrics.json").exists());
    let adapter = candle_sam_lora::files::read_tensors(
        output.join("adapter/adapter_model.safetensors"),
        &Device::Cpu,
    )?;
    for (name, tensor) in adapter {
        let largest = tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        assert_eq!(largest == 0.0, name.contains("lora_B"), "{name}: {largest}");
        assert!(largest < 1.0, "{name}: {largest}");
    }
    Ok(())
}

#[test]
fn a_bf16_base_trains_f32_adapters() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let outcome =
        finetune(&output, &short(&["--steps", "30", "--dtype", "bf16", "--overlays", "0"]))?;
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let (first, last) = (mean(&outcome.losses[..8]), mean(&outcome.losses[22..]));
    assert!(last < 0.9 * first, "the loss went from {first} to {last}");
    let (before, after) = (outcome.before.objects.iou, outcome.after.objects.iou);
    assert!(after > before, "{before} became {after}");
    let adapter = output.join("adapter/adapter_model.safetensors");
    let adapter = candle_sam_lora::files::read_tensors(&adapter, &Device::Cpu)?;
    assert!(adapter.values().all(|tensor| tensor.dtype() == DType::F32));
    Ok(())
}

#[test]
fn an_int8_base_trains_f32_adapters() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let outcome =
        finetune(&output, &short(&["--steps", "30", "--quantize", "int8", "--overlays", "0"]))?;
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let (first, last) = (mean(&outcome.losses[..8]), mean(&outcome.losses[22..]));
    assert!(last < 0.9 * first, "the loss went from {first} to {last}");
    assert!(
        outcome.after.objects.iou > outcome.before.objects.iou,
        "{:?}",
        (outcome.before, outcome.after)
    );
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
        (&missing, vec!["--batch", "100000000000"], "images and prompts each at most"),
        (&missing, vec!["--lr-schedule", "plateau"], "--eval-every"),
        (&missing, vec!["--loss", "bce=1,bce=2"], "bce is there twice"),
        (&mine.join("thesis.txt"), vec![], "thesis.txt: is a file; expected a folder"),
        (&missing, vec!["--save-every", "0"], "--save-every"),
        (&missing, vec!["--rank", "0"], "rank"),
        (&missing, vec!["--lr", "nan"], "lr must be finite"),
        (&missing, vec!["--accumulate", "0"], "an accumulation of 0"),
        (&missing, vec!["--max-grad-norm=-1"], "must be positive"),
        (
            &missing,
            vec!["--lr-schedule", "linear", "--warmup-steps", "300"],
            "shorter than the run",
        ),
        (&missing, vec!["--eval-every", "0"], "at least 1"),
        (&missing, vec!["--prompts", "65537"], "65536 images and prompts each at most"),
        (&missing, vec!["--boxes", "0.3"], "--boxes has no effect without --prompt mixed"),
        (&missing, vec!["--mask-probability", "0.3"], "no effect with --corrections 0"),
        (&missing, vec!["--plateau-patience", "3"], "no effect without --lr-schedule plateau"),
        (&missing, vec!["--train", "decoder", "--rank", "4"], "where --train has no adapters"),
        (&missing, vec!["--symmetries", "recomputed"], "--symmetries has no effect"),
        (&missing, vec!["--val-fraction", "0.5"], "--val-fraction has no effect"),
        (&missing, vec!["--automatic", "0", "--automatic-nms", "0.5"], "with --automatic 0"),
        (
            &missing,
            vec!["--automatic", "0", "--automatic-ranking", "iou-stability"],
            "with --automatic 0",
        ),
        (&missing, vec!["--automatic-nms", "nan"], "--automatic-nms is NaN"),
        (&missing, vec!["--alpha", "0"], "adapters would have no effect"),
        (&missing, vec!["--images", "i", "--coco", "c", "--parts"], "--parts has no effect"),
        (&missing, vec!["--patience", "3"], "--eval-every"),
        (&missing, vec!["--model", "/nowhere"], "no such file or folder"),
        (&missing, vec!["--target-modules", "nothing"], "matches no layer"),
        (&missing, vec!["--target-modules", "q,q_proj"], "no layer to adapt is called \"q_proj\""),
        (&missing, vec!["--images", "/nowhere", "--masks", "/nowhere"], "/nowhere"),
    ] {
        let message = finetune(output, &arguments).expect_err(expected).to_string();
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
    assert!(!missing.exists());
    assert_eq!(std::fs::read_dir(&mine)?.count(), 1);
    Ok(())
}

/// A finished run stays as it is, unless it may be replaced.
#[test]
fn a_finished_run_is_replaced_only_when_asked() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let one = short(&["--steps", "1", "--overlays", "0"]);
    finetune(&output, &one)?;
    let adapter = || std::fs::read(output.join("adapter/adapter_model.safetensors"));
    let before = adapter()?;
    let other = [&one[..], &["--seed", "5"]].concat();
    let message = finetune(&output, &other).expect_err("finished").to_string();
    assert!(message.contains("holds a finished run; replace it with --overwrite"), "{message}");
    assert!(adapter()? == before && output.join("metrics.json").exists());
    finetune(&output, &[&other[..], &["--overwrite"]].concat())?;
    assert!(adapter()? != before);
    Ok(())
}

/// The only object of an image lies between the pixels of the low-resolution mask in some of the eight turns.
#[test]
fn an_object_between_the_pixels_of_the_mask_is_trained() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (images, masks) = (folder.path().join("images"), folder.path().join("masks"));
    std::fs::create_dir(&images)?;
    std::fs::create_dir(&masks)?;
    for name in ["a.png", "b.png"] {
        let inside = |x: u32, y: u32| (325..331).contains(&x) && (485..491).contains(&y);
        let value = |x, y, on: u8, off: u8| image::Luma([if inside(x, y) { on } else { off }]);
        image::GrayImage::from_fn(1024, 1024, |x, y| value(x, y, 220, 40))
            .save(images.join(name))?;
        image::GrayImage::from_fn(1024, 1024, |x, y| value(x, y, 1, 0)).save(masks.join(name))?;
    }
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (images, masks) = (text(&images), text(&masks));
    let data = ["--images", &images, "--masks", &masks, "--steps", "12", "--overlays", "0"];
    let outcome = finetune(&folder.path().join("run"), &short(&data))?;
    assert_eq!(outcome.losses.len(), 12);
    Ok(())
}

/// The objects of a folder of masks as COCO's annotations, run by run, in the order of their labels.
fn coco(images: &[std::path::PathBuf], masks: &Path) -> anyhow::Result<serde_json::Value> {
    use serde_json::json;
    let (mut described, mut annotations) = (vec![], vec![]);
    for (id, path) in images.iter().enumerate() {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        let mask = image::open(masks.join(name))?.into_luma16();
        let (width, height) = mask.dimensions();
        described.push(json!({ "id": id, "file_name": name, "width": width, "height": height }));
        let columns = || (0..width).flat_map(|x| (0..height).map(move |y| (x, y)));
        let labels: std::collections::BTreeSet<u16> = mask.pixels().map(|p| p.0[0]).collect();
        for label in labels.into_iter().filter(|label| *label > 0) {
            let (mut counts, mut inside) = (vec![0u32], false);
            for (x, y) in columns() {
                if (mask.get_pixel(x, y).0[0] == label) != inside {
                    inside = !inside;
                    counts.push(0);
                }
                *counts.last_mut().expect("a run") += 1;
            }
            annotations.push(json!({
                "id": annotations.len(), "image_id": id, "category_id": 1, "iscrowd": 0,
                "segmentation": { "size": [height, width], "counts": counts },
            }));
        }
    }
    Ok(json!({ "images": described, "annotations": annotations }))
}

/// The same objects as masks and as annotations: the same run, bit for bit.
#[test]
fn coco_annotations_train_as_masks_do() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos/nuclei");
    let (mut by_masks, mut by_coco) = (vec![], vec![]);
    for (part, prefix, count) in [("train", "", 3), ("heldout", "val-", 1)] {
        let mut images = std::fs::read_dir(shipped.join(part).join("images"))?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()?;
        images.sort();
        images.truncate(count);
        for (kind, of) in [("images", part), ("masks", part)] {
            let target = at(part).join(kind);
            std::fs::create_dir_all(&target)?;
            for image in &images {
                let name = image.file_name().expect("a name");
                std::fs::copy(shipped.join(of).join(kind).join(name), target.join(name))?;
            }
        }
        let file = at(part).join("instances.json");
        std::fs::write(&file, coco(&images, &at(part).join("masks"))?.to_string())?;
        let text = |path: std::path::PathBuf| path.to_string_lossy().into_owned();
        let images = [format!("--{prefix}images"), text(at(part).join("images"))];
        let masks = [format!("--{prefix}masks"), text(at(part).join("masks"))];
        by_masks.extend(images.iter().cloned().chain(masks));
        by_coco.extend(images.into_iter().chain([format!("--{prefix}coco"), text(file)]));
    }
    let train = |name: &str, data: &[String]| -> anyhow::Result<Outcome> {
        let data: Vec<&str> = data.iter().map(String::as_str).collect();
        finetune(&at(name), &short(&[&["--steps", "3"], data.as_slice()].concat()))
    };
    let (masks, coco) = (train("by-masks", &by_masks)?, train("by-coco", &by_coco)?);
    assert_eq!(masks.losses, coco.losses);
    assert_eq!((masks.before, masks.after), (coco.before, coco.after));
    let adapter = |name: &str| std::fs::read(at(name).join("adapter/adapter_model.safetensors"));
    assert!(adapter("by-masks")? == adapter("by-coco")?, "the adapters differ");
    Ok(())
}

/// Three epochs of two photographs, two a step; factors of 1 leave the bits as they are.
#[test]
fn epochs_are_steps_that_show_every_image() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let coins = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/photos/coins/train");
    let [images, masks] = ["images", "masks"].map(|kind| format!("{coins}/{kind}"));
    let run = |name: &str, more: &[&str]| {
        let output = folder.path().join(name);
        let data = ["--images", &images, "--masks", &masks, "--val-fraction", "0.5"];
        let cheap = ["--prompts", "1", "--overlays", "0", "--automatic", "0"];
        let steps = ["--batch", "1", "--accumulate", "2", "--lr-schedule", "linear"];
        finetune(&output, &[&data[..], &cheap, &steps, more].concat())?;
        Ok::<_, anyhow::Error>(std::fs::read(output.join("adapter/adapter_model.safetensors"))?)
    };
    let by_steps = run("steps", &["--steps", "3"])?;
    let groups = ["--loraplus-lr-ratio", "1", "--lr-factors", "q.lora_A=1,lora_B=1"];
    assert!(run("epochs", &[&["--epochs", "3"][..], &groups].concat())? == by_steps);
    let arguments = ["finetune", "--epochs", "3", "--steps", "3"];
    let message = Options::try_parse_from(arguments).expect_err("both").to_string();
    assert!(message.contains("cannot be used with"), "{message}");
    Ok(())
}

/// Doubles go by boxes, and by masks where that is wanted.
#[test]
fn doubles_go_by_their_overlap_where_no_objects_do() -> anyhow::Result<()> {
    let generator = |may_overlap: bool, more: &[&str]| {
        let options = Options::try_parse_from([&["finetune"], more].concat())?;
        let options = Options { automatic_nms: Some(options.nms(may_overlap)), ..options };
        options.generator().ok_or_else(|| anyhow::anyhow!("no automatic masks"))
    };
    let told = |may_overlap: bool, more: &[&str]| {
        let options = Options::try_parse_from([&["finetune"], more].concat())?;
        anyhow::Ok(options.chosen_nms(may_overlap).unwrap_or_default())
    };
    assert!(told(false, &[])?.contains("masks with an IoU above 0.3"));
    assert!(told(true, &[])?.contains("boxes alone"));
    for other in [["--automatic-nms", "0.3"], ["--automatic", "0"]] {
        assert_eq!(told(false, &other)?, "");
    }
    let found = generator(false, &[])?;
    assert_eq!((found.box_nms_thresh, found.mask_nms_thresh), (Some(0.7), Some(0.3)));
    assert_eq!(found.ranking, Ranking::PredictedIou);
    let ranked = generator(true, &["--automatic-ranking", "iou-stability"])?;
    assert_eq!(ranked.ranking, Ranking::IouTimesStability);
    assert_eq!(generator(true, &[])?.mask_nms_thresh, None);
    assert_eq!(generator(true, &["--automatic-nms", "0.5"])?.mask_nms_thresh, Some(0.5));
    assert_eq!(generator(false, &["--automatic-nms", "1"])?.mask_nms_thresh, None);
    Ok(())
}
