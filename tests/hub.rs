//! Models and adapters by their names on the hub: real requests to a small server on this machine that answers as the
//! hub does (tests/hub/server.rs).
//!
//! The environment says where hub and cache are, and it belongs to a process. So the tests run the program, and this
//! binary again, which then prints what `hub::folder` gives.

mod common;
#[path = "hub/server.rs"]
mod server;

use anyhow::{ensure, Context, Result};
use candle_core::Device;
use candle_sam_lora::files::{read_tensors, write_tensors};
use candle_sam_lora::hub;
use candle_sam_lora::sam::SamProcessor;
use common::model::{folder, Tensors};
use libtest_mimic::{Arguments, Failed, Trial};
use server::{Hub, Running, COMMIT, TOKEN};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

/// Where it is set, this process prints a folder.
const FOLDER: &str = "CANDLE_SAM_LORA_TEST_FOLDER";

fn main() -> ExitCode {
    match std::env::var_os(FOLDER) {
        Some(_) => print_folder(),
        None => tests(),
    }
}

fn print_folder() -> ExitCode {
    match hub::folder(std::env::args().next_back().unwrap_or_default()) {
        Ok(folder) => {
            print!("{}", folder.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprint!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn tests() -> ExitCode {
    type Test = fn(&Path) -> Result<()>;
    let trials: [(&str, Test); 11] = [
        ("encode_takes_model_and_adapter_from_the_hub", encode_takes_both_from_the_hub),
        ("segment_takes_the_model_from_the_hub", segment_takes_the_model_from_the_hub),
        ("finetune_notes_the_name_of_its_model", finetune_notes_the_name_of_its_model),
        ("only_what_is_read_is_fetched_and_once", only_what_is_read_is_fetched_and_once),
        ("shards_come_with_their_index", shards_come_with_their_index),
        ("files_of_torch_come_where_nothing_else_is", files_of_torch_come_where_nothing_else_is),
        ("processor_settings_come_with_the_model", processor_settings_come_with_the_model),
        ("the_cache_serves_where_the_hub_does_not", the_cache_serves_where_the_hub_does_not),
        ("who_is_not_let_in_is_told", who_is_not_let_in_is_told),
        ("what_is_not_there_is_told", what_is_not_there_is_told),
        ("a_broken_download_leaves_nothing_to_be_believed", a_broken_download_leaves_nothing),
    ];
    let trials = trials.into_iter().map(|(name, test)| {
        Trial::test(name, move || {
            let folder = tempfile::tempdir()?;
            test(folder.path()).map_err(|error| Failed::from(format!("{error:?}")))
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// Runs a command of the program, or `folder` of this binary, in `here`, where its cache is, too.
fn start(
    here: &Path,
    hub: &str,
    program: &str,
    arguments: &[&str],
    more: &[(&str, &str)],
) -> Result<Output> {
    let (mut command, first) = match program {
        "folder" => (Command::new(std::env::current_exe()?), None),
        name => (Command::new(env!("CARGO_BIN_EXE_candle-sam-lora")), Some(name)),
    };
    for name in ["http_proxy", "https_proxy", "all_proxy", "HF_TOKEN", "HF_HUB_OFFLINE"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command.env(FOLDER, "").args(first);
    command.env("HF_HOME", here.join("home")).env("HF_ENDPOINT", hub);
    Ok(command.envs(more.iter().copied()).args(arguments).current_dir(here).output()?)
}

/// The folder of a name.
fn found(here: &Path, hub: &str, name: &str, more: &[(&str, &str)]) -> Result<PathBuf> {
    let output = start(here, hub, "folder", &[name], more)?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.into())
}

/// The message about a name, which must have all these words.
fn refused(
    here: &Path,
    hub: &str,
    name: &str,
    more: &[(&str, &str)],
    words: &[&str],
) -> Result<()> {
    let output = start(here, hub, "folder", &[name], more)?;
    let message = String::from_utf8(output.stderr)?;
    let said = words.iter().chain([&name]).all(|word| message.contains(word));
    ensure!(output.status.code() == Some(1) && said, "{name}: expected {words:?}, got {message}");
    Ok(())
}

/// The files of a folder.
fn contents(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("no name")?;
        files.insert(name.to_string(), std::fs::read(&path)?);
    }
    Ok(files)
}

/// The files of a fixture that a repository would have.
fn repository(name: &str, folder: &Path) -> Result<Hub> {
    let mut files = contents(folder)?;
    files.retain(|file, _| {
        !["io.safetensors", "original.safetensors", "split.safetensors"].contains(&&**file)
    });
    Ok(Hub { name: name.to_string(), files, ..Default::default() })
}

fn tiny() -> Result<Hub> {
    repository("facebook/sam-tiny", &folder("tiny"))
}

/// The two files that every model has here.
fn is_tiny(found: &Path) -> Result<()> {
    ensure!(contents(found)? == tiny()?.files, "{}: other files", found.display());
    Ok(())
}

fn run_well(here: &Path, hub: &Running, program: &str, arguments: &[&str]) -> Result<()> {
    let output = start(here, &hub.address, program, arguments, &[])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.is_empty(), "{program} {arguments:?}: {said}");
    Ok(())
}

fn encode_takes_both_from_the_hub(here: &Path) -> Result<()> {
    let adapters = folder("").with_file_name("adapters");
    let inputs = read_tensors(adapters.join("inputs.safetensors"), &Device::Cpu)?;
    let is_input = |name: &String| name == "pixel_values" || name.starts_with("input_");
    let inputs: Tensors = inputs.into_iter().filter(|(name, _)| is_input(name)).collect();
    write_tensors(here.join("in"), &inputs)?;
    let (model, adapter) = (folder("tiny"), adapters.join("lora_qv"));
    let (model, adapter) = (model.to_str().context("UTF-8")?, adapter.to_str().context("UTF-8")?);
    let encode = |hub: &Running, output: &str, model: &str, adapter: &str| {
        let command = ["--input", "in", "--output", output, "--model", model, "--adapter", adapter];
        run_well(here, hub, "encode", &command)
    };
    // A hub has one repository: the second run has the model in the cache, which the second hub knows nothing of.
    encode(&tiny()?.run()?, "one", "facebook/sam-tiny", adapter)?;
    let hub = repository("user/lora", Path::new(adapter))?.run()?;
    encode(&hub, "two", model, "user/lora@v1.0")?;
    encode(&hub, "local", model, adapter)?;
    // The files name their settings, so their tensors alone are equal.
    let values = |name: &str| -> Result<BTreeMap<String, Vec<f32>>> {
        let tensors = read_tensors(here.join(name), &Device::Cpu)?.into_iter();
        tensors.map(|(name, tensor)| Ok((name, tensor.flatten_all()?.to_vec1()?))).collect()
    };
    let local = values("local")?;
    ensure!(local.contains_key("pred_masks"), "no masks");
    for name in ["one", "two"] {
        ensure!(values(name)? == local, "{name} is not what the folders give");
    }
    Ok(())
}

fn segment_takes_the_model_from_the_hub(here: &Path) -> Result<()> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let images = assets.join("photos/nuclei/heldout/images");
    let names = contents(&images)?;
    let image = images.join(names.keys().next().context("no image")?);
    let image = image.to_str().context("UTF-8")?;
    let hub = repository("user/small", &assets.join("tiny-sam"))?.run()?;
    for (mask, model) in [("local.png", vec![]), ("hub.png", vec!["--model", "user/small"])] {
        let command =
            [&[image, "--point", "60,60", "--overwrite", "--mask", mask], &model[..]].concat();
        run_well(here, &hub, "segment", &command)?;
    }
    ensure!(
        image::open(here.join("local.png"))? == image::open(here.join("hub.png"))?,
        "other masks"
    );
    let asked = hub.requests();
    ensure!(!asked.is_empty() && !asked.iter().any(|path| path.contains("README")), "{asked:?}");
    Ok(())
}

fn finetune_notes_the_name_of_its_model(here: &Path) -> Result<()> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny-sam");
    let hub = repository("user/small", &model)?.run()?;
    // Its steps become more, which a schedule with an end forbids.
    let short = "--batch 1 --prompts 1 --overlays 0 --lr-schedule constant --output run";
    let short: Vec<&str> = short.split(' ').collect();
    let from_hub = ["--model", "user/small@v1.0", "--steps", "1"];
    run_well(here, &hub, "finetune", &[&short[..], &from_hub].concat())?;
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(here.join("run/adapter/adapter_config.json"))?)?;
    ensure!(config["base_model_name_or_path"] == "user/small", "{config}");
    // It is the same model from a folder.
    let model = model.to_str().context("UTF-8")?;
    let from_folder = ["--model", model, "--steps", "2", "--resume"];
    run_well(here, &hub, "finetune", &[&short[..], &from_folder].concat())
}

fn only_what_is_read_is_fetched_and_once(here: &Path) -> Result<()> {
    let mut hub = tiny()?;
    for name in [
        "pytorch_model.bin",
        "README.md",
        "model.fp16.safetensors",
        "sub/model.safetensors",
        "../x.safetensors",
    ] {
        hub.files.insert(name.into(), b"not to be read".to_vec());
    }
    let hub = hub.run()?;
    let first = found(here, &hub.address, "facebook/sam-tiny", &[])?;
    ensure!(first.ends_with(Path::new("snapshots").join(COMMIT)), "{}", first.display());
    is_tiny(&first)?;
    ensure!(hub.requests().len() > 3);
    // Whichever revision it is called by, a commit is there once.
    for name in
        ["facebook/sam-tiny", "facebook/sam-tiny@v1.0", &format!("facebook/sam-tiny@{COMMIT}")]
    {
        ensure!(found(here, &hub.address, name, &[])? == first, "{name}");
        let requests = hub.requests();
        ensure!(requests.len() == 1 && requests[0].starts_with("/api/"), "{name}: {requests:?}");
    }
    // A folder of that name wins.
    std::fs::create_dir_all(here.join("facebook/sam-tiny"))?;
    ensure!(found(here, &hub.address, "facebook/sam-tiny", &[])? == Path::new("facebook/sam-tiny"));
    ensure!(hub.requests().is_empty());
    Ok(())
}

fn shards_come_with_their_index(here: &Path) -> Result<()> {
    let mut hub = tiny()?;
    let Some(whole) = hub.files.remove("model.safetensors") else { anyhow::bail!("no weights") };
    let shard = "model-00001-of-00001.safetensors";
    hub.files.insert(shard.into(), whole);
    hub.files.insert("model.safetensors.index.json".into(), br#"{"weight_map": {}}"#.to_vec());
    let files = hub.files.clone();
    let got = found(here, &hub.run()?.address, "facebook/sam-tiny", &[])?;
    ensure!(contents(&got)? == files);
    Ok(())
}

fn files_of_torch_come_where_nothing_else_is(here: &Path) -> Result<()> {
    let offline = [("HF_HUB_OFFLINE", "1")];
    let torch = |names: &[&str]| -> Result<Hub> {
        let mut hub = tiny()?;
        hub.files.remove("model.safetensors").context("no weights")?;
        hub.files.extend(names.iter().map(|name| (name.to_string(), b"PK..".to_vec())));
        Ok(hub)
    };
    // The name of the repository, what it holds, and what of that is none of the model's.
    for (index, (names, left)) in [
        (
            &["pytorch_model.bin", "optimizer.pt", "sub/x.pth"][..],
            &["optimizer.pt", "sub/x.pth"][..],
        ),
        (&["sam_vit_b_01ec64.pth", "README.md"], &["README.md"]),
        (
            &["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "x.pth"],
            &["x.pth"],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("user/torch{index}");
        let hub = Hub { name: name.clone(), ..torch(names)? };
        let mut expected = hub.files.clone();
        expected.retain(|file, _| !left.contains(&file.as_str()));
        let hub = hub.run()?;
        let got = found(here, &hub.address, &name, &[])?;
        ensure!(contents(&got)? == expected, "{names:?}");
        ensure!(found(here, &hub.address, &name, &offline)? == got);
        let chosen = found(here, &hub.address, &format!("{name}#teacher"), &[])?;
        ensure!(chosen == Path::new(&format!("{}#teacher", got.display())));
    }
    let two = Hub { name: "user/two".into(), ..torch(&["a.pth", "b.pth"])? }.run()?;
    refused(here, &two.address, "user/two", &[], &["several files", "a.pth, b.pth", "download one"])
}

/// In both files, of which the nested one counts.
fn processor_settings_come_with_the_model(here: &Path) -> Result<()> {
    let mut hub = tiny()?;
    let nested = r#"{"image_processor": {"size": {"longest_edge": 60}}}"#;
    for (name, text) in [("processor_config.json", nested), ("preprocessor_config.json", "{}")] {
        hub.files.insert(name.into(), text.into());
    }
    let files = hub.files.clone();
    let got = found(here, &hub.run()?.address, "facebook/sam-tiny", &[])?;
    ensure!(contents(&got)? == files);
    ensure!(SamProcessor::load(got, 64)?.longest_edge == 60);
    Ok(())
}

fn the_cache_serves_where_the_hub_does_not(here: &Path) -> Result<()> {
    let (name, nobody) = ("facebook/sam-tiny", "http://127.0.0.1:1");
    let down = Hub { down: true, ..tiny()? }.run()?;
    let offline = [("HF_HUB_OFFLINE", "1")];
    refused(here, nobody, name, &[], &["out of reach", nobody, "home", "lacks it"])?;
    refused(here, &down.address, name, &[], &["HTTP status 503", "lacks it"])?;
    let hub = tiny()?.run()?;
    refused(here, &hub.address, name, &offline, &["HF_HUB_OFFLINE", "lacks it"])?;
    ensure!(hub.requests().is_empty());
    let first = found(here, &hub.address, name, &[])?;
    hub.requests();
    let of_commit = format!("{name}@{COMMIT}");
    for (address, more) in [(nobody, &[][..]), (&down.address, &[]), (&hub.address, &offline)] {
        for name in [name, &of_commit] {
            ensure!(found(here, address, name, more)? == first, "{address} {more:?}");
        }
        refused(here, address, "facebook/sam-tiny@v1.0", more, &["lacks it"])?;
    }
    ensure!(hub.requests().is_empty());
    is_tiny(&first)
}

fn who_is_not_let_in_is_told(here: &Path) -> Result<()> {
    let name = "facebook/sam-tiny";
    let token = [("HF_TOKEN", TOKEN)];
    let hub = Hub { private: true, ..tiny()? }.run()?;
    refused(here, &hub.address, name, &[], &["no such repository", "private", "HF_TOKEN"])?;
    let hub = Hub { gated: true, ..tiny()? }.run()?;
    refused(here, &hub.address, name, &[], &["config.json", "gated", "HF_TOKEN"])?;
    // The download that was begun left nothing.
    refused(here, "http://127.0.0.1:1", name, &[], &["lacks it"])?;
    is_tiny(&found(here, &hub.address, name, &token)?)
}

fn what_is_not_there_is_told(here: &Path) -> Result<()> {
    let hub = tiny()?.run()?;
    let refuses = |name: &str, words: &[&str]| refused(here, &hub.address, name, &[], words);
    refuses(
        "facebook/sam-huge",
        &["no such file or folder here", "no such repository", &hub.address],
    )?;
    refuses("facebook/sam-tiny@v9", &["no revision v9", &hub.address])?;
    hub.requests();
    for name in [
        "../secret",
        "facebook/../../secret",
        "facebook/sam-tiny@../../main",
        "facebook/..",
        "sam-tiny",
    ] {
        refuses(name, &["owner/name"])?;
    }
    ensure!(hub.requests().is_empty() && !here.join("secret").exists());

    let files =
        BTreeMap::from([("config.json".into(), vec![]), ("flax_model.msgpack".into(), vec![])]);
    let foreign = Hub { name: "user/old".into(), files, ..Default::default() }.run()?;
    refused(
        here,
        &foreign.address,
        "user/old",
        &[],
        &["safetensors", "torch.save", "it has config.json, flax_model.msgpack"],
    )?;
    let strange = Hub { commit: Some("../../..".into()), ..tiny()? }.run()?;
    refused(here, &strange.address, "facebook/sam-tiny", &[], &["../../..", "no commit"])
}

fn a_broken_download_leaves_nothing(here: &Path) -> Result<()> {
    let name = "facebook/sam-tiny";
    let truncating = Hub { truncating: true, ..tiny()? }.run()?;
    let lying = Hub { lying: true, ..tiny()? }.run()?;
    for hub in [&lying, &truncating] {
        refused(here, &hub.address, name, &[], &["model.safetensors"])?;
        for name in [name, &format!("{name}@{COMMIT}")] {
            refused(here, "http://127.0.0.1:1", name, &[], &["lacks it"])?;
        }
    }
    // The next download goes on where the connection broke.
    is_tiny(&found(here, &tiny()?.run()?.address, name, &[])?)
}
