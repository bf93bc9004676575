//! Which file holds a model, by names alone.

use std::path::{Path, PathBuf};

/// Weights by their usual names, the first that is there counts.
pub(crate) const USUAL: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];
/// Endings of files of weights; the first of which a folder has exactly one file counts.
const ENDINGS: [&[&str]; 2] = [&["safetensors"], &["pth", "pt", "bin", "ckpt"]];
/// Starts of names of files that lie beside weights and are none.
const BESIDE: [&str; 6] =
    ["adapter_model", "optimizer", "scheduler", "training_args", "rng_state", "scaler"];

/// The weights among the files of a folder.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice<'a> {
    /// This file, or this index of several.
    One(&'a str),
    /// Any of these may be meant.
    Several(Vec<&'a str>),
    /// No file has such a name.
    Nothing,
}

/// Chooses among the names of a folder's files.
pub(crate) fn choose_weights<'a>(names: &[&'a str]) -> Choice<'a> {
    let usual = USUAL.iter().find_map(|usual| names.iter().find(|name| *name == usual));
    if let Some(usual) = usual {
        return Choice::One(usual);
    }
    for endings in ENDINGS {
        let found: Vec<&str> =
            names.iter().copied().filter(|name| has_ending(name, endings)).collect();
        match found[..] {
            [] => {}
            [name] => return Choice::One(name),
            _ => return Choice::Several(found),
        }
    }
    Choice::Nothing
}

/// Whether a file has the name of weights.
#[cfg(feature = "hub")]
pub(crate) fn is_weights(name: &str) -> bool {
    ENDINGS.iter().any(|endings| has_ending(name, endings))
}

fn has_ending(name: &str, endings: &[&str]) -> bool {
    let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_lowercase());
    let known = ending.is_some_and(|ending| endings.contains(&ending.as_str()));
    known && !name.starts_with('.') && !BESIDE.iter().any(|start| name.starts_with(start))
}

/// Takes `FILE#PREFIX` apart, which names one of several models in a file: the path, and the text before the names of
/// the model's tensors. A path that is there is whole, whatever its name.
///
/// [Example](crate::sam::checkpoint)
pub fn split_prefix(path: &Path) -> (PathBuf, Option<String>) {
    let whole = || (path.to_path_buf(), None);
    if path.exists() {
        return whole();
    }
    match path.to_str().and_then(|text| text.rsplit_once('#')) {
        Some((file, prefix)) if !file.is_empty() => (file.into(), Some(prefix.to_string())),
        _ => whole(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_chosen_by_name() {
        for (names, expected) in [
            (&["config.json", "pytorch_model.bin", "model.safetensors"][..], "model.safetensors"),
            (&["sam_vit_b.PTH", "optimizer.pt", "readme.md"], "sam_vit_b.PTH"),
            (&["a.pth", "b.pth", "c.safetensors"], "c.safetensors"),
            (
                &["pytorch_model.bin.index.json", "pytorch_model-1.bin"],
                "pytorch_model.bin.index.json",
            ),
        ] {
            assert_eq!(choose_weights(names), Choice::One(expected));
        }
        let two = ["a.pth", ".hidden.pth", "b.bin"];
        assert_eq!(choose_weights(&two), Choice::Several(vec!["a.pth", "b.bin"]));
        assert_eq!(choose_weights(&["adapter_model.bin", "x.txt"]), Choice::Nothing);
    }

    #[test]
    fn a_prefix_follows_the_last_hash() {
        let split = |text: &str| split_prefix(Path::new(text));
        let prefix = |text: &str| Some(text.to_string());
        assert_eq!(split("a#b.pth#teacher"), ("a#b.pth".into(), prefix("teacher")));
        assert_eq!(split("owner/name#"), ("owner/name".into(), prefix("")));
        assert_eq!(split("sam.pth"), ("sam.pth".into(), None));
        assert_eq!(split("#x"), ("#x".into(), None));
    }
}
