//! The JSON of annotations as Python's `json` and common tools write it: NaN, booleans and nulls, numbers as strings.
//! Formats other than COCO's are told by their names.

use crate::sam::rle::Size;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::borrow::Cow;

#[derive(Deserialize)]
pub(super) struct Instances {
    pub images: Vec<ImageEntry>,
    pub annotations: Vec<Annotation>,
}

/// The annotations of one image, in a file of its own.
#[derive(Deserialize)]
pub(super) struct OneImage {
    pub image: Option<ImageEntry>,
    pub annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
pub(super) struct ImageEntry {
    #[serde(default)]
    pub id: Id,
    #[serde(default)]
    file_name: Id,
    /// LVIS names its images by their place on the web alone.
    coco_url: Option<String>,
    #[serde(default)]
    width: Loose,
    #[serde(default)]
    height: Loose,
}

impl ImageEntry {
    /// The name of the file.
    pub fn file_name(&self) -> Option<String> {
        let url = self.coco_url.as_deref().and_then(|url| url.rsplit('/').next());
        let named = Some(&self.file_name.0).filter(|name| !name.is_empty()).cloned();
        named.or(url.map(str::to_string))
    }

    /// Height and width, if the file tells them: tools write 0, -1 and null where they do not know.
    pub fn size(&self, most: u32) -> Result<Option<Size>, String> {
        let (Some(width), Some(height)) = (self.width.number(), self.height.number()) else {
            return Ok(None);
        };
        if width <= 0.0 || height <= 0.0 {
            return Ok(None);
        }
        let whole = |side: f64| side.fract() == 0.0 && side <= f64::from(most);
        match whole(width) && whole(height) {
            true => Ok(Some((height as u32, width as u32))),
            false => Err(format!("its sides must be 1 to {most}, are {width} x {height}")),
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Annotation {
    #[serde(default)]
    pub id: Id,
    #[serde(default)]
    pub image_id: Id,
    pub segmentation: Option<Segmentation>,
    #[serde(default)]
    iscrowd: Loose,
}

impl Annotation {
    pub fn is_crowd(&self) -> bool {
        self.iscrowd.number().is_some_and(|number| number != 0.0)
    }
}

/// An id: a number or a string, the same written either way.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id(pub String);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a number or a string for an id or a name")]
        enum Written {
            Whole(i64),
            Large(u64),
            Number(f64),
            Text(String),
            Nothing(()),
        }
        Ok(Self(match Written::deserialize(deserializer)? {
            Written::Whole(id) => id.to_string(),
            Written::Large(id) => id.to_string(),
            // Beyond 2^53 two ids may be one number.
            Written::Number(id) if id.abs() > (1u64 << 53) as f64 => {
                return Err(serde::de::Error::custom(format!("the id {id} has more than 64 bits")))
            }
            Written::Number(id) => id.to_string(),
            Written::Text(id) => id,
            Written::Nothing(()) => String::new(),
        }))
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_empty() { "without id" } else { &self.0 })
    }
}

/// A number, however it is written.
#[derive(Default, Deserialize)]
#[serde(untagged, expecting = "expected a number, true, false or null")]
enum Loose {
    Number(f64),
    Text(String),
    Truth(bool),
    #[default]
    Nothing,
}

impl Loose {
    fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(text) => text.trim().parse().ok(),
            Self::Truth(truth) => Some(f64::from(u8::from(*truth))),
            Self::Nothing => None,
        }
        .filter(|number| number.is_finite())
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum Segmentation {
    Polygons(Vec<Vec<Coordinate>>),
    Runs {
        size: [Count; 2],
        counts: Vec<Count>,
    },
    Compressed {
        size: [Count; 2],
        counts: String,
    },
    /// None of these.
    Other(Value),
}

impl Segmentation {
    /// The fault of an outline of another kind.
    pub fn fault(&self) -> Option<String> {
        const SHOWN: usize = 80;
        let Self::Other(value) = self else { return None };
        let text = value.to_string();
        let shown: String = text.chars().take(SHOWN).collect();
        let more = if shown.len() < text.len() { ".." } else { "" };
        Some(format!(
            "a segmentation must be polygons, [[x, y, ..], ..], or {{size: [height, width], counts}}, the counts whole \
             numbers or a string; it is {shown}{more}"
        ))
    }
}

/// A coordinate; null, as which NaN is read, is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Coordinate(pub f64);

impl<'de> Deserialize<'de> for Coordinate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN)))
    }
}

/// A whole number, also as 5.0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Count(pub u32);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = f64::deserialize(deserializer)?;
        match number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number) {
            true => Ok(Self(number as u32)),
            false => Err(serde::de::Error::custom("no whole number")),
        }
    }
}

/// The text as JSON proper: without a byte order mark, NaN and infinities as null.
pub(super) fn proper(text: &str) -> Cow<'_, str> {
    let text = text.trim_start_matches('\u{feff}');
    if !["NaN", "Infinity"].iter().any(|word| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let (mut proper, mut rest) = (String::with_capacity(text.len()), text);
    let mut in_string = false;
    while let Some(character) = rest.chars().next() {
        let words = ["NaN", "-Infinity", "Infinity"];
        if let Some(after) = words.iter().find_map(|w| rest.strip_prefix(w)).filter(|_| !in_string)
        {
            proper.push_str("null");
            rest = after;
            continue;
        }
        let escaped = if in_string && character == '\\' { rest[1..].chars().next() } else { None };
        in_string ^= character == '"';
        let length = character.len_utf8() + escaped.map_or(0, char::len_utf8);
        proper.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    Cow::Owned(proper)
}

/// Which format of texts other than JSON the file has.
pub(super) fn text_format(bytes: &[u8]) -> Option<String> {
    const START: usize = 4096;
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(START)]);
    let start = start.trim_start_matches('\u{feff}').trim_start();
    if start.starts_with('<') && start.contains("<annotation") {
        return Some("it is XML, as CVAT and Pascal VOC have it; export it as COCO".into());
    }
    let numbers = start.lines().next()?.split_whitespace().map(str::parse::<f64>);
    let numbers: Vec<f64> = numbers.collect::<Result<_, _>>().ok()?;
    (numbers.len() >= 5)
        .then(|| "it is a text of numbers, as YOLO has it; export it as COCO".into())
}

/// The content found in the place of COCO's instances; none where it is JSON with images and annotations.
pub(super) fn found_instead(text: &str) -> Option<String> {
    const WANTED: [&str; 2] = ["images", "annotations"];
    const SHOWN: usize = 8;
    let expected = "expected an object with images and annotations";
    let Ok(value) = serde_json::from_str::<Value>(text) else {
        let is_json = text.trim_start().starts_with(['{', '[']);
        let start: String = text.trim_start().chars().take(40).collect();
        return (!is_json).then(|| format!("expected JSON, it begins with {start:?}"));
    };
    if let Some(name) = other_format(&value) {
        return Some(format!("it is {name}"));
    }
    match value {
        Value::Object(map) if WANTED.iter().all(|key| map.contains_key(*key)) => None,
        Value::Object(map) => {
            let keys: Vec<&str> = map.keys().map(String::as_str).take(SHOWN).collect();
            Some(format!("{expected}, got one with {}", keys.join(", ")))
        }
        Value::Array(_) => Some(format!("{expected}, got a list")),
        _ => Some(format!("{expected}, got one value")),
    }
}

/// Which other format the JSON has.
fn other_format(value: &Value) -> Option<&'static str> {
    let has = |value: &Value, keys: &[&str]| keys.iter().all(|key| value.get(key).is_some());
    if let Some(first) = value.as_array().and_then(|list| list.first()) {
        return Some(match first {
            first if has(first, &["segmentation", "predicted_iou"]) => {
                "the list that SAM's automatic mask generator makes of one image"
            }
            first if has(first, &["image_id", "score"]) => {
                "COCO's results, found objects without images"
            }
            first if has(first, &["data", "annotations"]) => {
                "Label Studio's list of tasks; export it as COCO"
            }
            first if has(first, &["Label"]) || has(first, &["data_row"]) => {
                "Labelbox's list; export it as COCO"
            }
            _ => return None,
        });
    }
    let is_via = |value: &Value| {
        value.as_object().is_some_and(|map| map.values().any(|v| has(v, &["filename", "regions"])))
    };
    Some(match value {
        v if has(v, &["image", "annotations"]) => {
            "SA-1B's file of one image; COCO's instances hold all images and their annotations in one file"
        }
        v if has(v, &["shapes", "imagePath"]) => "LabelMe's file of one image; convert it to COCO with labelme2coco",
        v if has(v, &["_via_img_metadata"]) || is_via(v) => {
            "a project of the VGG Image Annotator; export it as COCO"
        }
        v if has(v, &["objects", "size"]) => "Supervisely's file of one image; export it as COCO",
        v if v.get("type").is_some_and(|kind| kind == "FeatureCollection") => {
            "GeoJSON; convert its polygons to COCO's instances"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_s_json_becomes_proper() {
        for (text, expected) in [
            ("\u{feff}{}", "{}"),
            (r#"{"a": NaN, "b": [-Infinity, Infinity]}"#, r#"{"a": null, "b": [null, null]}"#),
            (
                r#"{"NaN": "Infinity \" NaN", "b\\": NaN}"#,
                r#"{"NaN": "Infinity \" NaN", "b\\": null}"#,
            ),
            ("\"\u{e9}NaN\\\u{e9}\" NaN", "\"\u{e9}NaN\\\u{e9}\" null"),
            ("NaN\"\\", "null\"\\"),
        ] {
            assert_eq!(proper(text), expected);
        }
    }

    #[test]
    fn other_formats_are_named() {
        for (text, expected) in [
            (r#"{"image": {}, "annotations": []}"#, "SA-1B"),
            (r#"{"shapes": [], "imagePath": "x.jpg", "version": "5"}"#, "LabelMe"),
            (r#"[{"segmentation": {}, "predicted_iou": 0.9}]"#, "automatic mask generator"),
            (r#"{"x.jpg123": {"filename": "x.jpg", "regions": []}}"#, "VGG Image Annotator"),
            (r#"[{"image_id": 1, "score": 0.5}]"#, "COCO's results"),
            (r#"{"type": "FeatureCollection", "features": []}"#, "GeoJSON"),
            (r#"{"video_id": 1, "masklet": []}"#, "got one with video_id, masklet"),
            ("[1]", "got a list"),
            ("image,rle", "begins with \"image,rle\""),
        ] {
            assert!(found_instead(text).is_some_and(|name| name.contains(expected)), "{expected}");
        }
        assert_eq!(found_instead(r#"{"images": 1, "annotations": []}"#), None);
        assert_eq!(found_instead("{\"images\": ["), None, "the parser says where it ends");
    }

    #[test]
    fn texts_of_other_tools_are_named() {
        for (text, expected) in [
            ("<?xml version=\"1.0\"?>\n<annotations><version>", "CVAT"),
            ("\u{feff} <annotation><folder>", "Pascal VOC"),
            ("0 0.1 0.2 0.3 0.4\n", "YOLO"),
        ] {
            assert!(text_format(text.as_bytes()).is_some_and(|name| name.contains(expected)));
        }
        assert_eq!(text_format(b"<html>"), None);
        assert_eq!(text_format(b"1 2\n"), None);
        assert_eq!(text_format(b"{\"images\": []}"), None);
    }

    #[test]
    fn long_ids_stay_apart() {
        let id = |text: &str| serde_json::from_str::<Id>(text).map(|Id(id)| id);
        assert_eq!(id("18446744073709551615").ok().as_deref(), Some("18446744073709551615"));
        assert_eq!(id("7.0").ok().as_deref(), Some("7"));
        assert!(id("1180591620717411303424").is_err());
    }
}
