//! Report on a loaded checkpoint, in one line.

use super::place::{quoted, Place};
use super::plan::{shown_unread, Origin};
use super::source::Source;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// The finds of [`load`](super::load) in a checkpoint. Its `Display` is one line for a user.
///
/// [Example](crate::nn::checkpoint)
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// The file, or the folder of several.
    pub path: PathBuf,
    /// `safetensors` or `PyTorch`.
    pub format: &'static str,
    /// Files that hold the tensors.
    pub files: usize,
    /// Text before the names of the model's tensors.
    pub prefix: String,
    /// Tensors of the file that were read.
    pub tensors: usize,
    /// Tensors of the file that were passed over.
    pub passed_over: usize,
    /// Dtypes of the tensors that were read.
    pub dtypes: BTreeSet<String>,
    /// Tensors of the file of kinds that are not read, each with its kind.
    pub unread: BTreeMap<String, String>,
    /// Prefixes of other models of the same shape in the file.
    pub others: Vec<String>,
}

impl Loaded {
    pub(super) fn new(
        source: &Source,
        place: &Place,
        others: &[String],
        origins: &BTreeMap<String, Origin>,
    ) -> Self {
        let used: BTreeSet<&str> = origins
            .values()
            .flat_map(|origin| match origin {
                Origin::Whole(name) | Origin::Part(name, _) => std::slice::from_ref(name),
                Origin::Fused(names) => &names[..],
            })
            .map(String::as_str)
            .collect();
        let dtype = |name: &&str| Some(source.info(name).ok()?.dtype.to_string().to_lowercase());
        Self {
            path: source.path.clone(),
            format: source.files.first().map_or("safetensors", |file| file.format()),
            files: source.files.len(),
            prefix: place.prefix.clone(),
            tensors: used.len(),
            passed_over: source.names().len() - used.len(),
            dtypes: used.iter().filter_map(dtype).collect(),
            unread: source.unread.clone(),
            others: others.to_vec(),
        }
    }
}

impl std::fmt::Display for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dtypes: Vec<&str> = self.dtypes.iter().map(String::as_str).collect();
        write!(f, "{}: {}", self.path.display(), self.format)?;
        if self.files > 1 {
            write!(f, " in {} files", self.files)?;
        }
        write!(f, ", {} tensors of {}", self.tensors, dtypes.join(" and "))?;
        if !self.prefix.is_empty() {
            write!(f, " below {:?}", self.prefix)?;
        }
        match self.passed_over {
            0 => {}
            1 => write!(f, "; 1 other passed over")?,
            count => write!(f, "; {count} others passed over")?,
        }
        if !self.others.is_empty() {
            let others = quoted(self.others.iter());
            write!(f, ", a second model below {others} among them")?;
        }
        if !self.unread.is_empty() {
            let (count, unread) = (self.unread.len(), shown_unread(&self.unread));
            write!(f, "; {count} of kinds that are not read: {unread}")?;
        }
        Ok(())
    }
}
