//! The values of a configuration that are of several kinds in JSON.

use serde::{Deserialize, Serialize};

/// Module names: whole dotted components at the end of a path, or one regular expression for the whole path.
///
/// [Example](crate::lora::LoraConfig)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of names of modules, or a regular expression")]
pub enum ModuleNames {
    /// A path matches if it equals a name or ends with `.` and a name.
    List(Vec<String>),
    /// A path matches if the whole of it does, as Python's `re.fullmatch`. As a target, `all-linear` is every
    /// linear layer.
    Regex(String),
}

impl ModuleNames {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::List(names) => names.is_empty(),
            Self::Regex(pattern) => pattern.is_empty(),
        }
    }
}

/// One value, or a list of them.
///
/// [Example](crate::lora::LoraConfig)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value or a list of such")]
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
///
/// [Example](crate::lora::LoraConfig)
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
/// base's weights, and do so again on loading. The base must be the one of the training.
///
/// [Example](crate::lora::LoraConfig)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or the name of an initialisation")]
pub enum InitLoraWeights {
    /// `true`: A Kaiming-uniform, B zero; `false`: both random.
    Default(bool),
    /// "gaussian", "orthogonal", "pissa", `pissa_niter_<number>` or "olora"; "eva" can be read only.
    Named(String),
}
