//! `finetune` by several processes: the files of one process, and one message where they differ.

use crate::{ended, files, mpirun, PROGRAM, SOON};
use anyhow::{ensure, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A short run of the program, on the micrographs that come with it.
const FINETUNE: &str =
    "finetune --steps 3 --batch 1 --prompts 2 --eval-every 2 --overlays 2 --lora-dropout 0.1 \
                        --lr-schedule constant";
const NUCLEI_IMAGES: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/assets/photos/nuclei/heldout/images");
const NUCLEI_MASKS: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/assets/photos/nuclei/heldout/masks");

pub fn finetune_writes_the_files_of_one_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = |name: &str| folder.path().join(name);
    let alone = Command::new(PROGRAM)
        .args(FINETUNE.split(' '))
        .args(["--accumulate", "4", "--output"])
        .arg(output("alone"))
        .output()?;
    ensure!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stderr));
    let expected = files(&output("alone"), &output("alone"))?;
    ensure!(expected.contains_key(Path::new("best/adapter_model.safetensors")), "no best adapter");
    for (size, accumulate) in [("2", "2"), ("4", "1")] {
        let (two, _) = ended(
            mpirun()
                .args(["-n", size, PROGRAM])
                .args(FINETUNE.split(' '))
                .args(["--accumulate", accumulate, "--output"])
                .arg(output(size)),
        )?;
        ensure!(two.status.success(), "{}", String::from_utf8_lossy(&two.stderr));
        let said = String::from_utf8_lossy(&two.stdout);
        let shared = format!("{size} processes, {size} on this host (threads each: 1); 4 parts");
        ensure!(said.contains(&shared), "{said}");
        ensure!(said.contains(" % waiting for the slowest process, "), "no times: {said}");
        ensure!(said.matches("held-out IoU, mean").count() == 1, "said more than once: {said}");
        let found = files(&output(size), &output(size))?;
        ensure!(found.keys().eq(expected.keys()), "{:?}", found.keys());
        for (path, bytes) in &expected {
            ensure!(found[path] == *bytes, "{size} ranks: other bytes in {}", path.display());
        }
    }
    Ok(())
}

/// A TAR in the making.
struct TarWriter {
    path: PathBuf,
    builder: tar::Builder<Vec<u8>>,
}

impl TarWriter {
    fn new(path: PathBuf) -> Self {
        Self { path, builder: tar::Builder::new(vec![]) }
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        Ok(self.builder.append_data(&mut header, name, bytes)?)
    }

    fn write(self) -> Result<()> {
        Ok(std::fs::write(self.path, self.builder.into_inner()?)?)
    }
}

/// The data in one folder, in a list of folders and in TARs, by one process and by two.
pub fn finetune_reads_shards_and_lists() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let here = folder.path();
    let nuclei = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos/nuclei/heldout");
    let mut tars = ["0.tar", "1.tar"].map(|name| TarWriter::new(here.join(name)));
    for index in 0..8 {
        let name = format!("nuclei_r{}c{}.png", 6 + index / 4, index % 4);
        for (kind, ending) in [("images", "png"), ("masks", "mask.png")] {
            let bytes = std::fs::read(nuclei.join(kind).join(&name))?;
            for place in [format!("all/{kind}"), format!("part{}/{kind}", index % 2)] {
                std::fs::create_dir_all(here.join(&place))?;
                std::fs::write(here.join(place).join(&name), &bytes)?;
            }
            tars[index % 2].append(&name.replace("png", ending), &bytes)?;
        }
    }
    for tar in tars {
        tar.write()?;
    }
    std::fs::write(here.join("images.txt"), "# two disks\npart1/images\n\npart0/images\n")?;
    let run = |size: usize, data: &str, output: &str| -> Result<_> {
        let mut command = if size == 1 { Command::new(PROGRAM) } else { mpirun() };
        if size > 1 {
            command.args(["-n", &size.to_string(), PROGRAM]);
        }
        let accumulate = (2 / size).to_string();
        command.args(FINETUNE.split(' ')).args(["--accumulate", &accumulate, "--output", output]);
        let (ended, _) = ended(command.args(data.split(' ')).current_dir(here))?;
        ensure!(ended.status.success(), "{data}: {}", String::from_utf8_lossy(&ended.stderr));
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        Ok((files(&here.join(output), &here.join(output))?, said))
    };
    let (expected, _) = run(1, "--images all/images --masks all/masks", "folder")?;
    let lists = "--images @images.txt --masks part0/masks --masks part1/masks";
    let shards = "--images 0.tar --images 1.tar";
    for (size, data, output) in
        [(1, lists, "lists1"), (2, lists, "lists2"), (1, shards, "tars1"), (2, shards, "tars2")]
    {
        let (found, said) = run(size, data, output)?;
        ensure!(found == expected, "{output}: other files or bytes");
        let told = said.matches("8 samples in 2 shards").count();
        ensure!(told == usize::from(data == shards), "{output}: {said}");
    }
    Ok(())
}

/// Each process has a working folder of its own, and only that of the first holds the run.
pub fn the_first_ranks_folder_is_enough_to_resume() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let here = |name: &str| folder.path().join(name);
    let run = |steps: &str, names: &[&str], more: &[&str]| -> Result<()> {
        let mut command = mpirun();
        for (rank, name) in names.iter().enumerate() {
            std::fs::create_dir_all(here(name))?;
            if rank > 0 {
                command.arg(":");
            }
            command.args(["-n", "1", "-wdir"]).arg(here(name)).arg(PROGRAM);
            command.args(FINETUNE.replace("--steps 3", steps).split(' '));
            command.args(["--images", NUCLEI_IMAGES, "--masks", NUCLEI_MASKS, "--output", "run"]);
            command.args(more);
        }
        let (ended, _) = ended(&mut command)?;
        ensure!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        Ok(())
    };
    run("--steps 3", &["alone"], &["--accumulate", "2"])?;
    run("--steps 2", &["first", "second"], &[])?;
    run("--steps 3", &["first", "second"], &["--resume"])?;
    for name in ["state.safetensors", "adapter/adapter_model.safetensors"] {
        let read = |run: &str| std::fs::read(here(run).join("run").join(name)).context(name);
        ensure!(read("alone")? == read("first")?, "other bytes in {name}");
    }
    ensure!(!here("second").join("run").exists(), "the second process has written");
    Ok(())
}

/// MPICH's launcher says how many processes there are by PMI_SIZE, which OpenMPI does not know.
pub fn another_librarys_launcher_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let mut command = Command::new(PROGRAM);
    command.args(FINETUNE.split(' ')).arg("--output").arg(&output).env("PMI_SIZE", "2");
    let (ended, _) = ended(&mut command)?;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(!ended.status.success() && !output.exists(), "it went on alone");
    ensure!(said.contains("started as one of 2 processes, and MPI says 1"), "{said}");
    Ok(())
}

/// One message for all, whatever the processes disagree about.
pub fn finetune_tells_what_differs(other: &str, told: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let process = |command: &mut Command, more: &str| {
        let more: Vec<_> = more.split(' ').filter(|word| !word.is_empty()).collect();
        command.args(["-n", "1", PROGRAM]).args(FINETUNE.split(' ')).args(more);
        command.arg("--output").arg(&output);
    };
    let mut command = mpirun();
    process(&mut command, "");
    command.arg(":");
    process(&mut command, other);
    let (ended, took) = ended(&mut command)?;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(!ended.status.success() && took < SOON, "{took:?}: {said}");
    ensure!(said.contains(told), "{said}");
    ensure!(said.matches("error: ").count() == 1, "{said}");
    Ok(())
}
