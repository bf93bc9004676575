//! Names what stands in a file's place: pointers, pages of errors, and formats that are not read here.

/// Tells by their beginning what bytes are that were taken for an image, weights or annotations.
///
/// `None` where nothing is recognised.
pub fn stand_in(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(256)]).to_lowercase();
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let said = |message: &str| Some(message.to_string());
    if bytes.is_empty() {
        return said("the file is empty: 0 bytes");
    }
    if bytes.iter().all(|byte| *byte == 0) {
        return said("every byte is 0: the file was never filled, as after a broken download");
    }
    if text.starts_with("version https://git-lfs.github.com/spec/") {
        return said("it is a git-LFS pointer, not the file itself: run `git lfs pull`");
    }
    if text.starts_with("<!doctype html") || text.starts_with("<html") {
        return said("it is an HTML page: the download got a page of the site, not the file");
    }
    if text.starts_with("<?xml") || text.starts_with("<svg") || text.starts_with("<error") {
        return said("it is XML, as an SVG drawing or the error message of a server");
    }
    KINDS
        .iter()
        .find(|(place, magic, _, _)| bytes.get(*place..).is_some_and(|b| b.starts_with(magic)))
        .map(|(_, _, kind, advice)| format!("it is {kind}, which is not read here; {advice}"))
}

/// Offset, first bytes, the name of a format, and what to do with it.
const KINDS: [(usize, &[u8], &str, &str); 17] = [
    (0, b"\x93NUMPY", "a NumPy array (.npy)", "write it as PNG or TIFF"),
    (128, b"DICM", "a DICOM file", "write its pixels as TIFF"),
    (344, b"n+1\0", "a NIfTI volume", "write its slices as TIFF"),
    (0, b"\x89HDF\r\n", "an HDF5 file", "write its pixels as TIFF"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image", "write it as PNG or TIFF"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", "write it as PNG or TIFF"),
    (4, b"ftypavif", "an AVIF image", "write it as PNG"),
    (4, b"ftyphe", "a HEIC image", "write it as PNG or JPEG"),
    (4, b"ftypmif1", "a HEIF image", "write it as PNG or JPEG"),
    (0, b"8BPS", "a Photoshop file", "write it as PNG or TIFF"),
    (0, b"%PDF", "a PDF document", "write its pages as PNG"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it first"),
    (0, b"(\xb5/\xfd", "a zstd archive", "unpack it first"),
    (0, b"Rar!", "a RAR archive", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
];

#[cfg(test)]
mod tests {
    use super::stand_in;

    #[test]
    fn stand_ins_are_named() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        for (bytes, expected) in [
            (&pointer[..], "git lfs pull"),
            (b"\n <!DOCTYPE html><html>", "HTML page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "error message of a server"),
            (b"", "0 bytes"),
            (&[0; 999], "never filled"),
            (b"\x93NUMPY\x01\0", ".npy"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (b"\0\0\0\x20ftypavif", "AVIF"),
        ] {
            let named = stand_in(bytes).unwrap_or_default();
            assert!(named.contains(expected), "{expected}: {named}");
        }
        assert_eq!(stand_in(b"\x89PNG\r\n\x1a\n"), None);
        assert_eq!(stand_in(b"x"), None);
    }
}
