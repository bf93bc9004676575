//! Gradients of anything against finite differences of its loss.
//!
//! The gradient of each variable is compared along a random direction with the slope that losses have there, see
//! `train/slope.rs`. Elements whose gradient is exactly zero move along a direction of their own. So the gradient of v
//! does not hide a lost gradient of q and k in the same tensor.

use crate::nn::ENDS_THE_GRAPH;
use crate::train::slope::{epsilon, values, Loss, Moving, Slope};
use crate::train::StepRng;
use crate::{Error, Result};
use candle_core::{Tensor, Var};
use std::collections::BTreeMap;
use std::fmt;

/// Above this part of a derivative an uncertainty hides too much.
const LEAST_PRECISION: f64 = 0.1;
/// Smaller errors, relative to the gradient, count as rounding: candle's own backward of `gelu_erf` has some of 2e-6.
const LEAST_ERROR: f64 = 1e-5;

/// How a gradient and the losses agree.
///
/// [Example](crate::guide::gradients)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They agree.
    Right,
    /// There is no gradient, and the loss has the same bits for other values: it does not depend on the variable.
    Unused,
    /// Rounding errors or a kink of the loss hide its derivative.
    Unclear,
    /// There is no gradient, but the loss depends on the variable.
    Missing,
    /// The gradient is exactly zero, but the loss depends on the variable.
    Zero,
    /// The gradient has another value.
    Wrong,
}

impl Verdict {
    /// Whether the gradient is missing, zero or wrong.
    pub fn is_fault(self) -> bool {
        matches!(self, Self::Missing | Self::Zero | Self::Wrong)
    }
}

/// The check of a variable, or of some of its elements.
///
/// [Example](crate::guide::gradients)
#[derive(Clone, Debug, PartialEq)]
pub struct GradientCheck {
    /// Name of the variable.
    pub name: String,
    /// Number of elements that moved: all, or those with or without a gradient of exactly zero.
    pub elements: usize,
    /// Number of elements of the variable.
    pub of: usize,
    /// The derivative along the direction by the gradient; none without a gradient.
    pub by_gradient: Option<f64>,
    /// The derivative along the direction by losses.
    pub by_losses: f64,
    /// Largest error of `by_losses`.
    pub uncertainty: f64,
    /// The conclusion.
    pub verdict: Verdict,
}

impl fmt::Display for GradientCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, elements, of, by_gradient, by_losses, uncertainty, verdict } = self;
        write!(f, "{:<8} {name}", format!("{verdict:?}").to_lowercase())?;
        if elements < of {
            write!(f, " ({elements} of {of} elements)")?;
        }
        match by_gradient {
            Some(derivative) => write!(f, ": derivative {derivative:.6e} by gradient")?,
            None => write!(f, ": no gradient")?,
        }
        write!(f, ", {by_losses:.6e} +- {uncertainty:.1e} by losses")
    }
}

/// The checks of all variables, sorted by name.
///
/// [Example](crate::guide::gradients)
#[derive(Clone, Debug, PartialEq)]
pub struct GradientReport {
    /// One for each variable; two where only some of its elements have a gradient of exactly zero.
    pub checks: Vec<GradientCheck>,
}

/// One line for each check.
impl fmt::Display for GradientReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.checks.iter().map(|check| check.to_string()).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl GradientReport {
    /// The checks that found a gradient missing, zero or wrong.
    pub fn faults(&self) -> impl Iterator<Item = &GradientCheck> {
        self.checks.iter().filter(|check| check.verdict.is_fault())
    }

    /// As [`check_gradients`], without an error for gradients at fault.
    ///
    /// # Errors
    /// - there are no variables;
    /// - a loss fails, is no scalar, is not finite, or is not the same when it is computed again.
    pub fn measure<N: Into<String>>(
        variables: impl IntoIterator<Item = (N, Var)>,
        mut loss: impl FnMut() -> candle_core::Result<Tensor>,
    ) -> Result<Self> {
        let variables: BTreeMap<String, Var> =
            variables.into_iter().map(|(name, var)| (name.into(), var)).collect();
        if variables.is_empty() {
            return Err(Error::Gradients("there is no variable to check".into()));
        }
        let first = loss()?;
        let here = Loss::of(&first)?;
        let gradients = first.backward()?;
        let mut checks = Vec::new();
        for (name, var) in &variables {
            let gradient = gradients.get(var).map(values).transpose()?;
            let zeros = gradient.iter().flatten().filter(|value| **value == 0.0).count();
            let parts: &[bool] = match zeros {
                0 => &[false],
                _ if zeros == var.elem_count() => &[true],
                _ => &[false, true],
            };
            for &zero in parts {
                let part = Part { name, var, gradient: gradient.as_deref(), zero };
                let mut check = part.check(0, here, &mut loss)?;
                if check.verdict.is_fault() {
                    // A rare, large rounding error does not come twice, along another direction.
                    check = part.check(1, here, &mut loss)?;
                }
                checks.push(check);
            }
        }
        Ok(Self { checks })
    }
}

/// The elements of a variable whose gradient is exactly zero, or all others.
struct Part<'a> {
    name: &'a str,
    var: &'a Var,
    gradient: Option<&'a [f64]>,
    zero: bool,
}

impl Part<'_> {
    fn check(
        &self,
        attempt: u64,
        here: Loss,
        loss: &mut impl FnMut() -> candle_core::Result<Tensor>,
    ) -> Result<GradientCheck> {
        let moves = |i: usize| self.gradient.is_none_or(|g| (g[i] == 0.0) == self.zero);
        let moving = Moving::new(self.var, &mut StepRng::new(0, self.name, attempt), moves)?;
        let direction = moving.direction()?;
        let Slope { value, uncertainty, constant } =
            Slope::along(&[moving], here, || Loss::of(&loss()?))
                .map_err(|error| Error::Gradients(format!("{}: {error}", self.name)))?;
        if uncertainty.is_infinite() {
            return Err(Error::Gradients(
                "the loss is another one when it is computed again; it must depend on nothing but the \
                 variables, so give dropout and other random numbers a fixed seed"
                    .into(),
            ));
        }
        let products =
            || self.gradient.iter().copied().flatten().zip(&direction).map(|(g, d)| g * d);
        let by_gradient = self.gradient.map(|_| products().sum::<f64>());
        let length = products().map(|product| product * product).sum::<f64>().sqrt();
        // A gradient sums up to 1 / sqrt(eps) terms, each rounded by eps.
        let rounding = epsilon(self.var.dtype()).max(here.epsilon).sqrt().max(LEAST_ERROR) * length;
        let agree = |derivative: f64| (value - derivative).abs() <= uncertainty + rounding;
        let precise = uncertainty <= LEAST_PRECISION * value.abs().max(length);
        let verdict = match by_gradient {
            None if constant => Verdict::Unused,
            None if agree(0.0) => Verdict::Unclear,
            None => Verdict::Missing,
            Some(_) if self.zero && agree(0.0) => Verdict::Right,
            Some(_) if self.zero => Verdict::Zero,
            Some(derivative) if !agree(derivative) => Verdict::Wrong,
            Some(_) if precise => Verdict::Right,
            Some(_) => Verdict::Unclear,
        };
        Ok(GradientCheck {
            name: self.name.to_string(),
            elements: direction.iter().filter(|d| **d != 0.0).count(),
            of: direction.len(),
            by_gradient,
            by_losses: value,
            uncertainty,
            verdict,
        })
    }
}

/// Compares the gradients of `loss` with finite differences, for every variable. Computes twelve losses each or more by
/// changing the variable in place, and restores it.
///
/// The variables are those of a module ([`trainable_variables`](crate::nn::trainable_variables)) or of a `VarMap` (a
/// clone of its data). Any with names serve too, the inputs of an operation among them. `loss` returns a scalar, and
/// must be a function of the variables alone. Check at values where nothing that matters is zero, as a LoRA's B is at
/// first. The precision is that of the variables and of the loss; in f64 it finds errors of 1e-5 of a gradient, in f32
/// of 1e-3.
///
/// ```
/// # fn main() -> candle_sam_lora::Result<()> {
/// use candle_core::{Device, Tensor, Var, D};
/// use candle_sam_lora::testing::check_gradients;
///
/// let numbers = |n: f32| Tensor::arange(0f32, n, &Device::Cpu)?.sin()?.reshape(((), 8));
/// let (x, weight) = (Var::from_tensor(&numbers(32.)?)?, Var::from_tensor(&numbers(64.)?)?);
/// let variables = [("x", x.clone()), ("weight", weight.clone())];
/// let y = || x.matmul(&weight);
/// let report = check_gradients(variables.clone(), || candle_nn::ops::softmax(&y()?, D::Minus1)?.sqr()?.sum_all())?;
/// println!("{report}");
///
/// // This one has no backward, and ends the graph without an error.
/// let lost = || candle_nn::ops::softmax_last_dim(&y()?)?.sqr()?.sum_all();
/// let error = check_gradients(variables, lost).expect_err("both gradients are missing");
/// assert!(error.to_string().contains("missing  weight"), "{error}");
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - a gradient is missing, is zero where the loss depends on the variable, or is wrong; each is named;
/// - as [`GradientReport::measure`].
pub fn check_gradients<N: Into<String>>(
    variables: impl IntoIterator<Item = (N, Var)>,
    loss: impl FnMut() -> candle_core::Result<Tensor>,
) -> Result<GradientReport> {
    let report = GradientReport::measure(variables, loss)?;
    let faults: Vec<String> = report.faults().map(|fault| format!("\n  {fault}")).collect();
    if faults.is_empty() {
        return Ok(report);
    }
    let lost = report.faults().any(|fault| fault.verdict != Verdict::Wrong);
    let cause = if lost { format!("\n{ENDS_THE_GRAPH}") } else { String::new() };
    Err(Error::Gradients(format!(
        "{} checks, {} at fault:{}{cause}",
        report.checks.len(),
        faults.len(),
        faults.concat()
    )))
}
