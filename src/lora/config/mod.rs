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

mod setters;
mod validate;
mod values;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
pub(super) use validate::{is_neutral, UNSUPPORTED};
pub use values::{BiasTraining, InitLoraWeights, ModuleNames, ValueOrList};

/// The configuration of a LoRA adapter, as PEFT's class of the same name.
///
/// ```
/// use candle_sam_lora::lora::{BiasTraining, LoraConfig};
///
/// # fn main() -> serde_json::Result<()> {
/// let config = LoraConfig::new(16).alpha(32.0).target_modules(["q", "v"]).bias(BiasTraining::LoraOnly);
/// assert_eq!(config.scaling(config.rank, config.alpha), 2.0);
/// let json = serde_json::to_string(&config)?; // as PEFT's adapter_config.json
/// assert!(json.contains(r#""bias":"lora_only""#));
/// let read: LoraConfig = serde_json::from_str(&json)?;
/// assert_eq!(read.target_modules, config.target_modules);
/// # Ok(())
/// # }
/// ```
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
    /// Limits the layers that a name in a list of `target_modules` matches by its end to blocks with these indices. The
    /// index is the first number in the path after `layers_pattern`, or after any component.
    #[serde(default)]
    pub layers_to_transform: Option<ValueOrList<i64>>,
    /// Components before a block's index, as `layers`: regular expressions of dotted components.
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
}
