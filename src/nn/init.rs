//! Random weights that depend only on a seed and on each parameter's name.

use super::int8::refuse_int8;
use super::tree::refuse_merged;
use super::variables::{check_settable, set_values};
use super::{ModuleTree, Node, NodeMut};
use crate::philox::{philox4x32, stream_of};
use crate::{Error, Result};
use candle_core::Tensor;
use rayon::prelude::*;

/// Fills a module with random numbers: normal, cut off at two standard deviations, `std` wide.
///
/// The weights of normalisations (rank-1 tensors named `weight`) get one added; buffers, which hold the frequencies
/// of positional encodings, get a `std` of 1. Variables, and those behind views, stay the same variables with new
/// values. The same seed gives the same values for a parameter whatever else the module holds.
///
/// [Example](crate::nn::checkpoint)
///
/// # Errors
/// - `std` is negative or not finite;
/// - a weight is in int8, or has a merged adapter;
/// - a tensor is computed from a variable, or is a broadcast view of one.
///
/// The module is unchanged then.
pub fn randomize(module: &mut dyn ModuleTree, seed: u64, std: f64) -> Result<()> {
    if !std.is_finite() || std < 0.0 {
        return Err(Error::config(format!("std of random weights must be >= 0, got {std}")));
    }
    refuse_int8(module, "filled with random numbers")?;
    refuse_merged(module)?;
    let mut settable = Ok(());
    module.visit("", &mut |name, node| {
        if let (Ok(()), Node::Parameter(tensor) | Node::Buffer(tensor)) = (&settable, node) {
            settable = check_settable(name, tensor);
        }
    });
    settable?;
    module.visit_mut("", &mut |name, node| {
        let (tensor, mean, std) = match node {
            NodeMut::Parameter(tensor) => {
                let norm = tensor.rank() == 1 && name.ends_with("weight");
                (tensor, if norm { 1.0 } else { 0.0 }, std)
            }
            NodeMut::Buffer(tensor) => (tensor, 0.0, 1.0),
            NodeMut::Tied(_) | NodeMut::Layer(_) => return Ok(()),
        };
        let random = random_like(tensor, seed, name, mean, std)?;
        set_values(name, tensor, &random)
    })
}

fn random_like(tensor: &Tensor, seed: u64, name: &str, mean: f64, std: f64) -> Result<Tensor> {
    let (key, stream) = ([seed as u32, (seed >> 32) as u32], stream_of(name));
    let values: Vec<f32> = (0..tensor.elem_count())
        .into_par_iter()
        .map(|index| (mean + std * truncated_normal(index as u64, stream, key)) as f32)
        .collect();
    let random = Tensor::from_vec(values, tensor.dims(), tensor.device())?;
    Ok(random.to_dtype(tensor.dtype())?)
}

/// A standard normal number within two standard deviations: Box and Muller's, drawn again (next counter) if outside.
fn truncated_normal(index: u64, stream: u32, key: [u32; 2]) -> f64 {
    let uniform = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    for attempt in 0..u32::MAX {
        let words = philox4x32([index as u32, (index >> 32) as u32, attempt, stream], key);
        for pair in words.chunks_exact(2) {
            let radius = (-2.0 * uniform(pair[0]).ln()).sqrt();
            let value = radius * (std::f64::consts::TAU * uniform(pair[1])).cos();
            if value.abs() <= 2.0 {
                return value;
            }
        }
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn moments_and_range_are_those_of_the_truncated_normal() {
        let values: Vec<f64> = (0..20_000).map(|i| truncated_normal(i, 5, [1, 2])).collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let var = values.iter().map(|v| v * v).sum::<f64>() / count;
        // Variance of a standard normal cut off at 2: 1 - 4 phi(2) / (2 Phi(2) - 1) = 0.7737.
        assert!(mean.abs() < 4.0 * (0.7737 / count).sqrt(), "mean {mean}");
        assert!((var - 0.7737).abs() < 0.02, "variance {var}");
        assert!(values.iter().all(|v| v.abs() <= 2.0));
    }

    #[test]
    fn seed_and_name_decide() -> Result<()> {
        let zeros = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
        let values = |seed, name: &str| -> Result<Vec<f32>> {
            Ok(random_like(&zeros, seed, name, 0.0, 1.0)?.flatten_all()?.to_vec1()?)
        };
        assert_eq!(values(1, "a")?, values(1, "a")?);
        assert_ne!(values(1, "a")?, values(2, "a")?);
        assert_ne!(values(1, "a")?, values(1, "b")?);
        Ok(())
    }
}
