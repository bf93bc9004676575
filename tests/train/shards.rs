//! Data sets in several folders and in TARs: the samples of one folder, each read by one process, and hostile files
//! refused.

use crate::threads::on_threads;
use anyhow::Result;
use candle_sam_lora::train::{Alone, Communicator, DataFiles, Dataset, DatasetOptions, TruthFiles};
use image::{GrayImage, Luma, RgbImage};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How many images there are.
const COUNT: u8 = 6;

/// The bytes of an image and of its mask, which differ from number to number; both of equal length always.
fn sample(number: u8) -> Result<(Vec<u8>, Vec<u8>)> {
    let encoded = |image: image::DynamicImage| -> Result<Vec<u8>> {
        let mut bytes = std::io::Cursor::new(vec![]);
        image.write_to(&mut bytes, image::ImageFormat::Bmp)?;
        Ok(bytes.into_inner())
    };
    let image = RgbImage::from_fn(24, 20, |x, y| {
        image::Rgb([number.wrapping_mul(31), x as u8 * 9, y as u8 * 11])
    });
    let inside = |x: u32, y: u32| (3..9 + u32::from(number)).contains(&x) && (4..12).contains(&y);
    let mask = GrayImage::from_fn(24, 20, |x, y| Luma([u8::from(inside(x, y)) * 255]));
    Ok((encoded(image.into())?, encoded(mask.into())?))
}

/// Writes a TAR of these entries.
fn tar(path: &Path, entries: &[(String, Vec<u8>)]) -> Result<PathBuf> {
    let mut builder = tar::Builder::new(std::fs::File::create(path)?);
    for (name, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes.as_slice())?;
    }
    builder.into_inner()?;
    Ok(path.into())
}

/// Writes images `from..to` and their masks into folders of these names.
fn folders(root: &Path, numbers: std::ops::Range<u8>, names: [&str; 2]) -> Result<[PathBuf; 2]> {
    let folders = names.map(|name| root.join(name));
    for folder in &folders {
        std::fs::create_dir_all(folder)?;
    }
    for number in numbers {
        let (image, mask) = sample(number)?;
        std::fs::write(folders[0].join(format!("{number:03}.bmp")), image)?;
        std::fs::write(folders[1].join(format!("{number:03}.bmp")), mask)?;
    }
    Ok(folders)
}

/// The entries of samples in WebDataset's layout.
fn entries(numbers: std::ops::Range<u8>) -> Result<Vec<(String, Vec<u8>)>> {
    let mut all = vec![];
    for number in numbers {
        let (image, mask) = sample(number)?;
        all.push((format!("{number:03}.bmp"), image));
        all.push((format!("{number:03}.mask.bmp"), mask));
    }
    Ok(all)
}

fn options() -> DatasetOptions {
    DatasetOptions::min_area(5)
}

fn beside(images: &[PathBuf]) -> DataFiles {
    DataFiles { images: images.to_vec(), truth: TruthFiles::Beside }
}

/// All that training sees of a data set.
fn content(dataset: &Dataset) -> Result<String> {
    let mut all = dataset.fingerprint();
    for index in 0..dataset.len() {
        let sample = dataset.load(index)?;
        all += &format!("{} {:?} {:?}", sample.name, sample.image.as_raw(), sample.instances);
    }
    Ok(all)
}

#[test]
fn several_places_are_read_as_one_folder() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    let [images, masks] = folders(root, 0..COUNT, ["images", "masks"])?;
    let expected = content(&Dataset::open(&images, &masks, &options())?)?;
    // The later images in the first folder: the order is that of the names.
    let [late, late_masks] = folders(root, 4..COUNT, ["a", "a_masks"])?;
    let [early, early_masks] = folders(root, 0..4, ["b", "b_masks"])?;
    let tars = [
        tar(&root.join("0.tar"), &entries(3..COUNT)?)?,
        tar(&root.join("1.tar"), &entries(0..3)?)?,
    ];
    let plain = |numbers, mask: bool| -> Result<Vec<_>> {
        let keep = |(name, _): &(String, Vec<u8>)| name.contains("mask") == mask;
        let entries = entries(numbers)?.into_iter().filter(keep);
        Ok(entries.map(|(name, bytes)| (name.replace(".mask", ""), bytes)).collect())
    };
    let of_images = tar(&root.join("images.tar"), &plain(0..COUNT, false)?)?;
    let of_masks = tar(&root.join("masks.tar"), &plain(0..2, true)?)?;
    let [_, other_masks] = folders(root, 2..COUNT, ["unused", "other"])?;
    for files in [
        DataFiles {
            images: vec![late, early],
            truth: TruthFiles::Masks(vec![early_masks, late_masks]),
        },
        beside(&tars),
        DataFiles {
            images: vec![of_images],
            truth: TruthFiles::Masks(vec![of_masks, other_masks]),
        },
    ] {
        let dataset = Dataset::open_files(&files, &options())?;
        assert_eq!(content(&dataset)?, expected, "{files:?}");
    }
    let lines = Dataset::open_files(&beside(&tars), &options())?.summary().lines();
    assert_eq!(lines[1], "6 samples in 2 shards", "{lines:?}");
    Ok(())
}

#[test]
fn entries_of_shards_are_told_apart_by_their_endings() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let png = |bytes: &[u8], format| -> Result<Vec<u8>> {
        let mut written = std::io::Cursor::new(vec![]);
        image::load_from_memory(bytes)?.write_to(&mut written, format)?;
        Ok(written.into_inner())
    };
    let (image, mask) = sample(1)?;
    let jpg = png(&image, image::ImageFormat::Jpeg)?;
    let mask_png = png(&mask, image::ImageFormat::Png)?;
    let annotated = serde_json::json!({
        "image": { "width": 24, "height": 20 },
        "annotations": [
            { "id": 1, "segmentation": [[2, 2, 12, 2, 12, 9, 2, 9]] },
            { "id": 2, "segmentation": { "size": [20, 24], "counts": [100, 20, 360] } },
            { "id": 3, "segmentation": [[1, 1, 5, 5]] },
        ],
    });
    let json = annotated.to_string().into_bytes();
    let all = [
        ("./x/1.jpg", jpg.clone()),
        ("./x/1.png", mask_png.clone()),
        ("./x/1.json", b"{\"caption\": 1}".to_vec()),
        ("x/2.image.png", png(&image, image::ImageFormat::Png)?),
        ("x/2.seg.png", mask_png),
        ("x/3.JPG", jpg),
        ("x/3.json", json),
        ("x/3.txt", b"a label".to_vec()),
        ("x/._3.jpg", b"hidden".to_vec()),
        ("README.md", b"text".to_vec()),
    ];
    let all = all.map(|(name, bytes)| (name.to_string(), bytes));
    let path = tar(&folder.path().join("all.tar"), &all)?;
    let dataset = Dataset::open_files(&beside(&[path]), &options())?;
    let found = (0..3).map(|index| {
        let sample = dataset.load(index)?;
        Ok((sample.name.clone(), sample.instances.len()))
    });
    let found = found.collect::<Result<Vec<_>>>()?;
    let expected = [("x_1", 1), ("x_2", 1), ("x_3", 2)].map(|(name, n)| (name.to_string(), n));
    assert_eq!(found, expected);
    let lines = dataset.summary().lines().join("\n");
    for told in [
        "3 samples in 1 shard",
        "left alone, entries that are no image and no truth: 3: README.md, x/1.json, x/3.txt",
        "left out, annotations without an outline: 1: 3.json",
    ] {
        assert!(lines.contains(told), "{told}: {lines}");
    }
    Ok(())
}

#[test]
fn hostile_shards_are_refused_by_file_and_entry() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let good = entries(0..3)?;
    let bytes = std::fs::read(tar(&folder.path().join("good.tar"), &good)?)?;
    let one = |name: &str| vec![(name.to_string(), sample(1).expect("a sample").0)];
    let with = |more: Vec<(String, Vec<u8>)>| -> Result<Vec<u8>> {
        let all = [good.clone(), more].concat();
        Ok(std::fs::read(tar(&folder.path().join("with.tar"), &all)?)?)
    };
    // An entry's name is at the beginning of its header, its size at 124, its type at 156, the checksum at 148.
    let patched = |place: usize, text: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[place..place + text.len()].copy_from_slice(text);
        bytes[148..156].copy_from_slice(b"        ");
        let sum: u32 = bytes[..512].iter().map(|byte| u32::from(*byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    };
    let block = |length: usize| length.div_ceil(512) * 512;
    let first_two = 2 * 512 + block(good[0].1.len()) + block(good[1].1.len());
    let gzip = [b"\x1f\x8b\x08\0".as_slice(), &bytes].concat();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("an image", sample(1)?.0, &["is no TAR and no folder"]),
        ("a PNG", b"\x89PNG\r\n\x1a\n".repeat(99), &["no folder: it is a PNG image"]),
        ("text", b"no TAR at all, but text".to_vec(), &["is no TAR"]),
        ("empty", vec![], &["it has no end"]),
        ("gzip", gzip, &["is compressed by gzip", "gunzip"]),
        ("cut in an entry", bytes[..first_two - 600].to_vec(), &["truncated", "000.mask.bmp"]),
        ("cut in a header", bytes[..first_two + 100].to_vec(), &["truncated", "000.mask.bmp"]),
        ("cut between entries", bytes[..first_two].to_vec(), &["it has no end", "000.mask.bmp"]),
        ("joined", [bytes.clone(), bytes.clone()].concat(), &["behind its end", "002.mask.bmp"]),
        ("a huge size", patched(124, b"77777777777\0"), &["truncated", "000.bmp has 8589934591"]),
        ("the largest size", patched(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), &["TAR"]),
        ("a parent", patched(0, b"../0.bmp\0"), &["../0.bmp: the name leads out"]),
        ("a root", patched(0, b"/etc.bmp\0"), &["the name leads out of the TAR"]),
        ("no Unicode", patched(0, b"\xff\xfe0.bmp"), &["not valid Unicode"]),
        ("a link", patched(156, b"2"), &["000.bmp: is no plain file", "Symlink"]),
        ("a sparse file", patched(156, b"S"), &["TAR"]),
        ("twice", with(good[..1].to_vec())?, &["000.bmp: is in the TAR twice"]),
        ("no mask", with(one("9.bmp"))?, &["the key 9 has no mask", "9.mask.png"]),
        ("no image", with(one("9.mask.bmp"))?, &["the key 9 has no image, but the mask"]),
        ("two images", with([one("9.bmp"), one("9.tif")].concat())?, &["9.bmp and 9.tif"]),
        (
            "no annotations",
            with([one("9.bmp"), vec![("9.json".into(), b"{\"a\": 1}".to_vec())]].concat())?,
            &["9.json: no annotations of an image", "annotations"],
        ),
        ("no image file", with(vec![("n.txt".into(), vec![0; 9])])?, &[]),
    ];
    for (what, bytes, told) in cases {
        let path = folder.path().join("hostile.tar");
        std::fs::write(&path, bytes)?;
        let opened = Dataset::open_files(&beside(&[path]), &options());
        if told.is_empty() {
            assert_eq!(opened?.len(), 3, "{what}");
            continue;
        }
        let error = opened.expect_err(what).to_string();
        for word in told.iter().chain(&["hostile.tar"]) {
            assert!(error.contains(word), "{what}: {word}: {error}");
        }
    }
    let places =
        [tar(&folder.path().join("a.tar"), &good)?, tar(&folder.path().join("b.tar"), &good)?];
    let error = Dataset::open_files(&beside(&places), &options()).expect_err("both").to_string();
    assert!(
        error.contains("b.tar/000.bmp: the key 000 is in ") && error.contains("a.tar too"),
        "{error}"
    );
    let images = [folder.path().to_path_buf()];
    let error = Dataset::open_files(&beside(&images), &options()).expect_err("masks").to_string();
    assert!(error.contains("is a folder: say where its masks are"), "{error}");
    Ok(())
}

/// The data as a rank sees them: bytes of the images that others read are of the right length alone.
fn seen_by(rank: usize, size: usize, root: &Path) -> Result<DataFiles> {
    let names = [format!("images {rank} of {size}"), format!("masks {rank} of {size}")];
    let [images, masks] = folders(root, 0..COUNT, names.each_ref().map(String::as_str))?;
    for number in (0..COUNT).filter(|number| usize::from(*number) % size != rank) {
        std::fs::write(images.join(format!("{number:03}.bmp")), sample(number + 100)?.0)?;
    }
    Ok(DataFiles { images: vec![images], truth: TruthFiles::Masks(vec![masks]) })
}

#[test]
fn each_process_reads_its_share_and_knows_all() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let alone = Dataset::open_together(&seen_by(0, 1, folder.path())?, &options(), &Alone)?;
    for size in [2, 3] {
        let found = on_threads(size, |communicator| -> Result<_> {
            let rank = communicator.rank();
            let files = seen_by(rank, size, folder.path())?;
            let dataset = Dataset::open_together(&files, &options(), &*communicator)?;
            // Images of other shares are compared when they are loaded.
            for index in 0..dataset.len() {
                let loaded = dataset.load(index);
                assert_eq!(loaded.is_ok(), index % size == rank, "{index} on {rank} of {size}");
                if let Err(error) = loaded {
                    let told = format!("{index:03}.bmp: is not the file that was read when");
                    assert!(error.to_string().contains(&told), "{error}");
                }
            }
            Ok((dataset.fingerprint(), dataset.summary().lines()))
        });
        for found in found {
            assert_eq!(found?, (alone.fingerprint(), alone.summary().lines()));
        }
    }
    Ok(())
}

#[test]
fn processes_with_other_data_are_told_the_same() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    let [images, masks] = folders(root, 0..COUNT, ["images", "masks"])?;
    let [more, more_masks] = folders(root, 0..COUNT + 1, ["more", "more_masks"])?;
    let [bad, bad_masks] = folders(root, 0..COUNT, ["bad", "bad_masks"])?;
    std::fs::write(bad.join("001.bmp"), b"no image")?;
    let errors = |own: [&Path; 2], options: [DatasetOptions; 2]| {
        on_threads(2, |communicator: Arc<dyn Communicator>| {
            let other = communicator.rank() == 1;
            let [images, masks] = if other { own } else { [images.as_path(), masks.as_path()] };
            let files = DataFiles {
                images: vec![images.into()],
                truth: TruthFiles::Masks(vec![masks.into()]),
            };
            let options = &options[communicator.rank()];
            let opened = Dataset::open_together(&files, options, &*communicator);
            opened.expect_err("other data").to_string()
        })
    };
    let same = || [options(), options()];
    let nowhere = root.join("nowhere");
    for (found, told) in [
        (
            errors([&more, &more_masks], same()),
            "rank 1: its run is not that of rank 0:\n  data.images: 7, on",
        ),
        (
            errors([&bad, &bad_masks], same()),
            "rank 1: its run is not that of rank 0:\n  data.names and sizes: ",
        ),
        (errors([&nowhere, &masks], same()), "rank 1: "),
        (
            errors([&images, &masks], [options(), DatasetOptions::min_area(6)]),
            "data.reading.min_area: 6, on",
        ),
    ] {
        assert!(found[0].contains(told) && found[0] == found[1], "{told}: {found:?}");
    }
    Ok(())
}
