//! Where a checkpoint's tensors lie: one safetensors file, or several with an index.

use crate::files::{self, TensorFile};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use safetensors::tensor::TensorInfo;
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
    /// What the caller named, for messages.
    pub path: PathBuf,
    files: Vec<TensorFile>,
    /// Which file holds a tensor.
    names: HashMap<String, usize>,
}

impl Source {
    /// Opens a `.safetensors` file, an `.index.json`, or the one of them that a folder holds.
    pub fn open(path: &Path) -> Result<Self> {
        let mut found = path.to_path_buf();
        if path.is_dir() {
            found = path.join("model.safetensors");
            if !found.exists() {
                found = path.join("model.safetensors.index.json");
            }
            if !found.exists() {
                return Err(Error::file(
                    path,
                    "the folder has neither model.safetensors nor model.safetensors.index.json",
                ));
            }
        }
        let extension = found.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let paths = match extension {
            "json" => shards(&found)?,
            "pth" | "pt" | "bin" | "ckpt" => return Err(Error::file(
                path,
                "a pickled PyTorch checkpoint can run code when read; convert it to safetensors",
            )),
            _ => vec![found],
        };
        let files = paths.iter().map(TensorFile::open).collect::<Result<Vec<_>>>()?;
        let mut names = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            for name in file.tensors().keys() {
                if names.insert(name.clone(), index).is_some() {
                    let message = format!("tensor {name} is in another file of the checkpoint too");
                    return Err(Error::file(file.path(), message));
                }
            }
        }
        Ok(Self { path: path.to_path_buf(), files, names })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.names.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    fn file(&self, name: &str) -> Result<&TensorFile> {
        let index = self.names.get(name).copied();
        index
            .and_then(|index| self.files.get(index))
            .ok_or_else(|| Error::file(&self.path, format!("tensor {name}: not in the checkpoint")))
    }

    /// Dtype and shape of a tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.file(name)?
            .tensors()
            .get(name)
            .ok_or_else(|| Error::file(&self.path, format!("tensor {name}: not in the checkpoint")))
    }

    /// Reads a tensor in the dtype it has in its file.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.file(name)?.read(name, device)
    }
}

/// The files an index names, each checked to be a plain file name, beside the index and holding what it should.
fn shards(index_path: &Path) -> Result<Vec<PathBuf>> {
    let index: Index = serde_json::from_str(&files::read_text(index_path)?)
        .map_err(|e| Error::file(index_path, format!("not an index of safetensors files: {e}")))?;
    let folder = index_path.parent().unwrap_or(Path::new(""));
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let mut paths = Vec::with_capacity(names.len());
    for name in names {
        let mut components = Path::new(name).components();
        let plain = matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(part)), None) if part.to_str() == Some(name)
        );
        // A backslash or colon is an ordinary character here and a way out of the folder on another system.
        if !plain || name.contains(['\\', ':', '\0']) || !name.ends_with(".safetensors") {
            let message = format!("{name:?} is not the name of a safetensors file in this folder");
            return Err(Error::file(index_path, message));
        }
        paths.push(folder.join(name));
    }
    for path in &paths {
        let shard = TensorFile::open(path)?;
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
