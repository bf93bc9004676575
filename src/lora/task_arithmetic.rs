//! Several tensors of one shape as one: A's, B's or products, of adapters that were trained for different tasks.
//!
//! ```text
//! prune     by magnitude: the share `density` with the largest |t| stays, the rest is 0
//!           at random:    t mask / density, each element kept with the probability `density`
//! all       sum w_i t_i
//! elected   sum w_i t_i / count  over the i whose sign is the majority's: that of sum t_i, or of sum sign(t_i)
//! ```
//!
//! Source: PEFT 0.21, `utils/merge_utils.py`; TIES: Yadav et al., arXiv 2306.01708; DARE: Yu et al., arXiv 2311.03099.

use crate::philox::{stream_of, Dropout};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Random masks keep with multiples of this probability.
const SMALLEST: f64 = 1.0 / 65536.0;

/// Which elements of each tensor stay.
///
/// [Example](crate::lora::add_weighted_adapter)
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prune {
    /// All.
    Nothing,
    /// The largest.
    Magnitude {
        /// The share that stays, in `(0, 1]`.
        density: f64,
    },
    /// Any, the same for the same seed; those that stay are divided by the density.
    Random {
        /// The probability to stay, in `(0, 1]`, rounded to a multiple of 2^-16.
        density: f64,
        /// Seed of the masks.
        seed: u64,
    },
}

/// The rule that elects the sign of an element; values of the opposite sign are not added.
///
/// [Example](crate::lora::add_weighted_adapter)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sum of the values.
    Total,
    /// The number of values of either sign.
    Frequency,
}

/// How tensors are added: what of each, and whether their signs have to agree.
///
/// [Example](crate::lora::add_weighted_adapter)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TaskArithmetic {
    /// The elements of each that stay.
    pub prune: Prune,
    /// Who elects the sign; none where all are added.
    pub sign: Option<MajoritySign>,
}

impl TaskArithmetic {
    /// The plain weighted sum.
    pub const SUM: Self = Self { prune: Prune::Nothing, sign: None };

    /// PEFT's "magnitude_prune".
    pub fn magnitude_prune(density: f64) -> Self {
        Self { prune: Prune::Magnitude { density }, sign: None }
    }

    /// PEFT's "ties".
    pub fn ties(density: f64) -> Self {
        Self { sign: Some(MajoritySign::Total), ..Self::magnitude_prune(density) }
    }

    /// PEFT's "dare_linear".
    pub fn dare_linear(density: f64, seed: u64) -> Self {
        Self { prune: Prune::Random { density, seed }, sign: None }
    }

    /// PEFT's "dare_ties".
    pub fn dare_ties(density: f64, seed: u64) -> Self {
        Self { sign: Some(MajoritySign::Total), ..Self::dare_linear(density, seed) }
    }

    pub(super) fn validate(&self) -> Result<()> {
        match self.prune {
            Prune::Magnitude { density } | Prune::Random { density, .. }
                if !(density > 0.0 && density <= 1.0) =>
            {
                Err(Error::config(format!("the density must be in (0, 1], got {density}")))
            }
            Prune::Random { density, .. } if density < SMALLEST => Err(Error::config(format!(
                "a random mask has a density of at least {SMALLEST}, got {density}"
            ))),
            _ => Ok(()),
        }
    }

    /// The sum of tensors, each with its name and weight, in f32. They have one shape.
    pub(super) fn sum(&self, terms: &[(String, f64, Tensor)]) -> Result<Tensor> {
        let Some((_, _, first)) = terms.first() else {
            return Err(Error::config("nothing to add"));
        };
        let values = terms.iter().map(|(name, _, tensor)| self.pruned(name, tensor));
        let values = values.collect::<Result<Vec<_>>>()?;
        let weights: Vec<f64> = terms.iter().map(|(_, weight, _)| *weight).collect();
        let sums: Vec<f32> = (0..first.elem_count())
            .map(|at| {
                let column = values.iter().map(|values| f64::from(values[at]));
                self.sum_of(column, &weights) as f32
            })
            .collect();
        Ok(Tensor::from_vec(sums, first.dims(), first.device())?)
    }

    fn sum_of(&self, values: impl Iterator<Item = f64> + Clone, weights: &[f64]) -> f64 {
        let weighted = values.clone().zip(weights);
        let majority = match self.sign {
            None => return weighted.map(|(value, weight)| weight * value).sum(),
            Some(MajoritySign::Total) => values.sum::<f64>(),
            Some(MajoritySign::Frequency) => values.map(sign).sum(),
        };
        let majority = if majority >= 0.0 { 1.0 } else { -1.0 };
        let agreeing = weighted.filter(|(value, _)| sign(*value) == majority);
        let (sum, count) = agreeing
            .fold((0.0, 0.0), |(sum, count), (value, weight)| (sum + weight * value, count + 1.0));
        sum / f64::max(count, 1.0)
    }

    /// The elements of a tensor in f32, zero where they do not stay.
    fn pruned(&self, name: &str, tensor: &Tensor) -> Result<Vec<f32>> {
        let tensor = tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let mut values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        match self.prune {
            Prune::Magnitude { density } => {
                let kept = (density * values.len() as f64) as usize;
                let mut order: Vec<usize> = (0..values.len()).collect();
                order.sort_by(|i, j| values[*j].abs().total_cmp(&values[*i].abs()));
                for at in order.into_iter().skip(kept) {
                    values[at] = 0.0;
                }
            }
            Prune::Random { density, seed } => {
                let columns = values.len() / tensor.dims()[0].max(1);
                let dropout = dropout(density, seed, name);
                for (row, values) in values.chunks_mut(columns.max(1)).enumerate() {
                    dropout.apply_row(row as u64, 0, values);
                }
            }
            Prune::Nothing => {}
        }
        Ok(values)
    }
}

/// 1, -1, or 0 of zero.
fn sign(value: f64) -> f64 {
    if value == 0.0 {
        0.0
    } else {
        value.signum()
    }
}

fn dropout(density: f64, seed: u64, name: &str) -> Dropout {
    Dropout { p: 1.0 - density, seed, stream: stream_of(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(arithmetic: TaskArithmetic, terms: &[(f64, [f32; 4])]) -> Result<Vec<f32>> {
        let term = |(i, (weight, values)): (usize, &(f64, [f32; 4]))| {
            let tensor = Tensor::new(values, &Device::Cpu)?.reshape((2, 2))?;
            Ok((i.to_string(), *weight, tensor))
        };
        let terms = terms.iter().enumerate().map(term).collect::<Result<Vec<_>>>()?;
        Ok(arithmetic.sum(&terms)?.flatten_all()?.to_vec1()?)
    }

    /// The worked example of TIES: trim, elect, merge.
    #[test]
    fn by_hand() -> Result<()> {
        let terms = [(1.0, [1.0, -2.0, 0.5, 4.0]), (2.0, [-3.0, -1.0, 0.25, 0.5])];
        assert_eq!(sum(TaskArithmetic::SUM, &terms)?, [-5.0, -4.0, 1.0, 5.0]);
        assert_eq!(sum(TaskArithmetic::magnitude_prune(0.5), &terms)?, [-6.0, -4.0, 0.0, 4.0]);
        let ties = TaskArithmetic::ties(1.0);
        assert_eq!(sum(ties, &terms)?, [-6.0, -2.0, 0.5, 2.5]);
        // One of either sign: the tie is for plus.
        let frequency = TaskArithmetic { sign: Some(MajoritySign::Frequency), ..ties };
        assert_eq!(sum(frequency, &terms)?, [1.0, -2.0, 0.5, 2.5]);
        Ok(())
    }

    /// Over many elements the share that stays is the density, and the mean is that of all.
    #[test]
    fn random_pruning_keeps_the_mean() -> Result<()> {
        let (rows, columns, density) = (100, 1000, 0.3);
        let ones = Tensor::ones((rows, columns), DType::F32, &Device::Cpu)?;
        let pruned = |seed: u64, name: &str| -> Result<Vec<f32>> {
            let terms = [(name.to_string(), 1.0, ones.clone())];
            let sum = TaskArithmetic::dare_linear(density, seed).sum(&terms)?;
            Ok(sum.flatten_all()?.to_vec1()?)
        };
        let values = pruned(1, "a")?;
        let n = values.len() as f64;
        let kept = values.iter().filter(|value| **value != 0.0).count() as f64;
        assert!((kept / n - density).abs() < 4.0 * (density * (1.0 - density) / n).sqrt());
        // Four deviations, and the rounding of the density to 2^-16.
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / n;
        assert!((mean - 1.0).abs() < 4.0 * ((1.0 / density - 1.0) / n).sqrt() + 1e-4, "{mean}");
        assert_eq!(values, pruned(1, "a")?);
        assert_ne!(values, pruned(2, "a")?, "seeds differ");
        assert_ne!(values, pruned(1, "b")?, "tensors differ");
        Ok(())
    }
}
