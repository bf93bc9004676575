//! Files of `torch.save`: a zip archive with one pickle, which says what the tensors are, and one entry a storage.
//!
//! The pickle is read as data (see [`pickle`](super::pickle)), so a file can run no code. Every size is compared with the
//! archive before anything is allocated for it; entries are stored, never compressed.
//!
//! ```text
//! <root>/data.pkl       the object: a state dict, or dicts, lists and modules that hold one
//! <root>/data/<key>     the bytes of a storage
//! <root>/byteorder      little or big
//! ```
//!
//! Source: PyTorch, `torch/serialization.py`, `torch/_utils.py`.

use super::pickle::{Id, Object, Pickle};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use safetensors::tensor::{TensorInfo, TensorView};
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use zip::{CompressionMethod, ZipArchive};

/// The value of a pickle, or its fault.
type Checked<T> = std::result::Result<T, String>;

/// The largest pickle that is read. One of SAM ViT-H with an optimizer has 1 MB.
const MAX_PICKLE: u64 = 16 << 20;
/// The most bytes of names that are made of a pickle, in which a dict may be held by many others.
const MAX_NAMES: usize = 64 << 20;
/// The most dicts and lists within each other.
const MAX_DEPTH: usize = 64;
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
}

/// Where an entry of the archive lies.
#[derive(Clone, Copy, Debug)]
struct Entry {
    start: u64,
    size: u64,
    /// 0 where the writer computed none.
    crc: u32,
}

/// A tensor as a view of a storage; offset and strides count elements.
#[derive(Debug)]
struct View {
    storage: Entry,
    offset: usize,
    strides: Vec<usize>,
    /// The number of the dict that holds the tensor.
    container: u32,
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
        let mut found = Found { pickle: &pickle, tensors: BTreeMap::new(), views: HashMap::new() };
        found.walk(&|key| entry(&format!("data/{key}"))).map_err(wrong)?;
        let Found { tensors, views, .. } = found;
        Ok(Self { path: path.to_path_buf(), file, length, big_endian, tensors, views })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor's name, dtype and shape.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
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

/// The entries of an archive by their names.
fn entries(
    archive: &mut ZipArchive<BufReader<File>>,
    path: &Path,
) -> Result<BTreeMap<String, Entry>> {
    let damaged = |_| Error::file(path, "a zip archive with a damaged list of entries");
    let mut entries = BTreeMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.into_owned();
        if entry.encrypted() || entry.compression() != CompressionMethod::Stored {
            return Err(Error::file(
                path,
                format!("{name} is compressed or encrypted; torch.save stores the entries of its archive as they are"),
            ));
        }
        let (start, size) = (entry.data_start().unwrap_or(u64::MAX), entry.compressed_size());
        entries.insert(name, Entry { start, size, crc: entry.crc32() });
    }
    Ok(entries)
}

/// The first names of a list.
fn shown<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<String> =
        names.take(SHOWN + 1).map(|name| name.chars().take(80).collect()).collect();
    match names.get(..SHOWN).filter(|_| names.len() > SHOWN) {
        Some(first) => format!("{}, ...", first.join(", ")),
        None => names.join(", "),
    }
}

/// Reads `size` bytes, for which room is made as they come.
fn read_at(file: &File, path: &Path, start: u64, size: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = file;
    file.seek(SeekFrom::Start(start))
        .and_then(|_| file.take(size as u64).read_to_end(&mut bytes))
        .map_err(|e| Error::io(path, e))?;
    match bytes.len() == size {
        true => Ok(bytes),
        false => Err(Error::file(path, "an entry of the archive reaches beyond its end")),
    }
}

/// Elements of the storage from the first that a view uses to the last.
fn span(shape: &[usize], strides: &[usize]) -> usize {
    match shape.contains(&0) {
        true => 0,
        false => {
            1 + shape.iter().zip(strides).map(|(side, stride)| (side - 1) * stride).sum::<usize>()
        }
    }
}

fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(side, stride)| {
        let fits = *side <= 1 || *stride == expected;
        expected *= side;
        fits
    })
}

/// The elements of a view one after the other.
fn gather(bytes: &[u8], shape: &[usize], strides: &[usize], width: usize) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut gathered = Vec::with_capacity(count * width);
    let mut index = vec![0; shape.len()];
    let mut offset = 0;
    for _ in 0..count {
        gathered
            .extend_from_slice(bytes.get(offset * width..(offset + 1) * width).unwrap_or_default());
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            offset -= index[axis] * strides[axis];
            index[axis] = 0;
        }
    }
    gathered
}

/// The tensors of a pickle.
struct Found<'a> {
    pickle: &'a Pickle,
    tensors: BTreeMap<String, TensorInfo>,
    views: HashMap<String, View>,
}

impl Found<'_> {
    /// Goes through dicts, lists and the attributes of objects. A tensor's name is the path to it, joined by dots.
    fn walk(&mut self, storage: &dyn Fn(&str) -> Option<Entry>) -> Checked<()> {
        let mut budget = MAX_NAMES;
        // Object, the path to it, the dicts around it, the number of the innermost one.
        let mut open = vec![(self.pickle.root, String::new(), 0, 0u32)];
        let mut containers = 0;
        while let Some((id, path, depth, container)) = open.pop() {
            budget = budget.checked_sub(path.len() + 16).ok_or_else(|| {
                format!("its data.pkl makes more than {MAX_NAMES} bytes of names of tensors")
            })?;
            if depth > MAX_DEPTH {
                return Err(format!(
                    "its data.pkl has more than {MAX_DEPTH} dicts within each other"
                ));
            }
            if let Some(tensor) = self.tensor(id) {
                let (info, view) = tensor.view(&path, container, storage)?;
                if self.tensors.insert(path.clone(), info).is_some() {
                    return Err(format!("holds two tensors called {path}"));
                }
                self.views.insert(path, view);
                continue;
            }
            containers += 1;
            for (name, child) in self.children(id) {
                // Only what has children, or is a tensor, goes on the list.
                if matches!(
                    self.pickle.object(child),
                    Object::Dict(_) | Object::Sequence(_) | Object::Instance(_)
                ) {
                    let path = match (path.is_empty(), name.is_empty()) {
                        (true, _) => name,
                        (_, true) => path.clone(),
                        _ => format!("{path}.{name}"),
                    };
                    budget = budget.saturating_sub(path.len() + 16);
                    if budget == 0 {
                        continue; // told when the next one is taken
                    }
                    open.push((child, path, depth + 1, containers));
                }
            }
        }
        Ok(())
    }

    /// The objects inside another, with the names that lead to them.
    fn children(&self, id: Id) -> Vec<(String, Id)> {
        let mut children = Vec::new();
        let mut items = |items: &[(Id, Id)]| {
            children.extend(items.iter().filter_map(|&(key, value)| {
                let key = match self.pickle.object(key) {
                    Object::Text(text) => text.to_string(),
                    Object::Int(number) => number.to_string(),
                    _ => return None,
                };
                // A module keeps its tensors and its modules in dicts of its own.
                let inner = ["_parameters", "_buffers", "_modules"].contains(&key.as_str());
                Some((if inner { String::new() } else { key }, value))
            }));
        };
        match self.pickle.object(id) {
            Object::Dict(pairs) => items(pairs),
            Object::Instance(instance) => {
                items(&instance.items);
                match instance.state.map(|state| self.pickle.object(state)) {
                    Some(Object::Dict(pairs)) => items(pairs),
                    Some(Object::Instance(state)) => items(&state.items),
                    _ => {}
                }
            }
            Object::Sequence(elements) => {
                children.extend(elements.iter().enumerate().map(|(i, id)| (i.to_string(), *id)));
            }
            _ => {}
        }
        children
    }

    /// The tensor that a call makes, if it makes one that is stored plainly.
    fn tensor(&self, id: Id) -> Option<Stored> {
        let pickle = self.pickle;
        let mut id = id;
        // A parameter around a tensor, and a subclass around either.
        for _ in 0..4 {
            let Object::Instance(call) = pickle.object(id) else { return None };
            let mut function = pickle.global(call.function)?;
            let mut arguments = pickle.sequence(call.arguments)?;
            if function == "torch._tensor._rebuild_from_type_v2" {
                function = pickle.global(*arguments.first()?)?;
                arguments = pickle.sequence(*arguments.get(2)?)?;
            }
            match function {
                "torch._utils._rebuild_parameter"
                | "torch._utils._rebuild_parameter_with_state" => {
                    id = *arguments.first()?;
                }
                "torch._utils._rebuild_tensor"
                | "torch._utils._rebuild_tensor_v2"
                | "torch._utils._rebuild_tensor_v3" => {
                    let is_v3 = function.ends_with("v3");
                    let dtype =
                        arguments.get(6).filter(|_| is_v3).and_then(|id| pickle.global(*id));
                    let [storage, offset, shape, strides, ..] = *arguments else { return None };
                    let Object::Persistent(storage) = *pickle.object(storage) else { return None };
                    let [_, class, key, ..] = *pickle.sequence(storage)? else { return None };
                    return Some(Stored {
                        kind: dtype.or_else(|| pickle.global(class))?.to_string(),
                        key: pickle.text(key)?.to_string(),
                        offset: pickle.size(offset)?,
                        shape: pickle.sizes(shape)?,
                        strides: pickle.sizes(strides)?,
                    });
                }
                _ => return None,
            }
        }
        None
    }
}

/// A tensor as a pickle describes it.
struct Stored {
    /// The storage's class, or the dtype.
    kind: String,
    key: String,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Stored {
    /// The tensor in its storage.
    fn view(
        self,
        name: &str,
        container: u32,
        storage: &dyn Fn(&str) -> Option<Entry>,
    ) -> Checked<(TensorInfo, View)> {
        let Self { kind, key, offset, shape, strides } = self;
        let dtype = match kind.rsplit('.').next().unwrap_or_default() {
            "FloatStorage" | "float32" => Dtype::F32,
            "DoubleStorage" | "float64" => Dtype::F64,
            "HalfStorage" | "float16" => Dtype::F16,
            "BFloat16Storage" | "bfloat16" => Dtype::BF16,
            "ByteStorage" | "uint8" => Dtype::U8,
            "CharStorage" | "int8" => Dtype::I8,
            "ShortStorage" | "int16" => Dtype::I16,
            "IntStorage" | "int32" => Dtype::I32,
            "LongStorage" | "int64" => Dtype::I64,
            "BoolStorage" | "bool" => Dtype::BOOL,
            "uint16" => Dtype::U16,
            "uint32" => Dtype::U32,
            "uint64" => Dtype::U64,
            "float8_e4m3fn" => Dtype::F8_E4M3,
            "float8_e5m2" => Dtype::F8_E5M2,
            other => {
                return Err(format!("tensor {name} has the type {other}, which is not read here"))
            }
        };
        let storage = storage(&key).ok_or_else(|| {
            format!("tensor {name} has its values in data/{key}, which is not in the archive")
        })?;
        let width = dtype.bitsize() / 8;
        let too_large = || {
            format!(
                "tensor {name} of shape {shape:?} reaches beyond its storage data/{key} of {} bytes",
                storage.size
            )
        };
        let count = shape.iter().try_fold(1usize, |n, side| n.checked_mul((*side).max(1)));
        let count = if shape.contains(&0) { count.and(Some(0)) } else { count };
        let last = shape.iter().zip(&strides).try_fold(offset, |last, (side, stride)| {
            last.checked_add(side.saturating_sub(1).checked_mul(*stride)?)
        });
        let end = last.and_then(|last| last.checked_add(1)?.checked_mul(width));
        let bytes = count.and_then(|count| count.checked_mul(width)).ok_or_else(too_large)?;
        let fits = bytes == 0 || end.is_some_and(|end| end as u64 <= storage.size);
        if !fits || shape.len() != strides.len() {
            return Err(too_large());
        }
        let info = TensorInfo { dtype, shape, data_offsets: (0, bytes) };
        let offset = if bytes == 0 { 0 } else { offset };
        Ok((info, View { storage, offset, strides, container }))
    }
}
