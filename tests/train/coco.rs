//! COCO's annotations: the masks of pycocotools, pixel for pixel, and errors that name what is wrong.

use crate::common;
use crate::common::property;
use candle_sam_lora::train::{Dataset, DatasetOptions, Sample};
use image::RgbImage;
use proptest::prelude::*;
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// Images of the sizes that the annotations tell.
fn write_images(folder: &Path, instances: &Value) -> anyhow::Result<()> {
    for image in instances["images"].as_array().expect("images") {
        let path = folder.join(image["file_name"].as_str().expect("a name"));
        std::fs::create_dir_all(path.parent().expect("a folder"))?;
        let side = |name: &str| image[name].as_u64().expect("a side") as u32;
        RgbImage::new(side("width"), side("height")).save(path)?;
    }
    Ok(())
}

/// The pixels of each instance.
fn masks(sample: &Sample) -> Vec<Vec<u8>> {
    let mask = |instance| {
        let labels = sample.labels(instance).expect("a layer").pixels();
        labels.map(|label| u8::from(label.0[0] == instance.label)).collect()
    };
    sample.instances.iter().map(mask).collect()
}

#[test]
fn masks_are_those_of_pycocotools() -> anyhow::Result<()> {
    let file = common::fixtures().join("train/coco/instances.json");
    let instances: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
    let folder = tempfile::tempdir()?;
    write_images(folder.path(), &instances)?;
    let cases: BTreeMap<String, common::Case> = common::cases("train/coco/masks.safetensors")
        .into_iter()
        .map(|c| (c.name.clone(), c))
        .collect();
    let dataset = Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(1))?;
    assert_eq!(dataset.len(), 3, "the image without objects is left out");
    let mut compared = 0;
    for (index, (name, image)) in [("a_one", 1), ("two", 2), ("three", 3)].into_iter().enumerate() {
        let sample = dataset.load(index)?;
        assert_eq!(sample.name, name);
        let annotations = instances["annotations"].as_array().expect("annotations").iter();
        let expected = annotations.filter(|a| a["image_id"] == image && a["iscrowd"] == 0);
        let expected: Vec<Vec<u8>> = expected
            .map(|a| common::values(&cases[&a["id"].to_string()].tensor("mask")))
            .map(|mask| mask.into_iter().map(|value| value as u8).collect::<Vec<u8>>())
            .filter(|mask| mask.contains(&1))
            .collect();
        let found = masks(&sample);
        assert_eq!(found.len(), expected.len());
        for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
            assert_eq!(wrong, 0, "{name}, object {place}: {wrong} pixels differ");
            compared += 1;
        }
        assert!(sample.layers.len() > 1, "these objects overlap");
        for instance in &sample.instances {
            assert_eq!(
                masks(&sample)
                    [sample.instances.iter().position(|i| i == instance).expect("itself")]
                .iter()
                .filter(|v| **v == 1)
                .count(),
                instance.area
            );
        }
    }
    println!("{compared} masks equal");
    assert!(compared >= 40);
    // Smaller objects are left out, and an image in which none is left.
    let large = Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(4000))?;
    assert_eq!(large.len(), 1);
    assert!(large.load(0)?.instances.iter().all(|instance| instance.area >= 4000));
    assert_ne!(dataset.fingerprint(), large.fingerprint());
    Ok(())
}

fn good() -> Value {
    json!({
        "images": [{ "id": 7, "file_name": "x.png", "width": 6, "height": 4 }],
        "annotations": [{ "id": 3, "image_id": 7, "segmentation": [[1, 1, 4, 1, 4, 3]] }],
    })
}

/// The dataset of an annotation file with this text, if it opens and each of its samples loads.
fn open(text: &str) -> anyhow::Result<candle_sam_lora::Result<Vec<Sample>>> {
    let folder = tempfile::tempdir()?;
    RgbImage::new(6, 4).save(folder.path().join("x.png"))?;
    let file = folder.path().join("instances.json");
    std::fs::write(&file, text)?;
    let dataset = Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(1));
    Ok(dataset.and_then(|dataset| (0..dataset.len()).map(|index| dataset.load(index)).collect()))
}

#[test]
fn what_is_wrong_is_named() -> anyhow::Result<()> {
    assert_eq!(open(&good().to_string())?.map(|samples| samples.len())?, 1);
    let segmentation = |value: Value| ("/annotations/0/segmentation", value);
    let runs = |counts: Value| segmentation(json!({ "size": [4, 6], "counts": counts }));
    let cases: Vec<((&str, Value), &str)> = vec![
        (
            ("/images/0/file_name", json!("../x.png")),
            "image 7: file_name \"../x.png\" leads out of the folder",
        ),
        (("/images/0/file_name", json!("/etc/../passwd")), "leads out of the folder"),
        (("/images/0/file_name", json!("/etc/passwd.png")), "etc/passwd.png: No such file"),
        (("/images/0/file_name", json!("")), "image 7: it has no file_name"),
        (("/images/0/file_name", json!("y.png")), "y.png"),
        (("/images/0/height", json!(4_000_000_000u32)), "1 to 32768"),
        (("/images/0/width", json!(7)), "is 6 x 4 pixels, but 7 x 4"),
        (("/annotations/0/image_id", json!(8)), "annotation 3: there is no image 8"),
        (("/annotations/0/iscrowd", json!(1)), "all 1 annotations are marked as crowds"),
        (("/annotations", json!([])), "no image has an object"),
        (("/annotations", json!(5)), "not COCO's instances"),
        (("/images/0/id", json!(1e30)), "has more than 64 bits"),
        (segmentation(json!([])), "1 have no outline"),
        (segmentation(json!([[]])), "1 have no outline"),
        (segmentation(json!([[1, 1, 2, 2]])), "1 have no outline"),
        (segmentation(json!([[1, 1, 2, 2, 3, 3, 4]])), "1 have no outline"),
        (segmentation(json!([[1, 1, 2, 2, 3, 1e300]])), "far outside of its image of 6 x 4"),
        (segmentation(json!([[1, 1, 2, "2", 3, 3]])), "a segmentation must be polygons"),
        (segmentation(json!("runs")), "annotation 3: a segmentation must be polygons"),
        (segmentation(json!(null)), "1 have no outline"),
        (segmentation(json!([[1, 1, 1, 1, 1, 1]])), "no image has an instance of 1 pixels"),
        (
            segmentation(json!({ "size": [6, 4], "counts": [24] })),
            "its size is [6, 4], its image's [4, 6]",
        ),
        (runs(json!([1, 2])), "its runs hold 3 pixels, the image 24"),
        (runs(json!([4_294_967_295u32, 4_294_967_295u32])), "its runs hold 8589934590 pixels"),
        (runs(json!([-1, 25])), "a segmentation must be polygons"),
        (runs(json!("")), "its runs hold 0 pixels"),
        (runs(json!("0")), "its runs hold 0 pixels"),
        (runs(json!("P")), "the counts end within a number"),
        (runs(json!("PPPPPPPPPPPPPPPPPPPPP0")), "more than 7 characters"),
        (runs(json!("5\u{00e9}")), "does not belong into counts"),
        (runs(json!("5 5")), "' ' does not belong"),
        (runs(json!("@")), "a count is -16"),
    ];
    for ((pointer, value), expected) in cases {
        let mut spoilt = good();
        match spoilt.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => spoilt["annotations"][0]["iscrowd"] = value,
        }
        let message = open(&spoilt.to_string())?.map(drop).expect_err(expected).to_string();
        assert!(message.contains(expected), "{pointer}: expected {expected:?} in {message}");
        assert!(message.contains("instances.json") || message.contains(".png"), "{message}");
    }
    for (text, expected) in [("", "not COCO's"), ("{", "not COCO's"), ("[1]", "not COCO's")] {
        let message = open(text)?.map(drop).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    }
    let mut twice = good();
    twice["images"] = json!([good()["images"][0], good()["images"][0]]);
    let message = open(&twice.to_string())?.map(drop).expect_err("two of one id").to_string();
    assert!(message.contains("image 7: there are two of this id"), "{message}");
    Ok(())
}

/// Forms that Python and common tools write give the same object.
#[test]
fn annotations_are_read_as_python_reads_them() -> anyhow::Result<()> {
    let expected = masks(&open(&good().to_string())?.expect("a data set")[0]);
    let change = |pointer: &str, value: Value| {
        let mut changed = good();
        match changed.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => changed["annotations"][0][&pointer[15..]] = value,
        }
        changed.to_string()
    };
    let outline = json!([1, 1, 4, 1, 4, 3]);
    let mut strings = good();
    strings["images"][0]["id"] = json!("7");
    strings["annotations"][0]["id"] = json!("9f3c-uuid");
    let mut bare = good();
    for key in ["width", "height"] {
        bare["images"][0].as_object_mut().expect("an image").remove(key);
    }
    bare["annotations"][0].as_object_mut().expect("an annotation").remove("id");
    let texts = [
        strings.to_string(),
        bare.to_string(),
        change("/images/0/width", json!(-1)),
        change("/images/0/width", json!(0)),
        change("/images/0/height", json!(null)),
        change("/images/0/height", json!(4.0)),
        change("/images/0/file_name", json!("images/x.png")),
        change("/images/0/file_name", json!("images\\x.png")),
        change("/images/0/file_name", json!("http://images.org/train/x.png")),
        change("/images/0/file_name", json!("X.PNG")),
        change("/annotations/0/iscrowd", json!(false)),
        change("/annotations/0/iscrowd", json!(null)),
        change("/annotations/0/iscrowd", json!("0")),
        change("/annotations/0/segmentation", json!([outline, [1, 1, 2, 2]])),
        change("/annotations/0/segmentation", json!([outline, [], [1, 1, 2, 2, 3]])),
        change("/annotations/0/score", json!(0.5)).replace("0.5", "NaN"),
        format!("\u{feff}{}", good()),
    ];
    for text in texts {
        let samples = open(&text)?.map_err(|error| anyhow::anyhow!("{text}: {error}"))?;
        assert_eq!(masks(&samples[0]), expected, "{text}");
    }
    Ok(())
}

#[test]
fn annotations_without_an_outline_are_left_out_and_counted() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    RgbImage::new(6, 4).save(folder.path().join("x.png"))?;
    let file = folder.path().join("instances.json");
    let mut two = good();
    for (id, outline) in [(4, json!([])), (5, json!(null))] {
        let annotation = json!({ "id": id, "image_id": 7, "segmentation": outline });
        two["annotations"].as_array_mut().expect("annotations").push(annotation);
    }
    std::fs::write(&file, two.to_string())?;
    let options = DatasetOptions::min_area(1);
    let dataset = Dataset::open_coco(folder.path(), &file, &options)?;
    let lines = dataset.summary().lines();
    let said = "left out, annotations without an outline: 2: annotation 4, annotation 5";
    assert!(lines.contains(&said.to_string()), "{lines:?}");
    let strict = DatasetOptions { strict: true, ..options };
    let error = Dataset::open_coco(folder.path(), &file, &strict).expect_err("strict").to_string();
    assert!(error.contains("without an outline: 2"), "{error}");
    Ok(())
}

/// Joined files hold annotations twice. One id for several objects is no such case.
#[test]
fn annotations_that_are_there_twice_count_once() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    RgbImage::new(6, 4).save(folder.path().join("x.png"))?;
    let file = folder.path().join("instances.json");
    let mut joined = good();
    let mut other = joined["annotations"][0].clone();
    let same = other.clone();
    other["segmentation"] = json!([[0, 0, 3, 0, 3, 3]]);
    joined["annotations"].as_array_mut().expect("annotations").extend([same, other]);
    std::fs::write(&file, joined.to_string())?;
    let dataset = Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(1))?;
    assert_eq!(dataset.summary().objects(), 2);
    let said = "left out, annotations that are there twice: 1: annotation 3";
    assert!(dataset.summary().lines().contains(&said.to_string()));
    Ok(())
}

/// Subsets keep the annotations of images that they dropped, and drop the names of images without objects.
#[test]
fn what_belongs_to_no_image_is_left_out() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    RgbImage::new(6, 4).save(folder.path().join("x.png"))?;
    let file = folder.path().join("instances.json");
    let mut subset = good();
    let annotation = json!({ "id": 4, "image_id": 99, "segmentation": [[1, 1, 4, 1, 4, 3]] });
    subset["annotations"].as_array_mut().expect("annotations").push(annotation);
    let nameless = json!({ "id": 8, "file_name": null, "width": 6, "height": 4 });
    subset["images"].as_array_mut().expect("images").push(nameless);
    std::fs::write(&file, subset.to_string())?;
    let options = DatasetOptions::min_area(1);
    let dataset = Dataset::open_coco(folder.path(), &file, &options)?;
    assert_eq!((dataset.len(), dataset.summary().objects()), (1, 1));
    let said = "left out, annotations of images that are not listed: 1: annotation 4: there is no image 99";
    assert!(dataset.summary().lines().contains(&said.to_string()));
    let strict = DatasetOptions { strict: true, ..options };
    let error = Dataset::open_coco(folder.path(), &file, &strict).expect_err("strict").to_string();
    assert!(error.contains("not listed: 1"), "{error}");
    Ok(())
}

#[test]
fn images_are_found_under_other_endings_and_it_is_said() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    RgbImage::new(6, 4).save(folder.path().join("x.png"))?;
    let file = folder.path().join("instances.json");
    for name in
        [json!("x.jpg"), json!("x"), json!("X.PNG"), json!("train/x.tif"), json!("/data/x.png")]
    {
        let mut other = good();
        other["images"][0]["file_name"] = name.clone();
        std::fs::write(&file, other.to_string())?;
        let dataset = Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(1))?;
        let lines = dataset.summary().lines();
        assert!(
            lines.iter().any(|line| line.contains("another path, case or ending")),
            "{name}: {lines:?}"
        );
    }
    // Decomposed on disk, as some systems write it, and composed in the annotations.
    RgbImage::new(6, 4).save(folder.path().join("Zella\u{308}.png"))?;
    std::fs::write(&file, good().to_string().replace("x.png", "Zell\u{e4}.png"))?;
    assert_eq!(Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(1))?.len(), 1);
    RgbImage::new(6, 4).save(folder.path().join("x.bmp"))?;
    std::fs::write(&file, good().to_string().replace("x.png", "x.jpg"))?;
    let two = Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(1));
    assert!(two.expect_err("two images of this stem").to_string().contains("x.jpg"));
    RgbImage::new(6, 4).save(folder.path().join("7.png"))?;
    let mut number = good();
    number["images"][0]["file_name"] = json!(7);
    std::fs::write(&file, number.to_string())?;
    assert_eq!(Dataset::open_coco(folder.path(), &file, &DatasetOptions::min_area(1))?.len(), 1);
    Ok(())
}

/// LVIS names its images by their place on the web; other formats are told by their names.
#[test]
fn other_formats_are_read_or_named() -> anyhow::Result<()> {
    let mut lvis = good();
    let image = lvis["images"][0].as_object_mut().expect("an image");
    image.remove("file_name");
    image.insert("coco_url".into(), json!("http://images.cocodataset.org/train2017/x.png"));
    assert_eq!(open(&lvis.to_string())?.expect("LVIS").len(), 1);
    for (text, expected) in [
        (json!({ "image": {}, "annotations": [] }), "SA-1B"),
        (json!({ "shapes": [], "imagePath": "x.png" }), "LabelMe"),
        (json!([{ "segmentation": {}, "predicted_iou": 1 }]), "automatic mask generator"),
    ] {
        let message = open(&text.to_string())?.map(drop).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    }
    Ok(())
}

/// An outline to and fro across an image that is said to be large: drawn, it would have 16 GB of runs.
#[test]
fn nothing_is_drawn_by_the_size_that_annotations_claim() -> anyhow::Result<()> {
    let mut file = good();
    file["images"][0]["width"] = json!(32768);
    file["images"][0]["height"] = json!(32768);
    let zigzag = (0..60_000).flat_map(|y| [[-500, y / 2], [33_000, y / 2]]).flatten();
    file["annotations"][0]["segmentation"] = json!([zigzag.collect::<Vec<i32>>()]);
    let message = open(&file.to_string())?.map(drop).expect_err("another size").to_string();
    assert!(message.contains("is 6 x 4 pixels, but 32768 x 32768"), "{message}");
    Ok(())
}

proptest! {
    #![proptest_config(property::config(300))]

    /// Whatever the polygon or the counts: a mask of the image's size, or an error.
    #[test]
    fn any_polygon_and_any_counts_end_well(
        polygon in proptest::collection::vec(prop_oneof![-20.0..20.0f64, -1e9..1e9f64], 0..20),
        counts in "[0-o]{0,12}",
        runs in proptest::collection::vec(0u32..30, 0..6),
    ) {
        for segmentation in [
            json!([polygon]),
            json!({ "size": [4, 6], "counts": counts }),
            json!({ "size": [4, 6], "counts": runs }),
        ] {
            let mut file = good();
            file["annotations"][0]["segmentation"] = segmentation;
            for sample in open(&file.to_string()).expect("files").into_iter().flatten() {
                prop_assert!(sample.instances[0].area <= 24);
            }
        }
    }
}
