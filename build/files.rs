//! The files of a folder of kernels: for build.rs, which compiles them for GPUs, and for the emulator, which includes this.

use std::path::{Path, PathBuf};

/// The files of a folder with one of these extensions, sorted.
pub fn with_extensions(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)))
        .collect();
    files.sort();
    Ok(files)
}

/// Those of its folder `sm90`: what is for Hopper alone. None if there is no such folder.
pub fn for_hopper(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let hopper = folder.join("sm90");
    if hopper.is_dir() {
        with_extensions(&hopper, extensions)
    } else {
        Ok(Vec::new())
    }
}
