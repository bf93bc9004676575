//! Parameters with a learning rate or a weight decay of their own.
//!
//! ```text
//! lr             x the factor of the last name that the parameter's holds   x LoRA+'s ratio, of a B or a vector
//! weight decay   0 for a parameter whose name holds one of `no_decay`
//! ```
//! LoRA+ gives B a higher rate than A: A of a new adapter is random, B is zero, and both are to move features alike.
//!
//! Source: Hayou, Ghosh and Yu, "LoRA+", ICML 2024; `create_loraplus_optimizer` of PEFT, which counts vectors as B.

use crate::{Error, Result};
use candle_core::Var;
use serde::Serialize;

/// Rules by which parameters get their learning rate and weight decay. Names are any part of a parameter's path.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_sam_lora::nn::{named_parameters, Linear};
/// use candle_sam_lora::train::ParameterGroups;
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let model = Linear::load(8, 4, vb)?;
/// let names: Vec<_> = named_parameters(&model).into_iter().map(|(name, _)| name).collect();
/// let groups = ParameterGroups { no_decay: vec!["bias".into()], ..Default::default() };
/// groups.validate(names.iter().map(String::as_str))?;
/// let groups = ParameterGroups { lr_factors: vec![("head".into(), 0.1)], ..groups };
/// assert!(groups.validate(names.iter().map(String::as_str)).is_err()); // there is no head
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ParameterGroups {
    /// Names, and the factor of the learning rate of each.
    pub lr_factors: Vec<(String, f64)>,
    /// Names of what is not decayed; `bias` and `norm` are usual.
    pub no_decay: Vec<String>,
    /// Learning rate of every `lora_B` and every vector, over that of the rest.
    pub loraplus_lr_ratio: Option<f64>,
}

impl ParameterGroups {
    /// Refuses factors that are negative or not finite, and names that no parameter's holds.
    ///
    /// # Errors
    /// As said.
    pub fn validate<'a>(&self, parameters: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        let ratio = self.loraplus_lr_ratio.map(|ratio| ("LoRA+'s ratio", ratio));
        let factors = self.lr_factors.iter().map(|(name, factor)| (name.as_str(), *factor));
        for (name, factor) in factors.chain(ratio) {
            if !(factor.is_finite() && factor >= 0.0) {
                let message = format!("learning rates: {name} must be at least 0, got {factor}");
                return Err(Error::config(message));
            }
        }
        let names = self.lr_factors.iter().map(|(name, _)| name).chain(&self.no_decay);
        for name in names {
            if name.is_empty() || !parameters.clone().any(|known| known.contains(name.as_str())) {
                let message = format!("no trained parameter's name holds {name:?}");
                return Err(Error::config(message));
            }
        }
        Ok(())
    }

    /// The factors of a parameter.
    pub(super) fn factors(&self, name: &str, var: &Var) -> Factors {
        let held = |part: &String| name.contains(part.as_str());
        let own = self.lr_factors.iter().rev().find(|(part, _)| held(part));
        let by_name = own.map_or(1.0, |(_, factor)| *factor);
        let is_b = name.contains("lora_B") || var.rank() == 1;
        let ratio = self.loraplus_lr_ratio.filter(|_| is_b).unwrap_or(1.0);
        let decays = !self.no_decay.iter().any(held);
        Factors { lr: by_name * ratio, weight_decay: if decays { 1.0 } else { 0.0 } }
    }
}

/// Factors of an optimizer's numbers for one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Factors {
    pub lr: f64,
    pub weight_decay: f64,
}

/// As all parameters.
impl Default for Factors {
    fn default() -> Self {
        Self { lr: 1.0, weight_decay: 1.0 }
    }
}
