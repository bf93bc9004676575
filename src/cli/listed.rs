//! Paths that a file lists.

use crate::files::read_text;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The paths, each `@FILE` replaced by those in it: one a line; blank lines and those that begin with `#` are no paths.
///
/// # Errors
/// - a file cannot be read, or lists no path.
pub fn listed(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut all = vec![];
    for path in paths {
        let Some(list) = path.to_str().and_then(|path| path.strip_prefix('@')) else {
            all.push(path.clone());
            continue;
        };
        let text = read_text(Path::new(list))?;
        let lines = text.lines().map(str::trim);
        let before = all.len();
        all.extend(lines.filter(|l| !l.is_empty() && !l.starts_with('#')).map(PathBuf::from));
        if all.len() == before {
            return Err(Error::file(list, "lists no path"));
        }
    }
    Ok(all)
}
