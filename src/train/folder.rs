//! Images and masks of folders and TARs, paired by their names, wherever each is.

use super::stored::Stored;
use super::tar_file;
use crate::sam::{has_image_ending, ImageFolder};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use unicode_normalization::UnicodeNormalization;

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

/// Images and masks by their names, and the rest of their folders.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// By the images' names.
    pub pairs: Vec<Named>,
    /// Everything that is wrong with names.
    pub faults: Vec<Error>,
    /// Visible files and folders that are no image, or have not the suffix.
    pub left_alone: BTreeSet<PathBuf>,
}

/// The pairs of images and masks. Several folders or TARs are read as one folder with all their files.
///
/// # Errors
/// - a folder or TAR cannot be read, or has no image;
/// - one folder is given for both, and nothing tells images from masks.
pub(super) fn pairs(images: &[PathBuf], masks: &[PathBuf], suffixes: &Suffixes) -> Result<Found> {
    let Found { mut pairs, mut faults, mut left_alone } = Found::default();
    let image_files = files(images, &mut faults, &mut left_alone)?;
    let mask_files = files(masks, &mut faults, &mut left_alone)?;
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
        let Some(key) = key(&file.path, &suffixes.mask) else {
            left_alone.extend((!same).then_some(file.path));
            continue;
        };
        if same && suffixes.mask.is_empty() && stem(&file.path).ends_with(&suffixes.image) {
            continue;
        }
        insert(&mut by_name, key, file, &mut faults);
    }
    let mut wanted = BTreeMap::new();
    for file in image_files {
        let Some(key) = key(&file.path, &suffixes.image) else {
            left_alone.extend((!same).then_some(file.path));
            continue;
        };
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
    for (key, image) in wanted {
        let full =
            image.path.file_name().map(|name| nfc(&name.to_string_lossy())).unwrap_or_default();
        let found = [&key, &full].into_iter().find(|name| by_name.contains_key(*name)).cloned();
        match found.or_else(|| same_but_case(&by_name, &key)).and_then(|name| by_name.remove(&name))
        {
            Some(mask) => pairs.push(Named { name: stem(&image.path), image, mask }),
            None => {
                let hint = suffix_hint(&by_name, &key, &suffixes.mask)
                    .or_else(|| format_hint(&left_alone, &key, &suffixes.mask));
                let hint = hint.unwrap_or_default();
                let stem = format!("{key}{}", suffixes.mask);
                let message =
                    format!("has no mask: {} has no file of this stem, {stem}{hint}", named(masks));
                faults.push(Error::file(&image.path, message));
            }
        }
    }
    for (key, mask) in &by_name {
        let hint = format_hint(&left_alone, key, &suffixes.image).unwrap_or_default();
        let message = format!("has no image: {} has no file of this stem{hint}", named(images));
        faults.push(Error::file(&mask.path, message));
    }
    Ok(Found { pairs, faults, left_alone })
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

/// The image files of folders and TARs, and what else lies in the folders.
fn files(
    places: &[PathBuf],
    faults: &mut Vec<Error>,
    left_alone: &mut BTreeSet<PathBuf>,
) -> Result<Vec<Stored>> {
    let mut all = vec![];
    for place in places {
        if !place.is_file() {
            all.extend(in_folder(place, faults, left_alone)?.into_iter().map(Stored::file));
            continue;
        }
        let files = tar_file::entries(place, faults)?.into_iter().map(|entry| entry.stored);
        let before = all.len();
        for file in files {
            match has_image_ending(&file.path) {
                true => all.push(file),
                false => drop(left_alone.insert(file.path)),
            }
        }
        if all.len() == before {
            return Err(Error::file(place, "the TAR has no image"));
        }
    }
    Ok(all)
}

/// The image files of a folder in the order of their names.
fn in_folder(
    folder: &Path,
    faults: &mut Vec<Error>,
    left_alone: &mut BTreeSet<PathBuf>,
) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    let listed = ImageFolder::list(folder)?;
    if listed.images.is_empty() {
        return Err(listed.without_image(folder));
    }
    left_alone.extend(listed.others.iter().map(|name| folder.join(name)));
    for path in listed.images {
        if path.file_stem().and_then(|stem| stem.to_str()).is_none() {
            faults.push(Error::file(&path, "the file name is not valid Unicode"));
        } else if !path.exists() {
            faults.push(Error::file(&path, "is a link to a file that is not there"));
        } else {
            files.push(path);
        }
    }
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
fn suffix_hint(masks: &BTreeMap<String, Stored>, image: &str, suffix: &str) -> Option<String> {
    let longer = masks.keys().filter_map(|mask| mask.strip_prefix(image));
    let longer = longer.filter(|rest| rest.starts_with(['_', '-', '.', ' ']));
    let rest = longer.min_by_key(|rest| rest.len())?;
    Some(format!("; it has {image}{rest}{suffix}: try --mask-suffix {rest}{suffix}"))
}

/// Which file of this stem is there, but has another format.
fn format_hint(left_alone: &BTreeSet<PathBuf>, name: &str, suffix: &str) -> Option<String> {
    let wanted = format!("{name}{suffix}");
    let found = left_alone.iter().find(|path| path.is_file() && stem(path) == wanted)?;
    let found = found.file_name()?.to_string_lossy();
    Some(format!("; {found} is of a format that is not read: write PNG or TIFF"))
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
    let lower = |path: &Path| nfc(&path.to_string_lossy().to_lowercase());
    let names = || {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| PathBuf::from(entry.file_name()))
    };
    // An image written in another format has the stem, or the name if that has no ending.
    let wanted = Path::new(last);
    let stem =
        if has_image_ending(wanted) { wanted.with_extension("") } else { wanted.to_path_buf() };
    let same_name = names().filter(|path| lower(path) == lower(wanted));
    let same_stem = names()
        .filter(|path| has_image_ending(path) && lower(&path.with_extension("")) == lower(&stem));
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
        let Found { pairs, faults, .. } = pairs(&[a], &[b], &suffixes).expect("folders");
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
    fn what_is_left_alone_is_told() {
        let (root, a, b) = tree(&["x.png", "y.heic", "Thumbs.db", ".z"], &["x.png", "y.npy"]);
        std::fs::create_dir(a.join("sub.png")).expect("a folder");
        #[cfg(unix)]
        let _pipe = std::os::unix::net::UnixListener::bind(a.join("pipe.png")).expect("a socket");
        let places = ([a], [b]);
        let found = pairs(&places.0, &places.1, &Suffixes::default()).expect("folders");
        let names = found.left_alone.iter().filter_map(|path| path.file_name()?.to_str());
        let names: Vec<_> = names.filter(|name| *name != "pipe.png").collect();
        assert_eq!(names, ["sub.png", "y.heic", "y.npy"]);
        // Nobody waits for what is no file.
        assert_eq!(found.left_alone.len() - names.len(), usize::from(cfg!(unix)));
        let error = pairs(&[root.path().into()], &places.1, &Suffixes::default());
        let error = error.expect_err("no image").to_string();
        assert!(error.ends_with("; it holds images/, masks/"), "{error}");
    }

    #[test]
    fn files_of_other_formats_are_named() {
        let (_, faults) = paired(&["a.png", "b.czi"], &["a.npy", "b.png"], "", "");
        assert!(faults[0].contains("a.npy is of a format that is not read"), "{}", faults[0]);
        assert!(faults[1].contains("b.czi is of a format that is not read"), "{}", faults[1]);
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
        let Found { pairs: found, faults, .. } = pairs(&both, &both, &masks).expect("a folder");
        assert_eq!((found.len(), faults.len()), (1, 1), "the flows have no mask");
        assert!(found[0].mask.path.ends_with("x_masks.tif"));
    }

    #[cfg(unix)]
    #[test]
    fn broken_links_are_faults() {
        let (_root, a, b) = tree(&["x.png"], &["x.png"]);
        std::os::unix::fs::symlink("/nowhere.png", a.join("y.png")).expect("a link");
        let Found { faults, .. } = pairs(&[a], &[b], &Suffixes::default()).expect("folders");
        assert!(faults[0].to_string().contains("y.png: is a link to a file that is not there"));
    }
}
