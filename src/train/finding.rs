//! Findings of one reading of an image and its truth. Processes that read a data set together tell it each other.

use super::coco::CocoImage;
use super::facts::{MaskFacts, PictureFacts};
use super::sample::{Content, Loaded, Pair};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Findings in a pair.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Finding {
    /// Everything that is wrong; the rest is empty then.
    #[serde(with = "told")]
    pub faults: Vec<Error>,
    pub transparent: bool,
    /// Width and height.
    pub size: (u32, u32),
    /// Areas of the objects that are large enough.
    pub areas: Vec<usize>,
    /// Objects that are too small.
    pub small: usize,
    pub picture: PictureFacts,
    pub mask: Option<MaskFacts>,
    /// Annotations that were left out, by reason.
    pub left_out: Vec<(String, usize)>,
    pub content: Content,
    /// Checksum of the runs of annotations.
    pub runs: u32,
}

impl Finding {
    /// The findings in `pair`, which was read.
    pub fn of(pair: &Pair, loaded: Result<Loaded>) -> Self {
        let found = loaded.map_err(|error| pair.faults(error)).and_then(|loaded| {
            let Loaded { sample, picture, mask, small, objects, left_out, content } = loaded;
            let (width, height) = sample.image.dimensions();
            let runs = objects.as_ref().map_or(Ok(0), |coco| runs_checksum(coco, (height, width)));
            Ok(Self {
                faults: vec![],
                transparent: sample.transparent,
                size: (width, height),
                areas: sample.instances.iter().map(|instance| instance.area).collect(),
                small,
                picture: PictureFacts::of(&picture),
                mask: mask.map(MaskFacts::of),
                left_out,
                content,
                runs: runs.map_err(|error| vec![error])?,
            })
        });
        found.unwrap_or_else(|faults| Self { faults, ..Self::default() })
    }
}

fn runs_checksum(coco: &CocoImage, size: (u32, u32)) -> Result<u32> {
    coco.objects(size).try_fold(0, |checksum, runs| {
        let runs = runs?;
        // The number of parts too, so that no two objects run together.
        let words = [runs.len() as u32].into_iter().chain(runs.into_iter().flatten());
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        Ok(crc32c::crc32c_append(checksum, &bytes))
    })
}

/// Errors by their file and message, which are all that a user sees of them.
mod told {
    use super::{Error, PathBuf};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(errors: &[Error], to: S) -> Result<S::Ok, S::Error> {
        let parts = |error: &Error| match error {
            Error::Io { path, source } => (Some(path.clone()), source.to_string()),
            Error::File { path, message } => (Some(path.clone()), message.clone()),
            other => (None, other.to_string()),
        };
        errors.iter().map(parts).collect::<Vec<_>>().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Error>, D::Error> {
        let error = |(path, message): (Option<PathBuf>, String)| match path {
            Some(path) => Error::File { path, message },
            None => candle_core::Error::msg(message).into(),
        };
        Ok(Vec::deserialize(from)?.into_iter().map(error).collect())
    }
}
