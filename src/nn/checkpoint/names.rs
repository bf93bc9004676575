//! The names of a model's tensors in its files, as a table.
//!
//! Most names differ by a word or two ([`Names::renamed`]). Heads differ more: the tree names the first and the last
//! layer. So the other names of the same checkpoint tell the number of the last layer. For that reason, whole lists are
//! translated.

use crate::nn::ModuleTree;
use std::collections::{HashMap, HashSet};

/// How the files of a model name, fuse and surround its tensors. Start from [`Names::PLAIN`] and fill in what differs:
///
/// ```
/// use candle_sam_lora::nn::checkpoint::{Fused, Names};
/// const VIT: Names = Names {
///     renamed: &[("blocks.#.*", "layers.#.*")],
///     fused: &[Fused::QKV],
///     ..Names::PLAIN
/// };
/// let in_file = ["blocks.3.attn.qkv.weight", "blocks.3.norm1.bias", "head.weight"];
/// let in_tree = ["layers.3.attn.qkv.weight", "layers.3.norm1.bias", "head.weight"];
/// assert_eq!(VIT.to_tree(&in_file), in_tree);
/// assert_eq!(VIT.to_file(&in_tree), in_file);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// Name in the file and name in the tree; the first match counts. `#` stands for a number, `*` at the end for any
    /// rest. A name that no row matches stays as it is.
    pub renamed: &'static [(&'static str, &'static str)],
    /// Paths of heads whose layers a file counts, `layers.0` to `layers.n`, and the tree calls `proj_in`, `layers.0`,
    /// ..., `proj_out`.
    pub heads: &'static [&'static str],
    /// Modules of the whole model that can be loaded from its files, and saved, alone.
    pub parts: &'static [Part],
    /// Text inside the names of a file, and its replacement: modules that other tools wrap around layers.
    pub wrapped: &'static [(&'static str, &'static str)],
    /// Tensors of a file that are no part of the model, by their names in the tree; `*` stands for any text. A tensor
    /// that the model has is loaded nevertheless.
    pub ignored: &'static [&'static str],
    /// Projections that a file stacks in one tensor. [`load`](super::load) reads them fused or split, whichever way the
    /// tree has them; [`save`](super::save) fuses.
    pub fused: &'static [Fused],
    /// Names of surplus tensors that tell another model, and what that is called; `*` stands for any text.
    pub relatives: &'static [(&'static str, &'static str)],
    /// Two names of one tensor: the shared one, and that of a [`Tied`](crate::nn::Tied) parameter. The parameter gets a
    /// value of its own where the file holds two different ones.
    pub tied: Option<(&'static str, &'static str)>,
    /// Whether [`save`](super::save) writes the names of [`renamed`](Self::renamed)'s left side.
    pub save_renamed: bool,
}

/// A module of a model that may be loaded alone.
///
/// [Example](Names)
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Its path in the whole model.
    pub path: &'static str,
    /// The start of a tensor's name that only this module has.
    pub first: &'static str,
}

/// Layers of one shape whose weights, and biases, a file stacks along the rows.
///
/// [Example](Names)
#[derive(Clone, Copy, Debug)]
pub struct Fused {
    /// The end of the stacked layer's path.
    pub whole: &'static str,
    /// The ends of the layers' paths, in the order of their rows.
    pub parts: &'static [&'static str],
}

impl Fused {
    /// `attn.q`, `attn.k` and `attn.v` as `attn.qkv`.
    pub const QKV: Self = Self { whole: "attn.qkv", parts: &["attn.q", "attn.k", "attn.v"] };
}

impl Names {
    /// The file has the tree's names, and nothing else.
    pub const PLAIN: Self = Self {
        renamed: &[],
        heads: &[],
        parts: &[],
        wrapped: &[],
        ignored: &[],
        fused: &[],
        relatives: &[],
        tied: None,
        save_renamed: false,
    };

    /// Names of a file as names of the tree, in the same order. A name that is one already, or that the table lacks,
    /// stays as it is.
    pub fn to_tree(&self, names: &[&str]) -> Vec<String> {
        let heads = Heads::of(self.heads, names);
        let translate = |name: &&str| match heads.split(name) {
            Some((head, _, _)) if heads.named.contains(head) => name.to_string(),
            Some((head, layer, rest)) => match layer.parse::<usize>() {
                Ok(0) => format!("{head}.proj_in.{rest}"),
                Ok(n) if heads.last.get(head) == Some(&n) => format!("{head}.proj_out.{rest}"),
                Ok(n) => format!("{head}.layers.{}.{rest}", n - 1),
                Err(_) => name.to_string(),
            },
            None => self
                .renamed
                .iter()
                .find_map(|(file, tree)| rewrite(name, file, tree))
                .unwrap_or_else(|| name.to_string()),
        };
        names.iter().map(translate).collect()
    }

    /// Names of the tree as names of a file, in the same order. A name that is one already, or that the table lacks,
    /// stays as it is.
    pub fn to_file(&self, names: &[&str]) -> Vec<String> {
        let heads = Heads::of(self.heads, names);
        let translate = |name: &&str| match heads.split(name) {
            Some((head, _, _)) if !heads.named.contains(head) => name.to_string(),
            Some((head, layer, rest)) => {
                // The layers between the first and the last count from 0; `proj_in` comes before them.
                let number = match (layer, layer.parse::<usize>()) {
                    ("proj_in", _) => 0,
                    ("proj_out", _) => heads.last.get(head).map_or(1, |n| n + 2),
                    (_, Ok(n)) => n + 1,
                    (_, Err(_)) => return name.to_string(),
                };
                format!("{head}.layers.{number}.{rest}")
            }
            None => self
                .renamed
                .iter()
                .find_map(|(file, tree)| rewrite(name, tree, file))
                .unwrap_or_else(|| name.to_string()),
        };
        names.iter().map(translate).collect()
    }

    /// The path of the model's root in the whole model; empty for the whole model.
    pub(super) fn root(&self, model: &dyn ModuleTree) -> &'static str {
        let mut root = "";
        model.visit("", &mut |name, _| {
            let part = self.parts.iter().find(|part| name.starts_with(part.first));
            root = part.map_or(root, |part| part.path);
        });
        root
    }

    /// A name without the modules that other tools wrap around layers.
    pub(super) fn unwrapped(&self, name: &str) -> String {
        self.wrapped
            .iter()
            .fold(name.to_string(), |name, (wrapped, plain)| name.replace(wrapped, plain))
    }

    pub(super) fn is_ignored(&self, name: &str) -> bool {
        self.ignored.iter().any(|pattern| matches(name, pattern))
    }

    /// The name of the fused tensor that a tensor may lie in, the index of its block of rows, and their number.
    pub(super) fn fused_name(&self, part: &str) -> Option<(String, usize, usize)> {
        let (path, leaf) = part.rsplit_once('.')?;
        self.fused.iter().find_map(|fused| {
            let mut ends = fused.parts.iter().enumerate();
            let (index, before) = ends.find_map(|(i, end)| Some((i, below(path, end)?)))?;
            Some((format!("{before}{}.{leaf}", fused.whole), index, fused.parts.len()))
        })
    }

    /// The names of the tensors that a fused one consists of: `a.attn.qkv.weight` gives `a.attn.q.weight` and so on.
    pub(super) fn split_names(&self, whole: &str) -> Option<Vec<String>> {
        let (path, leaf) = whole.rsplit_once('.')?;
        let (fused, before) =
            self.fused.iter().find_map(|fused| Some((fused, below(path, fused.whole)?)))?;
        Some(fused.parts.iter().map(|part| format!("{before}{part}.{leaf}")).collect())
    }
}

/// The path of a model's root in the whole model that `names` describes; empty for the whole model.
pub(crate) fn root_of(names: &Names, model: &dyn ModuleTree) -> &'static str {
    names.root(model)
}

/// The text before `end`, which has to begin a component of `path`.
fn below<'a>(path: &'a str, end: &str) -> Option<&'a str> {
    path.strip_suffix(end).filter(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether `name` has the form `pattern`, where `*` stands for any text.
pub(super) fn matches(name: &str, pattern: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return name == pattern };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    for piece in middle.split('*') {
        match name.split_once(piece) {
            Some((_, after)) => name = after,
            None => return false,
        }
    }
    name.ends_with(end)
}

/// The heads in a list of names.
struct Heads<'a> {
    paths: &'static [&'static str],
    /// The heads with a `proj_in`, which only the tree's names have.
    named: HashSet<&'a str>,
    /// The highest `layers` number of each head.
    last: HashMap<&'a str, usize>,
}

impl<'a> Heads<'a> {
    fn of(paths: &'static [&'static str], names: &[&'a str]) -> Self {
        let mut heads = Self { paths, named: HashSet::new(), last: HashMap::new() };
        for name in names {
            let Some((head, layer, _)) = heads.split(name) else { continue };
            if layer == "proj_in" {
                heads.named.insert(head);
            } else if let Ok(number) = layer.parse::<usize>() {
                let highest = heads.last.entry(head).or_insert(number);
                *highest = number.max(*highest);
            }
        }
        heads
    }

    /// Splits a name inside a head into the head's path, the layer (`proj_in`, `proj_out` or a number) and the rest.
    fn split<'b>(&self, name: &'b str) -> Option<(&'b str, &'b str, &'b str)> {
        let (path, rest) = name.rsplit_once('.')?;
        let (path, layer) = path.rsplit_once('.')?;
        let head = match layer {
            "proj_in" | "proj_out" => path,
            // Numbers beyond any model's are left alone, so that counting up from one cannot overflow.
            _ if layer.parse::<u16>().is_ok() => path.strip_suffix(".layers")?,
            _ => return None,
        };
        let known = self.paths.iter().any(|pattern| rewrite(head, pattern, "").is_some());
        known.then_some((head, layer, rest))
    }
}

/// `name` in the form `to`, if it has the form `from`.
fn rewrite(name: &str, from: &str, to: &str) -> Option<String> {
    let (from, rest) = match from.strip_suffix('*') {
        Some(from) => {
            let length = from.split('.').count() - 1;
            let split = match length {
                0 => 0,
                _ => name.match_indices('.').nth(length - 1)?.0 + 1,
            };
            (from, &name[split..])
        }
        None => (from, ""),
    };
    let name = &name[..name.len() - rest.len()];
    let mut number = "";
    for (part, pattern) in name.split('.').zip(from.split('.')) {
        match pattern {
            "#" if part.parse::<u32>().is_ok() => number = part,
            _ if part == pattern => {}
            _ => return None,
        }
    }
    (name.split('.').count() == from.split('.').count())
        .then(|| to.replace('#', number).replace('*', rest))
}

#[cfg(test)]
mod tests {
    use super::{matches, Fused, Names};

    #[test]
    fn a_table_translates_both_ways() {
        const NAMES: Names = Names {
            renamed: &[("a.#.b.*", "x.#.y.*"), ("a.#.*", "x.#.*"), ("old", "new")],
            heads: &["head.#"],
            fused: &[Fused::QKV],
            ..Names::PLAIN
        };
        let in_file = [
            "a.7.b.weight",
            "a.0.c",
            "old",
            "head.1.layers.0.w",
            "head.1.layers.1.w",
            "head.1.layers.2.w",
        ];
        let in_tree = [
            "x.7.y.weight",
            "x.0.c",
            "new",
            "head.1.proj_in.w",
            "head.1.layers.0.w",
            "head.1.proj_out.w",
        ];
        assert_eq!(NAMES.to_tree(&in_file), in_tree);
        assert_eq!(NAMES.to_file(&in_tree), in_file);
        assert_eq!(NAMES.to_tree(&["a.b.c", "a.x.b.weight"]), ["a.b.c", "a.x.b.weight"]);
        let parts = NAMES.split_names("x.0.attn.qkv.bias").unwrap();
        assert_eq!(parts, ["x.0.attn.q.bias", "x.0.attn.k.bias", "x.0.attn.v.bias"]);
        for (index, part) in parts.iter().enumerate() {
            assert_eq!(NAMES.fused_name(part), Some(("x.0.attn.qkv.bias".to_string(), index, 3)));
        }
        assert_eq!(NAMES.split_names("x.0.fattn.qkv.bias"), None);
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (name, pattern) in [
            ("mean", "mean"),
            ("a.mean", "*.mean"),
            ("mean.a", "mean*"),
            ("a.w_1.weight", "*.w_*.weight"),
            ("a.w_.w_.weight", "*.w_*.weight"),
            ("", "*"),
        ] {
            assert!(matches(name, pattern), "{name} {pattern}");
        }
        for (name, pattern) in [
            ("a.mean", "mean"),
            ("mean.a", "*.mean"),
            ("w_1.weight", "*.w_*.weight"),
            ("a.w_1.bias", "*.w_*.weight"),
            ("ab", "ab*b"),
        ] {
            assert!(!matches(name, pattern), "{name} {pattern}");
        }
    }
}
