//! Which modules a configuration means, by PEFT's rules.
//!
//! ```text
//! list          path == name, or path ends with "." + name
//! string        Python's re.fullmatch(string, path)
//! to save       path ends with name; nothing at or below a component that matches name is ever targeted
//! rank, alpha   the first pattern with Python's re.match("(.*\.)?(pattern)$", path)
//! ```
//!
//! Source: PEFT 0.21, `check_target_module_exists` in `tuners/tuners_utils.py`; `_set_trainable` and
//! `get_pattern_key` in `utils/other.py`.

use super::{LoraConfig, ModuleNames};
use crate::{Error, Result};
use fancy_regex::Regex;

/// The rules of one configuration, compiled.
pub(super) struct Matcher<'a> {
    config: &'a LoraConfig,
    target: Names<'a>,
    exclude: Names<'a>,
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
            Some(ModuleNames::Regex(pattern)) => {
                Self::Regex(compile(&format!(r"\A(?:{pattern})\z"))?)
            }
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

fn compile(pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| Error::config(format!("regular expression {pattern:?}: {e}")))
}

fn is_match(regex: &Regex, path: &str) -> Result<bool> {
    regex
        .is_match(path)
        .map_err(|e| Error::config(format!("regular expression {:?}: {e}", regex.as_str())))
}

fn compile_suffixes<T: Copy>(
    patterns: &std::collections::BTreeMap<String, T>,
) -> Result<Vec<(Regex, T)>> {
    patterns
        .iter()
        .map(|(pattern, value)| Ok((compile(&format!(r"\A(.*\.)?({pattern})\z"))?, *value)))
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
            saved: config
                .modules_to_save
                .iter()
                .flatten()
                .map(|name| compile(&format!(r"\A(^|.*\.){name}($|\..*)")))
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
        for saved in &self.saved {
            if is_match(saved, path)? {
                return Ok(false);
            }
        }
        Ok(!self.exclude.matches(path, is_linear)?)
    }

    /// Whether the module at `path` is trained and saved whole.
    pub(super) fn is_saved(&self, path: &str) -> bool {
        self.config.modules_to_save.iter().flatten().any(|name| path.ends_with(name.as_str()))
    }

    /// Rank and scaling of the module at `path`.
    pub(super) fn rank_and_scaling(&self, path: &str) -> Result<(usize, f64)> {
        let rank = first_match(&self.ranks, path, self.config.rank)?;
        let alpha = first_match(&self.alphas, path, self.config.alpha)?;
        Ok((rank, self.config.scaling(rank, alpha)))
    }
}
