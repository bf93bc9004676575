//! Images that processes divide: the files and the output of one process, also after a kill, and failures told once.

use crate::{ended, files, mpirun, PROGRAM, SOON};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A command line over the folder `photos`, and the results that it leaves beside it.
pub const COMMANDS: [&str; 5] = [
    "masks photos --points-per-side 4 --iou 0.5 --stability 0.5 --geojson --sheet out/sheet.png --json --output out",
    "masks photos --points-per-side 4 --iou 0.99 --embeddings out/kept --json --output out",
    "segment photos --point 20,20 --point 40,30,0 --output out",
    "encode --input photos --embeddings out",
    "encode --input tensors --output out",
];

/// Six images of several sizes, and three files of tensors.
fn inputs() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let (photos, tensors) = (folder.path().join("photos"), folder.path().join("tensors"));
    std::fs::create_dir(&photos)?;
    std::fs::create_dir(&tensors)?;
    let heldout = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos/coins/heldout/images");
    let coins = image::open(heldout.join("coins_r0c2.png"))?;
    for (index, side) in [64, 96, 700, 80, 64, 90].into_iter().enumerate() {
        let image = coins.resize(side, side, image::imageops::FilterType::Triangle);
        image.save(photos.join(format!("{index}.png")))?;
    }
    // Transparent pixels make a note, which keeps its place among the results.
    coins.thumbnail(70, 70).into_rgba8().save(photos.join("3.png"))?;
    let mut glass = coins.thumbnail(70, 70).into_rgba8();
    glass.put_pixel(0, 0, image::Rgba([9, 9, 9, 0]));
    glass.save(photos.join("3.png"))?;
    for seed in 0..3u32 {
        let pixels =
            (0..3 * 128 * 128u32).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0);
        let pixels = candle_core::Tensor::from_iter(pixels, &candle_core::Device::Cpu)?;
        let tensors_of = [("pixel_values".to_string(), pixels.reshape((1, 3, 128, 128))?)];
        candle_core::safetensors::save(
            &std::collections::HashMap::from(tensors_of),
            tensors.join(format!("{seed}.safetensors")),
        )?;
    }
    Ok(folder)
}

/// `size` processes of the program in a folder; 0 is one without mpirun.
fn program(size: usize, folder: &Path, line: &str) -> Command {
    let mut command = match size {
        0 => Command::new(PROGRAM),
        _ => {
            let mut command = mpirun();
            command.args(["-n", &size.to_string(), PROGRAM]);
            command
        }
    };
    command.args(line.split(' ')).current_dir(folder);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The files and the output of one process.
fn alone(folder: &Path, line: &str) -> Result<(BTreeMap<PathBuf, Vec<u8>>, Output)> {
    let output = program(0, folder, line).output()?;
    ensure!(output.status.success(), "{line}: {}", text(&output.stderr));
    let found = files(&folder.join("out"), &folder.join("out"))?;
    std::fs::remove_dir_all(folder.join("out"))?;
    Ok((found, output))
}

fn same_files(expected: &BTreeMap<PathBuf, Vec<u8>>, folder: &Path, what: &str) -> Result<()> {
    let found = files(&folder.join("out"), &folder.join("out"))?;
    ensure!(found.keys().eq(expected.keys()), "{what}: {:?}", found.keys());
    for (path, bytes) in expected {
        ensure!(found[path] == *bytes, "{what}: other bytes in {}", path.display());
    }
    Ok(())
}

pub fn files_and_output_are_those_of_one(line: &str) -> Result<()> {
    let folder = inputs()?;
    let (expected, one) = alone(folder.path(), line)?;
    ensure!(expected.len() >= 3, "{line}: {:?}", expected.keys());
    for size in 1..=3 {
        let (many, _) = ended(&mut program(size, folder.path(), line))?;
        ensure!(many.status.success(), "{size}: {}", text(&many.stderr));
        ensure!(many.stdout == one.stdout, "{size}: {}", text(&many.stdout));
        ensure!(many.stderr == one.stderr, "{size}: {}", text(&many.stderr));
        same_files(&expected, folder.path(), &format!("{size} processes"))?;
        std::fs::remove_dir_all(folder.path().join("out"))?;
    }
    Ok(())
}

/// The processes that mpirun has started.
fn children(pid: u32) -> Result<Vec<i32>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(text.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?)
}

/// Removes files that a killed process was still writing, beside their destinations.
fn forget_unfinished(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(".tmp") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Kills the last of three processes once an image is done; any other number goes on to the same bytes.
pub fn a_killed_job_is_resumed_by_others() -> Result<()> {
    let folder = inputs()?;
    let line = COMMANDS[0];
    let (expected, _) = alone(folder.path(), line)?;
    let journal = folder.path().join("out/masks.jsonl");
    for size in [0, 1, 2] {
        let mut job = program(3, folder.path(), line);
        let job = job.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let start = Instant::now();
        let done = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
        while done() < 2 {
            ensure!(start.elapsed() < SOON, "no image was done");
            std::thread::sleep(Duration::from_millis(2));
        }
        let last = children(job.id())?.pop().context("mpirun has no process")?;
        // SAFETY: the process is a grandchild of this test.
        let killed = unsafe { libc::kill(last, libc::SIGKILL) };
        let output = job.wait_with_output()?;
        // A quick machine may have done all before.
        ensure!(killed != 0 || !output.status.success() || done() == 7, "the kill went unnoticed");
        forget_unfinished(&folder.path().join("out"))?;
        let resumed = ended(&mut program(size, folder.path(), &format!("{line} --resume")))?.0;
        ensure!(resumed.status.success(), "{size}: {}", text(&resumed.stderr));
        let told = text(&resumed.stderr) + &text(&resumed.stdout);
        ensure!(told.contains("of 6 images were done already"), "{size}: {told}");
        same_files(&expected, folder.path(), &format!("resumed by {size}"))?;
        std::fs::remove_dir_all(folder.path().join("out"))?;
    }
    Ok(())
}

/// A failure ends all with one message, which names `told`.
fn fails(folder: &Path, line: &str, told: &str) -> Result<Output> {
    let (output, took) = ended(&mut program(3, folder, line))?;
    let said = text(&output.stderr);
    ensure!(!output.status.success() && took < SOON, "{took:?}: {said}");
    ensure!(said.contains(told), "{said}");
    ensure!(said.matches("error: ").count() == 1, "{said}");
    Ok(output)
}

/// The images before it are done and told, as by one process.
pub fn an_unreadable_image_is_told_once() -> Result<()> {
    let folder = inputs()?;
    std::fs::write(folder.path().join("photos/4.png"), b"no image")?;
    let alone = program(0, folder.path(), COMMANDS[2]).output()?;
    let message = text(&alone.stderr);
    let message = message.trim().strip_prefix("error: ").context("no error")?;
    std::fs::remove_dir_all(folder.path().join("out"))?;
    let many = fails(folder.path(), COMMANDS[2], message)?;
    ensure!(many.status.code() == alone.status.code(), "{:?}", many.status);
    ensure!(many.stdout == alone.stdout, "{}", text(&many.stdout));
    let done = folder.path().join("out/3.mask.png").exists();
    ensure!(done && !folder.path().join("out/4.mask.png").exists(), "3 is not done, or 4 is");
    // A fault of all is told once, too.
    fails(folder.path(), "masks nowhere.png --output none", "error: rank 0: nowhere.png: ")?;
    fails(folder.path(), "segment photos --output none", "error: rank 0: say what to cut out")
        .map(drop)
}

/// One of the images is a pipe that nobody writes to.
pub fn a_process_that_hangs_ends_the_job() -> Result<()> {
    let folder = inputs()?;
    let pipe = folder.path().join("pipe.png");
    ensure!(Command::new("mkfifo").arg(&pipe).status()?.success(), "no pipe");
    let line = "segment photos/0.png pipe.png photos/1.png --point 9,9 --output out --wait 3";
    fails(folder.path(), line, "s for rank 1, which did not come; the job ends").map(drop)
}

/// Processes with other inputs, models or folders for results do not begin.
pub fn processes_that_differ_do_not_begin() -> Result<()> {
    let folder = inputs()?;
    let other = folder.path().join("other");
    std::fs::create_dir_all(other.join("photos"))?;
    std::fs::copy(folder.path().join("photos/0.png"), other.join("photos/0.png"))?;
    let differing = |more: [&str; 2]| -> Result<String> {
        let mut command = mpirun();
        command.args(["-n", "1", PROGRAM]).args(COMMANDS[2].split(' ')).arg(":");
        command.args(more).args(["-n", "1", PROGRAM]).args(COMMANDS[2].split(' '));
        let (output, took) = ended(command.current_dir(folder.path()))?;
        let said = text(&output.stderr);
        ensure!(!output.status.success() && took < SOON, "{took:?}: {said}");
        ensure!(said.matches("error: ").count() == 1, "{said}");
        Ok(said)
    };
    let elsewhere = other.display().to_string();
    let said = differing(["-wdir", &elsewhere])?;
    ensure!(said.contains("rank 1: its run is not that of rank 0:\n  inputs: "), "{said}");
    for index in 1..6 {
        let name = format!("photos/{index}.png");
        std::fs::copy(folder.path().join(&name), other.join(&name))?;
    }
    let said = differing(["-wdir", &elsewhere])?;
    ensure!(said.contains("rank 1: out: is another folder than that of rank 0"), "{said}");
    Ok(())
}
