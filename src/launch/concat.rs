//! A few vectors in a row: `kernels/concat/concat.cu`.

use super::bindings::{ConcatParams, ConcatPart, CONCAT_PARTS, CONCAT_THREADS};
use super::cache::Plans;
use super::plan::Plan;
use super::slots::{input, output};
use super::Launch;
use candle_core::{bail, DType, Result};
use std::sync::{Arc, LazyLock};

/// Most vectors that a launch takes.
pub const MOST: usize = CONCAT_PARTS as usize;

/// One launch. Inputs: vectors of these lengths; output: all of them, one behind the other.
///
/// # Errors
/// - there are more than [`MOST`], or one is empty;
/// - on other dtypes than f32, f16 and bf16.
pub fn plan(lengths: &[usize], dtype: DType) -> Result<Arc<Plan>> {
    static PLANS: LazyLock<Plans<(Vec<usize>, DType)>> = LazyLock::new(Plans::default);
    PLANS.get_or(&(lengths.to_vec(), dtype), |_| make(lengths, dtype).map(Arc::new))
}

fn make(lengths: &[usize], dtype: DType) -> Result<Plan> {
    if lengths.len() > MOST || lengths.contains(&0) {
        bail!("concat: up to {MOST} vectors that are not empty, got lengths {lengths:?}")
    }
    let (mut parts, mut size) = ([ConcatPart::default(); MOST], 0);
    for (index, (part, &length)) in parts.iter_mut().zip(lengths).enumerate() {
        size += length as u64;
        *part = ConcatPart { from: input(index), end: size };
    }
    let params = ConcatParams { parts, out: output(0), size };
    let grid = [size.div_ceil(u64::from(CONCAT_THREADS)), 1, 1];
    Ok(Launch::new("concat", dtype, grid, CONCAT_THREADS, &params)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_too_many_vectors_are_refused() -> Result<()> {
        assert_eq!(plan(&[100, 200, 300], DType::F16)?.steps[0].grid, [3, 1, 1]);
        for refused in [&[1; MOST + 1][..], &[3, 0], &[]] {
            assert!(plan(refused, DType::F16).is_err(), "{refused:?}");
        }
        Ok(())
    }
}
