//! `merge`, `export`, `import`: what they write computes what the source computes.

use super::encode::{compare, inputs};
use super::{fail, folder, read, succeed};
use crate::common::model::Tensors;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::files::write_tensors;
use candle_sam_lora::sam::{checkpoint, AttentionKind, SamConfig, SamModel};
use std::path::{Path, PathBuf};

fn adapters() -> PathBuf {
    folder("").with_file_name("adapters")
}

fn foreign(name: &str) -> PathBuf {
    folder("").with_file_name("foreign").join(name).with_extension("safetensors")
}

const OUTPUTS: [&str; 3] = ["image_embeddings", "pred_masks", "iou_scores"];

/// The tensors that `encode` with these arguments writes for the inputs of the adapters' fixtures.
fn encoded(here: &Path, arguments: &str) -> Result<Tensors> {
    let tensors = read(adapters().join("inputs.safetensors"))?;
    write_tensors(here.join("in"), &inputs(&tensors, &[""]))?;
    succeed(here, "encode", &format!("--input in --output out {arguments}"))?;
    read(here.join("out"))
}

/// These outputs must be those of a fixture of PyTorch.
fn equal(here: &Path, arguments: &str, (io, prefix): (&Tensors, &str)) -> Result<()> {
    let written = encoded(here, arguments)?;
    for name in OUTPUTS {
        compare(&written, name, &io[&format!("{prefix}/{name}")]).context(arguments.to_string())?;
    }
    Ok(())
}

#[test]
fn merged_models_compute_what_peft_computes() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    for kind in ["lora_qv", "dora", "fused_qkv"] {
        let adapter = adapters().join(kind);
        let io = read(adapter.join("io.safetensors"))?;
        let source =
            format!("--model {} --adapter {}", folder("tiny").display(), adapter.display());
        let out = succeed(here, "merge", &format!("{source} --output {kind}"))?;
        ensure!(out.contains(&format!("{kind}: the merged model")), "{out}");
        equal(here, &format!("--model {kind}"), (&io, "eval"))?;
        let original = format!("--format original {source} --output {kind}.safetensors");
        succeed(here, "export", &original)?;
        let weights = read(here.join(format!("{kind}.safetensors")))?;
        ensure!(weights.contains_key("image_encoder.blocks.0.attn.qkv.weight"));
        // The file's names are the original's; the sizes of so small a model are told by its configuration alone.
        std::fs::create_dir(here.join(format!("{kind}-original")))?;
        for (from, to) in [
            (format!("{kind}.safetensors"), "model.safetensors"),
            (format!("{kind}/config.json"), "config.json"),
        ] {
            std::fs::copy(here.join(from), here.join(format!("{kind}-original")).join(to))?;
        }
        equal(here, &format!("--model {kind}-original"), (&io, "eval"))?;
    }
    fail(
        here,
        "merge",
        &format!("--model {} --output x", folder("tiny").display()),
        1,
        &["--adapter"],
    )?;
    let source = format!(
        "--model {} --adapter {} --output lora_qv",
        folder("tiny").display(),
        adapters().join("lora_qv").display()
    );
    fail(here, "merge", &source, 1, &["lora_qv/model.safetensors", "exists", "--overwrite"])?;
    let adapter = adapters().join("lora_qv");
    let own =
        format!("--model lora_qv --adapter {} --output lora_qv --overwrite", adapter.display());
    fail(here, "merge", &own, 1, &["lora_qv/model.safetensors: the result is made from it"])?;
    let name = adapter.display();
    for (line, words) in [
        ("--format original --output x.PTH".into(), "x.PTH: is written as safetensors"),
        ("--format original --output x.png".into(), "x.png: is written as safetensors"),
        ("--format transformers --output x.safetensors".into(), "is written as a folder"),
        (
            format!("--format fused-adapter --adapter {name} --dtype bf16 --output x"),
            "--dtype has no effect",
        ),
    ] {
        fail(here, "export", &line, 1, &[words])?;
    }
    fail(here, "import", "lora_qv --output x", 1, &["lora_qv: is a folder; expected a file"])
}

/// The folder has what `SamModel.from_pretrained` and `SamProcessor.from_pretrained` look for.
#[test]
fn a_folder_for_transformers_has_the_source_bits() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let shipped = super::root().join("assets/tiny-sam");
    let source = format!("--format transformers --model {}", shipped.display());
    let out = succeed(here, "export", &format!("{source} --output plain --json --quiet"))?;
    ensure!(out == "{\"output\":\"plain\",\"format\":\"transformers\"}\n", "{out}");
    let json = |path: &str| -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&std::fs::read(here.join(path))?)?)
    };
    let config = json("plain/config.json")?;
    ensure!(config["model_type"] == "sam" && config["dtype"] == "float32", "{config}");
    let processor = json("plain/preprocessor_config.json")?;
    ensure!(processor["image_processor_type"] == "SamImageProcessor", "{processor}");
    let own: serde_json::Value =
        serde_json::from_slice(&std::fs::read(shipped.join("preprocessor_config.json"))?)?;
    for key in ["size", "pad_size", "image_mean", "image_std", "rescale_factor"] {
        ensure!(processor[key] == own[key], "{key}: {} and {}", processor[key], own[key]);
    }
    let (written, expected) =
        (read(here.join("plain/model.safetensors"))?, read(shipped.join("model.safetensors"))?);
    for (name, tensor) in &expected {
        let got = written.get(name).with_context(|| format!("{name} is not there"))?;
        ensure!(got.flatten_all()?.to_vec1::<f32>()? == tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    succeed(here, "export", &format!("{source} --output half --dtype f16"))?;
    ensure!(json("half/config.json")?["dtype"] == "float16");
    let half = read(here.join("half/model.safetensors"))?;
    let weight = &half["vision_encoder.layers.0.attn.qkv.weight"];
    ensure!(weight.dtype() == candle_core::DType::F16, "{:?}", weight.dtype());
    Ok(())
}

#[test]
fn an_adapter_for_the_fused_qkv_gives_the_outputs_of_q_k_and_v() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let model = folder("tiny");
    let model = model.display();
    for kind in ["lora_qv", "dora", "patterns"] {
        let adapter = adapters().join(kind);
        let io = read(adapter.join("io.safetensors"))?;
        let source = format!("--model {model} --adapter {}", adapter.display());
        succeed(here, "export", &format!("--format fused-adapter {source} --output {kind}"))?;
        let tensors = read(here.join(kind).join("adapter_model.safetensors"))?;
        let fused = "base_model.model.vision_encoder.layers.0.attn.qkv.lora_A.weight";
        ensure!(tensors.contains_key(fused), "{:?}", tensors.keys());
        equal(here, &format!("--model {model} --adapter {kind}"), (&io, "eval"))?;
    }
    let again = format!("--format fused-adapter --model {model} --adapter lora_qv --output x");
    fail(here, "export", &again, 1, &["on the fused qkv already"])
}

#[test]
fn files_of_samed_and_micro_sam_become_model_and_adapter() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let io = read(foreign("io"))?;
    let tiny = folder("tiny");
    for name in ["samed", "micro_sam"] {
        let line =
            format!("{} --model {} --output {name}", foreign(name).display(), tiny.display());
        let out = succeed(here, "import", &line)?;
        ensure!(out.contains("the model") && out.contains("LoRA of rank"), "{out}");
        equal(here, &format!("--model {name}/model --adapter {name}/adapter"), (&io, name))?;
        // The adapter names the model beside it.
        equal(here, &format!("--adapter {name}/adapter"), (&io, name))?;
    }
    let some = foreign("samed_some");
    let line = format!("{} --model {} --output some", some.display(), tiny.display());
    let out = succeed(here, "import", &format!("{line} --blocks 0,2"))?;
    ensure!(!here.join("some/model").exists() && out.contains("some/adapter"), "{out}");
    let expected = &io["samed_some/image_embeddings"];
    compare(&encoded(here, "--adapter some/adapter")?, "image_embeddings", expected)?;

    let fails = |line: &str, words: &[&str]| fail(here, "import", line, 1, words);
    fails(&format!("{line} --overwrite"), &["adapts 2 blocks"])?;
    fails(&format!("{} --output y", some.display()), &["no whole model", "--model"])?;
    fails("none --output y", &["none", "No such file"])?;
    let other = adapters().join("lora_qv/adapter_model.safetensors");
    fails(&format!("{} --output y", other.display()), &["neither parts of a SAM nor LoRA"])
}

/// SAMed trains a decoder with a mask for each class.
#[test]
fn a_decoder_of_samed_keeps_its_classes() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let mut config = SamConfig::load(folder("tiny").join("config.json"))?;
    config.mask_decoder_config.num_multimask_outputs = 5;
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let mut model = SamModel::new(&config, AttentionKind::Split, vb)?;
    model.randomize(3, 0.2)?;
    checkpoint::save(&model, here.join("all"), checkpoint::Naming::Original, None)?;
    let mut tensors = read(here.join("all"))?;
    tensors.retain(|name, _| name.starts_with("mask_decoder."));
    let decoder = tensors.clone();
    let lora = read(foreign("samed"))?;
    tensors.extend(lora.into_iter().filter(|(name, _)| name.starts_with("w_")));
    write_tensors(here.join("samed.safetensors"), &tensors)?;

    let line = format!("samed.safetensors --model {} --output imported", folder("tiny").display());
    succeed(here, "import", &line)?;
    let written = SamConfig::load(here.join("imported/model/config.json"))?;
    ensure!(written.mask_decoder_config.num_multimask_outputs == 5);
    let name = "mask_decoder.mask_tokens.weight";
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let weights = read(here.join("imported/model/model.safetensors"))?;
    ensure!(values(&weights[name])? == values(&decoder[name])?, "other tokens");
    let masks = &encoded(here, "--adapter imported/adapter")?["pred_masks"];
    ensure!(masks.dim(2)? == 5, "{:?}", masks.dims());
    Ok(())
}
