//! The adapters of one layer: any number under names of their own, of which some are active.
//!
//! ```text
//! y = base(x) + the active adapters' parts, in the order of activation; base(x) alone if disabled or merged
//! ```
//! In the tree the tensors of the adapter called "default" have the names of PEFT's files, `lora_A.weight`. Those of
//! another bear its name, `lora_A.<name>.weight`, as inside PEFT. In files no adapter's name ever appears.

use super::low_rank::LowRank;
use super::{Adapter, Mode};
use candle_core::Tensor;

/// The name of an adapter that was given none.
///
/// [Example](crate::lora::hotswap_adapter)
pub const DEFAULT_ADAPTER: &str = "default";

/// The base's weight and bias as they were before adapters were merged into them.
///
/// [Example](crate::nn::Adapters)
#[derive(Clone, Debug)]
pub struct Unmerged {
    /// The adapters in the weight.
    pub names: Vec<String>,
    /// The weight from before.
    pub weight: Tensor,
    /// The bias from before.
    pub bias: Option<Tensor>,
}

/// The named adapters of a layer.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::nn::{adapter_tensor_name, is_adapter_tensor, Adapter, Linear, Mode};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let zeros = |dims: (usize, usize)| Tensor::zeros(dims, DType::F32, &Device::Cpu);
/// let mut layer = Linear::new(zeros((3, 4))?, None);
/// let (a, b) = (zeros((2, 4))? + 1.0, zeros((3, 2))? + 1.0);
/// let adapter = Adapter {
///     a: a?,
///     b: b?,
///     b_bias: None,
///     magnitude: None,
///     scaling: 0.5,
///     dropout: 0.0,
///     stream: 0,
///     changes_base: false,
/// };
/// layer.adapters.insert("cells", adapter);
/// layer.adapters.active = vec!["cells".to_string()];
/// let y = layer.forward(&(zeros((1, 4))? + 1.0)?, Mode::Eval)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[4.0; 3]]); // 0.5 B A x
/// let name = adapter_tensor_name("head", "cells", "lora_A.weight");
/// assert_eq!(name, "head.lora_A.cells.weight");
/// assert!(is_adapter_tensor(&name));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Adapters {
    named: Vec<(String, Adapter)>,
    /// The names of those in use, some of which this layer may lack.
    pub active: Vec<String>,
    /// Whether none is in use for now.
    pub disabled: bool,
    /// The base from before merging; none while not merged.
    pub unmerged: Option<Unmerged>,
}

impl Adapters {
    /// The adapter called `name`.
    pub fn get(&self, name: &str) -> Option<&Adapter> {
        self.named.iter().find(|(own, _)| own == name).map(|(_, adapter)| adapter)
    }

    /// The adapter called `name`.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Adapter> {
        self.named.iter_mut().find(|(own, _)| own == name).map(|(_, adapter)| adapter)
    }

    /// Names and adapters, in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Adapter)> {
        self.named.iter().map(|(name, adapter)| (name.as_str(), adapter))
    }

    /// As [`iter`](Self::iter), with leave to change the adapters.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Adapter)> {
        self.named.iter_mut().map(|(name, adapter)| (name.as_str(), adapter))
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Adds an adapter, in the place of one of that name; it is not active for that.
    pub fn insert(&mut self, name: &str, adapter: Adapter) {
        match self.get_mut(name) {
            Some(old) => *old = adapter,
            None => self.named.push((name.to_string(), adapter)),
        }
    }

    /// Takes an adapter out; its name stays among the active ones. After the last one nothing is disabled.
    pub fn remove(&mut self, name: &str) -> Option<Adapter> {
        let place = self.named.iter().position(|(own, _)| own == name)?;
        let removed = self.named.remove(place).1;
        self.disabled &= !self.named.is_empty();
        Some(removed)
    }

    /// The active adapters that this layer has, whether disabled, merged or not.
    pub fn activated(&self) -> impl Iterator<Item = (&str, &Adapter)> {
        self.active.iter().filter_map(|name| Some((name.as_str(), self.get(name)?)))
    }

    /// Low-rank parts of the adapters in use for this pass, as few as possible. One for each, or one for all where none
    /// has a magnitude or drops anything.
    pub fn low_rank(&self, mode: Mode) -> candle_core::Result<Vec<LowRank>> {
        if self.disabled || self.unmerged.is_some() {
            return Ok(Vec::new());
        }
        let parts = self.activated().map(|(_, adapter)| LowRank::new(adapter, mode));
        LowRank::together(parts.collect::<candle_core::Result<_>>()?)
    }
}

/// The name in the tree of an adapter's tensor, which files call `<path>.<leaf>`.
///
/// [Example](crate::nn::Adapters)
pub fn adapter_tensor_name(path: &str, adapter: &str, leaf: &str) -> String {
    match leaf.split_once('.') {
        _ if adapter == DEFAULT_ADAPTER => format!("{path}.{leaf}"),
        Some((matrix, rest)) => format!("{path}.{matrix}.{adapter}.{rest}"),
        None => format!("{path}.{leaf}.{adapter}"),
    }
}

/// Whether the tensor with this name in the tree belongs to an adapter.
///
/// [Example](crate::nn::Adapters)
pub fn is_adapter_tensor(name: &str) -> bool {
    name.split('.').any(|part| matches!(part, "lora_A" | "lora_B" | "lora_magnitude_vector"))
}
