//! `finetune` on TARs and lists of folders.

use super::{fail, root, succeed};
use anyhow::{ensure, Result};
use std::path::Path;

/// Four micrographs and their masks as the entries of a TAR.
fn shard(path: &Path) -> Result<()> {
    let nuclei = root().join("assets/photos/nuclei/heldout");
    let mut builder = tar::Builder::new(std::fs::File::create(path)?);
    for index in 0..4 {
        for (kind, ending) in [("images", "png"), ("masks", "mask.png")] {
            let bytes = std::fs::read(nuclei.join(kind).join(format!("nuclei_r6c{index}.png")))?;
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, format!("{index}.{ending}"), bytes.as_slice())?;
        }
    }
    Ok(builder.into_inner().map(drop)?)
}

#[test]
fn trains_on_a_shard_and_says_so() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    shard(&here.join("a.tar"))?;
    std::fs::write(here.join("list.txt"), "# one a line\na.tar\n")?;
    let line = "--images @list.txt --steps 1 --batch 1 --prompts 1 --overlays 1 --output run";
    let out = succeed(here, "finetune", line)?;
    ensure!(out.contains("\n4 samples in 1 shard\n"), "{out}");
    ensure!(out.contains("3 images to train on, 1 held out"), "{out}");
    ensure!(out.contains("an IoU above 0.3, as objects of masks do not overlap"), "{out}");
    ensure!(here.join("run/adapter/adapter_model.safetensors").exists());
    Ok(())
}

#[test]
fn says_which_shard_is_wrong() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let here = temporary.path();
    shard(&here.join("a.tar"))?;
    std::fs::write(here.join("a.tar.gz"), b"\x1f\x8b\x08\0packed")?;
    std::fs::write(here.join("empty.txt"), "# nothing\n")?;
    std::fs::create_dir(here.join("photos"))?;
    let fails = |line: &str, words: &[&str]| fail(here, "finetune", line, 1, words);
    fails("--images a.tar --images a.tar", &["error: a.tar: is named twice"])?;
    fails("--images a.tar.gz", &["a.tar.gz: is compressed by gzip", "gunzip"])?;
    fails("--images photos", &["photos: is a folder: say where its masks are"])?;
    fails("--images none.tar", &["none.tar: No such file"])?;
    fails("--images @none.txt", &["none.txt: No such file"])?;
    fails("--images @empty.txt", &["empty.txt: lists no path"])?;
    fail(here, "finetune", "--masks photos", 2, &["--images"])
}
