//! [`LoraConfig`]: what PEFT's `adapter_config.json` says, read and written without losing anything.
//!
//! The fields that decide a result are typed; every other key is kept in [`LoraConfig::other`] and written back.
//! A key that would change results in a way this crate does not follow is refused by name, never ignored.
//!
//! ```text
//! scaling = lora_alpha / r            or, rank-stabilised (use_rslora), lora_alpha / sqrt(r)
//! ```
//!
//! Source: PEFT 0.21, `peft/tuners/lora/config.py`; rank stabilisation: Kalajdzievski, arXiv 2312.03732.

use super::warnings::warn;
use crate::{files, Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// The largest rank taken: above it a configuration is a mistake, and its tensors would not fit any memory.
const MAX_RANK: usize = 1 << 16;

/// PEFT features that would change the result and are not followed here; refused unless null, false or empty.
pub(super) const UNSUPPORTED: [&str; 12] = [
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Initialisations that leave the base weights as they are, so that an adapter trained from them loads as plain LoRA.
const INIT_KEEPS_BASE: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Module names: whole dotted components at the end of a path, or one regular expression for the whole path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ModuleNames {
    /// A path matches if it equals a name or ends with `.` and a name.
    List(Vec<String>),
    /// A path matches if the whole of it does, as Python's `re.fullmatch`. As a target, `all-linear` is every
    /// linear layer.
    Regex(String),
}

impl ModuleNames {
    fn is_empty(&self) -> bool {
        match self {
            Self::List(names) => names.is_empty(),
            Self::Regex(pattern) => pattern.is_empty(),
        }
    }
}

/// One value, or a list of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ValueOrList<T> {
    /// Written without brackets.
    Value(T),
    /// A list.
    List(Vec<T>),
}

impl<T> ValueOrList<T> {
    /// The values; one is a list of one.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::Value(value) => std::slice::from_ref(value),
            Self::List(values) => values,
        }
    }
}

/// Which of the base model's biases are trained and saved with the adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasTraining {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// The biases of the adapted layers.
    LoraOnly,
}

/// How the adapter is initialised. "pissa", `pissa_niter_<number>` and "olora" take the adapter's start out of the
/// base's weights, and do so again when it is loaded: the base must be the one it was trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InitLoraWeights {
    /// `true`: A Kaiming-uniform, B zero; `false`: both random.
    Default(bool),
    /// "gaussian", "orthogonal", "pissa", `pissa_niter_<number>` or "olora"; "eva" can be read only.
    Named(String),
}

/// The configuration of a LoRA adapter, as PEFT's class of the same name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    pub(super) peft_type: String,
    /// `r`: rows of A, columns of B.
    #[serde(rename = "r", default = "default_rank")]
    pub rank: usize,
    /// `lora_alpha`: numerator of the scaling.
    #[serde(rename = "lora_alpha", default = "default_alpha", serialize_with = "number")]
    pub alpha: f64,
    /// `lora_dropout`: dropout probability of the adapter's input in training, in `[0, 1)`.
    #[serde(rename = "lora_dropout", default, deserialize_with = "null_as_empty")]
    pub dropout: f64,
    /// The linear layers that get an adapter.
    #[serde(default)]
    pub target_modules: Option<ModuleNames>,
    /// Layers that get none even if targeted.
    #[serde(default)]
    pub exclude_modules: Option<ModuleNames>,
    /// Of the layers that a name in a list of `target_modules` matches by its end, only those in blocks with these
    /// indices. The index is the first number in the path after `layers_pattern`, or after any component.
    #[serde(default)]
    pub layers_to_transform: Option<ValueOrList<i64>>,
    /// What stands before a block's index, as `layers`: regular expressions of dotted components.
    #[serde(default)]
    pub layers_pattern: Option<ValueOrList<String>>,
    /// Rank stabilisation.
    #[serde(default)]
    pub use_rslora: bool,
    /// Weight decomposition: a trained magnitude per output.
    #[serde(default)]
    pub use_dora: bool,
    /// A bias in B, scaled as the rest of the adapter.
    #[serde(default)]
    pub lora_bias: bool,
    /// Which base biases are trained.
    #[serde(default)]
    pub bias: BiasTraining,
    /// Modules trained and saved whole. As in PEFT a path matches if it *ends* with a name, dot or no dot.
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
    /// Weights stored `[in, out]`; must be false.
    #[serde(default)]
    pub fan_in_fan_out: bool,
    /// The initialisation.
    #[serde(default = "default_init", deserialize_with = "null_as_default_init")]
    pub init_lora_weights: InitLoraWeights,
    /// Ranks of single modules, by regular expression of the end of the path. Tried in alphabetical order, the
    /// order of PEFT's files.
    #[serde(default, deserialize_with = "null_as_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of single modules, as `rank_pattern`. A rank of its own without an alpha of its own changes the
    /// scaling of that module.
    #[serde(default, deserialize_with = "null_as_empty", serialize_with = "numbers")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Where the base model came from; for the reader alone.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// PEFT's task type; kept, without effect here. [`warnings`](Self::warnings) tells of one that PEFT refuses.
    #[serde(default)]
    pub task_type: Option<String>,
    /// Every other key of the file.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.0
}

fn default_init() -> InitLoraWeights {
    InitLoraWeights::Default(true)
}

fn null_as_default_init<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<InitLoraWeights, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_else(default_init))
}

fn null_as_empty<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A whole number is written without a decimal point, as Python writes the integers users give for alpha.
fn python_number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}

fn number<S: Serializer>(value: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    python_number(*value).serialize(serializer)
}

fn numbers<S: Serializer>(
    values: &BTreeMap<String, f64>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(values.iter().map(|(name, value)| (name, python_number(*value))))
}

impl LoraConfig {
    /// PEFT's defaults with this rank: alpha 8, no dropout, no target yet.
    pub fn new(rank: usize) -> Self {
        Self {
            peft_type: "LORA".to_string(),
            rank,
            alpha: default_alpha(),
            dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            bias: BiasTraining::None,
            modules_to_save: None,
            fan_in_fan_out: false,
            init_lora_weights: default_init(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            base_model_name_or_path: None,
            task_type: None,
            other: Map::new(),
        }
    }

    /// Sets `lora_alpha`.
    pub fn alpha(self, alpha: f64) -> Self {
        Self { alpha, ..self }
    }

    /// Sets `lora_dropout`.
    pub fn dropout(self, dropout: f64) -> Self {
        Self { dropout, ..self }
    }

    /// Targets the linear layers with one of these names.
    pub fn target_modules<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self { target_modules: Some(ModuleNames::List(names)), ..self }
    }

    /// Targets the linear layers whose whole path matches this regular expression.
    pub fn target_regex(self, pattern: impl Into<String>) -> Self {
        Self { target_modules: Some(ModuleNames::Regex(pattern.into())), ..self }
    }

    /// Leaves out modules with one of these names.
    pub fn exclude_modules<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self { exclude_modules: Some(ModuleNames::List(names)), ..self }
    }

    /// Adapts only the blocks with these indices.
    pub fn layers_to_transform(self, indices: impl IntoIterator<Item = i64>) -> Self {
        let indices = indices.into_iter().collect();
        Self { layers_to_transform: Some(ValueOrList::List(indices)), ..self }
    }

    /// Names what stands before the index of a block.
    pub fn layers_pattern<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self { layers_pattern: Some(ValueOrList::List(names)), ..self }
    }

    /// Trains and saves these modules whole.
    pub fn modules_to_save<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        Self { modules_to_save: Some(names.into_iter().map(Into::into).collect()), ..self }
    }

    /// Chooses which base biases are trained.
    pub fn bias(self, bias: BiasTraining) -> Self {
        Self { bias, ..self }
    }

    /// Chooses the initialisation by its name, as "pissa".
    pub fn init(self, name: impl Into<String>) -> Self {
        Self { init_lora_weights: InitLoraWeights::Named(name.into()), ..self }
    }

    /// Turns on rank stabilisation.
    pub fn rslora(self) -> Self {
        Self { use_rslora: true, ..self }
    }

    /// Turns on DoRA.
    pub fn dora(self) -> Self {
        Self { use_dora: true, ..self }
    }

    /// Gives B a bias.
    pub fn lora_bias(self) -> Self {
        Self { lora_bias: true, ..self }
    }

    /// Gives modules that match `pattern` a rank of their own.
    pub fn rank_of(mut self, pattern: impl Into<String>, rank: usize) -> Self {
        self.rank_pattern.insert(pattern.into(), rank);
        self
    }

    /// Gives modules that match `pattern` an alpha of their own.
    pub fn alpha_of(mut self, pattern: impl Into<String>, alpha: f64) -> Self {
        self.alpha_pattern.insert(pattern.into(), alpha);
        self
    }

    /// Whether tensors of the base are changed with the adapter.
    pub(super) fn changes_base(&self) -> bool {
        self.bias != BiasTraining::None
            || self.modules_to_save.as_ref().is_some_and(|names| !names.is_empty())
            || self.init_lora_weights.changes_base()
    }

    /// `alpha / rank`, or `alpha / sqrt(rank)` with rank stabilisation.
    pub fn scaling(&self, rank: usize, alpha: f64) -> f64 {
        let rank = rank as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Checks everything that needs no model.
    ///
    /// # Errors
    /// On a value no adapter can have, or a PEFT feature that is not supported, by name.
    pub fn validate(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::config(message));
        if self.peft_type != "LORA" {
            return refuse(format!("peft_type must be \"LORA\", got {:?}", self.peft_type));
        }
        for (name, rank) in std::iter::once(("r", self.rank))
            .chain(self.rank_pattern.iter().map(|(name, rank)| (name.as_str(), *rank)))
        {
            if !(1..=MAX_RANK).contains(&rank) {
                return refuse(format!("the rank {name} must be in 1..={MAX_RANK}, got {rank}"));
            }
        }
        for (name, alpha) in std::iter::once(("lora_alpha", self.alpha))
            .chain(self.alpha_pattern.iter().map(|(name, alpha)| (name.as_str(), *alpha)))
        {
            if !alpha.is_finite() {
                return refuse(format!("the alpha {name} must be finite, got {alpha}"));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse(format!("lora_dropout must be in [0, 1), got {}", self.dropout));
        }
        if self.target_modules.as_ref().is_none_or(ModuleNames::is_empty) {
            return refuse("target_modules is empty: name the layers to adapt".to_string());
        }
        let layers = [
            ("layers_to_transform", self.layers_to_transform.is_some()),
            ("layers_pattern", self.layers_pattern.is_some()),
        ];
        for (name, given) in layers {
            if given && matches!(self.target_modules, Some(ModuleNames::Regex(_))) {
                return refuse(format!("{name} cannot be used when target_modules is a string"));
            }
        }
        let pattern = self.layers_pattern.as_ref().map_or(&[][..], ValueOrList::as_slice);
        let has_pattern = match &self.layers_pattern {
            Some(ValueOrList::Value(name)) => !name.is_empty(),
            _ => !pattern.is_empty(),
        };
        if has_pattern && self.layers_to_transform.is_none() {
            return refuse("layers_pattern needs layers_to_transform too".to_string());
        }
        if self.modules_to_save.iter().flatten().any(String::is_empty) {
            return refuse("modules_to_save holds an empty name".to_string());
        }
        if self.lora_bias && self.use_dora {
            return refuse("lora_bias and use_dora cannot be combined".to_string());
        }
        if self.fan_in_fan_out {
            return refuse("fan_in_fan_out is not supported: weights are [out, in]".to_string());
        }
        if let InitLoraWeights::Named(name) = &self.init_lora_weights {
            if !INIT_KEEPS_BASE.contains(&name.as_str()) && !self.init_lora_weights.changes_base() {
                return refuse(format!(
                    "init_lora_weights {name:?} is not supported: it changes the base weights or the layer; \
                     convert the adapter to plain LoRA with PEFT first"
                ));
            }
            if self.lora_bias {
                return refuse(format!(
                    "lora_bias needs init_lora_weights true or false, got {name:?}"
                ));
            }
        }
        for name in UNSUPPORTED {
            if let Some(value) = self.other.get(name).filter(|value| !is_neutral(value)) {
                return refuse(format!("{name} is not supported, got {value}"));
            }
        }
        Ok(())
    }

    /// Reads and checks an `adapter_config.json`. Writes its [`warnings`](Self::warnings) to standard error.
    ///
    /// # Errors
    /// When the file cannot be read, is no JSON of this kind, or does not pass [`validate`](Self::validate).
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = files::read_text(path)?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|e| Error::file(path, format!("not a LoRA configuration: {e}")))?;
        config.validate().map_err(|e| Error::file(path, e.to_string()))?;
        config.warnings().iter().for_each(|line| warn(&path.display(), line));
        Ok(config)
    }

    /// The text of `adapter_config.json` as PEFT writes it: two spaces, sorted keys, in inference mode.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn to_json(&self) -> Result<String> {
        self.validate()?;
        let failed = |e: serde_json::Error| Error::config(format!("cannot be written: {e}"));
        let mut value = serde_json::to_value(self).map_err(failed)?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("inference_mode".to_string(), Value::Bool(true));
        }
        value.sort_all_objects();
        serde_json::to_string_pretty(&value).map_err(failed)
    }
}

/// Null, false or empty.
pub(super) fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}
