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
/// Directions along which parameters move, one after the other. Dead ReLUs, and points drawn where a mask is wrong,
/// give a loss kinks and jumps. They seldom look like a slope where the gradient is rightly zero, and along two
/// directions they do not.
const DIRECTIONS: u64 = 2;

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
        match is_constant(&moving(&suspects, 0)?, here, &mut loss)? {
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
/// loss has no slope when all such elements move together. Two more losses tell in most cases, twelve or more in
/// others; an error takes twice as many.
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
    for direction in 0..DIRECTIONS {
        let moving = moving(&suspects, direction)?;
        // The loss may fail at other values of the parameters; then it tells nothing.
        let Ok(slope) = Slope::along(&moving, here, &mut loss) else { return Ok(()) };
        if slope.value.abs() <= slope.uncertainty {
            return Ok(());
        }
    }
    let used = used(&suspects, here, loss)?;
    bail!(
        "the loss depends on parameters whose gradient is exactly zero, in all or some elements: {used}. \
         {ENDS_THE_GRAPH}; testing::check_gradients tells more"
    )
}

/// A parameter, and its gradient where there is one.
type Suspect<'a> = (&'a str, &'a Var, Option<&'a Tensor>);

/// The suspects' elements without gradient, to be moved along one of the random directions.
fn moving(suspects: &[Suspect<'_>], direction: u64) -> Result<Vec<Moving>> {
    let moving = suspects.iter().map(|(name, var, gradient)| {
        let gradient = gradient.map(values).transpose()?;
        let moves = |i: usize| gradient.as_ref().is_none_or(|g| g[i] == 0.0);
        Moving::new(var, &mut StepRng::new(0, name, direction), moves)
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
        if !is_constant(&moving(&[*suspect], 0)?, here, &mut loss)? {
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const SIZE: usize = 64;

    /// A loss of one parameter, whose gradient is said to be zero; whether that is refused.
    fn refused(case: u64, of: impl Fn(&[f32], &[Vec<f32>]) -> f32) -> Result<bool> {
        let mut draws = StepRng::new(case, "losses", 0);
        let mut row = || (0..SIZE).map(|_| draws.uniform() as f32 - 0.5).collect::<Vec<f32>>();
        let var = Var::new(row(), &Device::Cpu)?;
        let rows: Vec<_> = (0..24).map(|_| row()).collect();
        let gradients =
            Gradients::of([("p", &var)].into_iter(), |var| Some(var.zeros_like()).transpose())?;
        let loss = || Loss::of(&Tensor::new(of(&var.to_vec1()?, &rows), &Device::Cpu)?);
        Ok(check_zeros([("p", &var)].into_iter(), &gradients, loss()?, loss).is_err())
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// Units that are dead at the start and come to life at some distance, and a step of the loss at many places.
    #[test]
    fn dead_units_and_jumps_are_no_lost_gradients() -> Result<()> {
        let mut alarms = 0;
        for case in 0..1000 {
            let mut draws = StepRng::new(case, "start", 0);
            let dead: Vec<f32> = (0..24).map(|_| 0.5 * draws.uniform() as f32).collect();
            let start = std::cell::OnceCell::new();
            alarms += u32::from(refused(case, |p, rows| {
                let at: Vec<f32> = rows.iter().map(|row| dot(row, p)).collect();
                let start: &Vec<f32> = start.get_or_init(|| at.clone());
                let moved =
                    at.iter().zip(start).zip(&dead).map(|((at, start), dead)| at - start - dead);
                0.5 + 1e-3 * moved.map(|x| x.max(0.0)).sum::<f32>()
                    + 1e-4 * (at[0] * 20.0).floor().sin()
            })?);
        }
        assert_eq!(alarms, 0);
        Ok(())
    }

    #[test]
    fn lost_gradients_are_refused() -> Result<()> {
        for case in 0..1000 {
            assert!(refused(case, |p, rows| (dot(p, &rows[0]) + 0.5).tanh())?, "case {case}");
        }
        Ok(())
    }
}
