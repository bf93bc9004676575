//! The shapes of the models in a checkpoint, by headers alone.

use super::names::Names;
use super::place::{Place, Spellings};
use super::plan::relative;
use super::source::Source;
use crate::Result;
use std::collections::BTreeMap;
use std::path::Path;

/// Shapes of tensors by their names in the tree.
pub(crate) type Shapes = BTreeMap<String, Vec<usize>>;

/// The tensors' shapes of every model in a checkpoint, by their names in the tree, with the prefix of each. A model is
/// where the tensor `anchor` is, a name in the tree.
pub(crate) fn shapes(path: &Path, names: &Names, anchor: &str) -> Result<Vec<(String, Shapes)>> {
    let source = Source::open(path)?;
    let places = Spellings::new(names, std::iter::once(anchor)).places(&source, names);
    let mut models = Vec::new();
    for place in Place::meant(&source, &places)? {
        let (in_file, inside) = place.inside(&source, names, &places);
        let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
        let shapes = names.to_tree(&inside).into_iter().zip(in_file);
        let shapes: Shapes = shapes
            .map(|(name, in_file)| Ok((name, source.info(in_file)?.shape.clone())))
            .collect::<Result<_>>()?;
        if shapes.contains_key(anchor) {
            models.push((place.prefix.clone(), shapes));
        }
    }
    Ok(models)
}

/// Which related model a checkpoint is of, by the names of its tensors, if that can be told.
pub(crate) fn related(path: &Path, names: &Names) -> Result<Option<String>> {
    Ok(relative(names, &Source::open(path)?.names()))
}
