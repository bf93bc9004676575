//! Dropout on its own: `kernels/dropout/dropout.cu`, with the masks of `kernels/common/philox.cuh`.

use super::bindings::{DropoutParams, DROPOUT_THREADS};
use super::plan::Plan;
use super::slots::{self, input, mask, output};
use super::{narrow, Launch};
use candle_core::{DType, Result};

/// `y = x * mask` for an input x `[rows, cols]` and a dropout; of the output's gradient, it makes the input's.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, and on shapes that no grid covers.
pub fn plan((rows, cols): (usize, usize), dtype: DType) -> Result<Plan> {
    let (rows, groups) = (rows as u64, cols.div_ceil(8) as u64);
    let cols = narrow("dropout", "the number of columns", cols)?;
    let mask = mask(Some(slots::dropout(0)));
    let params = DropoutParams { x: input(0), y: output(0), rows, cols, mask };
    let grid = [(rows * groups).div_ceil(u64::from(DROPOUT_THREADS)), 1, 1];
    Ok(Launch::new("dropout", dtype, grid, DROPOUT_THREADS, &params)?.into())
}
