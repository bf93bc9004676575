//! Files of `torch.save`: a zip archive with one pickle, which says what the tensors are, and one entry a storage.
//!
//! The pickle is read as data (see [`pickle`](super::pickle)), so a file can run no code. Every size is compared with
//! the archive before anything is allocated for it; entries are stored, never compressed.
//!
//! ```text
//! <root>/data.pkl       the object: a state dict, or dicts, lists and modules that hold one
//! <root>/data/<key>     the bytes of a storage
//! <root>/byteorder      little or big
//! ```
//!
//! Source: PyTorch, `torch/serialization.py`, `torch/_utils.py`.

mod archive;
mod view;
mod walk;

use super::pickle::Pickle;
use crate::{Error, Result};
use archive::{entries, read_at, shown, Entry};
use candle_core::{Device, Tensor};
use safetensors::tensor::{TensorInfo, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use view::{gather, is_contiguous, span, View};
use walk::Found;
use zip::ZipArchive;

/// The largest pickle that is read. One of SAM ViT-H with an optimizer has 1 MB.
const MAX_PICKLE: u64 = 16 << 20;
/// How often all tensors together may use each byte of the file, when all are read.
const MAX_SHARED: usize = 8;

/// An open file of `torch.save`: its pickle read and compared with its storages.
#[derive(Debug)]
pub(crate) struct TorchFile {
    path: PathBuf,
    file: File,
    length: u64,
    big_endian: bool,
    tensors: BTreeMap<String, TensorInfo>,
    views: HashMap<String, View>,
    unread: BTreeMap<String, String>,
}

impl TorchFile {
    /// Opens a file and reads its pickle.
    ///
    /// # Errors
    /// - the file is unreadable, truncated or no archive of `torch.save`;
    /// - its pickle is larger than 16 MiB, damaged, or holds more names than 64 MiB;
    /// - a tensor is larger than its storage, or two have one name.
    pub fn open(path: &Path) -> Result<Self> {
        let wrong = |message: String| Error::file(path, message);
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
        let reader = BufReader::new(file.try_clone().map_err(|e| Error::io(path, e))?);
        let mut archive = ZipArchive::new(reader).map_err(|_| {
            wrong(format!(
                "a file of torch.save without the end of its archive: its {length} bytes are truncated or damaged"
            ))
        })?;
        let entries = entries(&mut archive, path)?;
        let pickles: Vec<&str> = entries
            .keys()
            .filter_map(|name| name.strip_suffix("data.pkl"))
            .filter(|root| root.is_empty() || root.ends_with('/') && root.matches('/').count() == 1)
            .collect();
        let [root] = pickles[..] else {
            return Err(wrong(format!(
                "a zip archive with {} data.pkl, where a file of torch.save has one; it holds {}",
                pickles.len(),
                shown(entries.keys().map(String::as_str)),
            )));
        };
        let bytes = |entry: Entry| read_at(&file, path, entry.start, entry.size as usize);
        let entry = |name: &str| entries.get(&format!("{root}{name}")).copied();
        let big_endian = match entry("byteorder") {
            Some(order) if order.size <= 16 => bytes(order)?.starts_with(b"big"),
            _ => false,
        };
        let pickle = entry("data.pkl").ok_or_else(|| wrong("data.pkl is missing".into()))?;
        if pickle.size > MAX_PICKLE {
            return Err(wrong(format!(
                "its data.pkl has {} bytes, more than the {MAX_PICKLE} that are read",
                pickle.size
            )));
        }
        let pickle = Pickle::parse(&bytes(pickle)?)
            .map_err(|e| wrong(format!("its data.pkl is no pickle that can be read: {e}")))?;
        let Found { tensors, views, unread } =
            Found::of(&pickle, &|key| entry(&format!("data/{key}"))).map_err(wrong)?;
        Ok(Self { path: path.to_path_buf(), file, length, big_endian, tensors, views, unread })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor's name, dtype and shape.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Tensors of kinds that are not read, as complex and quantised ones, each with its kind.
    pub fn unread(&self) -> &BTreeMap<String, String> {
        &self.unread
    }

    /// The number of the dict that holds a tensor.
    pub fn container(&self, name: &str) -> u32 {
        self.views.get(name).map_or(0, |view| view.container)
    }

    /// Forgets the tensors whose name `keep` denies.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.tensors.retain(|name, _| keep(name));
    }

    /// Reads one tensor, in the dtype it has in the file.
    ///
    /// # Errors
    /// - there is no such tensor, or it is larger than its storage, as an expanded one is;
    /// - its storage is unreadable or damaged;
    /// - candle lacks the dtype.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        let invalid =
            |e: &dyn std::fmt::Display| Error::file(&self.path, format!("tensor {name}: {e}"));
        let (info, view) = self
            .tensors
            .get(name)
            .zip(self.views.get(name))
            .ok_or_else(|| invalid(&"not in the file"))?;
        let width = info.dtype.bitsize() / 8;
        let count: usize = info.shape.iter().product();
        let span = span(&info.shape, &view.strides);
        if count > span {
            return Err(invalid(&format!(
                "an expanded view: {count} elements of {span}; save tensor.contiguous()"
            )));
        }
        let start = view.storage.start + (view.offset * width) as u64;
        let mut bytes = read_at(&self.file, &self.path, start, span * width)?;
        let whole = bytes.len() as u64 == view.storage.size && view.storage.crc != 0;
        if whole && crc32fast::hash(&bytes) != view.storage.crc {
            return Err(invalid(
                &"its bytes are damaged: their checksum is another than the file's",
            ));
        }
        if !is_contiguous(&info.shape, &view.strides) {
            bytes = gather(&bytes, &info.shape, &view.strides, width);
        }
        if self.big_endian {
            bytes.chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        let view =
            TensorView::new(info.dtype, info.shape.clone(), &bytes).map_err(|e| invalid(&e))?;
        candle_core::safetensors::Load::load(&view, device).map_err(|e| invalid(&e))
    }

    /// Reads every tensor.
    ///
    /// # Errors
    /// - as [`Self::read`];
    /// - the tensors together are more than eight times as large as the file.
    pub fn read_all(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let sizes = self.tensors.values().map(|info| info.data_offsets.1);
        let total = sizes.fold(0usize, usize::saturating_add);
        if total as u64 > self.length.saturating_mul(MAX_SHARED as u64) {
            return Err(Error::file(
                &self.path,
                format!(
                    "its tensors have {total} bytes, the file {}: too many share a storage",
                    self.length
                ),
            ));
        }
        self.tensors.keys().map(|name| Ok((name.clone(), self.read(name, device)?))).collect()
    }
}
