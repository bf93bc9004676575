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
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A zip archive, as `torch.save` writes it.
    Zip,
    /// A pickle without an archive around it, as `torch.save` wrote it before PyTorch 1.6.
    Pickle,
    /// A text of JSON.
    Json,
    /// A file that holds no tensors here; the text says what it is and what helps.
    Foreign(String),
    /// Anything else, safetensors among it.
    Unknown,
}

/// A format that is read nowhere here.
struct Foreign {
    /// Where its first bytes stand.
    place: usize,
    start: &'static [u8],
    name: &'static str,
    /// Advice to the user.
    advice: &'static str,
}

const fn foreign(
    place: usize,
    start: &'static [u8],
    name: &'static str,
    advice: &'static str,
) -> Foreign {
    Foreign { place, start, name, advice }
}

const UNPACK: &str = "unpack it first";
const AS_IMAGE: &str = "write an image as PNG or TIFF";

const AS_TIFF: &str = "write its planes as TIFF";
const AS_FRAMES: &str = "write its frames as PNG";

const FOREIGN: [Foreign; 35] = [
    foreign(0, b"\x93NUMPY", "a NumPy array (.npy)", AS_IMAGE),
    foreign(0, b"\x89HDF", "an HDF5 file", "write images as TIFF, weights as safetensors"),
    foreign(0, b"GGUF", "a GGUF file", "write the weights as safetensors"),
    foreign(128, b"DICM", "a DICOM file", "write its pixels as TIFF"),
    foreign(344, b"n+1\0", "a NIfTI volume", "write its slices as TIFF"),
    foreign(0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image", AS_IMAGE),
    foreign(0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", AS_IMAGE),
    foreign(4, b"ftypavif", "an AVIF image", AS_IMAGE),
    foreign(4, b"ftyphe", "a HEIC image", AS_IMAGE),
    foreign(4, b"ftypmif1", "a HEIF image", AS_IMAGE),
    foreign(4, b"ftypmsf1", "a HEIF image", AS_IMAGE),
    foreign(0, b"\xff\x0a", "a JPEG XL image", AS_IMAGE),
    foreign(0, b"\0\0\0\x0cJXL ", "a JPEG XL image", AS_IMAGE),
    foreign(0, b"\x76\x2f\x31\x01", "an OpenEXR image", AS_IMAGE),
    foreign(344, b"ni1\0", "the header of a NIfTI volume", AS_TIFF),
    foreign(4, b"n+2\0", "a NIfTI volume", AS_TIFF),
    foreign(0, b"ZISRAWFILE", "a CZI file of Zeiss", AS_TIFF),
    foreign(0, b"\xda\xce\xbe\x0a", "an ND2 file of Nikon", AS_TIFF),
    foreign(0, b"\x70\0\0\0", "a LIF file of Leica", AS_TIFF),
    foreign(0, b"\xd0\xcf\x11\xe0", "an OLE file, as Olympus' OIB", AS_TIFF),
    foreign(0, b"NRRD000", "an NRRD volume", AS_TIFF),
    foreign(0, b"SIMPLE  =", "a FITS file", AS_TIFF),
    foreign(0, b"MATLAB 5.0", "a MATLAB file", AS_TIFF),
    foreign(4, b"ftyp", "a film (MP4 or MOV)", AS_FRAMES),
    foreign(8, b"AVI LIST", "a film (AVI)", AS_FRAMES),
    foreign(0, b"\x1aE\xdf\xa3", "a film (Matroska or WebM)", AS_FRAMES),
    foreign(0, b"8BPS", "a Photoshop file", AS_IMAGE),
    foreign(0, b"%PDF", "a PDF document", "write its pages as PNG"),
    foreign(0, b"\x1f\x8b", "a gzip archive", UNPACK),
    foreign(0, b"BZh", "a bzip2 archive", UNPACK),
    foreign(0, b"\xfd7zXZ", "an xz archive", UNPACK),
    foreign(0, b"(\xb5/\xfd", "a zstd archive", UNPACK),
    foreign(0, b"Rar!", "a RAR archive", UNPACK),
    foreign(0, b"7z\xbc\xaf", "a 7z archive", UNPACK),
    foreign(257, b"ustar", "a tar archive", UNPACK),
];

/// First letters of texts in the place of a file, in lower case.
const TEXTS: [(&[&str], &str); 3] = [
    (
        &["version https://git-lfs"],
        "a git-LFS pointer and not the file itself: run `git lfs pull`, or download the file again",
    ),
    (
        &["<!doctype html", "<html", "<head", "<!--"],
        "an HTML page, a web page in place of the file: the download needs another address or a login",
    ),
    (&["<?xml", "<svg", "<error"], "XML, as an SVG drawing or the error message of a server"),
];

/// Names the content that stands in a file's place: a pointer, a page, an unfilled file, or a format that is read
/// nowhere here. `None` if nothing is recognised.
pub(crate) fn stand_in(start: &[u8]) -> Option<String> {
    let start = &start[..start.len().min(START)];
    if start.is_empty() {
        return Some("it is empty, 0 bytes: the download or the disk failed".into());
    }
    if start.iter().all(|byte| *byte == 0) && start.len() > 8 {
        return Some("it begins with 0 alone and was never filled: a broken download".into());
    }
    let text = letters(start).to_ascii_lowercase();
    let begins = |words: &[&str]| words.iter().any(|word| text.starts_with(word.as_bytes()));
    if let Some((_, what)) = TEXTS.iter().find(|(words, _)| begins(words)) {
        return Some(format!("it is {what}"));
    }
    let found = FOREIGN
        .iter()
        .find(|format| start.get(format.place..).is_some_and(|b| b.starts_with(format.start)))?;
    Some(format!("it is {}, which is not read here; {}", found.name, found.advice))
}

/// A text without its byte order mark and leading blanks.
fn letters(start: &[u8]) -> &[u8] {
    start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start()
}

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
        if let Some(what) = stand_in(start) {
            return Self::Foreign(what);
        }
        match start {
            [b'P', b'K', 3, 4, ..] => Self::Zip,
            [0x80, 2..=5, ..] => Self::Pickle,
            [0x89, b'P', b'N', b'G', ..] => Self::Foreign("it is a PNG image, no weights".into()),
            [0xff, 0xd8, 0xff, ..] => Self::Foreign("it is a JPEG image, no weights".into()),
            _ if matches!(letters(start).first(), Some(b'{' | b'[')) => Self::Json,
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{stand_in, Kind};

    #[test]
    fn files_are_told_by_their_first_bytes() {
        let header = [&24u64.to_le_bytes()[..], b"{\"__metadata__\":"].concat();
        assert_eq!(Kind::of(&header), Kind::Unknown);
        assert_eq!(Kind::of(b"PK\x03\x04\0\0\x08\x08"), Kind::Zip);
        assert_eq!(Kind::of(b"\x80\x02\x8a\x0al\xfc"), Kind::Pickle);
        assert_eq!(Kind::of(b"{\"error\": \"Not Found\"}"), Kind::Json);
        assert!(
            matches!(Kind::of(b"\x89PNG\r\n\x1a\n"), Kind::Foreign(what) if what.contains("PNG"))
        );
    }

    #[test]
    fn stand_ins_are_named() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        for (bytes, expected) in [
            (&pointer[..], "git lfs pull"),
            (b"\n <!DOCTYPE html><html>", "web page"),
            (b"\xef\xbb\xbf<HTML><body>", "HTML page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "error message of a server"),
            (b"", "0 bytes"),
            (&[0; 999], "never filled"),
            (b"\x93NUMPY\x01\0", ".npy"),
            (b"\x89HDF\r\n\x1a\n", "HDF5"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (b"\0\0\0\x20ftypavif", "AVIF"),
            (b"\0\0\0\x20ftypisom", "a film"),
            (b"ZISRAWFILE\0\0", "CZI"),
            (b"\xda\xce\xbe\x0a\0", "ND2"),
            (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        ] {
            let named = stand_in(bytes).unwrap_or_default();
            assert!(named.contains(expected), "{expected}: {named}");
            assert_eq!(Kind::of(bytes), Kind::Foreign(named));
        }
        assert_eq!(stand_in(b"\x89PNG\r\n\x1a\n"), None);
        assert_eq!(stand_in(b"x"), None);
    }
}
