//! Reading and writing files so that nothing is lost: a file is written beside its destination and renamed over it
//! only when it is complete and on disk, and what is read is checked before it is believed.

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

/// Replaces the file at `path` by what `write` produces, or leaves it as it was.
///
/// # Errors
/// When the folder cannot be written to, the disk is full, or `write` fails; no partial file remains.
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|e| Error::io(path, e))?;
    write(&mut file).map_err(|e| Error::io(path, e))?;
    file.as_file().sync_all().map_err(|e| Error::io(path, e))?;
    file.persist(path).map_err(|e| Error::io(path, e.error))?;
    Ok(())
}

/// Creates a folder and its parents.
pub fn create_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))
}

/// Reads a text file.
pub fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io(path, e))
}

/// Reads every tensor of a safetensors file, in the dtype it has there.
///
/// # Errors
/// When the file cannot be read, is truncated, lies about its sizes, or holds a dtype candle lacks.
pub fn read_tensors(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let invalid =
        |e: &dyn std::fmt::Display| Error::file(path, format!("not a valid safetensors file: {e}"));
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|e| invalid(&e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let tensor = candle_core::safetensors::Load::load(&view, device)
            .map_err(|e| Error::file(path, format!("tensor {name}: {e}")))?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// Writes tensors as a safetensors file, atomically, with `{"format": "pt"}` as Python libraries expect it.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(tensors, Some(metadata))
        .map_err(|e| Error::file(path, format!("cannot be serialized: {e}")))?;
    write_atomic(path, |file| file.write_all(&bytes))
}
