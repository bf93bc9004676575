//! An optimizer's arithmetic on the CPU, in one pass over a parameter where candle's operations take ten.

use super::custom::{vec_f32, with_f32};
use crate::cpu;
use crate::problem::{AdamWRates, AdamWStep};
use candle_core::{Result, Tensor};

/// The parameter in f32 and its moments after a step, `[parameter, exp_avg, exp_avg_sq]`.
pub(crate) fn adamw(
    tensors: [&Tensor; 3],
    gradient: &Tensor,
    step: &AdamWStep,
    rates: AdamWRates,
) -> Result<[Tensor; 3]> {
    const OP: &str = "adamw";
    let [mut p, mut m, mut v] =
        [vec_f32(OP, tensors[0])?, vec_f32(OP, tensors[1])?, vec_f32(OP, tensors[2])?];
    with_f32(OP, gradient, |gradient| {
        cpu::adamw::update([&mut p, &mut m, &mut v], &gradient, step, rates);
        Ok(())
    })?;
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, gradient.shape(), gradient.device());
    Ok([tensor(p)?, tensor(m)?, tensor(v)?])
}

/// The sum of squares of a tensor on the CPU.
pub(crate) fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    with_f32("norm", tensor, |values| Ok(cpu::sum_of_squares(&values)))
}
