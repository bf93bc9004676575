//! The files of a folder of kernels: for build.rs, which compiles them for GPUs, and for the emulator, which includes
//! this.

use std::path::{Path, PathBuf};

/// The files below a folder with one of these extensions, sorted.
pub fn with_extensions(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        let error = |e| format!("{}: {e}", folder.display());
        for entry in std::fs::read_dir(&folder).map_err(error)? {
            let path = entry.map_err(error)?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}
