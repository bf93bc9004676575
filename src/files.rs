//! Reading and writing files so that nothing is lost. A file is written beside its destination and renamed over it only
//! when it is complete and on disk. Content that is read is checked before it is believed.
//!
//! [`TensorFile`] reads a safetensors file header first and then tensor by tensor, so a checkpoint is never in memory
//! twice. It allocates nothing by a size that the file's own length does not bear out.

mod checksum;
mod sealed;

pub(crate) use checksum::Checksum;
pub(crate) use sealed::Seal;

use crate::file_kind::{stand_in, Kind, PICKLE};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::Dtype;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::Deserializer;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Text files are configurations and indexes of checkpoints; a larger one is no such thing.
const MAX_TEXT: u64 = 64 << 20;
/// The limit of the safetensors format.
const MAX_HEADER: u64 = 100_000_000;
/// A complete new version of a file, on disk beside it; dropped unless committed.
#[derive(Debug)]
pub struct Staged {
    file: NamedTempFile,
    path: PathBuf,
}

impl Staged {
    /// Puts the new version in the place of the old one, in one step.
    pub fn commit(self) -> Result<()> {
        let Self { file, path } = self;
        file.persist(&path).map_err(|e| Error::io(&path, e.error))?;
        // The rename itself lasts only once the folder is on disk.
        #[cfg(unix)]
        File::open(parent(&path)).and_then(|f| f.sync_all()).map_err(|e| Error::io(&path, e))?;
        Ok(())
    }
}

/// The folder of a file.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Writes what will become the file at `path` beside it, so that several files can be replaced once all are complete.
///
/// # Errors
/// When there is something else than a file, the folder cannot be written to, the disk is full, or `write` fails; no
/// partial file remains.
pub fn stage(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<Staged> {
    stage_file(path, |file| write(file))
}

/// As [`stage`], for what is not written in order.
///
/// # Errors
/// As [`stage`].
pub fn stage_file(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<&File>) -> std::io::Result<()>,
) -> Result<Staged> {
    let path = path.as_ref();
    let folder = parent(path);
    if !folder.is_dir() {
        return Err(Error::file(path, format!("there is no folder {}", folder.display())));
    }
    // A new file would take the place of a device, such as /dev/null, for every program.
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(Error::file(
            path,
            "is a folder, device or pipe; expected a file, or a name for a new one",
        ));
    }
    // Errors are without the name of the temporary file, which is no matter of the user's.
    let failed = |e: std::io::Error| Error::io(path, e);
    let file = temporary().tempfile_in(folder).map_err(|e| failed(e.kind().into()))?;
    let mut buffered = BufWriter::with_capacity(1 << 20, file.as_file());
    write(&mut buffered).map_err(failed)?;
    buffered.into_inner().map_err(|e| failed(e.into_error()))?;
    file.as_file().sync_all().map_err(failed)?;
    Ok(Staged { file, path: path.to_path_buf() })
}

/// Temporary files that end as ordinary ones have the permissions of ordinary ones, not of secrets.
fn temporary() -> tempfile::Builder<'static, 'static> {
    #[cfg_attr(not(unix), allow(unused_mut))]
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666)); // less the umask
    }
    builder
}

/// Replaces the file at `path` by what `write` produces, or leaves it as it was.
///
/// [Example](crate::write_tensors)
///
/// # Errors
/// When the folder cannot be written to, the disk is full, or `write` fails; no partial file remains.
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    stage(path, write)?.commit()
}

/// Refuses the empty name, as of a variable that is not set. Systems take it for the folder that the program runs in
/// when files are written, and for none when they are read.
pub(crate) fn check_folder_name(path: &Path) -> Result<()> {
    match path.as_os_str().is_empty() {
        true => {
            Err(Error::config("the name of a folder is empty; . is that where the program runs"))
        }
        false => Ok(()),
    }
}

/// Creates a folder and its parents.
pub fn create_dir(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    check_folder_name(path)?;
    if path.exists() && !path.is_dir() {
        let message = "is a file; expected a folder, or a name for a new one";
        return Err(Error::io(path, std::io::Error::new(ErrorKind::NotADirectory, message)));
    }
    std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))
}

/// Waits for a folder's lock, and keeps it until the result is dropped: `File::lock` to write files that belong
/// together, `File::lock_shared` to read them. Without effect where the system does not lock folders.
pub(crate) fn locked(folder: &Path, lock: fn(&File) -> std::io::Result<()>) -> Option<File> {
    let folder = File::open(folder).ok()?;
    lock(&folder).is_ok().then_some(folder)
}

/// Reads a text file of at most 64 MiB.
pub fn read_text(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_TEXT + 1).read_to_string(&mut text))
        .map_err(|e| Error::io(path, e))?;
    if text.len() as u64 > MAX_TEXT {
        return Err(Error::file(path, format!("larger than {MAX_TEXT} bytes, not a text file")));
    }
    Ok(text)
}

/// Reads a JSON file of some kind, which the error names. A byte order mark, as editors on Windows write it, is
/// skipped.
///
/// # Errors
/// - as [`read_text`];
/// - another kind of file is in its place;
/// - the text is not of this kind.
pub(crate) fn read_json<T: DeserializeOwned>(path: impl AsRef<Path>, kind: &str) -> Result<T> {
    let path = path.as_ref();
    let text = read_text(path)?;
    if let Some(what) = stand_in(text.as_bytes()) {
        return Err(Error::file(path, format!("not {kind}: {what}")));
    }
    let text = text.trim_start_matches('\u{feff}');
    serde_json::from_str(text)
        .map_err(|e| Error::file(path, format!("not {kind}: {e}{}", before(text, &e))))
}

/// The end of a JSON text before an error: it names the value that is wrong.
fn before(text: &str, error: &serde_json::Error) -> String {
    const SHOWN: usize = 60;
    let line = error.line().checked_sub(1).and_then(|line| text.lines().nth(line));
    let part: Vec<char> = line.unwrap_or_default().chars().take(error.column()).collect();
    let part: String = part[part.len().saturating_sub(SHOWN)..].iter().collect();
    match part.trim() {
        "" => String::new(),
        part => format!(", after `{part}`"),
    }
}

/// The first name that a JSON object has twice. Readers differ in which of the two counts.
fn twice(json: &[u8]) -> Option<String> {
    struct Names<'a>(&'a mut Option<String>);
    impl<'de> Visitor<'de> for Names<'_> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
            let mut names = HashSet::new();
            while let Some((name, IgnoredAny)) = map.next_entry::<String, _>()? {
                if !names.insert(name.clone()) {
                    self.0.get_or_insert(name);
                }
            }
            Ok(())
        }
    }
    let mut found = None;
    // The parser below tells every other fault.
    let _ = serde_json::Deserializer::from_slice(json).deserialize_map(Names(&mut found));
    found
}

/// An open safetensors file whose header has been read and checked; its tensors are read one at a time.
///
/// [Example](crate::write_tensors)
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    data_len: u64,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: HashMap<String, String>,
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// When the file cannot be read, is truncated, or its header contradicts itself or the file's length.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let invalid = |e: &dyn std::fmt::Display| {
            Error::file(&path, format!("not a valid safetensors file: {e}"))
        };
        let mut file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let found = file.metadata().map_err(|e| Error::io(&path, e))?;
        if found.is_dir() {
            return Err(Error::file(&path, "is a folder; expected a file"));
        }
        let length = found.len();
        match Kind::of_file(&path) {
            Kind::Foreign(what) => return Err(Error::file(&path, what)),
            Kind::Pickle => return Err(Error::file(&path, PICKLE)),
            Kind::Zip => return Err(invalid(&"it is a zip archive, as torch.save writes")),
            Kind::Json => return Err(Error::file(&path, "a JSON text, not weights")),
            Kind::Unknown => {}
        }
        let mut prefix = [0u8; 8];
        file.read_exact(&mut prefix).map_err(|_| {
            invalid(&format!("{length} bytes, fewer than the 8 that its first number has"))
        })?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > MAX_HEADER {
            return Err(invalid(&format!(
                "its first bytes are no length of a header, which is {MAX_HEADER} bytes at most"
            )));
        }
        if header_length > length.saturating_sub(8) {
            return Err(invalid(&format!(
                "the file of {length} bytes ends within its header of {header_length}: it is truncated"
            )));
        }
        let mut header = vec![0u8; header_length as usize];
        file.read_exact(&mut header).map_err(|e| invalid(&e))?;
        if let Some(name) = twice(&header) {
            return Err(invalid(&format!("its header has {name} twice")));
        }
        // Parsing checks that the tensors fill the data without gap or overlap, each as large as its shape says.
        let header: Metadata = serde_json::from_slice(&header).map_err(|e| invalid(&e))?;
        let data_start = 8 + header_length;
        let (expected, found) = (header.data_len() as u64, length - data_start);
        if expected != found {
            let truncated = if found < expected { ": the file is truncated" } else { "" };
            return Err(invalid(&format!(
                "{found} bytes of data, the header says {expected}{truncated}"
            )));
        }
        let mut tensors = BTreeMap::new();
        for (name, info) in header.tensors() {
            // An empty tensor may still claim sides whose product overflows.
            let fits =
                info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1))).is_some();
            if !fits {
                return Err(invalid(&format!("tensor {name} has the shape {:?}", info.shape)));
            }
            tensors.insert(name, info.clone());
        }
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { path, file, data_start, data_len: expected, tensors, metadata })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor's name, dtype and shape.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Forgets the tensors whose name `keep` denies.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.tensors.retain(|name, _| keep(name));
    }

    /// The strings stored beside the tensors.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Bytes of all tensors together, those forgotten too.
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Reads one tensor, in the dtype it has in the file.
    ///
    /// # Errors
    /// When there is no such tensor, the file cannot be read, memory has no room for it, or candle lacks the dtype.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.read_with(name, device, |_| ())
    }

    /// As [`Self::read`], and shows the bytes as they are in the file.
    pub(crate) fn read_with(
        &self,
        name: &str,
        device: &Device,
        see: impl FnOnce(&[u8]),
    ) -> Result<Tensor> {
        let invalid =
            |e: &dyn std::fmt::Display| Error::file(&self.path, format!("tensor {name}: {e}"));
        let info = self.tensors.get(name).ok_or_else(|| invalid(&"not in the file"))?;
        if matches!(info.dtype, Dtype::F4 | Dtype::F6_E2M3 | Dtype::F6_E3M2 | Dtype::F8_E8M0) {
            return Err(invalid(&format!("dtype {:?} is not supported", info.dtype)));
        }
        let (start, end) = info.data_offsets;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(end - start)
            .map_err(|_| invalid(&format!("no memory for its {} bytes", end - start)))?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.data_start + start as u64))
            .and_then(|_| file.take((end - start) as u64).read_to_end(&mut bytes))
            .map_err(|e| Error::io(&self.path, e))?;
        see(&bytes);
        let view =
            TensorView::new(info.dtype, info.shape.clone(), &bytes).map_err(|e| invalid(&e))?;
        candle_core::safetensors::Load::load(&view, device).map_err(|e| invalid(&e))
    }

    /// Reads every tensor.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_all(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        self.tensors.keys().map(|name| Ok((name.clone(), self.read(name, device)?))).collect()
    }
}

/// Reads every tensor of a safetensors file, in the dtype it has there.
///
/// [Example](crate::write_tensors)
///
/// # Errors
/// When the file cannot be read, is truncated, lies about its sizes, or holds a dtype candle lacks.
pub fn read_tensors(path: impl AsRef<Path>, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    TensorFile::open(path)?.read_all(device)
}

/// Writes tensors as a safetensors file, atomically, with `{"format": "pt"}` as Python libraries expect it. One
/// tensor at a time is copied.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::{read_tensors, write_atomic, write_tensors, TensorFile};
/// use std::{collections::BTreeMap, io::Write};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let path = std::env::temp_dir().join("candle-sam-lora-tensors.safetensors");
/// let table = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
/// write_tensors(&path, &BTreeMap::from([("table".to_string(), table)]))?;
/// assert_eq!(read_tensors(&path, &Device::Cpu)?["table"].to_vec1::<f32>()?, [1.0, 2.0]);
/// let file = TensorFile::open(&path)?; // the header alone
/// assert_eq!(file.read("table", &Device::Cpu)?.dims(), [2]);
/// write_atomic(path.with_extension("txt"), |file| file.write_all(b"a table of two numbers"))?;
/// # Ok(())
/// # }
/// ```
pub fn write_tensors(path: impl AsRef<Path>, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    stage_tensors(path, tensors)?.commit()
}

/// As [`write_tensors`], up to the last step.
pub fn stage_tensors(path: impl AsRef<Path>, tensors: &BTreeMap<String, Tensor>) -> Result<Staged> {
    let path = path.as_ref();
    use DType::{BF16, F16, F32, F64, I16, I32, I64, U32, U8};
    let invalid = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
    // Wide elements first, so that each tensor is aligned to its elements, as the format recommends.
    let mut sorted: Vec<(&String, &Tensor)> = tensors.iter().collect();
    sorted.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));
    let mut offset = 0;
    let mut infos = Vec::with_capacity(sorted.len());
    for (name, tensor) in &sorted {
        if !matches!(tensor.dtype(), U8 | U32 | I16 | I32 | I64 | F16 | BF16 | F32 | F64) {
            return Err(invalid(&format!("tensor {name} has the dtype {:?}", tensor.dtype())));
        }
        let end = offset + tensor.elem_count() * tensor.dtype().size_in_bytes();
        let (dtype, shape) = (tensor.dtype().into(), tensor.dims().to_vec());
        infos.push((name.to_string(), TensorInfo { dtype, shape, data_offsets: (offset, end) }));
        offset = end;
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let header = Metadata::new(Some(metadata), infos).map_err(|e| invalid(&e))?;
    let mut header = serde_json::to_vec(&header).map_err(|e| invalid(&e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    stage(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (_, tensor) in &sorted {
            let tensor = tensor.to_device(&Device::Cpu).map_err(std::io::Error::other)?;
            file.write_all(&safetensors::View::data(&tensor))?;
        }
        Ok(())
    })
}
