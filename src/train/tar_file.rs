//! The entries of a TAR, by their offsets: an entry is read by a seek, and nothing is unpacked.

use super::stored::Stored;
use crate::file_kind::Kind;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path};
use std::sync::Arc;
use tar::{Archive, EntryType};

/// A header, and what sizes of entries are rounded up to.
const BLOCK: u64 = 512;
/// First bytes of files that tools pack a TAR into, and the tool that unpacks them.
const PACKED: [(&[u8], &str, &str); 6] = [
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    (b"PK\x03\x04", "zip", "unzip and tar"),
];

/// A file in a TAR.
#[derive(Debug)]
pub(super) struct TarEntry {
    /// Its path within the TAR, without `./`.
    pub name: String,
    /// Its bytes.
    pub stored: Stored,
}

/// The files in a TAR, but hidden ones, in its order; faults of single entries go to `faults`.
///
/// # Errors
/// - the file is no TAR, is compressed, or is cut off;
/// - its entries do not fit into it, or something follows its end.
pub(super) fn entries(path: &Path, faults: &mut Vec<Error>) -> Result<Vec<TarEntry>> {
    let io = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let mut first = vec![];
    (&mut file).take(6).read_to_end(&mut first).map_err(io)?;
    if let Some((_, by, with)) = PACKED.iter().find(|(magic, ..)| first.starts_with(magic)) {
        let message = format!(
            "is compressed by {by}, and a sample is read by its offset: unpack it with {with}"
        );
        return Err(Error::file(path, message));
    }
    file.rewind().map_err(io)?;
    let tar: Arc<Path> = path.into();
    let (mut found, mut names) = (vec![], BTreeMap::<String, u64>::new());
    let (mut last, mut end) = (String::new(), 0u64);
    let after = |last: &str| match last {
        "" => String::new(),
        last => format!(", after its entry {last}"),
    };
    let mut archive = Archive::new(file);
    for entry in archive.entries_with_seek().map_err(io)? {
        let entry = entry.map_err(|e| {
            match (end, Kind::of_file(path)) {
                (0, Kind::Foreign(what)) => {
                    Error::file(path, format!("is no TAR and no folder: {what}"))
                }
                // The bytes in the place of its numbers are no matter of the user's.
                (0, _) => Error::file(path, "is no TAR and no folder"),
                _ => {
                    Error::file(path, format!("is a damaged or truncated TAR{}: {e}", after(&last)))
                }
            }
        })?;
        let bytes = entry.path_bytes().into_owned();
        let name = String::from_utf8_lossy(&bytes).into_owned();
        let (offset, len) = (entry.raw_file_position(), entry.size());
        end = match offset.checked_add(len) {
            Some(end) if end <= length => end.div_ceil(BLOCK) * BLOCK,
            _ => {
                let message = format!(
                    "is a truncated TAR: its entry {name} has {len} bytes from {offset} on, the file has {length}"
                );
                return Err(Error::file(path, message));
            }
        };
        last.clone_from(&name);
        let kind = entry.header().entry_type();
        let mut fault = |message: &str| faults.push(Error::file(path.join(&name), message));
        let parts = || Path::new(&name).components();
        let is_inside =
            parts().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        match kind {
            EntryType::Directory | EntryType::XGlobalHeader => continue,
            _ if String::from_utf8(bytes).is_err() => fault("the name is not valid Unicode"),
            _ if !is_inside || name.contains('\\') => fault("the name leads out of the TAR"),
            EntryType::Regular | EntryType::Continuous => {
                let name = name.trim_start_matches("./").to_string();
                let last = name.rsplit('/').next().unwrap_or_default();
                match names.insert(name.clone(), offset) {
                    _ if last.starts_with('.') => {}
                    Some(_) => fault("is in the TAR twice"),
                    None => {
                        let stored = Stored::entry(&tar, &name, offset, len);
                        found.push(TarEntry { name, stored });
                    }
                }
            }
            kind => fault(&format!("is no plain file in the TAR, but of the type {kind:?}")),
        }
    }
    check_end(path, end, &after(&last))?;
    Ok(found)
}

/// Fails unless zeros follow the last entry, a block at least, and nothing else.
fn check_end(path: &Path, end: u64, after: &str) -> Result<()> {
    let io = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io)?;
    file.seek(SeekFrom::Start(end)).map_err(io)?;
    let (mut block, mut zeros) = ([0; 1 << 16], 0);
    loop {
        match file.read(&mut block).map_err(io)? {
            0 if zeros < BLOCK => {
                let message = format!("is a truncated TAR: it has no end{after}");
                return Err(Error::file(path, message));
            }
            0 => return Ok(()),
            read if block[..read].iter().all(|byte| *byte == 0) => zeros += read as u64,
            _ => {
                let message = format!(
                    "has more behind its end{after}: name TARs one by one, do not join them"
                );
                return Err(Error::file(path, message));
            }
        }
    }
}
