//! The zip archive around a pickle: where its entries lie, and their bytes.

use crate::{Error, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use zip::{CompressionMethod, ZipArchive};

/// Where an entry of the archive lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub start: u64,
    pub size: u64,
    /// 0 where the writer computed none.
    pub crc: u32,
}

/// The entries of an archive by their names.
pub(super) fn entries(
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
pub(super) fn shown<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<String> =
        names.take(SHOWN + 1).map(|name| name.chars().take(80).collect()).collect();
    match names.get(..SHOWN).filter(|_| names.len() > SHOWN) {
        Some(first) => format!("{}, ...", first.join(", ")),
        None => names.join(", "),
    }
}

/// Reads `size` bytes, for which room is made as they come.
pub(super) fn read_at(file: &File, path: &Path, start: u64, size: usize) -> Result<Vec<u8>> {
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
