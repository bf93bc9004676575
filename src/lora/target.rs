//! Which modules a configuration means, by PEFT's rules.
//!
//! ```text
//! list          path == name; or path ends with "." + name, and the layer's index is asked for
//! index         the first number that follows layers_pattern, or any component, in the path
//! string        Python's re.fullmatch(string, path)
//! to save       path ends with name; nothing at or below a component that matches name is ever targeted
//! rank, alpha   the first pattern with Python's re.match("(.*\.)?(pattern)$", path)
//! ```
//!
//! Source: PEFT 0.21, `check_target_module_exists` in `tuners/tuners_utils.py`; `_set_trainable` and
//! `get_pattern_key` in `utils/other.py`.

use super::{LoraConfig, ModuleNames, ValueOrList};
use crate::{Error, Result};
use fancy_regex::Regex;

/// The rules of one configuration, compiled.
pub(super) struct Matcher<'a> {
    config: &'a LoraConfig,
    target: Names<'a>,
    exclude: Names<'a>,
    layers: Option<Layers<'a>>,
    saved: Vec<Regex>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

enum Names<'a> {
    List(&'a [String]),
    Regex(Regex),
    AllLinear,
}

impl<'a> Names<'a> {
    fn new(names: Option<&'a ModuleNames>) -> Result<Self> {
        Ok(match names {
            None => Self::List(&[]),
            Some(ModuleNames::List(names)) => Self::List(names),
            Some(ModuleNames::Regex(pattern)) => Self::Regex(compile(r"\A(?:", pattern, r")\z")?),
        })
    }

    fn matches(&self, path: &str, is_linear: bool) -> Result<bool> {
        match self {
            Self::List(names) => Ok(names.iter().any(|name| {
                path.strip_suffix(name.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })),
            Self::Regex(regex) => is_match(regex, path),
            Self::AllLinear => Ok(is_linear),
        }
    }
}

/// A block's index, behind the name of the list of blocks.
const INDEX: &str = r"\.(?P<idx>\d+)\.)";

/// The blocks that are asked for.
struct Layers<'a> {
    indices: &'a [i64],
    /// Each with a group `idx`.
    patterns: Vec<Regex>,
}

impl<'a> Layers<'a> {
    /// None where every block is asked for.
    fn new(config: &'a LoraConfig) -> Result<Option<Self>> {
        let indices = match &config.layers_to_transform {
            None => return Ok(None),
            Some(ValueOrList::List(indices)) if indices.is_empty() => return Ok(None),
            Some(indices) => indices.as_slice(),
        };
        let patterns = match &config.layers_pattern {
            None => &[][..],
            Some(ValueOrList::Value(name)) if name.is_empty() => &[],
            Some(names) => names.as_slice(),
        };
        let patterns = if patterns.is_empty() {
            vec![compile(r"\A(?:.*?\.", "[^.]*", INDEX)?]
        } else {
            let before = |name: &String| compile(r"\A(?:(?:^|.*?\.)", name, INDEX);
            patterns.iter().map(before).collect::<Result<_>>()?
        };
        Ok(Some(Self { indices, patterns }))
    }

    fn contains(&self, path: &str) -> Result<bool> {
        for pattern in &self.patterns {
            let found = pattern.captures(path).map_err(|e| failed(pattern, &e))?;
            if let Some(found) = found {
                let index = found.name("idx").and_then(|index| index.as_str().parse().ok());
                return Ok(index.is_some_and(|index| self.indices.contains(&index)));
            }
        }
        Ok(false)
    }
}

/// Digits of a number in a pattern, at most: the engine makes room for every group up to the one that is referred to.
const MOST_DIGITS: usize = 4;

/// The expression of a configuration, between what PEFT's rule adds to it.
fn compile(before: &str, pattern: &str, after: &str) -> Result<Regex> {
    if pattern.split(|c: char| !c.is_ascii_digit()).any(|number| number.len() > MOST_DIGITS) {
        return Err(Error::config(format!(
            "regular expression {pattern:?}: a number has more than {MOST_DIGITS} digits"
        )));
    }
    Regex::new(&format!("{before}{pattern}{after}")).map_err(|e| {
        // Places in the error are those of the pattern as it was given.
        let e = Regex::new(pattern).err().unwrap_or(e);
        Error::config(format!("regular expression {pattern:?}: {e}"))
    })
}

fn is_match(regex: &Regex, path: &str) -> Result<bool> {
    regex.is_match(path).map_err(|e| failed(regex, &e))
}

fn failed(regex: &Regex, error: &fancy_regex::Error) -> Error {
    Error::config(format!("regular expression {:?}: {error}", regex.as_str()))
}

fn compile_suffixes<T: Copy>(
    patterns: &std::collections::BTreeMap<String, T>,
) -> Result<Vec<(Regex, T)>> {
    patterns
        .iter()
        .map(|(pattern, value)| Ok((compile(r"\A(.*\.)?(", pattern, r")\z")?, *value)))
        .collect()
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str, default: T) -> Result<T> {
    for (regex, value) in patterns {
        if is_match(regex, path)? {
            return Ok(*value);
        }
    }
    Ok(default)
}

impl<'a> Matcher<'a> {
    /// # Errors
    /// On a regular expression that does not compile.
    pub(super) fn new(config: &'a LoraConfig) -> Result<Self> {
        let target = match &config.target_modules {
            Some(ModuleNames::Regex(name)) if name.eq_ignore_ascii_case("all-linear") => {
                Names::AllLinear
            }
            names => Names::new(names.as_ref())?,
        };
        Ok(Self {
            config,
            target,
            exclude: Names::new(config.exclude_modules.as_ref())?,
            layers: Layers::new(config)?,
            saved: config
                .modules_to_save
                .iter()
                .flatten()
                .map(|name| compile(r"\A(^|.*\.)", name, r"($|\..*)"))
                .collect::<Result<_>>()?,
            ranks: compile_suffixes(&config.rank_pattern)?,
            alphas: compile_suffixes(&config.alpha_pattern)?,
        })
    }

    /// Whether the module at `path` is to be adapted.
    pub(super) fn is_target(&self, path: &str, is_linear: bool) -> Result<bool> {
        if path.is_empty() || !self.target.matches(path, is_linear)? {
            return Ok(false);
        }
        if let (Names::List(names), Some(layers)) = (&self.target, &self.layers) {
            // A layer named in full is meant whatever its index.
            if !names.iter().any(|name| name == path) && !layers.contains(path)? {
                return Ok(false);
            }
        }
        for saved in &self.saved {
            if is_match(saved, path)? {
                return Ok(false);
            }
        }
        Ok(!self.exclude.matches(path, is_linear)?)
    }

    /// A reminder, for the error when nothing is targeted, of what else narrows the targets.
    pub(super) fn narrowed_by(&self) -> String {
        let mut note = String::new();
        if let Some(indices) = &self.config.layers_to_transform {
            note += &format!("; layers_to_transform is {:?}", indices.as_slice());
        }
        if let Some(names) = &self.config.layers_pattern {
            note += &format!("; layers_pattern is {:?}", names.as_slice());
        }
        if let Some(excluded) = &self.config.exclude_modules {
            note += &match excluded {
                ModuleNames::List(names) => format!("; exclude_modules is {names:?}"),
                ModuleNames::Regex(pattern) => format!("; exclude_modules is {pattern:?}"),
            };
        }
        if let Some(saved) = self.config.modules_to_save.as_ref().filter(|names| !names.is_empty())
        {
            note += &format!("; modules_to_save, which are no targets, is {saved:?}");
        }
        note
    }

    /// Whether the module at `path` is trained and saved whole.
    pub(super) fn is_saved(&self, path: &str) -> bool {
        self.config.modules_to_save.iter().flatten().any(|name| path.ends_with(name.as_str()))
    }

    /// Tells of patterns of ranks and alphas that none of these layers matches.
    pub(super) fn idle_patterns<'b>(
        &self,
        layers: impl Iterator<Item = &'b String> + Clone,
    ) -> Result<Vec<String>> {
        let ranks = self.config.rank_pattern.keys().zip(self.ranks.iter().map(|(regex, _)| regex));
        let alphas =
            self.config.alpha_pattern.keys().zip(self.alphas.iter().map(|(regex, _)| regex));
        let mut idle = vec![];
        for (what, (pattern, regex)) in ranks
            .map(|found| ("rank_pattern", found))
            .chain(alphas.map(|found| ("alpha_pattern", found)))
        {
            let mut matched = false;
            for path in layers.clone() {
                matched = matched || is_match(regex, path)?;
            }
            if !matched {
                idle.push(format!(
                    "{what}: no adapted layer matches {pattern:?}; PEFT passes over it"
                ));
            }
        }
        Ok(idle)
    }

    /// Rank and scaling of the module at `path`.
    pub(super) fn rank_and_scaling(&self, path: &str) -> Result<(usize, f64)> {
        let rank = first_match(&self.ranks, path, self.config.rank)?;
        let alpha = first_match(&self.alphas, path, self.config.alpha)?;
        Ok((rank, self.config.scaling(rank, alpha)))
    }
}
