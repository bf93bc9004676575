//! Tells lost gradients from rightly absent ones: moves the parameters, and looks whether the loss follows.

use super::gradients::causes;
use super::slope::{is_constant, values, Loss, Moving, Slope};
use super::{Gradients, StepRng};
use crate::nn::ENDS_THE_GRAPH;
use candle_core::{bail, DType, Error, Result, Tensor, Var};

/// How many parameters are tried one by one, to name some in an error.
const TRIED: usize = 8;
/// How many are named.
const NAMED: usize = 3;

/// The error on trainable parameters that got no gradient from `loss`, whose value is `here`.
pub(super) fn missing(
    parameters: &[(&str, &Var)],
    of: usize,
    here: Loss,
    mut loss: impl FnMut() -> Result<Loss>,
) -> Error {
    let names: Vec<&str> = parameters.iter().map(|(name, _)| *name).collect();
    let suspects: Vec<_> = parameters.iter().map(|(name, var)| (*name, *var, None)).collect();
    let mut used = || -> Result<Option<String>> {
        if loss()?.value != here.value {
            bail!("the loss cannot be repeated")
        }
        match is_constant(&moving(&suspects)?, here, &mut loss)? {
            true => Ok(None),
            false => used(&suspects, here, &mut loss).map(Some),
        }
    };
    let cause = match used() {
        Ok(None) => {
            "; the loss does not depend on them, so freeze them with nn::set_trainable".to_string()
        }
        Ok(Some(used)) => format!(
            ", but the loss depends on {used}. {ENDS_THE_GRAPH}. Freeze those that the loss does not depend on"
        ),
        // A loss that fails or changes by itself tells nothing.
        Err(_) => format!(". {}", causes()),
    };
    let (count, names) = (names.len(), names.join(", "));
    Error::msg(format!("{count} of {of} trainable parameters got no gradient: {names}{cause}"))
}

/// Fails when `loss`, whose value is `here`, depends on elements whose gradient is exactly zero.
///
/// Many gradients are rightly zero: that of a LoRA's A while B is zero, or of an embedding that is not used. Then the
/// loss has no slope when all such elements move together: two more losses tell in most cases, twelve or more in
/// others.
pub(super) fn check_zeros<'a>(
    parameters: impl Iterator<Item = (&'a str, &'a Var)>,
    gradients: &Gradients,
    here: Loss,
    mut loss: impl FnMut() -> Result<Loss>,
) -> Result<()> {
    let mut suspects = Vec::new();
    for ((name, var), gradient) in parameters.zip(gradients.tensors()) {
        if gradient.eq(0.0)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()? > 0.0 {
            suspects.push((name, var, Some(gradient)));
        }
    }
    if suspects.is_empty() {
        return Ok(());
    }
    // The loss may fail at other values of the parameters; then it tells nothing.
    let Ok(slope) = Slope::along(&moving(&suspects)?, here, &mut loss) else { return Ok(()) };
    if slope.value.abs() <= slope.uncertainty {
        return Ok(());
    }
    let used = used(&suspects, here, loss)?;
    bail!(
        "the loss depends on parameters whose gradient is exactly zero, in all or some elements: {used}. \
         {ENDS_THE_GRAPH}; testing::check_gradients tells more"
    )
}

/// A parameter, and its gradient where there is one.
type Suspect<'a> = (&'a str, &'a Var, Option<&'a Tensor>);

/// The suspects' elements without gradient, to be moved.
fn moving(suspects: &[Suspect<'_>]) -> Result<Vec<Moving>> {
    let moving = suspects.iter().map(|(name, var, gradient)| {
        let gradient = gradient.map(values).transpose()?;
        let moves = |i: usize| gradient.as_ref().is_none_or(|g| g[i] == 0.0);
        Moving::new(var, &mut StepRng::new(0, name, 0), moves)
    });
    moving.collect()
}

/// Names of a few suspects on which the loss depends.
fn used(
    suspects: &[Suspect<'_>],
    here: Loss,
    mut loss: impl FnMut() -> Result<Loss>,
) -> Result<String> {
    let mut used = Vec::new();
    for suspect in suspects.iter().take(TRIED) {
        if !is_constant(&moving(&[*suspect])?, here, &mut loss)? {
            used.push(suspect.0);
        }
        if used.len() == NAMED {
            break;
        }
    }
    match used.len() == suspects.len() {
        true => {}
        false if used.is_empty() => used.push("some of them"),
        false => used.push("and perhaps more"),
    }
    Ok(used.join(", "))
}
