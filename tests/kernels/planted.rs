//! Copies of the kernels' headers with a bug in one file.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A folder of this name with copies of all headers below `kernels`, where `planted` stands in place of `original` in
/// `file`: a path below `kernels`, or the `tests/kernels/..` of a test, which is copied into the folder itself.
pub fn copy_with(name: &str, file: &str, original: &str, planted: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted_bugs").join(name);
    copy_headers(&root.join("kernels"), &folder);
    let (source, copy) = match file.strip_prefix("tests/kernels/") {
        Some(of_test) => (root.join(file), folder.join(Path::new(of_test).file_name().unwrap())),
        None => (root.join("kernels").join(file), folder.join(file)),
    };
    let text = fs::read_to_string(&source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
    let found = places(&text, original);
    let [place] = &found[..] else { panic!("{file} holds {} times: {original:?}", found.len()) };
    fs::write(copy, [&text[..place.start], planted, &text[place.end..]].concat()).unwrap();
    folder
}

/// The places of `wanted` in `text`, whatever white space stands in either: line breaks may move.
pub fn places(text: &str, wanted: &str) -> Vec<Range<usize>> {
    let solid = |text: &str| -> Vec<(usize, char)> {
        text.char_indices().filter(|(_, c)| !c.is_whitespace()).collect()
    };
    let (text, wanted) = (solid(text), solid(wanted));
    let is_wanted = |window: &&[(usize, char)]| window.iter().zip(&wanted).all(|(a, b)| a.1 == b.1);
    let place = |window: &[(usize, char)]| {
        let (end, last) = window[window.len() - 1];
        window[0].0..end + last.len_utf8()
    };
    text.windows(wanted.len()).filter(is_wanted).map(place).collect()
}

fn copy_headers(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for path in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let copy = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_headers(&path, &copy);
        } else if path.extension().is_some_and(|e| e == "cuh" || e == "h") {
            fs::copy(path, copy).unwrap();
        }
    }
}
