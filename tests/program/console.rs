//! All commands have these in common: JSON, silence, help, completions, closed pipes.

use super::{micrograph, run, succeed, Ended};
use anyhow::{ensure, Result};
use std::process::{Command, Stdio};

#[test]
fn json_is_all_of_standard_output() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let image = micrograph().0;
    let line = format!("{} --point 30,30 --json", image.display());
    let Ended { code, out, err } = run(here, "segment", &line)?;
    ensure!(code == Some(0) && err.starts_with("model: "), "{code:?}: {err}");
    let object: serde_json::Value = serde_json::from_str(&out)?;
    ensure!(object["objects"].as_array().is_some_and(|objects| objects.len() == 1), "{object}");
    ensure!(object["mask"] == "nuclei_r6c0.mask.png", "{object}");
    let quiet = succeed(here, "segment", &format!("{line} --overwrite --quiet"))?;
    ensure!(quiet == out, "{quiet}");
    let out = succeed(here, "params", "--json")?;
    ensure!(out == "{\"trainable\":589824,\"all\":94325296}\n", "{out}");
    Ok(())
}

#[test]
fn quiet_runs_print_results_only() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let line = format!("{} --point 30,30 --quiet", micrograph().0.display());
    let out = succeed(temporary.path(), "segment", &line)?;
    ensure!(out.starts_with("expected IoU") && out.lines().count() == 2, "{out}");
    Ok(())
}

#[test]
#[cfg(not(feature = "mpi"))]
fn one_of_several_processes_does_not_do_all_the_work() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    for (name, value, told) in
        [("OMPI_COMM_WORLD_SIZE", "3", "one of 3 processes"), ("PMIX_RANK", "0", "one of several")]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_candle-sam-lora"))
            .args(["finetune", "--steps", "1"])
            .env(name, value)
            .current_dir(temporary.path())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.contains(told), "{said}");
        ensure!(said.contains("build it with --features cli,mpi"), "{said}");
    }
    ensure!(std::fs::read_dir(temporary.path())?.next().is_none(), "something was written");
    Ok(())
}

#[test]
fn every_command_has_help_and_completions() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    let help = succeed(here, "--help", "")?;
    for shell in ["bash", "zsh", "fish"] {
        let script = succeed(here, "completions", shell)?;
        for command in
            ["masks", "segment", "finetune", "encode", "params", "merge", "export", "import"]
        {
            ensure!(help.contains(command) && script.contains(command), "{shell}: {command}");
            ensure!(succeed(here, command, "--help")?.contains("Usage: candle-sam-lora"));
        }
    }
    Ok(())
}

#[test]
fn a_closed_pipe_is_no_error() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let mut child = Command::new(env!("CARGO_BIN_EXE_candle-sam-lora"))
        .arg("params")
        .current_dir(temporary.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    Ok(())
}

#[test]
#[cfg(target_os = "linux")]
fn results_that_are_lost_are_an_error() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let full = std::fs::File::options().write(true).open("/dev/full")?;
    let output = Command::new(env!("CARGO_BIN_EXE_candle-sam-lora"))
        .arg("params")
        .current_dir(temporary.path())
        .stdout(full)
        .output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(
        output.status.code() == Some(1) && said.starts_with("error: standard output"),
        "{said}"
    );
    Ok(())
}

#[test]
fn an_error_is_one_line_that_names_the_image() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    image::GrayImage::new(9999, 1).save(temporary.path().join("narrow.png"))?;
    let output = Command::new(env!("CARGO_BIN_EXE_candle-sam-lora"))
        .args(["segment", "narrow.png", "--point", "1,0"])
        .env("RUST_BACKTRACE", "1")
        .current_dir(temporary.path())
        .output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(said.starts_with("error: narrow.png: ") && said.lines().count() == 1, "{said}");
    Ok(())
}

#[test]
fn threads_do_not_change_a_run() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let line = "--steps 2 --batch 1 --prompts 2 --overlays 1 --lora-dropout 0.1 --quiet";
    for threads in ["1", "3"] {
        succeed(
            temporary.path(),
            "finetune",
            &format!("{line} --threads {threads} --output {threads}"),
        )?;
    }
    for file in
        ["adapter/adapter_model.safetensors", "metrics.json", "metrics.csv", "state.safetensors"]
    {
        let [one, three] =
            ["1", "3"].map(|run| std::fs::read(temporary.path().join(run).join(file)));
        ensure!(one? == three?, "other bytes in {file}");
    }
    let Ended { code, err, .. } = run(temporary.path(), "finetune", "--threads 0")?;
    ensure!(code == Some(2) && err.contains("--threads"), "{code:?}: {err}");
    for (name, threads) in [("RAYON_NUM_THREADS", "100000"), ("CANDLE_NUM_THREADS", "four")] {
        let mut program = Command::new(env!("CARGO_BIN_EXE_candle-sam-lora"));
        let output = program.arg("params").env(name, threads).output()?;
        let err = String::from_utf8(output.stderr)?;
        let expected = format!("{name} is {threads:?}, expected a number of threads");
        ensure!(output.status.code() == Some(1) && err.contains(&expected), "{err}");
    }
    Ok(())
}
