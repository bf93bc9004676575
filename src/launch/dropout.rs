//! Dropout masks on the device: `kernels/common/philox.cuh`, and dropout on its own, `kernels/dropout/dropout.cu`.

use super::bindings::{device_ptr, DropoutMask, DropoutParams, DROPOUT_THREADS};
use super::{narrow, Launch};
use crate::philox::Dropout;
use candle_core::{DType, Result};

/// A mask as kernels take it; none keeps everything.
pub(super) fn mask(dropout: Option<Dropout>) -> DropoutMask {
    let Some(dropout) = dropout else { return DropoutMask { scale: 1.0, ..Default::default() } };
    DropoutMask {
        seed_low: dropout.seed as u32,
        seed_high: (dropout.seed >> 32) as u32,
        stream: dropout.stream,
        threshold: dropout.threshold(),
        scale: dropout.scale(),
    }
}

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
