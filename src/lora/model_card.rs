//! The folder that PEFT's `save_pretrained` makes: the adapter's two files, and a model card, `README.md`, whose header
//! model hubs read.
//!
//! ```text
//! base_model      the name of the base, where the configuration has it
//! library_name    peft
//! tags            lora; where the base has a name also base_model:adapter:<name> and transformers
//! ```
//! A card that is there keeps its text and the rest of its header; the version is added to its framework versions.
//!
//! Source: PEFT 0.21, `create_or_update_model_card` in `peft_model.py`.

use super::{save_named_adapter, LoraConfig, ModuleNames};
use crate::nn::{ModuleTree, DEFAULT_ADAPTER};
use crate::{files, Error, Result};
use std::path::Path;

/// Name of the model card in an adapter folder.
///
/// [Example](crate::lora::model_card())
pub const CARD_FILE: &str = "README.md";

const VERSIONS: &str = "### Framework versions";
const FENCE: &str = "---";

/// Writes the adapter called `name`, made with `config`, and a model card to the folder `dir`. As in PEFT, an adapter
/// not called "default" goes to the folder of its name in `dir`.
///
/// [Example](crate::lora::model_card())
///
/// # Errors
/// As [`save_adapter`](super::save_adapter); when there is a card that is no text.
pub fn save_pretrained(
    model: &dyn ModuleTree,
    name: &str,
    config: &LoraConfig,
    dir: impl AsRef<Path>,
) -> Result<()> {
    let dir = dir.as_ref();
    let path = dir.join(CARD_FILE);
    let old = match path.try_exists().map_err(|e| Error::io(&path, e))? {
        true => Some(files::read_text(&path)?),
        false => None,
    };
    match name {
        DEFAULT_ADAPTER => save_named_adapter(model, name, config, dir)?,
        _ => save_named_adapter(model, name, config, dir.join(name))?,
    }
    let card = model_card(config, old.as_deref());
    files::write_atomic(&path, |file| file.write_all(card.as_bytes()))
}

/// The model card of an adapter: a new one, or `old` brought up to date.
///
/// ```
/// use candle_sam_lora::lora::{model_card, LoraConfig};
///
/// let mut config = LoraConfig::new(4);
/// config.base_model_name_or_path = Some("facebook/sam-vit-base".into());
/// let card = model_card(&config, None);
/// assert!(card.contains("base_model: facebook/sam-vit-base"));
/// let mine = card + "Trained on nuclei.\n";
/// assert!(model_card(&config, Some(&mine)).ends_with("Trained on nuclei.\n")); // the text stays
/// ```
pub fn model_card(config: &LoraConfig, old: Option<&str>) -> String {
    let new = || (String::new(), text(config));
    let (header, text) = old.map_or_else(new, |old| {
        let (header, text) = split_header(old);
        (header.to_string(), text.to_string())
    });
    let mut tags = vec!["lora".to_string()];
    let mut fields = Vec::new();
    if let Some(base) = config.base_model_name_or_path.as_deref().filter(|base| !base.is_empty()) {
        tags = vec![format!("base_model:adapter:{base}"), "lora".into(), "transformers".into()];
        fields.push(("base_model", format!("base_model: {}", scalar(base))));
    }
    let tags: String = tags.iter().map(|tag| format!("\n- {}", scalar(tag))).collect();
    fields.push(("library_name", "library_name: peft".to_string()));
    fields.push(("tags", format!("tags:{tags}")));
    let header = fields.into_iter().fold(header, |header, (key, block)| set(&header, key, &block));
    format!("{FENCE}\n{header}{FENCE}\n{}", with_version(&text))
}

/// Text of a new card.
fn text(config: &LoraConfig) -> String {
    let targets = match &config.target_modules {
        Some(ModuleNames::List(names)) => names.join(", "),
        Some(ModuleNames::Regex(pattern)) => format!("`{pattern}`"),
        None => String::new(),
    };
    let kind = if config.use_dora { "DoRA" } else { "LoRA" };
    let base = match config.base_model_name_or_path.as_deref() {
        Some(base) if !base.is_empty() => format!(" for {base}"),
        _ => String::new(),
    };
    format!(
        "\n# {kind} adapter{base}\n\n- rank: {}\n- alpha: {}\n- target modules: {targets}\n\n",
        config.rank, config.alpha
    )
}

/// The lines between the fences a card begins with, and what follows.
fn split_header(card: &str) -> (&str, &str) {
    let fence = |line: &str| line.trim_end() == FENCE;
    let mut end = 0;
    let mut start = None;
    for line in card.split_inclusive('\n') {
        let begin = end;
        end += line.len();
        match start {
            None if fence(line) => start = Some(end),
            None => break,
            Some(start) if fence(line) => return (&card[start..begin], &card[end..]),
            Some(_) => {}
        }
    }
    ("", card)
}

/// A header with this block of lines for `key`, in the place of the one it has or at its end.
fn set(header: &str, key: &str, block: &str) -> String {
    let is_key = |line: &str| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':'));
    let (mut lines, mut inside, mut done) = (Vec::new(), false, false);
    for line in header.lines() {
        // A value goes on in lines that are indented, or in items of a list.
        inside = is_key(line) || (inside && line.starts_with([' ', '\t', '-']));
        if !inside {
            lines.push(line);
        } else if !done {
            lines.push(block);
            done = true;
        }
    }
    if !done {
        lines.push(block);
    }
    lines.join("\n") + "\n"
}

/// A YAML scalar; JSON's strings are such.
fn scalar(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:".contains(c);
    let is_plain = value.starts_with(|c: char| c.is_ascii_alphabetic())
        && !value.ends_with(':')
        && value.chars().all(plain);
    match is_plain {
        true => value.to_string(),
        false => serde_json::Value::from(value).to_string(),
    }
}

/// The text with this crate among the framework versions.
fn with_version(text: &str) -> String {
    let version = concat!("- ", env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));
    let mut lines: Vec<&str> = text.lines().collect();
    if lines.contains(&version) {
        return text.to_string();
    }
    match lines.iter().position(|line| *line == VERSIONS) {
        Some(heading) => lines.insert((heading + 2).min(lines.len()), version),
        None => lines.extend([VERSIONS, "", version]),
    }
    lines.join("\n") + "\n"
}
