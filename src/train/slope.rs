//! The derivative of a loss along a random direction, from values of the loss alone.
//!
//! ```text
//! l_i = loss(p + i h d), i = -4 .. 4        each element of d random in +-[0.5, 1.5] times the size of p
//! l_i ~ a quartic in i, by least squares    slope = derivative of the quartic at 0, over h
//! uncertainty = 15 standard errors of the slope, by the residuals of the fit
//! h = eps^(1/5), at most 1/16               rounding, eps / h, and truncation, h^4, are then alike;
//!                                           smaller by 8, up to four times, while residuals exceed rounding
//! ```
//! Residuals hold all that makes the slope uncertain. A fifth power, which the quartic lacks, shifts the slope by 3.3
//! standard errors. A jump shifts it by up to 3.7, a kink by up to 10.4. Rounding errors, with the four degrees of
//! freedom that the fit leaves, exceed 15 once in 9,000. A residual below the rounding of the loss itself counts as
//! that rounding.
//!
//! Source: the weights are those of Savitzky and Golay, "Smoothing and differentiation of data by simplified least
//! squares procedures", 1964.

use super::StepRng;
use candle_core::{bail, DType, Device, Result, Tensor, Var};

/// Largest step to either side.
const REACH: i32 = 4;
/// Number of losses.
const POINTS: usize = 2 * REACH as usize + 1;
/// Degrees of freedom that the quartic leaves.
const FREEDOM: f64 = POINTS as f64 - 5.0;
/// Standard errors that an uncertainty is wide.
const WIDTH: f64 = 15.0;
/// The size that a tensor of zeros is given.
const SIZE_OF_ZEROS: f64 = 0.1;
/// A loss repeats itself within so many roundings.
const REPEATED: f64 = 1000.0;
/// How many sizes of h are tried at most.
const SIZES: usize = 5;
/// A residual of so many roundings of the loss is no rounding error.
const TRUNCATED: f64 = 8.0;
/// Times the losses: the derivative at 0 of the fitted quartic, times [`SLOPE_SCALE`].
const SLOPE: [f64; POINTS] = [86., -142., -193., -126., 0., 126., 193., 142., -86.];
/// See [`SLOPE`].
const SLOPE_SCALE: f64 = 1188.0;
/// Orthogonal polynomials of degree 0 to 4 over -4 .. 4.
const POLYNOMIALS: [[f64; POINTS]; 5] = [
    [1., 1., 1., 1., 1., 1., 1., 1., 1.],
    [-4., -3., -2., -1., 0., 1., 2., 3., 4.],
    [28., 7., -8., -17., -20., -17., -8., 7., 28.],
    [-14., 7., 13., 9., 0., -9., -13., -7., 14.],
    [14., -21., -11., 9., 18., 9., -11., -21., 14.],
];

/// A derivative along a direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slope {
    pub(crate) value: f64,
    /// The true derivative is this near; infinite for a loss that cannot be repeated.
    pub(crate) uncertainty: f64,
    /// Whether the loss has the same bits everywhere.
    pub(crate) constant: bool,
}

/// A variable that moves along a direction, and goes back to its start when it is dropped.
#[derive(Debug)]
pub(crate) struct Moving {
    var: Var,
    start: Tensor,
    direction: Tensor,
}

impl Moving {
    /// Along a random direction, in the elements that `moves` picks by their index.
    pub(crate) fn new(
        var: &Var,
        draws: &mut StepRng,
        moves: impl Fn(usize) -> bool,
    ) -> Result<Self> {
        let start = var.as_detached_tensor().copy()?;
        let squares: f64 = values(&start)?.into_iter().map(|value| value * value).sum();
        let size = match (squares / start.elem_count().max(1) as f64).sqrt() {
            0.0 => SIZE_OF_ZEROS,
            size => size,
        };
        let mut random =
            || (draws.uniform() + 0.5) * if draws.bits() & 1 == 0 { size } else { -size };
        let direction = (0..start.elem_count()).map(|i| if moves(i) { random() } else { 0.0 });
        let dtype = if start.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let direction =
            Tensor::from_vec(direction.collect::<Vec<f64>>(), start.dims(), &Device::Cpu)?;
        let direction = direction.to_dtype(dtype)?.to_device(start.device())?;
        Ok(Self { var: var.clone(), start, direction })
    }

    /// In the order of the variable's elements.
    pub(crate) fn direction(&self) -> Result<Vec<f64>> {
        values(&self.direction)
    }

    fn go_to(&self, distance: f64) -> Result<()> {
        let start = self.start.to_dtype(self.direction.dtype())?;
        let there = (start + (&self.direction * distance)?)?;
        self.var.set(&there.to_dtype(self.start.dtype())?)
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        // Cannot fail: the start is a copy of the variable.
        let _ = self.var.set(&self.start);
    }
}

impl Slope {
    /// The slope of `loss`, whose value is `here`, while all of `moving` move together.
    ///
    /// # Errors
    /// When a loss fails or is not finite.
    pub(crate) fn along(
        moving: &[Moving],
        here: Loss,
        mut loss: impl FnMut() -> Result<Loss>,
    ) -> Result<Self> {
        let mut h = first_step(moving, here);
        let rounded = |value: f64| 0.5 * here.epsilon * value.abs();
        if is_constant(moving, here, &mut loss)? {
            let uncertainty = wide(rounded(here.value), h);
            return Ok(Self { value: 0.0, uncertainty, constant: true });
        }
        let mut at = |distance: f64| change(moving, distance, here, &mut loss);
        // Matrix products may round otherwise in other memory; what draws random numbers is further off.
        if at(0.0)?.abs() > REPEATED * rounded(here.value) {
            return Ok(Self { value: 0.0, uncertainty: f64::INFINITY, constant: false });
        }
        let mut found: Vec<Self> = Vec::with_capacity(SIZES);
        for _ in 0..SIZES {
            let mut losses = [0.0; POINTS];
            for (i, loss) in (-REACH..=REACH).zip(&mut losses) {
                *loss = at(f64::from(i) * h)?;
            }
            let largest = losses.iter().fold(here.value, |most, l| most.abs().max(l.abs()));
            let (residual, rounding) = (residual(&losses), rounded(largest));
            found.push(Self {
                value: dot(&SLOPE, &losses) / SLOPE_SCALE / h,
                uncertainty: wide(residual.max(rounding), h),
                constant: false,
            });
            if residual <= TRUNCATED * rounding {
                break;
            }
            h /= 8.0;
        }
        Ok(best(&found))
    }
}

/// The slope with the least uncertainty; larger where another size of h contradicts it, as among many kinks.
fn best(found: &[Slope]) -> Slope {
    let none = Slope { value: 0.0, uncertainty: f64::INFINITY, constant: false };
    let least = |a: Slope, b: &Slope| if b.uncertainty < a.uncertainty { *b } else { a };
    let best = found.iter().fold(none, least);
    let apart = found.iter().map(|other| {
        let apart = (other.value - best.value).abs();
        if apart > other.uncertainty + best.uncertainty {
            apart
        } else {
            0.0
        }
    });
    Slope { uncertainty: apart.fold(best.uncertainty, f64::max), ..best }
}

/// Whether `loss`, whose value is `here`, has the same bits at either end of the way that `moving` go.
///
/// # Errors
/// When a loss fails or is not finite.
pub(crate) fn is_constant(
    moving: &[Moving],
    here: Loss,
    mut loss: impl FnMut() -> Result<Loss>,
) -> Result<bool> {
    let reach = f64::from(REACH) * first_step(moving, here);
    let mut at = |distance: f64| change(moving, distance, here, &mut loss);
    Ok(at(reach)? == 0.0 && at(-reach)? == 0.0)
}

/// The largest h, in sizes of the variables.
fn first_step(moving: &[Moving], here: Loss) -> f64 {
    let eps = moving.iter().map(|m| epsilon(m.start.dtype())).fold(here.epsilon, f64::max);
    eps.powf(0.2).min(1.0 / 16.0)
}

/// Change of the loss, this far along the directions.
fn change(
    moving: &[Moving],
    distance: f64,
    here: Loss,
    loss: &mut impl FnMut() -> Result<Loss>,
) -> Result<f64> {
    moving.iter().try_for_each(|m| m.go_to(distance))?;
    Ok(loss()?.value - here.value)
}

/// The uncertainty of a slope over losses with these errors.
fn wide(error: f64, h: f64) -> f64 {
    WIDTH * error * dot(&SLOPE, &SLOPE).sqrt() / SLOPE_SCALE / h
}

/// Standard deviation of the losses about the quartic.
fn residual(losses: &[f64; POINTS]) -> f64 {
    let mut rest = *losses;
    for polynomial in &POLYNOMIALS {
        let share = dot(losses, polynomial) / dot(polynomial, polynomial);
        rest.iter_mut().zip(polynomial).for_each(|(rest, p)| *rest -= share * p);
    }
    (dot(&rest, &rest) / FREEDOM).sqrt()
}

fn dot(a: &[f64; POINTS], b: &[f64; POINTS]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A loss in f64, and the precision that it was computed in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loss {
    pub(crate) value: f64,
    pub(crate) epsilon: f64,
}

impl Loss {
    /// # Errors
    /// When it is no scalar, or not finite.
    pub(crate) fn of(loss: &Tensor) -> Result<Self> {
        if loss.elem_count() != 1 {
            bail!("the loss must be a scalar, has shape {:?}", loss.dims())
        }
        let value = values(loss)?[0];
        if !value.is_finite() {
            bail!("the loss is {value}")
        }
        Ok(Self { value, epsilon: epsilon(loss.dtype()) })
    }
}

/// The elements of a tensor, row-major, in f64.
///
/// [Example](crate::testing)
///
/// # Errors
/// When the tensor cannot be copied to the CPU.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = tensor.detach().to_device(&Device::Cpu)?;
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// The distance of 1 to the next number.
pub(crate) fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON,
        DType::F16 => 2f64.powi(-10),
        DType::BF16 => 2f64.powi(-7),
        _ => f64::from(f32::EPSILON),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slope(f: impl Fn(&Tensor) -> Result<Tensor>, x: &[f64]) -> Result<(Slope, Vec<f64>)> {
        let var = Var::new(x, &Device::Cpu)?;
        let moving = Moving::new(&var, &mut StepRng::new(1, "x", 0), |_| true)?;
        let direction = moving.direction()?;
        let loss = || Loss::of(&f(var.as_tensor())?.sum_all()?);
        let found = Slope::along(&[moving], loss()?, loss)?;
        assert_eq!(var.to_vec1::<f64>()?, x, "the variable went back");
        Ok((found, direction))
    }

    #[test]
    fn smooth_slopes_lie_within_their_uncertainty() -> Result<()> {
        let x = [0.3, -1.2, 0.7];
        let (found, direction) = slope(|x| x.exp()? * x, &x)?;
        let expected: f64 = x.iter().zip(direction).map(|(x, d)| d * x.exp() * (1.0 + x)).sum();
        assert!((found.value - expected).abs() <= found.uncertainty, "{found:?}, {expected}");
        assert!(found.uncertainty < 1e-8, "{found:?}");
        Ok(())
    }

    #[test]
    fn kinks_critical_points_and_constants_have_no_slope_beyond_doubt() -> Result<()> {
        for f in [
            (|x| x.abs()) as fn(&Tensor) -> Result<Tensor>,
            |x| x.sqr(),
            |x| x.sqr()? * x,
            |x| x.relu()?.sqr(),
            |x| x.zeros_like(),
        ] {
            let (found, _) = slope(f, &[0.0])?;
            assert!(found.value.abs() <= found.uncertainty, "{found:?}");
        }
        let (found, direction) = slope(|x| x.relu(), &[0.0])?;
        // Either one-sided derivative is possible.
        let one_sided = [0.0, direction[0]];
        assert!(
            one_sided.iter().all(|d| (found.value - d).abs() <= found.uncertainty),
            "{found:?}"
        );
        Ok(())
    }
}
