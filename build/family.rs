//! The names of kernels by their files: for build.rs, and for the test that every launch finds its file.

use std::path::Path;

/// Whether a source is for Hopper alone: it lies in a folder `sm90`.
pub fn is_for_hopper(source: &Path) -> bool {
    source.parent().is_some_and(|folder| folder.ends_with("sm90"))
}

/// The first part of the names of a source's kernels: `projection_fwd_sm90` for `projection/sm90/fwd.cu`, and `dropout`
/// for `dropout/dropout.cu`. None without a folder.
pub fn family(source: &Path) -> Option<String> {
    let stem = source.file_stem()?.to_str()?;
    let hopper = is_for_hopper(source);
    let folder = if hopper { source.parent()?.parent()? } else { source.parent()? };
    let operation = folder.file_name()?.to_str()?;
    let family = if operation == stem { stem.to_string() } else { format!("{operation}_{stem}") };
    Some(if hopper { family + "_sm90" } else { family })
}
