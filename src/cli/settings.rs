//! The settings of a run are kept with its results, so that `--resume` goes on with no others.

use crate::files::Checksum;
use anyhow::bail;
use serde_json::{Map, Value};
use std::path::Path;

/// Refuses to go on with `file`, whose `earlier` settings are not those of this run.
pub fn check(file: &Path, earlier: &Value, settings: &Value) -> anyhow::Result<()> {
    let names = settings.as_object().into_iter().flat_map(Map::keys);
    let differing: Vec<&str> = names
        .filter(|name| earlier.get(*name) != settings.get(*name))
        .map(String::as_str)
        .collect();
    if differing.is_empty() && earlier == settings {
        return Ok(());
    }
    bail!(
        "{}: is of a run with other settings ({}); choose another --output, or go without --resume",
        file.display(),
        if differing.is_empty() { "of another version".to_string() } else { differing.join(", ") }
    )
}

/// A checksum of each setting: for files that people pass on, which should not name their folders.
pub fn checksums(settings: &Value) -> Value {
    let checksum = |(name, setting): (&String, &Value)| {
        let mut checksum = Checksum::new();
        checksum.add(name, setting.to_string().as_bytes());
        (name.clone(), Value::from(checksum.to_string()))
    };
    settings.as_object().into_iter().flatten().map(checksum).collect::<Map<_, _>>().into()
}
