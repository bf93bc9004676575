//! Annotations of COCO's for two images: any text, and well-formed files of any polygons and runs. The same runs, plain
//! and compressed, are the same masks.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use candle_sam_lora::train::{Dataset, DatasetOptions, Sample};
use candle_sam_lora_fuzz::{file, folder};
use image::RgbImage;
use serde_json::{json, Value};
use std::sync::Once;

/// Width and height of the images.
const SIZES: [(u32, u32); 2] = [(6, 4), (40, 25)];

#[derive(Arbitrary, Debug)]
struct Input {
    objects: Vec<(bool, Object)>,
}

#[derive(Arbitrary, Debug)]
enum Object {
    /// Twentieths of a pixel, about the image.
    Near(Vec<Vec<i16>>),
    Polygons(Vec<Vec<f64>>),
    Runs(Vec<u32>),
    /// Runs that fill the image: the last one takes what is left.
    Filling(Vec<u16>),
    Counts(String),
}

fn filling(runs: &[u16], pixels: u32) -> Vec<u32> {
    let (mut left, mut filled) = (pixels, vec![]);
    for run in runs {
        filled.push(u32::from(*run).min(left));
        left -= filled[filled.len() - 1];
    }
    filled.push(left);
    filled
}

/// The compressed form, as `rleToString` of pycocotools writes it.
fn compressed(runs: &[u32]) -> String {
    let mut text = String::new();
    for (index, run) in runs.iter().enumerate() {
        let before = if index > 2 { i64::from(runs[index - 2]) } else { 0 };
        let mut number = i64::from(*run) - before;
        loop {
            let group = (number & 31) as u8;
            number >>= 5;
            let more = number != if group & 16 != 0 { -1 } else { 0 };
            text.push(char::from(48 + group + if more { 32 } else { 0 }));
            if !more {
                break;
            }
        }
    }
    text
}

fn segmentation(object: &Object, (width, height): (u32, u32), compress: bool) -> Value {
    let runs = |counts: Value| json!({ "size": [height, width], "counts": counts });
    match object {
        Object::Near(polygons) => polygons
            .iter()
            .map(|polygon| polygon.iter().map(|value| f64::from(*value) / 20.0).collect::<Value>())
            .collect(),
        Object::Polygons(polygons) => json!(polygons),
        Object::Runs(counts) => runs(json!(counts)),
        Object::Filling(lengths) => {
            let counts = filling(lengths, width * height);
            runs(if compress { json!(compressed(&counts)) } else { json!(counts) })
        }
        Object::Counts(counts) => runs(json!(counts)),
    }
}

/// The samples, if the annotations are accepted. Counts each sample's instances again.
fn samples(annotations: &[u8]) -> Option<Vec<Sample>> {
    let path = file("instances.json", annotations);
    let dataset = match Dataset::open_coco(folder(), &path, &DatasetOptions::min_area(1)) {
        Ok(dataset) => dataset,
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(&folder().display().to_string()), "{message}");
            return None;
        }
    };
    let load = |index| {
        let sample = dataset.load(index).unwrap();
        for instance in &sample.instances {
            let labels = sample.labels(instance).unwrap();
            assert_eq!(labels.dimensions(), sample.image.dimensions());
            let pixels = labels.pixels().filter(|pixel| pixel.0[0] == instance.label).count();
            assert!(pixels == instance.area && pixels > 0);
        }
        sample
    };
    Some((0..dataset.len()).map(load).collect())
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static IMAGES: Once = Once::new();
    IMAGES.call_once(|| {
        for (name, (width, height)) in ["a.png", "b.png"].iter().zip(SIZES) {
            RgbImage::new(width, height).save(folder().join(name)).unwrap();
        }
    });
    if bytes.first() == Some(&b'{') {
        samples(bytes);
        return;
    }
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(bytes)) else { return };
    let written = |compress| {
        let annotations = input.objects.iter().zip(0..).map(|((second, object), id)| {
            let segmentation = segmentation(object, SIZES[usize::from(*second)], compress);
            json!({ "id": id, "image_id": u8::from(*second), "segmentation": segmentation })
        });
        let image = |(id, name): (usize, &str)| {
            let (width, height) = SIZES[id];
            json!({ "id": id, "file_name": name, "width": width, "height": height })
        };
        let images: Value = ["a.png", "b.png"].into_iter().enumerate().map(image).collect();
        json!({ "images": images, "annotations": annotations.collect::<Value>() }).to_string()
    };
    let (plain, packed) = (samples(written(false).as_bytes()), samples(written(true).as_bytes()));
    let labels = |samples: Option<Vec<Sample>>| {
        samples.map(|samples| samples.into_iter().map(|s| s.layers).collect::<Vec<_>>())
    };
    assert_eq!(labels(plain), labels(packed));
});
