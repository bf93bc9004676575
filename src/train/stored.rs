//! The bytes of a data set's file: a file on disk, or an entry of a TAR.

use crate::sam::read_file;
use crate::{Error, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the bytes of a file are.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// The path of the file; of an entry the TAR's and the entry's.
    pub path: PathBuf,
    entry: Option<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    tar: Arc<Path>,
    offset: u64,
    len: u64,
}

impl Stored {
    /// A file on disk.
    pub fn file(path: PathBuf) -> Self {
        Self { path, entry: None }
    }

    /// The bytes `offset..offset + len` of a TAR, which has them under this name.
    pub fn entry(tar: &Arc<Path>, name: &str, offset: u64, len: u64) -> Self {
        Self { path: tar.join(name), entry: Some(Entry { tar: tar.clone(), offset, len }) }
    }

    /// How many bytes there are.
    ///
    /// # Errors
    /// - the file cannot be looked at.
    pub fn len(&self) -> Result<u64> {
        match &self.entry {
            Some(entry) => Ok(entry.len),
            None => std::fs::metadata(&self.path)
                .map(|file| file.len())
                .map_err(|e| Error::io(&self.path, e)),
        }
    }

    /// The bytes.
    ///
    /// # Errors
    /// - the file cannot be read, or the TAR became shorter.
    pub fn read(&self) -> Result<Vec<u8>> {
        let failed = |e| Error::io(&self.path, e);
        let Some(Entry { tar, offset, len }) = &self.entry else {
            return read_file(&self.path);
        };
        let mut file = File::open(tar).map_err(failed)?;
        file.seek(SeekFrom::Start(*offset)).map_err(failed)?;
        let mut bytes = vec![];
        file.take(*len).read_to_end(&mut bytes).map_err(failed)?;
        match bytes.len() as u64 == *len {
            true => Ok(bytes),
            false => Err(Error::file(&self.path, "the TAR became shorter")),
        }
    }
}
