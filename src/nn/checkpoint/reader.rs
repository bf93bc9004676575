//! One file of tensors, in any of the formats that are read.

use super::torch::TorchFile;
use crate::file_kind::Kind;
use crate::files::TensorFile;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use safetensors::tensor::TensorInfo;
use std::collections::BTreeMap;
use std::path::Path;

/// An open file of tensors: its names, dtypes and shapes are known, and compared with the file's length.
#[derive(Debug)]
pub(crate) enum TensorReader {
    /// A safetensors file.
    Safetensors(TensorFile),
    /// A file of `torch.save`.
    Torch(TorchFile),
}

impl TensorReader {
    /// Opens a file in the format that its first bytes tell, whatever its name.
    ///
    /// # Errors
    /// - the file cannot be read, is truncated or contradicts itself;
    /// - it is of a format that is not read: the error says which.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match Kind::of_file(path) {
            Kind::Zip => TorchFile::open(path).map(Self::Torch),
            _ => TensorFile::open(path).map(Self::Safetensors),
        }
    }

    /// The format's name.
    pub fn format(&self) -> &'static str {
        match self {
            Self::Safetensors(_) => "safetensors",
            Self::Torch(_) => "PyTorch",
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Torch(file) => file.path(),
        }
    }

    /// Every tensor's name, dtype and shape.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        match self {
            Self::Safetensors(file) => file.tensors(),
            Self::Torch(file) => file.tensors(),
        }
    }

    /// Tensors of `torch.save` that are not stored plainly, each with its kind.
    pub fn unread(&self) -> &BTreeMap<String, String> {
        static NOTHING: BTreeMap<String, String> = BTreeMap::new();
        match self {
            Self::Safetensors(_) => &NOTHING,
            Self::Torch(file) => file.unread(),
        }
    }

    /// The number of the dict that holds a tensor; safetensors has one for all.
    pub fn container(&self, name: &str) -> u32 {
        match self {
            Self::Safetensors(_) => 0,
            Self::Torch(file) => file.container(name),
        }
    }

    /// The tensor's name, dtype and shape.
    ///
    /// # Errors
    /// - there is no such tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || Error::file(self.path(), format!("tensor {name}: not in the file"));
        self.tensors().get(name).ok_or_else(missing)
    }

    /// Forgets the tensors whose name `keep` denies.
    pub fn retain(&mut self, keep: impl FnMut(&str) -> bool) {
        match self {
            Self::Safetensors(file) => file.retain(keep),
            Self::Torch(file) => file.retain(keep),
        }
    }

    /// Reads one tensor, in the dtype it has in the file.
    ///
    /// # Errors
    /// - there is no such tensor, or its bytes cannot be read;
    /// - candle lacks the dtype.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        match self {
            Self::Safetensors(file) => file.read(name, device),
            Self::Torch(file) => file.read(name, device),
        }
    }

    /// Reads every tensor.
    ///
    /// # Errors
    /// - as [`Self::read`].
    pub fn read_all(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        match self {
            Self::Safetensors(file) => file.read_all(device),
            Self::Torch(file) => file.read_all(device),
        }
    }
}
