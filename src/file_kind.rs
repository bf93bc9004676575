//! Tells a file by its first bytes, so that an error speaks of the file and not of the decoder that met it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes that are looked at.
const START: usize = 512;

/// The way out for [`Kind::Pickle`].
pub(crate) const PICKLE: &str = "a pickle without an archive around it, as torch.save wrote before PyTorch 1.6; it is not \
                                 read here. Convert it: torch.save(torch.load(old, weights_only=True), new)";

/// The format of a file of tensors, as its first bytes tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A zip archive, as `torch.save` writes it.
    Zip,
    /// A pickle without an archive around it, as `torch.save` wrote it before PyTorch 1.6.
    Pickle,
    /// A file that holds no tensors here; the text says what it is and what helps.
    Foreign(&'static str),
    /// Anything else, safetensors among it.
    Unknown,
}

/// First bytes and the files that begin with them.
const FOREIGN: [(&[u8], &str); 13] = [
    (
        b"version https://git-lfs",
        "a git-LFS pointer and not the file itself: run `git lfs pull`, or download the file again",
    ),
    (
        b"\x89HDF",
        "an HDF5 file, as Keras writes it, not weights of SAM in safetensors or PyTorch's format",
    ),
    (b"GGUF", "a GGUF file, not weights in safetensors or PyTorch's format"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x93NUMPY", "an array of NumPy, not weights in safetensors or PyTorch's format"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
];

impl Kind {
    /// The kind of the file at `path`; [`Unknown`](Self::Unknown) where it cannot be read, which opening it tells.
    pub fn of_file(path: &Path) -> Self {
        let mut start = Vec::with_capacity(START);
        match File::open(path).and_then(|file| file.take(START as u64).read_to_end(&mut start)) {
            Ok(_) if path.is_file() => Self::of(&start),
            _ => Self::Unknown,
        }
    }

    /// The kind of a file that begins with these bytes.
    pub fn of(start: &[u8]) -> Self {
        // The header of safetensors is JSON behind its length.
        if start.get(8) == Some(&b'{') && start.get(6..8) == Some(&[0, 0]) {
            return Self::Unknown;
        }
        if start.is_empty() {
            return Self::Foreign("empty, 0 bytes: the download or the disk failed");
        }
        if let Some((_, what)) = FOREIGN.iter().find(|(bytes, _)| start.starts_with(bytes)) {
            return Self::Foreign(what);
        }
        if start.starts_with(b"PK\x03\x04") {
            return Self::Zip;
        }
        if let [0x80, 2..=5, ..] = start {
            return Self::Pickle;
        }
        if start.get(257..262) == Some(b"ustar") {
            return Self::Foreign("a tar archive: unpack it first");
        }
        let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
        let begins = |tag: &str| {
            text.get(..tag.len()).is_some_and(|t| t.eq_ignore_ascii_case(tag.as_bytes()))
        };
        if ["<!doctype", "<html", "<head", "<?xml", "<!--"].into_iter().any(begins) {
            return Self::Foreign(
                "a web page (HTML) and not the file: the download needs another address or a login",
            );
        }
        match text.first() {
            Some(b'{' | b'[') => Self::Foreign("a JSON text, not weights"),
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Kind;

    #[test]
    fn files_are_told_by_their_first_bytes() {
        let header = [&24u64.to_le_bytes()[..], b"{\"__metadata__\":"].concat();
        assert_eq!(Kind::of(&header), Kind::Unknown);
        assert_eq!(Kind::of(b"PK\x03\x04\0\0\x08\x08"), Kind::Zip);
        assert_eq!(Kind::of(b"\x80\x02\x8a\x0al\xfc"), Kind::Pickle);
        for (start, word) in [
            (&b""[..], "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b"<HTML><body>", "web page"),
            (b"{\"error\": \"Not Found\"}", "JSON"),
            (b"\x89HDF\r\n\x1a\n", "HDF5"),
        ] {
            assert!(
                matches!(Kind::of(start), Kind::Foreign(what) if what.contains(word)),
                "{word}"
            );
        }
    }
}
