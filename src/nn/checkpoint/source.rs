//! Where a checkpoint's tensors lie: one file, or several with an index.

use super::reader::TensorReader;
use crate::files;
use crate::weights_file::{choose_weights, split_prefix, Choice, USUAL};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use safetensors::tensor::TensorInfo;
use safetensors::Dtype;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

/// `model.safetensors.index.json`, as far as it is needed.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// An opened checkpoint: every header read and checked, no tensor yet.
pub(super) struct Source {
    /// The path that the caller named, for messages.
    pub path: PathBuf,
    pub files: Vec<TensorReader>,
    /// Text before the names of the wanted model's tensors, if the caller named it.
    pub prefix: Option<String>,
    /// Tensors of kinds that are not read, each with its kind.
    pub unread: BTreeMap<String, String>,
    /// Which file holds a tensor.
    names: HashMap<String, usize>,
}

impl Source {
    /// Opens a file of weights, an `.index.json`, or the one of them that a folder holds; see [`split_prefix`].
    pub fn open(path: &Path) -> Result<Self> {
        let (path, prefix) = split_prefix(path);
        let found = weights_file(&path)?;
        let extension = found.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let paths = match extension {
            "json" => shards(&found)?,
            _ => vec![found],
        };
        let files = paths.iter().map(TensorReader::open).collect::<Result<Vec<_>>>()?;
        let (mut names, mut unread) = (HashMap::new(), BTreeMap::new());
        for (index, file) in files.iter().enumerate() {
            unread.extend(file.unread().iter().map(|(name, kind)| (name.clone(), kind.clone())));
            for (name, info) in file.tensors() {
                if is_unread(info.dtype) {
                    unread.insert(name.clone(), info.dtype.to_string().to_lowercase());
                    continue;
                }
                if names.insert(name.clone(), index).is_some() {
                    let message = format!("tensor {name} is in another file of the checkpoint too");
                    return Err(Error::file(file.path(), message));
                }
            }
        }
        // A folder with one file is spoken of as this file.
        let path = match &files[..] {
            [file] => file.path().to_path_buf(),
            _ => path,
        };
        Ok(Self { path, files, prefix, unread, names })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.names.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    fn file(&self, name: &str) -> Result<&TensorReader> {
        let index = self.names.get(name).copied();
        index
            .and_then(|index| self.files.get(index))
            .ok_or_else(|| Error::file(&self.path, format!("tensor {name}: not in the checkpoint")))
    }

    /// Dtype and shape of a tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.file(name)?.info(name)
    }

    /// The number of the dict that holds a tensor.
    pub fn container(&self, name: &str) -> u32 {
        self.file(name).map_or(0, |file| file.container(name))
    }

    /// Reads a tensor in the dtype it has in its file.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.file(name)?.read(name, device)
    }
}

/// Whether a tensor of this dtype cannot become one of candle's.
fn is_unread(dtype: Dtype) -> bool {
    use Dtype::{C64, F4, F6_E2M3, F6_E3M2, F8_E4M3FNUZ, F8_E5M2FNUZ, F8_E8M0};
    matches!(dtype, C64 | F4 | F6_E2M3 | F6_E3M2 | F8_E4M3FNUZ | F8_E5M2FNUZ | F8_E8M0)
}

/// The file of weights, or the index of several, that a path means.
fn weights_file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let mut names: Vec<String> = std::fs::read_dir(path)
        .map_err(|e| Error::io(path, e))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort_unstable();
    match choose_weights(&names.iter().map(String::as_str).collect::<Vec<_>>()) {
        Choice::One(name) => return Ok(path.join(name)),
        Choice::Several(found) => {
            let listed = found.join(", ");
            let message = match found.iter().all(|name| is_shard(name)) {
                true => format!(
                    "has parts of a checkpoint, {listed}, but not their index, {}",
                    USUAL[1]
                ),
                false => format!("several files may be the weights: {listed}; name one"),
            };
            return Err(Error::file(path, message));
        }
        Choice::Nothing => {}
    }
    if names.iter().any(|name| name == "adapter_config.json") {
        let message = "the folder of an adapter, which has no weights of a model";
        return Err(Error::file(path, message));
    }
    const SHOWN: usize = 12;
    let shown = match names.len() {
        0 => "nothing".to_string(),
        _ => names[..names.len().min(SHOWN)].join(", "),
    };
    Err(Error::file(
        path,
        format!(
            "expected weights: {}, or one file of another name that ends in .safetensors, .pth, .pt, .bin or .ckpt; \
             the folder holds {shown}",
            USUAL.join(", ")
        ),
    ))
}

/// Whether a name is that of a part of a checkpoint, as `model-00001-of-00002.safetensors`.
pub(super) fn is_shard(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    stem.rsplit_once("-of-").is_some_and(|(start, of)| {
        digits(of) && start.rsplit_once('-').is_some_and(|(_, number)| digits(number))
    })
}

/// The files an index names, each checked to be a plain file name, beside the index and holding what it should.
fn shards(index_path: &Path) -> Result<Vec<PathBuf>> {
    let index: Index = files::read_json(index_path, "an index of files of weights")?;
    let folder = index_path.parent().unwrap_or(Path::new(""));
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let mut paths = Vec::with_capacity(names.len());
    for name in names {
        let mut components = Path::new(name).components();
        let plain = matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(part)), None) if part.to_str() == Some(name)
        );
        let known = [".safetensors", ".bin", ".pth", ".pt"].iter().any(|end| name.ends_with(end));
        // A backslash or colon is an ordinary character here and a way out of the folder on another system.
        if !plain || name.contains(['\\', ':', '\0']) || !known {
            let message = format!("{name:?} is not the name of a safetensors file or one of torch.save in this folder");
            return Err(Error::file(index_path, message));
        }
        paths.push(folder.join(name));
    }
    for path in &paths {
        let shard = TensorReader::open(path)?;
        let file_name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let listed = index.weight_map.iter().filter(|(_, file)| *file == file_name);
        if let Some((tensor, _)) =
            listed.into_iter().find(|(t, _)| !shard.tensors().contains_key(*t))
        {
            return Err(Error::file(
                path,
                format!("lacks {tensor}, which the index says it holds"),
            ));
        }
    }
    Ok(paths)
}

/// The shape of the tensor with this name, or this name below a prefix, by a checkpoint's headers alone.
pub(crate) fn shape_of(path: &Path, name: &str) -> Result<Vec<usize>> {
    let source = Source::open(path)?;
    let below = format!(".{name}");
    let found: Vec<&str> =
        source.names().into_iter().filter(|n| *n == name || n.ends_with(&below)).collect();
    match found[..] {
        [found] => Ok(source.info(found)?.shape.clone()),
        [] => Err(Error::file(path, format!("has no tensor {name}"))),
        _ => Err(Error::file(path, format!("has several tensors {name}: {}", found.join(", ")))),
    }
}
