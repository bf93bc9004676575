//! How much of a model is trained, in PEFT's words:
//! `trainable params: 589,824 || all params: 94,325,296 || trainable%: 0.6253`.

use super::state::ancestors;
use super::target::Matcher;
use super::LoraConfig;
use crate::nn::{named_parameters, ModuleTree, Node};
use crate::Result;
use std::fmt;

/// Numbers of parameters; buffers and fixed parameters are not counted.
///
/// [Example](crate::lora)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCount {
    /// Elements of the trainable parameters.
    pub trainable: usize,
    /// Elements of all parameters, adapters included.
    pub all: usize,
}

impl fmt::Display for ParameterCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = 100.0 * self.trainable as f64 / self.all.max(1) as f64;
        let (trainable, all) = (thousands(self.trainable), thousands(self.all));
        write!(f, "trainable params: {trainable} || all params: {all} || trainable%: {percent:.4}")
    }
}

fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Counts the parameters of `model` as they are.
///
/// [Example](crate::lora)
pub fn count_parameters(model: &dyn ModuleTree) -> ParameterCount {
    let mut report = ParameterCount { trainable: 0, all: 0 };
    for (_, tensor) in named_parameters(model) {
        report.all += tensor.elem_count();
        if tensor.track_op() {
            report.trainable += tensor.elem_count();
        }
    }
    report
}

/// Counts as PEFT does: it trains a copy of every module in `modules_to_save` and counts the frozen original too.
/// Without such modules this is [`count_parameters`].
///
/// [Example](crate::lora)
///
/// # Errors
/// On a regular expression that does not compile.
pub fn count_parameters_as_peft(
    model: &dyn ModuleTree,
    config: &LoraConfig,
) -> Result<ParameterCount> {
    let matcher = Matcher::new(config)?;
    let mut report = count_parameters(model);
    let mut fixed = String::new();
    model.visit("", &mut |name, node| match node {
        // Its frozen original is not counted, as in a model without adapters.
        Node::Fixed => fixed = name.to_string(),
        Node::Parameter(tensor)
            if name != fixed && ancestors(name).any(|module| matcher.is_saved(module)) =>
        {
            report.all += tensor.elem_count();
        }
        _ => {}
    });
    Ok(report)
}
