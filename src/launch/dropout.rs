//! Dropout on its own: `kernels/dropout/dropout.cu`, with the masks of `kernels/common/philox.cuh`.

use super::bindings::{device_ptr, DropoutParams, DROPOUT_THREADS};
use super::plan::Plan;
use super::slots::{self, input, mask, output};
use super::{narrow, Launch};
use crate::philox::Dropout;
use candle_core::{DType, Result};

/// `y = x * mask` for `x [rows, cols]`; of the output's gradient, it makes the input's.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, and on shapes that no grid covers.
pub fn forward(
    (rows, cols): (usize, usize),
    dropout: Dropout,
    dtype: DType,
    x: device_ptr,
    y: device_ptr,
) -> Result<Launch> {
    let (rows, groups) = (rows as u64, cols.div_ceil(8) as u64);
    let cols = narrow("dropout", "the number of columns", cols)?;
    let params = DropoutParams { x, y, rows, cols, mask: mask(Some(dropout)) };
    let grid = [(rows * groups).div_ceil(u64::from(DROPOUT_THREADS)), 1, 1];
    Launch::new("dropout", dtype, grid, DROPOUT_THREADS, &params)
}

/// The plan of [`forward`]: an input, an output and a dropout.
///
/// # Errors
/// As [`forward`].
pub fn plan(shape: (usize, usize), dtype: DType) -> Result<Plan> {
    let launch = forward(shape, slots::dropout(0), dtype, input(0), output(0))?;
    Ok(Plan { steps: vec![launch], ..Default::default() })
}
