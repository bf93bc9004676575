//! Images and masks of folders and TARs, paired by their names, wherever each is.

use super::stored::Stored;
use super::tar_file;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use unicode_normalization::UnicodeNormalization;

/// File name endings taken for images; other files in the folders are left alone, hidden ones too.
const ENDINGS: [&str; 13] =
    ["png", "apng", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "gif", "pbm", "pgm", "ppm", "pnm"];

/// Suffixes of file names, before their endings.
///
/// [Example](crate::train::Dataset)
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Suffixes {
    /// Suffix of images, as `_image`.
    pub image: String,
    /// Suffix of masks, as `_mask`.
    pub mask: String,
}

/// An image and its mask.
#[derive(Debug)]
pub(super) struct Named {
    /// The stem of the image.
    pub name: String,
    /// The file.
    pub image: Stored,
    /// Its mask's.
    pub mask: Stored,
}

/// The pairs of images and masks, by the images' names, and everything that is wrong with their names. Several folders or
/// TARs are read as one folder with all their files.
///
/// # Errors
/// - a folder or TAR cannot be read, or has no image;
/// - one folder is given for both, and nothing tells images from masks.
pub(super) fn pairs(
    images: &[PathBuf],
    masks: &[PathBuf],
    suffixes: &Suffixes,
) -> Result<(Vec<Named>, Vec<Error>)> {
    let mut faults = vec![];
    let (image_files, mask_files) = (files(images, &mut faults)?, files(masks, &mut faults)?);
    let of_images = |folder: &&PathBuf| images.iter().any(|other| same_folder(folder, other));
    let same = masks.iter().find(of_images);
    if let Some(folder) = same.filter(|_| suffixes.mask == suffixes.image) {
        return Err(Error::file(
            folder,
            "is the folder of the images too: name that of the masks, or what their names end with (--mask-suffix)",
        ));
    }
    let same = same.is_some();
    let mut by_name = BTreeMap::new();
    for file in mask_files {
        let Some(key) = key(&file.path, &suffixes.mask) else { continue };
        if same && suffixes.mask.is_empty() && stem(&file.path).ends_with(&suffixes.image) {
            continue;
        }
        insert(&mut by_name, key, file, &mut faults);
    }
    let mut wanted = BTreeMap::new();
    for file in image_files {
        let Some(key) = key(&file.path, &suffixes.image) else { continue };
        if same && suffixes.image.is_empty() && stem(&file.path).ends_with(&suffixes.mask) {
            continue;
        }
        insert(&mut wanted, key, file, &mut faults);
    }
    let named = |places: &[PathBuf]| {
        let names = places.iter().map(|place| place.display().to_string());
        names.collect::<Vec<_>>().join(", ")
    };
    if wanted.is_empty() && faults.is_empty() {
        let message = format!("has no image whose name ends with {}", suffixes.image);
        return Err(Error::file(named(images), message));
    }
    let mut pairs = vec![];
    for (key, image) in wanted {
        let full =
            image.path.file_name().map(|name| nfc(&name.to_string_lossy())).unwrap_or_default();
        let found = [&key, &full].into_iter().find(|name| by_name.contains_key(*name)).cloned();
        match found.or_else(|| same_but_case(&by_name, &key)).and_then(|name| by_name.remove(&name))
        {
            Some(mask) => pairs.push(Named { name: stem(&image.path), image, mask }),
            None => {
                let hint = suffix_hint(&by_name, &key, &suffixes.mask);
                let stem = format!("{key}{}", suffixes.mask);
                let message =
                    format!("has no mask: {} has no file of this stem, {stem}{hint}", named(masks));
                faults.push(Error::file(&image.path, message));
            }
        }
    }
    for mask in by_name.values() {
        let message = format!("has no image: {} has no file of this stem", named(images));
        faults.push(Error::file(&mask.path, message));
    }
    Ok((pairs, faults))
}

fn insert(
    files: &mut BTreeMap<String, Stored>,
    key: String,
    file: Stored,
    faults: &mut Vec<Error>,
) {
    match files.get(&key) {
        Some(other) => {
            let message = format!("has the same stem as {}", other.path.display());
            faults.push(Error::file(&file.path, message));
        }
        None => {
            files.insert(key, file);
        }
    }
}

/// The image files of folders and TARs.
fn files(places: &[PathBuf], faults: &mut Vec<Error>) -> Result<Vec<Stored>> {
    let mut all = vec![];
    for place in places {
        if !place.is_file() {
            all.extend(in_folder(place, faults)?.into_iter().map(Stored::file));
            continue;
        }
        let files = tar_file::entries(place, faults)?.into_iter().map(|entry| entry.stored);
        let ending = |path: &Path| path.extension().map(|e| e.to_string_lossy().to_lowercase());
        let before = all.len();
        all.extend(files.filter(|file| ending(&file.path).is_some_and(|e| is_image(&e))));
        if all.len() == before {
            let message = format!("the TAR has no image ({})", ENDINGS.join(", "));
            return Err(Error::file(place, message));
        }
    }
    Ok(all)
}

/// Whether a name's ending, in small letters, is an image's.
pub(super) fn is_image(ending: &str) -> bool {
    ENDINGS.contains(&ending)
}

/// The image files of a folder in the order of their names.
fn in_folder(folder: &Path, faults: &mut Vec<Error>) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let ending = path.extension().and_then(|e| e.to_str()).map(str::to_lowercase);
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let is_hidden = name.is_none_or(|name| name.starts_with('.'));
        if is_hidden || !ending.is_some_and(|e| is_image(&e)) || path.is_dir() {
            continue;
        }
        if path.file_stem().and_then(|stem| stem.to_str()).is_none() {
            faults.push(Error::file(&path, "the file name is not valid Unicode"));
        } else if !path.exists() {
            faults.push(Error::file(&path, "is a link to a file that is not there"));
        } else {
            files.push(path);
        }
    }
    if files.is_empty() && faults.is_empty() {
        let message = format!("the folder has no image ({})", ENDINGS.join(", "));
        return Err(Error::file(folder, message));
    }
    files.sort();
    Ok(files)
}

/// The file's name without its ending, and without `.ome`, composed as most systems write it.
fn stem(path: &Path) -> String {
    let stem = nfc(&path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default());
    stem.strip_suffix(".ome").map(str::to_string).unwrap_or(stem)
}

fn nfc(name: &str) -> String {
    name.nfc().collect()
}

/// The stem without its suffix, if it has it.
fn key(path: &Path, suffix: &str) -> Option<String> {
    stem(path).strip_suffix(&nfc(suffix)).map(str::to_string)
}

fn same_folder(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// The one name that differs in case alone.
fn same_but_case(names: &BTreeMap<String, Stored>, name: &str) -> Option<String> {
    let lower = name.to_lowercase();
    only(names.keys().filter(|other| other.to_lowercase() == lower)).cloned()
}

/// Which suffix would find a mask.
fn suffix_hint(masks: &BTreeMap<String, Stored>, image: &str, suffix: &str) -> String {
    let longer = masks.keys().filter_map(|mask| mask.strip_prefix(image));
    match longer.filter(|rest| rest.starts_with(['_', '-', '.', ' '])).min_by_key(|rest| rest.len())
    {
        Some(rest) => format!("; it has {image}{rest}{suffix}: try --mask-suffix {rest}{suffix}"),
        None => String::new(),
    }
}

/// Where an image of annotations is, and whether it is there under another path, case or ending than its name says.
pub(super) fn on_disk(folder: &Path, name: &str) -> (PathBuf, bool) {
    let whole = folder.join(name);
    let slashes = name.replace('\\', "/");
    let (written, last) = (folder.join(&slashes), slashes.rsplit('/').next().unwrap_or(name));
    if let Some(path) = [&whole, &written].into_iter().find(|path| path.exists()) {
        return (path.clone(), false);
    }
    if folder.join(last).exists() {
        return (folder.join(last), true);
    }
    let lower = |path: &Path| path.to_string_lossy().to_lowercase();
    let names = || {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| PathBuf::from(entry.file_name()))
    };
    let is_image = |path: &Path| {
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        ending.is_some_and(|ending| self::is_image(&ending))
    };
    // An image written in another format has the stem, or the name if that has no ending.
    let wanted = Path::new(last);
    let stem = if is_image(wanted) { wanted.with_extension("") } else { wanted.to_path_buf() };
    let same_name = names().filter(|path| lower(path) == lower(wanted));
    let same_stem =
        names().filter(|path| is_image(path) && lower(&path.with_extension("")) == lower(&stem));
    let found = only(same_name).or_else(|| only(same_stem));
    found.map_or((whole, false), |name| (folder.join(name), true))
}

/// The one item, if there is one alone.
fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    items.next().filter(|_| items.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(images: &[&str], masks: &[&str]) -> (tempfile::TempDir, PathBuf, PathBuf) {
        let root = tempfile::tempdir().expect("a folder");
        let (a, b) = (root.path().join("images"), root.path().join("masks"));
        for (folder, names) in [(&a, images), (&b, masks)] {
            std::fs::create_dir_all(folder).expect("a folder");
            names.iter().for_each(|name| std::fs::write(folder.join(name), "").expect("a file"));
        }
        (root, a, b)
    }

    fn paired(images: &[&str], masks: &[&str], image: &str, mask: &str) -> (usize, Vec<String>) {
        let (_root, a, b) = tree(images, masks);
        let suffixes = Suffixes { image: image.into(), mask: mask.into() };
        let (pairs, faults) = pairs(&[a], &[b], &suffixes).expect("folders");
        (pairs.len(), faults.iter().map(Error::to_string).collect())
    }

    #[test]
    fn names_of_the_trade_are_paired() {
        for (image, mask, suffixes) in [
            ("x.png", "x.png", ("", "")),
            ("x.png", "x.TIF", ("", "")),
            ("x.tif", "x_masks.tif", ("", "_masks")),
            ("x.jpg", "x_segmentation.png", ("", "_segmentation")),
            ("x_image.png", "x_label.png", ("_image", "_label")),
            ("x.jpg", "x.jpg.png", ("", "")),
            ("x.ome.tif", "x.png", ("", "")),
            ("x.png", "x.ome.tiff", ("", "")),
            ("Cell 1.PNG", "cell 1.png", ("", "")),
            ("Zell\u{e4}.png", "Zella\u{308}.png", ("", "")),
        ] {
            let (pairs, faults) = paired(&[image], &[mask], suffixes.0, suffixes.1);
            assert_eq!((pairs, faults.len()), (1, 0), "{image} {mask}: {faults:?}");
        }
    }

    #[test]
    fn hidden_and_other_files_are_left_alone() {
        let images = ["x.png", "._x.png", ".DS_Store", "Thumbs.db", "notes.txt"];
        assert_eq!(paired(&images, &["x.png", "._x.png"], "", ""), (1, vec![]));
    }

    #[test]
    fn all_faults_are_told_and_the_suffix_is_guessed() {
        let (pairs, faults) =
            paired(&["a.png", "b.png", "c.png"], &["a_mask.png", "c.png", "d.png"], "", "");
        assert_eq!(pairs, 1);
        assert_eq!(faults.len(), 4, "{faults:?}");
        assert!(faults[0].contains("try --mask-suffix _mask"), "{}", faults[0]);
        assert!(faults[1].contains("b.png") && faults[1].contains("has no mask"), "{}", faults[1]);
        assert!(faults.iter().any(|fault| fault.contains("d.png: has no image")), "{faults:?}");
    }

    #[test]
    fn one_folder_needs_a_suffix() {
        let (_root, folder, _) = tree(&["x.tif", "x_masks.tif", "x_flows.tif"], &[]);
        let both = [folder];
        let error = pairs(&both, &both, &Suffixes::default()).expect_err("both").to_string();
        assert!(error.contains("--mask-suffix"), "{error}");
        let masks = Suffixes { mask: "_masks".into(), ..Default::default() };
        let (found, faults) = pairs(&both, &both, &masks).expect("a folder");
        assert_eq!((found.len(), faults.len()), (1, 1), "the flows have no mask");
        assert!(found[0].mask.path.ends_with("x_masks.tif"));
    }

    #[cfg(unix)]
    #[test]
    fn broken_links_are_faults() {
        let (_root, a, b) = tree(&["x.png"], &["x.png"]);
        std::os::unix::fs::symlink("/nowhere.png", a.join("y.png")).expect("a link");
        let (_, faults) = pairs(&[a], &[b], &Suffixes::default()).expect("folders");
        assert!(faults[0].to_string().contains("y.png: is a link to a file that is not there"));
    }
}
