//! A safetensors file with a text beside its tensors, and a checksum over both.
//!
//! ```text
//! metadata    KEY: "<checksum> <text>"
//! ```
//! The checksum (64-bit FNV-1a over the text and every tensor's name and bytes) tells a damaged file, which safetensors
//! alone would load.

use super::{stage, Checksum, Staged, TensorFile};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use safetensors::View;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The kind of a sealed file.
pub(crate) struct Seal {
    /// The metadata entry of checksum and text.
    pub key: &'static str,
    /// The file in messages: "a training state".
    pub what: &'static str,
}

impl Seal {
    /// Writes what becomes the file at `path` once it is committed.
    ///
    /// # Errors
    /// - the file cannot be written.
    pub fn stage(
        &self,
        path: &Path,
        text: &str,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Staged> {
        let mut checksum = Checksum::new();
        checksum.add(self.key, text.as_bytes());
        for (name, tensor) in tensors {
            checksum.add(name, &View::data(tensor));
        }
        let metadata = HashMap::from([(self.key.to_string(), format!("{checksum} {text}"))]);
        let bytes = safetensors::serialize(tensors, Some(metadata))
            .map_err(|e| Error::file(path, format!("cannot be serialized: {e}")))?;
        stage(path, |file| file.write_all(&bytes))
    }

    /// The text and the tensors of a file.
    ///
    /// # Errors
    /// - the file is of another kind, or damaged.
    pub fn read(
        &self,
        file: &TensorFile,
        device: &Device,
    ) -> Result<(String, BTreeMap<String, Tensor>)> {
        let (expected, text) =
            (file.metadata().get(self.key)).and_then(|text| text.split_once(' ')).ok_or_else(
                || self.invalid(file, format!("the metadata entry `{}` is missing", self.key)),
            )?;
        let mut checksum = Checksum::new();
        checksum.add(self.key, text.as_bytes());
        let mut tensors = BTreeMap::new();
        for name in file.tensors().keys() {
            let tensor = file.read_with(name, device, |data| checksum.add(name, data))?;
            tensors.insert(name.clone(), tensor);
        }
        match checksum.to_string() == expected {
            true => Ok((text.to_string(), tensors)),
            false => Err(self.invalid(file, "its checksum is wrong")),
        }
    }

    /// The error of a file that is not of this kind.
    pub fn invalid(&self, file: &TensorFile, why: impl std::fmt::Display) -> Error {
        Error::file(file.path(), format!("not {}, or a damaged one: {why}", self.what))
    }
}
