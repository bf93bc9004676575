//! Where in a file a model lies: below which prefix, and whether the file holds one of its parts alone.
//!
//! Every name of the file is compared with all the names that the model's tensors may have in a file. Text before such
//! a name is a place where the model may lie: nothing, `module.`, `model.sam.`, `teacher.`. The plan decides: the place
//! is where the whole model fits. Where it fits at several, bare names win. Without them the file is refused, since a
//! teacher and a student have one shape and different values.

use super::names::Names;
use super::source::Source;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};

/// A place where a model may lie in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Text before every name.
    pub prefix: String,
    /// The part of the model, with a dot, that the file leaves out of every name: it holds this part alone.
    pub part: String,
    /// Tensors with a known name.
    hits: usize,
}

/// Prefixes in a sentence.
pub(super) fn quoted<'a>(prefixes: impl Iterator<Item = &'a String>) -> String {
    prefixes.map(|prefix| format!("{prefix:?}")).collect::<Vec<_>>().join(" and ")
}

/// The names that tensors may have in a file, with the part of the model that each leaves out.
pub(super) struct Spellings {
    parts: HashMap<String, String>,
    /// Dots in the longest.
    dots: usize,
}

impl Spellings {
    /// All spellings of `tree_names`, which are names in the tree.
    pub fn new<'a>(names: &Names, tree_names: impl Iterator<Item = &'a str>) -> Self {
        let mut tree: Vec<String> = Vec::new();
        for name in tree_names {
            tree.push(name.to_string());
            tree.extend(names.fused_name(name).map(|(fused, ..)| fused));
            tree.extend(names.split_names(name).into_iter().flatten());
        }
        tree.extend(names.tied.iter().flat_map(|(a, b)| [a.to_string(), b.to_string()]));
        let in_file = names.to_file(&tree.iter().map(String::as_str).collect::<Vec<_>>());
        let mut parts = HashMap::new();
        for (tree, in_file) in tree.iter().zip(&in_file) {
            for name in [tree, in_file] {
                parts.insert(name.clone(), String::new());
            }
            let is_part = names.parts.iter().any(|part| tree.split('.').next() == Some(part.path));
            for name in [tree, in_file] {
                if let Some((part, rest)) = name.split_once('.').filter(|_| is_part) {
                    parts.entry(rest.to_string()).or_insert_with(|| format!("{part}."));
                }
            }
        }
        let dots = parts.keys().map(|name| name.matches('.').count()).max().unwrap_or(0);
        Self { parts, dots }
    }

    /// Every place with a known name, that with the most first.
    pub fn places(&self, source: &Source, names: &Names) -> Vec<Place> {
        let mut hits: BTreeMap<(String, &str), usize> = BTreeMap::new();
        for in_file in source.names() {
            let plain = names.unwrapped(in_file);
            // The longest known end of the name.
            let starts = plain.rmatch_indices('.').map(|(dot, _)| dot + 1).take(self.dots + 1);
            let starts = starts.chain((plain.matches('.').count() <= self.dots).then_some(0));
            let known =
                starts.filter_map(|start| Some((start, self.parts.get(&plain[start..])?))).last();
            if let Some((start, part)) = known {
                let prefix = &plain[..start];
                if in_file.starts_with(prefix) {
                    *hits.entry((prefix.to_string(), part)).or_default() += 1;
                }
            }
        }
        // `pos_embed` is the same in several namings: a prefix has the part that most of its names have.
        let mut places: BTreeMap<String, (Place, usize)> = BTreeMap::new();
        for ((prefix, part), hits) in hits {
            let fresh = Place { prefix: prefix.clone(), part: String::new(), hits: 0 };
            let (place, most) = places.entry(prefix).or_insert((fresh, 0));
            place.hits += hits;
            if hits > *most {
                (place.part, *most) = (part.to_string(), hits);
            }
        }
        let mut places: Vec<Place> = places.into_values().map(|(place, _)| place).collect();
        places.sort_by_key(|place| std::cmp::Reverse(place.hits));
        // Fewer than half of the most are chance, as `layers.0.norm1.weight` in another network.
        let most = places.first().map_or(0, |place| place.hits);
        let named = |place: &Place| source.prefix.is_some() && place.is_meant(source);
        places.retain(|place| 2 * place.hits >= most || named(place));
        if places.is_empty() {
            places.push(Place { prefix: String::new(), part: String::new(), hits: 0 });
        }
        places
    }
}

impl Place {
    /// Whether the caller named this place, with or without the last dot, or none.
    pub fn is_meant(&self, source: &Source) -> bool {
        let short = self.prefix.strip_suffix('.').unwrap_or(&self.prefix);
        source.prefix.as_ref().is_none_or(|named| *named == self.prefix || named == short)
    }

    /// The places that the caller may mean.
    ///
    /// # Errors
    /// - the caller named another one.
    pub fn meant<'a>(source: &Source, places: &'a [Self]) -> Result<Vec<&'a Self>> {
        let meant: Vec<&Self> = places.iter().filter(|place| place.is_meant(source)).collect();
        match (&source.prefix, meant.is_empty()) {
            (Some(named), true) => {
                let there = quoted(places.iter().map(|place| &place.prefix));
                let message = format!("holds no model below {named:?}, but below {there}");
                Err(Error::file(&source.path, message))
            }
            _ => Ok(meant),
        }
    }

    /// The names of the file below this place, and the names inside it. Left out are those below a longer prefix of
    /// `places`, and those in dicts without any tensor that `is_known`.
    pub fn inside<'a>(
        &self,
        source: &'a Source,
        names: &Names,
        places: &[Place],
    ) -> (Vec<&'a str>, Vec<String>) {
        let other = |name: &str| {
            places.iter().any(|other| {
                other.prefix.len() > self.prefix.len() && name.starts_with(&other.prefix)
            })
        };
        let all = source.names().into_iter().filter(|name| !other(name));
        all.filter_map(|name| {
            let inside = names.unwrapped(name.strip_prefix(self.prefix.as_str())?);
            Some((name, format!("{}{inside}", self.part)))
        })
        .unzip()
    }
}
